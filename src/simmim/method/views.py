"""Views: further crops of a batch's images, recoloured or not, for objectives that compare them.

A view is cut on the device from the images that the step has already. Its numbers are drawn on the host from each
image's key, so that it is the same on any number of ranks, on any device and after a resume.

Shapes: `B` images.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmim.errors import UserError
from simmim.method.random_keys import sample_keys, uniforms

CROP_NUMBERS = 5
"""Numbers of a view without colour."""
_JITTERED = 0.8  # share of the views that are jittered, as in SimCLR
_BLUR = (0.1, 2.0)  # range of sigma in pixels of an image of 224, as in SimCLR


@dataclass(frozen=True, kw_only=True)
class View:
    """A random crop of an image, resized, mirrored half of the time, and recoloured as in SimCLR (arXiv 2002.05709).

    Colours change in this order: brightness, contrast, saturation, hue, grey, blur.
    """

    name: str
    """Name of the view, unique in a training; its random stream is its own."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels; `None` is the image size."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over its height, relative to the image's."""
    flip: bool = True
    """Mirror half of the crops left to right."""
    jitter: float = 0
    """Strength of the colour jitter of four views in five: brightness, contrast and saturation change by a factor of
    1 ± 0.8 × jitter, hue by ± 0.2 × jitter of a turn. SimCLR has 0.5 for small images and 1 for ImageNet."""
    grey: float = 0
    """Share of the views without colour."""
    blur: float = 0
    """Share of the views that are blurred, by a Gaussian of 0.1 to 2 pixels at 224 pixels."""

    @property
    def recolours(self) -> bool:
        """Whether more than the crop changes."""
        return bool(self.jitter or self.grey or self.blur)

    def __post_init__(self) -> None:
        for name in ("jitter", "grey", "blur"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"{name} {value} of view {self.name} is not a share; use 0 to 1")
        for name, (least, most) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < least <= most or (name == "scale" and most > 1):
                raise UserError(f"{name} {(least, most)} of view {self.name} is not a range of shares; use (0.2, 1.0)")

    def draw(self, seed: int, epoch: ArrayLike, index: ArrayLike) -> NDArray[np.float32]:
        """Draw the crops of images `index` (B,) in epochs `epoch` (B,) or one epoch: (B, 5) float32.

        A row holds top, left, height and width as shares of the image, and 1.0 where the crop is mirrored. Of a view
        that recolours it goes on, (B, 11), with the factors of brightness, contrast and saturation, the turn of hue,
        1.0 where grey, and the blur's sigma in shares of 224 pixels. What does not change is 1, 1, 1, 0, 0, 0.
        """
        keys = sample_keys(seed, epoch, index, stream=f"view {self.name}")
        draws = uniforms(keys, CROP_NUMBERS + (8 if self.recolours else 0)).T
        area = self.scale[0] + draws[0] * (self.scale[1] - self.scale[0])
        least, most = map(math.log, self.ratio)
        ratio = np.exp(least + draws[1] * (most - least))
        height, width = np.minimum(np.sqrt(area / ratio), 1), np.minimum(np.sqrt(area * ratio), 1)
        top, left = draws[2] * (1 - height), draws[3] * (1 - width)
        mirrored = (draws[4] < 0.5) & self.flip
        numbers = (top, left, height, width, mirrored)
        if self.recolours:
            numbers += self._colours(draws[CROP_NUMBERS:])
        return np.stack(numbers, axis=1).astype(np.float32)

    def _colours(self, draws: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Return factors, turn of hue, grey and sigma, each (B,), of uniform numbers (8, B)."""
        jitter = np.where(draws[0] < _JITTERED, self.jitter, 0)
        brightness, contrast, saturation = 1 + 0.8 * jitter * (2 * draws[1:4] - 1)
        hue = 0.2 * jitter * (2 * draws[4] - 1)
        sigma = (_BLUR[0] + draws[7] * (_BLUR[1] - _BLUR[0])) / 224
        return brightness, contrast, saturation, hue, draws[5] < self.grey, np.where(draws[6] < self.blur, sigma, 0)
