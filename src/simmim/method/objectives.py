"""Objectives: the terms of a pretraining's loss. Engines build modules of them."""

from dataclasses import dataclass
from typing import ClassVar

from simmim.errors import UserError
from simmim.method.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Objective(Strategy, family="objective"):
    """A term of the loss, which is the sum of all terms, each times its `weight`."""

    weight: float = 1.0
    """Factor of the term, above 0."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight {self.weight} of objective {self.kind} is not above 0; use 1.0, or leave it out")


@dataclass(frozen=True, kw_only=True)
class PixelReconstruction(Objective):
    """Predict the target of hidden pixels (SimMIM). The configuration's `target`, `loss` and `head` say how."""

    kind: ClassVar[str] = "pixels"
