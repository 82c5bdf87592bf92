"""Masks of filtered noise.

Shapes: `B` images, `rows columns` cells.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from simmim.errors import UserError
from simmim.method.masks.base import Keys, Mask, MaskStrategy, Numbers, lowest
from simmim.method.random_keys import uniforms

_REACH = 3
"""Standard deviations after which a Gaussian is cut off."""
_COLOURS = ("green", "red", "blue", "purple")


@dataclass(frozen=True, kw_only=True)
class NoiseMask(MaskStrategy):
    """Hide the highest cells of filtered random noise (ColorMAE, arXiv 2407.13036, §3.2).

    Red is the noise blurred by a wide Gaussian, low frequencies: large hidden regions. Blue is the noise less a
    narrow blur, high ones: hidden cells lie apart. Green is the narrow blur less the wide one, the band between them:
    hidden groups of one size, evenly spread; the paper's best. Purple is the noise less green. The widths are this
    package's. The noise extends beyond the image, so that the border is not special.

    Raises `UserError` for an unknown `colour`, or if not 0 < `fine` < `coarse`.
    """

    kind: ClassVar[str] = "noise"
    colour: Literal["green", "red", "blue", "purple"] = "green"
    """Frequencies to keep: green has a band, red low ones, blue high ones, purple all but a band."""
    fine: float = 0.7
    """Standard deviation of the narrow blur in cells."""
    coarse: float = 1.5
    """Standard deviation of the wide blur in cells."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.colour not in _COLOURS:
            raise UserError(f"mask noise colour {self.colour!r} is unknown; use {', '.join(_COLOURS)}")
        if not 0 < self.fine < self.coarse < math.inf:
            raise UserError(
                f"mask noise blurs {self.fine} and {self.coarse} are not 0 < fine < coarse; use 0.7 and 1.5"
            )

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        around = math.ceil(_REACH * self.coarse)
        height, width = rows + 2 * around, columns + 2 * around
        white = uniforms(keys, height * width).reshape(-1, height, width)
        centre = _trim(white, around)
        if self.colour == "red":
            noise = _blur(white, self.coarse, around)
        elif self.colour == "blue":
            noise = centre - _blur(white, self.fine, around)
        else:
            green = _blur(white, self.fine, around) - _blur(white, self.coarse, around)
            noise = green if self.colour == "green" else centre - green
        return lowest(-noise.reshape(-1, rows * columns), count).reshape(-1, rows, columns)


def _blur(white: Numbers, deviation: float, around: int) -> Numbers:
    """Blur (B, rows + 2·around, columns + 2·around) by a Gaussian: (B, rows, columns).

    Sums of slices rather than products of matrices, whose rounding depends on the machine and on B.
    """
    reach = math.ceil(_REACH * deviation)
    weights = [math.exp(-0.5 * (offset / deviation) ** 2) for offset in range(reach + 1)]
    total = 2 * sum(weights) - 1
    white = _trim(white, around - reach)
    for axis in (1, 2):
        lines = np.moveaxis(white, axis, 1)
        size = lines.shape[1] - 2 * reach
        blurred = lines[:, reach : reach + size] * (weights[0] / total)
        for offset in range(1, reach + 1):
            pair = lines[:, reach - offset :][:, :size] + lines[:, reach + offset :][:, :size]
            blurred += pair * (weights[offset] / total)
        white = np.moveaxis(blurred, 1, axis)
    return white


def _trim(maps: Numbers, border: int) -> Numbers:
    """Cut a border off: (B, height, width) → (B, height - 2·border, width - 2·border)."""
    return maps[:, border : maps.shape[1] - border, border : maps.shape[2] - border]
