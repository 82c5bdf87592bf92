"""Prediction heads as configuration. Each engine builds its modules from them in its `heads` module."""

from dataclasses import dataclass
from typing import ClassVar

from simmim.errors import UserError
from simmim.method.strategy import Strategy

ATTENTION_FEATURES = 32
"""Features per attention head of a transformer head, as in MAE's decoder."""


@dataclass(frozen=True, kw_only=True)
class Head(Strategy, family="head"):
    """Map a feature map to predicted values of every cell."""

    cell_by_cell: ClassVar[bool] = True
    """Whether a cell is predicted from its own features only, so that a list of cells can replace the map."""


@dataclass(frozen=True, kw_only=True)
class LinearHead(Head):
    """One linear layer (SimMIM §3.3)."""

    kind: ClassVar[str] = "linear"


@dataclass(frozen=True, kw_only=True)
class MLPHead(Head):
    """Two linear layers with GELU in between (SimMIM table 3)."""

    kind: ClassVar[str] = "mlp"


@dataclass(frozen=True, kw_only=True)
class TransformerHead(Head):
    """A light transformer decoder over all cells (MAE, arXiv 2111.06377)."""

    kind: ClassVar[str] = "transformer"
    cell_by_cell: ClassVar[bool] = False
    depth: int = 2
    """Number of blocks (MAE: 8)."""
    width: int = 256
    """Number of features, a multiple of 32 (MAE: 512)."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"decoder depth {self.depth} is less than 1; use 2")
        if self.width < 1 or self.width % ATTENTION_FEATURES:
            near = max(self.width // ATTENTION_FEATURES, 1) * ATTENTION_FEATURES
            raise UserError(
                f"decoder width {self.width} is not a multiple of {ATTENTION_FEATURES}; "
                f"use {near} or {near + ATTENTION_FEATURES}"
            )
