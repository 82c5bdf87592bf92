"""Features of images as colours: the three principal axes of all their feature-map cells.

Shapes: `B` images, `H W` pixels, `C` channels, `h w` feature-map cells, `D` features.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.training.pictures import feature_panel, save_png
from simmim.training.whole_files import written_whole

_SPREAD = 2.0  # standard deviations from grey to the end of a colour's range
_NOTHING = 1e-3  # of the features' length: an axis along which they differ less is left grey


def draw_features(
    pixels: NDArray[np.number], features: NDArray[np.floating], folder: Path, done: int
) -> NDArray[np.uint8] | None:
    """Draw features (B, h, w, D) beside their images (B, H, W, C) in 0..255 into a run's folder; return the picture.

    Colours follow those of the folder's picture before, so that what is drawn at a step depends on the steps before it
    alone, and a resumed run draws the same. Beside each picture lie the values that it shows (B, h, w, 3), for the
    next. `None` if features are not finite.
    """
    if not np.isfinite(features).all():
        return None
    values = principal_axes(features)
    if (before := _values_before(folder, done)) is not None and before.shape == values.shape:
        values = turned_to(values, before)
    panel = panel_of(pixels, values)
    with written_whole(folder / f"step-{done:08d}.npy") as aside, aside.open("wb") as file:
        np.save(file, values.astype(np.float16))
    save_png(panel, folder / f"step-{done:08d}.png")
    return panel


def panel_of(pixels: NDArray[np.number], values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Draw values of `principal_axes` (B, h, w, 3) beside their images (B, H, W, C) in 0..255."""
    return feature_panel(pixels.astype(np.float32) / 255, np.clip(0.5 + values / (2 * _SPREAD), 0, 1))


def principal_axes(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return features (B, h, w, D) on the 3 principal axes of all cells of all images, each with deviation 1.

    One set of axes for all images, so that a colour means the same in each (DINOv2, arXiv 2304.07193, figure 1).
    """
    cells = features.reshape(-1, features.shape[-1]).astype(np.float64)
    length = np.sqrt((cells**2).sum(1).mean())
    cells -= cells.mean(0)
    if cells.shape[1] <= cells.shape[0]:
        axes = np.linalg.eigh(cells.T @ cells)[1][:, :-4:-1]
        scores = cells @ axes
    else:  # fewer cells than features: the same scores, from the smaller matrix
        squares, vectors = np.linalg.eigh(cells @ cells.T)
        scores = vectors[:, :-4:-1] * np.sqrt(np.maximum(squares[:-4:-1], 0))
    scores *= np.where((scores**3).sum(0) < 0, -1, 1)  # an axis has no sign of its own
    spread = scores.std(0)
    scores = np.where(spread > _NOTHING * length, scores / np.where(spread > 0, spread, 1), 0)
    scores = np.pad(scores, ((0, 0), (0, 3 - scores.shape[1])))
    return scores.reshape(*features.shape[:3], 3)


def turned_to(values: NDArray[np.floating], before: NDArray[np.floating]) -> NDArray[np.floating]:
    """Turn values (B, h, w, 3) about 0 so that they come nearest to those before (orthogonal Procrustes).

    Distances between cells stay as they are: nothing is added, only which axis has which colour.
    """
    left, _, right = np.linalg.svd(values.reshape(-1, 3).T @ before.reshape(-1, 3).astype(np.float64))
    return values @ (left @ right)


def _values_before(folder: Path, done: int) -> NDArray[np.floating] | None:
    """Return the values of the last step before this one; `None` where there are none that can be read."""
    steps = [
        int(found[1]) for file in folder.glob("step-*.npy") if (found := re.fullmatch(r"step-(\d+)\.npy", file.name))
    ]
    if not (earlier := [step for step in steps if step < done]):
        return None
    try:
        return np.load(folder / f"step-{max(earlier):08d}.npy", allow_pickle=False)
    except (OSError, ValueError):
        return None
