"""Masks of whole rows and columns of cells: of a spectrogram, spans of time and bands of frequency.

Shapes: `B` images, `rows columns` cells.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from simmim.errors import UserError
from simmim.method.masks.base import Keys, Mask, MaskStrategy, lowest
from simmim.method.random_keys import random_bits

_ALONG = ("time", "frequency", "both")


@dataclass(frozen=True, kw_only=True)
class StripMask(MaskStrategy):
    """Hide whole strips at random (AudioMAE, arXiv 2207.06405, §3: time, frequency, and time with frequency).

    Rows of cells are time and columns are frequency, as spectrograms lie here. With both, rows and columns are hidden
    in one random order. Of the last strip random cells are hidden, as many as the exact count leaves. Raises
    `UserError` for an unknown `along`.
    """

    kind: ClassVar[str] = "strips"
    along: Literal["time", "frequency", "both"] = "time"
    """Strips to hide: spans of time (rows), bands of frequency (columns), or both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.along not in _ALONG:
            raise UserError(f"strips along {self.along!r} are unknown; use {', '.join(_ALONG)}")

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        cells = rows * columns
        bits = random_bits(keys, rows + columns + cells)
        ranks = np.argsort(np.argsort(bits[:, : rows + columns], axis=1), axis=1)  # of all strips, no two alike
        row, column = ranks[:, :rows, None], ranks[:, None, rows:]
        if self.along == "both":
            strip = np.minimum(row, column)
        else:
            strip = np.broadcast_to(row if self.along == "time" else column, (len(keys), rows, columns))
        within = np.argsort(np.argsort(bits[:, rows + columns :], axis=1), axis=1)  # the order inside a strip
        order = strip.reshape(-1, cells) * cells + within
        return lowest(order, count).reshape(-1, rows, columns)
