"""Masks whose cells the training chooses on its device, by a score of each cell.

The host draws a random mask as ever, and a random order of the cells. The engine scores the cells of each image
(`simmim.torch_engine.models.mask_guides`), puts the highest first in that order, and hides the first cells.

Shapes: `B` images, `rows columns` cells.
"""

from abc import ABC
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError
from simmim.method.masks.base import Keys, Mask, MaskStrategy, lowest
from simmim.method.random_keys import random_bits


@dataclass(frozen=True, kw_only=True)
class GuidedMask(MaskStrategy, ABC):
    """Hide the cells of highest score and random others. `draw` alone hides random cells.

    Of the hidden cells, the share with the highest scores rises linearly from 0 to `share`, as in HPM. A moving average
    of the encoder, the teacher, sees the whole image; scores come from it.

    Raises `UserError` for a setting outside its range.
    """

    guided: ClassVar[bool] = True
    share: float = 0.5
    """Share of the hidden cells that the score chooses in the end; the others are random."""
    steps: int | None = None
    """Steps over which the share rises (default: the whole run)."""
    momentum: float = 0.99
    """Momentum of the teacher's average at the start."""
    momentum_end: float = 0.9999
    """Momentum of the teacher's average after `steps`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("share", "momentum", "momentum_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} of mask {self.kind} is not within 0..1")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps {self.steps} of mask {self.kind} is below 1; use 1 or more, or leave it out")

    def for_steps(self, steps: int) -> Self:
        return self if self.steps else replace(self, steps=steps)

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        return lowest(random_bits(keys, rows * columns), count).reshape(-1, rows, columns)

    def order(self, keys: Keys, image_size: tuple[int, int]) -> NDArray[np.int32]:
        """Return the random order of the cells, (B, rows, columns) of 0, 1, …; `draw` hides the first."""
        rows, columns = self.grid(image_size)
        order = random_bits(keys, rows * columns).argsort(axis=1).argsort(axis=1)
        return order.astype(np.int32).reshape(-1, rows, columns)


@dataclass(frozen=True, kw_only=True)
class AttentionMask(GuidedMask):
    """Hide the most attended cells (AttMask, arXiv 2203.12719): what stands for the image is to be predicted.

    The score is the attention of the teacher's class token in its last block. A model without a class token, or whose
    attention is not timm's plain one, has the cosine similarity of a cell's feature to the image's mean feature.
    """

    kind: ClassVar[str] = "attention"


@dataclass(frozen=True, kw_only=True)
class HardMask(GuidedMask):
    """Hide the cells that are hard to predict (HPM, arXiv 2304.05919).

    The score is a linear function of the teacher's feature. It is trained to rank an image's hidden cells by their loss
    on pixels. The paper's predictor is a decoder as large as that of the pixels.
    """

    kind: ClassVar[str] = "hard"
