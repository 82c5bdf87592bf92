"""The base of mask strategies, and random masks.

Every strategy hides exactly `ceil(ratio * cells)` cells of every image, so that the shapes of a step are static. A mask
depends only on its image's key (`simmim.method.random_keys`): it is the same on every engine and rank and on resume.

Shapes: `B` images, `H W` pixels, `rows columns` cells.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError
from simmim.method.random_keys import random_bits
from simmim.method.strategy import Strategy

PAPER_CELL = 32
"""Side of a cell in pixels in SimMIM's recipes."""

Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MaskStrategy(Strategy, ABC, family="mask"):
    """Draw masks: `strategy(keys, image_size)` with keys (B,) returns booleans (B, rows, columns).

    Raises `UserError` for a ratio or a cell outside its range.
    """

    guided: ClassVar[bool] = False
    """Whether the training chooses the cells (`simmim.method.masks.guided`)."""
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

    def for_steps(self, steps: int) -> Self:
        """Decide what is left open until the length of the training is known."""
        return self

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
        count = share_of(self.ratio, rows * columns)
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
        return lowest(random_bits(keys, rows * columns), count).reshape(-1, rows, columns)


def upsample_mask(mask: Mask, factor: int) -> Mask:
    """Upsample masks (B, rows, columns) to (B, factor·rows, factor·columns)."""
    return mask.repeat(factor, axis=1).repeat(factor, axis=2)


def share_of(ratio: float, cells: int) -> int:
    # The official code's expression, to match its counts, including rounding errors (0.55 of 100 is 56).
    return math.ceil(cells * ratio)


def _size_text(height: int, width: int) -> str:
    return str(height) if height == width else f"{height}x{width}"


def lowest(order: NDArray[Any], count: int) -> Mask:
    """Mark the `count` lowest values of each row: (B, n) → (B, n)."""
    mask = np.zeros(order.shape, bool)
    if count:
        np.put_along_axis(mask, np.argpartition(order, count - 1, axis=1)[:, :count], True, axis=1)
    return mask
