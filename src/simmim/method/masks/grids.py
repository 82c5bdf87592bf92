"""Regular masks.

Shapes: `B` images, `rows columns` cells.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError
from simmim.method.masks.base import Keys, Mask, MaskStrategy, lowest, share_of
from simmim.method.random_keys import uniforms


@dataclass(frozen=True, kw_only=True)
class GridMask(MaskStrategy):
    """Hide a regular pattern with a random phase: a checkerboard at ratio 0.5, three of each 2x2 at 0.75 (MAE).

    Other ratios are an ordered dither: cells are hidden in the order of a Bayer matrix, which spreads any number of
    them evenly. If a side of the grid is odd, a few cells deviate from the pattern to keep the count exact.
    """

    kind: ClassVar[str] = "grid"

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        bayer = _bayer(max(rows, columns))
        phase = np.floor(uniforms(keys, 2) * len(bayer)).astype(np.int64)
        order = _windows(bayer, phase, rows, columns)
        return lowest(order.reshape(-1, rows * columns), count).reshape(-1, rows, columns)


@dataclass(frozen=True, kw_only=True)
class SquareMask(MaskStrategy):
    """Hide one region, as square as the count and the image allow (SimMIM §3.2).

    Its sides differ by at most one cell unless the image is too narrow; the column at one end may be incomplete.
    Raises `UserError` for an unknown `position`.
    """

    kind: ClassVar[str] = "square"
    position: Literal["random", "centre"] = "random"
    """Position of the square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position not in ("random", "centre"):
            raise UserError(f"square mask position {self.position!r} is unknown; use 'random' or 'centre'")

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        square_side = math.isqrt(count - 1) + 1  # the square root, rounded up
        height = min(max(square_side, -(-count // columns)), rows)
        width = -(-count // height)
        region = np.zeros((rows, columns), bool)
        region[:height, :width].T.flat[:count] = True  # column by column
        numbers = uniforms(keys, 3) if self.position == "random" else np.full((len(keys), 3), 0.5)
        corner = np.floor(numbers[:, :2] * (rows - height + 1, columns - width + 1)).astype(np.int64)
        mask = _windows(region, -corner, rows, columns)
        # Turn half of the masks upside down, so that the incomplete column is not always at the lower right.
        return np.where(numbers[:, 2, None, None] < 0.5, mask[:, ::-1, ::-1], mask)


@dataclass(frozen=True, kw_only=True)
class UniformMask(MaskStrategy):
    """Hide the same number of random cells in each 2x2 (UM-MAE, arXiv 2205.10063).

    Ratios 0.25, 0.5 and 0.75 (the paper's uniform sampling) hide exactly 1, 2 and 3 of each 2x2. At other ratios,
    random 2x2s hide one more than the others; 0.8125 is the paper's sampling with secondary masking of 25 %. In an odd
    grid, the cells of the last row or column belong to no 2x2 and are hidden at random.
    """

    kind: ClassVar[str] = "uniform"

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        b, down, right = len(keys), rows // 2, columns // 2
        in_group = np.zeros((rows, columns), bool)
        in_group[: 2 * down, : 2 * right] = True
        grouped = 4 * down * right
        count_grouped = share_of(self.ratio, grouped)
        numbers = uniforms(keys, rows * columns + grouped)

        # Ranks 0 to 3 of the cells of a 2x2, so that all groups fill at the same pace. The fraction breaks ties.
        ranks = numbers[:, :grouped].reshape(b, down * right, 4).argsort(axis=-1)
        order = ranks.reshape(b, grouped) + numbers[:, rows * columns :]
        hidden = lowest(order, count_grouped).reshape(b, down, right, 2, 2)

        mask = np.empty((b, rows, columns), bool)
        mask[:, in_group] = hidden.swapaxes(2, 3).reshape(b, grouped)
        mask[:, ~in_group] = lowest(numbers[:, grouped : rows * columns], count - count_grouped)
        return mask


def _bayer(side: int) -> NDArray[np.int64]:
    """Return Bayer's dither matrix, with the smallest power of two of at least `side` as its side."""
    order = np.zeros((1, 1), np.int64)
    while len(order) < side:
        order = np.block([[4 * order, 4 * order + 2], [4 * order + 3, 4 * order + 1]])
    return order


def _windows(pattern: NDArray[Any], offset: NDArray[np.int64], rows: int, columns: int) -> NDArray[Any]:
    """Return windows (B, rows, columns) of the repeated pattern that start at each (y, x) of `offset` (B, 2)."""
    y = (offset[:, 0, None] + np.arange(rows)) % pattern.shape[0]
    x = (offset[:, 1, None] + np.arange(columns)) % pattern.shape[1]
    return pattern[y[:, :, None], x[:, None, :]]
