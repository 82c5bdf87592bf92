"""Find likely copies among images, in memory of about 1 kB an image.

Shapes: `N` images, `H W` pixels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIDE = 16  # pixels of a small copy
_BLANK = 4  # of 255
_SAME = 0.98  # correlation of two small copies
_PAIRS = 10_000
_AXES = 32  # principal axes that tell most pairs apart
_BLOCK = 1024  # images that are compared with all others at once
_SAMPLE = 4096  # images to find the axes of


def small_copies(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shrink pictures (N, H, W, 3), whose sides are multiples of 16, to 16 × 16 pixels: (N, 768)."""
    count, height, width, channels = pictures.shape
    cells = pictures.reshape(count, _SIDE, height // _SIDE, _SIDE, width // _SIDE, channels)
    return np.rint(cells.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8).reshape(count, -1)


def is_blank(pictures: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell which pictures (N, H, W, 3) are of one brightness: (N,)."""
    return pictures.mean(axis=-1, dtype=np.float32).std(axis=(1, 2)) < _BLANK


def duplicates(small: NDArray[np.uint8], blank: NDArray[np.bool_]) -> list[tuple[int, int, float]]:
    """Find pairs of images whose small copies (N, 768) correlate by over 0.98, the most alike first.

    Returns the numbers of the two and the correlation; blank images are left out. After 10,000 pairs it stops looking.
    All pairs are compared, but most of them by few numbers: copies of length 1 that correlate by r lie √(2 - 2r) apart,
    and no further apart along any axes. So images are sorted along one principal axis, neighbours in that order are
    compared along 32, and only those that are near there by all their pixels.
    """
    numbers = np.flatnonzero(~blank)
    if len(numbers) < 2:
        return []
    sample = _standard(small[numbers[:: -(-len(numbers) // _SAMPLE)]])
    axes = np.linalg.eigh(sample.T @ sample)[1][:, : -_AXES - 1 : -1]  # (768, 32), the widest first
    blocks = (numbers[first : first + _BLOCK] for first in range(0, len(numbers), _BLOCK))
    places = np.concatenate([_standard(small[block]) @ axes for block in blocks])
    order = np.argsort(places[:, 0], kind="stable")
    numbers, places = numbers[order], places[order]
    reach = np.float32(np.sqrt(2 - 2 * _SAME) + 1e-4)  # more than rounding takes
    norms = np.square(places).sum(axis=1)
    found: list[tuple[int, int, float]] = []
    for first in range(0, len(numbers), _BLOCK):
        last = min(first + _BLOCK, len(numbers))
        end = int(np.searchsorted(places[:, 0], places[last - 1, 0] + reach, side="right"))
        for start in range(first, end, _BLOCK):
            if len(found) >= _PAIRS:
                break
            stop = min(start + _BLOCK, end)
            squares = norms[first:last, None] + norms[start:stop] - 2 * places[first:last] @ places[start:stop].T
            rows, columns = np.nonzero(squares < reach**2)
            later = first + rows < start + columns
            found += _confirmed(small, numbers[first + rows[later]], numbers[start + columns[later]])
    return sorted(found, key=lambda pair: (-pair[2], pair))[:_PAIRS]


def _standard(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return copies (N, 768) without their mean, of length 1: their products are correlations."""
    values = small.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)
    return values


def _confirmed(
    small: NDArray[np.uint8], mine: NDArray[np.int64], other: NDArray[np.int64]
) -> list[tuple[int, int, float]]:
    """Return those of the pairs that correlate, the smaller number first."""
    found: list[tuple[int, int, float]] = []
    for first in range(0, len(mine), _BLOCK):
        if len(found) >= _PAIRS:
            break
        pair: Any = (mine[first : first + _BLOCK], other[first : first + _BLOCK])
        correlation = np.einsum("nd,nd->n", *(_standard(small[part]) for part in pair))
        for place in np.flatnonzero(correlation > _SAME).tolist():
            low, high = sorted(int(part[place]) for part in pair)
            found.append((low, high, float(correlation[place])))
    return found
