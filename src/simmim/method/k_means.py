"""Cluster points by k-means, the same on every machine: colours of a `ClusterTarget`, patches of `VisualWords`.

Shapes: `M` points of `C` values, `K` clusters.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmim.errors import UserError
from simmim.method.random_keys import sample_keys, uniforms


def k_means(
    values: ArrayLike, *, clusters: int, seed: int = 0, iterations: int = 50, stream: str = "k-means"
) -> NDArray[np.float32]:
    """Cluster points (M, C) by k-means++ and Lloyd's iterations. Returns the centres (K, C), deterministic by seed.

    `stream` names what is clustered, as in `sample_keys`. Raises `UserError` for fewer distinct points than clusters.
    """
    points = np.asarray(values, np.float32)
    centres = _spread_centres(points, clusters, sample_keys(seed, 0, [0], stream=stream))
    for _ in range(iterations):
        nearest = nearest_centre(points, centres)
        sums = np.stack([np.bincount(nearest, channel, clusters) for channel in points.T], axis=1)
        counts = np.bincount(nearest, minlength=clusters)[:, None]
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), centres).astype(np.float32)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _spread_centres(points: NDArray[np.float32], clusters: int, key: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Choose initial centres by k-means++ (Arthur & Vassilvitskii, 2007), in proportion to squared distance."""
    first, *draws = uniforms(key, clusters)[0]
    chosen = [points[int(first * len(points))]]
    distance = np.full(len(points), np.inf, np.float32)
    for draw in draws:
        distance = np.minimum(distance, ((points - chosen[-1]) ** 2).sum(axis=1))
        totals = np.cumsum(distance, dtype=np.float64)
        if totals[-1] == 0:
            raise UserError(
                f"{len(chosen)} distinct points are fewer than the {clusters} clusters; "
                f"use {len(chosen)} clusters or more images"
            )
        chosen.append(points[np.searchsorted(totals, draw * totals[-1], side="right")])
    return np.stack(chosen)


def nearest_centre(points: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the index (M,) of each point's nearest centre, in chunks that bound memory to a few megabytes."""
    offsets = (centres**2).sum(axis=1)
    chunks = [points[start : start + 8192] for start in range(0, len(points), 8192)]
    return np.concatenate([(offsets - 2 * chunk @ centres.T).argmin(axis=1) for chunk in chunks])
