"""Mask strategies: choose the cells of an image to hide from the encoder. `True` = masked.

Every strategy hides exactly `ceil(ratio * cells)` cells of every image, so that the shapes of a step are static. A mask
depends only on its image's key (`simmim.method.random_keys`): it is the same on every engine and rank and on resume.

Shapes: `B` images, `H W` pixels, `rows columns` cells.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError
from simmim.method.random_keys import random_bits, uniforms
from simmim.method.strategy import Strategy

PAPER_CELL = 32
"""Side of a cell in pixels in SimMIM's recipes."""

Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.float64]

_MIN_BLOCK_ASPECT = 0.3  # BEiT, Algorithm 1; the maximum is its inverse
_MAX_BLOCKS = 32  # on 14x14 cells an image needs 7 at ratio 0.6 and 12 at 0.75; later ones hide few new cells


@dataclass(frozen=True, kw_only=True)
class MaskStrategy(Strategy, ABC, family="mask"):
    """Draw masks: `strategy(keys, image_size)` with keys (B,) returns booleans (B, rows, columns).

    Raises `UserError` for a ratio or a cell outside its range.
    """

    ratio: float = 0.6
    """Share of cells to hide, between 0 and 1."""
    cell: int | None = None
    """Side of a cell in pixels (default: the paper's 32, a sixth of a small image, in whole patches)."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"mask ratio {self.ratio} is not between 0 and 1; use for example 0.6")
        if self.cell is not None and self.cell < 1:
            raise UserError(f"mask cell {self.cell} is less than 1 pixel; use for example 32")

    def for_patch(self, patch: int, image_size: tuple[int, int] | None = None) -> Self:
        """Set the cell size, if unset, for an encoder with patches of `patch` pixels a side.

        It is the paper's 32 pixels, or on a small image a sixth of its side as in the paper (32 of 192), to the nearest
        multiple of the patch that divides the image.
        """
        if self.cell:
            return self
        wanted = min(PAPER_CELL, *(side / 6 for side in image_size or ()), PAPER_CELL)
        sizes = [n * patch for n in range(1, max(round(wanted / patch), 1) + 1)]
        fitting = [cell for cell in sizes if all(side % cell == 0 for side in image_size or ())]
        return replace(self, cell=(fitting or sizes)[-1])

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of cells in an image of (H, W) pixels.

        Raises `UserError` with the nearest sizes if the cell does not divide both sides.
        """
        cell = self.cell or PAPER_CELL
        if any(side < cell or side % cell for side in image_size):
            smaller = [max(side // cell, 1) * cell for side in image_size]
            larger = [max(-(-side // cell), 1) * cell for side in image_size]
            nearest = " or ".join(dict.fromkeys([_size_text(*smaller), _size_text(*larger)]))
            raise UserError(
                f"image size {_size_text(*image_size)} is not a multiple of the mask cell {cell}; use {nearest}"
            )
        return image_size[0] // cell, image_size[1] // cell

    def masked_cells(self, image_size: tuple[int, int]) -> int:
        """Return the number of hidden cells of every mask: `ceil(ratio * cells)`, as in SimMIM's code.

        Raises `UserError` if that is every cell.
        """
        rows, columns = self.grid(image_size)
        count = _share(self.ratio, rows * columns)
        if count == rows * columns:
            raise UserError(
                f"mask ratio {self.ratio} hides all cells ({count} of {count}) of image size "
                f"{_size_text(*image_size)}; use a mask cell smaller than {self.cell or PAPER_CELL} or a lower ratio"
            )
        return count

    def __call__(self, keys: Keys, image_size: tuple[int, int]) -> Mask:
        """Draw masks (B, rows, columns) for images of (H, W) pixels with keys (B,)."""
        count = self.masked_cells(image_size)
        return self.draw(keys, *self.grid(image_size), count)

    @abstractmethod
    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        """Draw masks (B, rows, columns), each with exactly `count` cells hidden, from keys (B,) alone."""


@dataclass(frozen=True, kw_only=True)
class RandomMask(MaskStrategy):
    """Hide cells uniformly at random (SimMIM §3.2)."""

    kind: ClassVar[str] = "random"

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        return _lowest(random_bits(keys, rows * columns), count).reshape(-1, rows, columns)


@dataclass(frozen=True, kw_only=True)
class BlockMask(MaskStrategy):
    """Hide overlapping rectangles (BEiT, arXiv 2106.08254, Algorithm 1).

    A block has between `min_cells` and the number of cells still to hide. Its aspect ratio is log-uniform from 0.3 to
    1/0.3, as in BEiT's code. Sides are clipped to the grid. The last block keeps only the cells nearest to its centre,
    to reach the exact count. If 32 blocks do not suffice (on 14x14 cells: one image in 500 at ratio 0.75, one in three
    at 0.9), random cells make up the rest. Raises `UserError` if `min_cells` < 1.
    """

    kind: ClassVar[str] = "block"
    min_cells: int = 16
    """Minimum number of cells of a block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_cells < 1:
            raise UserError(f"smallest mask block {self.min_cells} is less than 1 cell; use for example 16")

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        numbers = uniforms(keys, 4 * _MAX_BLOCKS + rows * columns)
        tie_breaks = numbers[:, 4 * _MAX_BLOCKS :].reshape(-1, rows, columns)
        # Order in which cells are hidden: number of their block plus distance from its centre. The mask is the first
        # `count` cells, so that the last block is trimmed from its rim and every count is exact.
        hidden_at = _MAX_BLOCKS + tie_breaks
        for block in range(_MAX_BLOCKS):
            missing = count - np.count_nonzero(hidden_at < _MAX_BLOCKS, axis=(1, 2))
            unfinished = np.flatnonzero(missing > 0)
            if not len(unfinished):
                break
            drawn = numbers[unfinished, 4 * block : 4 * block + 4]
            distance = self._distances(drawn, missing[unfinished], rows, columns)
            previous = hidden_at[unfinished]
            new = (distance < 0.5) & (previous >= _MAX_BLOCKS)
            hidden_at[unfinished] = np.where(new, block + distance + 0.001 * tie_breaks[unfinished], previous)
        return _lowest(hidden_at.reshape(-1, rows * columns), count).reshape(-1, rows, columns)

    def _distances(self, numbers: Numbers, missing: NDArray[np.int64], rows: int, columns: int) -> Numbers:
        """Return distances (B, rows, columns) from each image's block centre, in block sides: < 0.5 is inside.

        A block takes four `numbers` (B, 4) in [0, 1): its area, aspect ratio, row and column.
        """
        area, aspect, down, right = numbers.T[:, :, None]  # (B, 1) each
        area = self.min_cells + area * np.maximum(missing[:, None] - self.min_cells, 0)
        aspect = _MIN_BLOCK_ASPECT ** (1 - 2 * aspect)
        height = np.clip(np.rint(np.sqrt(area * aspect)), 1, rows)
        width = np.clip(np.rint(np.sqrt(area / aspect)), 1, columns)
        centre_y = np.floor(down * (rows - height + 1)) + (height - 1) / 2
        centre_x = np.floor(right * (columns - width + 1)) + (width - 1) / 2
        distance_y = np.abs(np.arange(rows) - centre_y) / height  # (B, rows)
        distance_x = np.abs(np.arange(columns) - centre_x) / width  # (B, columns)
        return np.maximum(distance_y[:, :, None], distance_x[:, None, :])


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
        return _lowest(order.reshape(-1, rows * columns), count).reshape(-1, rows, columns)


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
        count_grouped = _share(self.ratio, grouped)
        numbers = uniforms(keys, rows * columns + grouped)

        # Ranks 0 to 3 of the cells of a 2x2, so that all groups fill at the same pace. The fraction breaks ties.
        ranks = numbers[:, :grouped].reshape(b, down * right, 4).argsort(axis=-1)
        order = ranks.reshape(b, grouped) + numbers[:, rows * columns :]
        hidden = _lowest(order, count_grouped).reshape(b, down, right, 2, 2)

        mask = np.empty((b, rows, columns), bool)
        mask[:, in_group] = hidden.swapaxes(2, 3).reshape(b, grouped)
        mask[:, ~in_group] = _lowest(numbers[:, grouped : rows * columns], count - count_grouped)
        return mask


def upsample_mask(mask: Mask, factor: int) -> Mask:
    """Upsample masks (B, rows, columns) to (B, factor·rows, factor·columns)."""
    return mask.repeat(factor, axis=1).repeat(factor, axis=2)


def _share(ratio: float, cells: int) -> int:
    # The official code's expression, to match its counts, including rounding errors (0.55 of 100 is 56).
    return math.ceil(cells * ratio)


def _size_text(height: int, width: int) -> str:
    return str(height) if height == width else f"{height}x{width}"


def _lowest(order: NDArray[Any], count: int) -> Mask:
    """Mark the `count` lowest values of each row: (B, n) → (B, n)."""
    mask = np.zeros(order.shape, bool)
    if count:
        np.put_along_axis(mask, np.argpartition(order, count - 1, axis=1)[:, :count], True, axis=1)
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
