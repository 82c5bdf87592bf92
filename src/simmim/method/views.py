"""Views: further crops of a batch's images for objectives that compare them.

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


@dataclass(frozen=True, kw_only=True)
class View:
    """A random crop of an image, resized, and mirrored half of the time."""

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

    def __post_init__(self) -> None:
        for name, (least, most) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < least <= most or (name == "scale" and most > 1):
                raise UserError(f"{name} {(least, most)} of view {self.name} is not a range of shares; use (0.2, 1.0)")

    def draw(self, seed: int, epoch: ArrayLike, index: ArrayLike) -> NDArray[np.float32]:
        """Draw the crops of images `index` (B,) in epochs `epoch` (B,) or one epoch: (B, 5) float32.

        A row holds top, left, height and width as shares of the image, and 1.0 where the crop is mirrored.
        """
        draws = uniforms(sample_keys(seed, epoch, index, stream=f"view {self.name}"), 5).T
        area = self.scale[0] + draws[0] * (self.scale[1] - self.scale[0])
        least, most = map(math.log, self.ratio)
        ratio = np.exp(least + draws[1] * (most - least))
        height, width = np.minimum(np.sqrt(area / ratio), 1), np.minimum(np.sqrt(area * ratio), 1)
        top, left = draws[2] * (1 - height), draws[3] * (1 - width)
        mirrored = (draws[4] < 0.5) & self.flip
        return np.stack((top, left, height, width, mirrored), axis=1).astype(np.float32)
