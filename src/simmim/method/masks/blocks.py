"""Masks of blocks.

Shapes: `B` images, `rows columns` cells.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError
from simmim.method.masks.base import Keys, Mask, MaskStrategy, Numbers, lowest
from simmim.method.random_keys import random_bits, uniforms

_MIN_BLOCK_ASPECT = 0.3  # BEiT, Algorithm 1; the maximum is its inverse
_MAX_BLOCKS = 32  # on 14x14 cells an image needs 7 at ratio 0.6 and 12 at 0.75; later ones hide few new cells


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
        return lowest(hidden_at.reshape(-1, rows * columns), count).reshape(-1, rows, columns)

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
class InverseBlockMask(MaskStrategy):
    """Keep square blocks visible and hide the rest (data2vec 2.0, arXiv 2212.07525, §3.3).

    The centres of the blocks are random cells, all different; blocks overlap and end at the border. An image has
    `(1 - ratio + adjust) / block²` centres a cell, rounded down, but one or more. Random cells outside the blocks are
    then shown, or random ones inside hidden, to reach the exact count. Raises `UserError` if `block` < 1 or `adjust` is
    negative or not finite.
    """

    kind: ClassVar[str] = "inverse-block"
    block: int = 3
    """Side of a visible block in cells."""
    adjust: float = 0.07
    """Share of cells by which blocks may exceed the visible share, since they overlap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise UserError(f"visible mask block {self.block} is less than 1 cell; use for example 3")
        if not 0 <= self.adjust < 1:
            raise UserError(f"mask adjustment {self.adjust} is not between 0 and 1; use for example 0.07")

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        cells = rows * columns
        centres = min(max(int(cells * (1 - self.ratio + self.adjust) / self.block**2), 1), cells)
        bits = random_bits(keys, 2 * cells)
        visible = lowest(bits[:, :cells], centres).reshape(-1, rows, columns)
        for axis in (1, 2):
            visible = _widen(visible, self.block, axis)
        # Cells outside the blocks are hidden first; the highest bit tells the two apart, the others are random.
        order = (bits[:, cells:] >> np.uint64(1)).reshape(visible.shape) + (visible.astype(np.uint64) << np.uint64(63))
        return lowest(order.reshape(-1, cells), count).reshape(-1, rows, columns)


def _widen(cells: Mask, width: int, axis: int) -> Mask:
    """Mark `width` cells around each marked one along an axis; an even width has the odd cell before it."""
    before, size = width // 2, cells.shape[axis]
    padding = [(0, 0)] * cells.ndim
    padding[axis] = (width - 1 - before, before)
    padded = np.pad(cells, padding)
    wide = np.zeros_like(cells)
    for shift in range(width):
        wide |= padded.take(range(shift, shift + size), axis)
    return wide
