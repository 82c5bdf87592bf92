"""Crop and resize images. The engine flips and changes colours, on the device.

Shapes: `B` images, `H W` pixels, `C` channels; a size is (H, W).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from simmim.config.field_types import Flip
from simmim.data.decode import open_picture
from simmim.data.picture import Picture, Raw
from simmim.data.sounds import Clip
from simmim.errors import UserError
from simmim.method.random_keys import draws, sample_keys, uniforms

FLIP_AXES: dict[Flip, int] = {"none": 0, "horizontal": 1, "both": 2}
_SHARP = 1.1
"""Sides that shrink by less are only interpolated, as aliasing is invisible."""


class Box(NamedTuple):
    """Rectangle of pixels; may extend beyond the image."""

    top: int
    left: int
    height: int
    width: int

    def scaled(self, vertical: float, horizontal: float) -> "Box":
        """Scale the box for an image at these shares of its height and width, to half a pixel."""
        scales = (vertical, horizontal, vertical, horizontal)
        return Box(*(round(side * scale) for side, scale in zip(self, scales, strict=True)))


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """Draw a box to crop and resize to `size`, as torchvision does (SimMIM §4.1: scale 0.67–1).

    `scale` is the box's share of the image's area, `ratio` its aspect ratio relative to that of `size`: by default,
    images are squashed by 4/3 at most, also for sizes that are not square. Raises `UserError`.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.67, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_crop_size(self.size)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"crop scale {self.scale} is not a range within 0..1; use (0.67, 1.0)")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"crop ratio {self.ratio} is not a range of positive numbers; use (0.75, 1.333)")

    def box(self, key: int, height: int, width: int) -> Box:
        """Draw an image's box by its key; after ten failed draws, return the largest box in the middle."""
        aspect = self.size[1] / self.size[0]
        narrowest, widest = self.ratio[0] * aspect, self.ratio[1] * aspect
        smallest, largest = self.scale
        for first in range(0, 4 * 10, 4):
            share, shape, down, right = draws(key, first, 4)
            area = height * width * (smallest + (largest - smallest) * share)
            ratio = narrowest * (widest / narrowest) ** shape
            box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 1 <= box_height <= height and 1 <= box_width <= width:
                top, left = int(down * (height - box_height + 1)), int(right * (width - box_width + 1))
                return Box(top, left, box_height, box_width)
        return _middle(height, width, min(max(width / height, narrowest), widest))


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """Centre box with the shape of `size` and `fraction` of the largest sides (0.875 = 224/256)."""

    size: tuple[int, int]
    fraction: float = 0.875

    def __post_init__(self) -> None:
        check_crop_size(self.size)
        if not 0 < self.fraction <= 1:
            raise UserError(f"crop fraction {self.fraction} is not within 0..1; use 0.875")

    def box(self, height: int, width: int) -> Box:
        return _middle(height, width, self.size[1] / self.size[0], self.fraction)


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """Box with the shape of `size` and the whole image at its top left."""

    size: tuple[int, int]

    def __post_init__(self) -> None:
        check_crop_size(self.size)

    def box(self, height: int, width: int) -> Box:
        pixels = max(height / self.size[0], width / self.size[1])  # image pixels per result pixel
        return Box(0, 0, max(1, round(pixels * self.size[0])), max(1, round(pixels * self.size[1])))


@dataclass(frozen=True, kw_only=True)
class ScaleJitter:
    """Large-scale jittering (arXiv 2012.07177): a box with the shape of `size` and the image at a random scale.

    At scale 1 the whole image just fits. A smaller image lies at the top left of its box. A larger one is cropped at
    random, around the middle of a random object if there are any, so that no step lacks objects. Raises `UserError`.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        check_crop_size(self.size)
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale jitter {self.scale} is not a range of positive numbers; use 0.1 2.0")

    def box(self, key: NDArray[np.uint64], height: int, width: int, objects: NDArray[np.floating]) -> Box:
        """Draw the box by an image's key (1,) and its objects' boxes, (n, 4) of left, top, right, bottom."""
        scale, vertical, horizontal, which = uniforms(key, 4)[0]
        pixels = max(height / self.size[0], width / self.size[1])  # image pixels per result pixel
        pixels /= self.scale[0] + (self.scale[1] - self.scale[0]) * scale
        rows, columns = (max(1, round(pixels * side)) for side in self.size)
        x = y = None
        if len(objects):
            left, top, right, bottom = objects[int(which * len(objects))]
            x, y = int((left + right) / 2), int((top + bottom) / 2)
        return Box(_begin(vertical, height, rows, y), _begin(horizontal, width, columns, x), rows, columns)


def _begin(draw: float, length: int, part: int, within: int | None) -> int:
    """Draw the start of a random part of a length, one that contains `within` if given."""
    first, last = 0, max(length - part, 0)
    if within is not None:
        first, last = max(first, min(within - part + 1, last)), min(last, max(within, first))
    return first + int(draw * (last - first + 1))


def whole_box(height: int, width: int) -> Box:
    """Return the box that is a whole image."""
    return Box(0, 0, height, width)


def draw_flips(seed: int, epoch: ArrayLike, index: ArrayLike, flip: Flip) -> NDArray[np.bool_]:
    """Draw flips, with probability 1/2 each: (B, 0) for none, (B, 1) for horizontal, (B, 2) for both.

    The first column flips left-right, the second upside down.
    """
    return uniforms(sample_keys(seed, epoch, index, stream="flip"), FLIP_AXES[flip]) < 0.5


def reduction(box: Box, size: tuple[int, int]) -> int:
    """Return the reduction (a power of 2) at which to decode, with `box` still no smaller than `size`."""
    spare = min(box.height // size[0], box.width // size[1])
    return 1 << max(spare.bit_length() - 1, 0)


def visible(box: Box, height: int, width: int, size: tuple[int, int]) -> tuple[Box, Box]:
    """Return the part of `box` inside an image, and its place when `box` is resized to `size`."""
    top, left = max(box.top, 0), max(box.left, 0)
    bottom, right = min(box.top + box.height, height), min(box.left + box.width, width)
    rows = [round((row - box.top) * size[0] / box.height) for row in (top, bottom)]
    columns = [round((column - box.left) * size[1] / box.width) for column in (left, right)]
    place = Box(rows[0], columns[0], max(1, rows[1] - rows[0]), max(1, columns[1] - columns[0]))
    return Box(top, left, bottom - top, right - left), place


def load(
    raw: Raw,
    choose_box: Callable[[int, int], Box],
    *,
    size: tuple[int, int],
    channels: int,
    dtype: DTypeLike,
    fill: ArrayLike = 0,
    out: NDArray[Any] | None = None,
    antialias: bool = True,
) -> NDArray[Any]:
    """Read the part of an image that `choose_box(height, width)` names, at `size`: (H, W, C). Raises `BadImage`.

    What the box has beyond the image is filled with the colour `fill`, (C,) or one number. The result is written into
    `out`, if given. Without `antialias` it is interpolated only, in less time.
    """
    picture = open_picture(raw)
    box = choose_box(picture.height, picture.width)
    how: dict[str, Any] = {"size": size, "channels": channels, "dtype": dtype, "fill": fill, "antialias": antialias}
    return show(picture, box, **how, out=out)


def show(
    picture: Picture,
    box: Box,
    *,
    size: tuple[int, int],
    channels: int,
    dtype: DTypeLike,
    fill: ArrayLike = 0,
    out: NDArray[Any] | None = None,
    antialias: bool = True,
) -> NDArray[Any]:
    """Do what `load` does, for an image that is open. Of a sound, it is `size[0]` samples around the box's middle."""
    if isinstance(picture, Clip):
        samples = picture.show(box, size[0], dtype=dtype)
        if out is None:
            return samples
        out[:] = samples
        return out
    pixels = picture.decode(channels=channels, dtype=dtype, reduction=reduction(box, size))
    height, width = pixels.shape[:2]
    if (height, width) != (picture.height, picture.width):
        box = box.scaled(height / picture.height, width / picture.width)
    return crop_resize(pixels, box, size, fill, out, antialias)


def crop_resize(
    image: NDArray[Any],
    box: Box,
    size: tuple[int, int],
    fill: ArrayLike = 0,
    out: NDArray[Any] | None = None,
    antialias: bool = True,
) -> NDArray[Any]:
    """Cut `box` out of an image (H, W, C) and resize it to `size`, without aliasing; `fill` lies beyond the image.

    `out`, if given, takes the result; it has its shape and the image's dtype. Values are close to the antialiased
    bilinear resizing of Pillow and torchvision (docs/speed.md has figures), in a quarter of the time. Three steps are
    vectorised by OpenCV: a 3×3 blur (if `antialias`), bilinear interpolation to a power of two times `size`, and
    halving by means of 2×2 pixels.
    """
    channels = image.shape[2]
    if out is None:
        out = np.empty((*size, channels), image.dtype)
    bottom, right = box.top + box.height, box.left + box.width
    if min(box.top, box.left) < 0 or bottom > image.shape[0] or right > image.shape[1]:
        part, place = visible(box, image.shape[0], image.shape[1], size)
        out[:] = fill
        rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        out[rows, columns] = crop_resize(image, part, (place.height, place.width), antialias=antialias)
        return out
    crop = image[box.top : bottom, box.left : right]
    block = 64  # OpenCV takes at most 128 channels at once
    if channels <= block:
        return _resize(crop, size, out, antialias)
    for first in range(0, channels, block):
        some = slice(first, first + block)
        out[..., some] = _resize(crop[..., some], size, np.empty_like(out[..., some]), antialias)
    return out


def _resize(pixels: NDArray[Any], size: tuple[int, int], out: NDArray[Any], antialias: bool) -> NDArray[Any]:
    cv2 = _opencv()
    height, width = size
    down, right = _halvings(pixels.shape[0], height), _halvings(pixels.shape[1], width)
    resized, interpolation = pixels, cv2.INTER_LINEAR
    if antialias:
        resized = _blur(pixels, height << down, width << right)
    while down or right:
        resized = cv2.resize(resized, (width << right, height << down), interpolation=interpolation)
        down, right, interpolation = max(0, down - 1), max(0, right - 1), cv2.INTER_AREA
    cv2.resize(resized, (width, height), out, interpolation=interpolation)
    return out


def _halvings(have: int, want: int) -> int:
    """Return how often to halve a side after interpolation, which shrinks by at most 2.2, the limit of the blur."""
    return max(0, math.ceil(math.log2(have / want / 2.2)))


def _blur(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Complete bilinear interpolation to (`height`, `width`) to an antialiasing filter.

    To shrink by s, a triangle filter has variance s²/6, of which interpolation supplies 1/6. The kernel (w, 1 - 2w, w)
    has variance 2w, so w = (s² - 1) / 12; on photographs, /8 comes closest to the triangle filter.
    """
    down, right = pixels.shape[0] / height, pixels.shape[1] / width
    if max(down, right) < _SHARP:
        return pixels
    cv2 = _opencv()
    kernel = (3 if right >= _SHARP else 1, 3 if down >= _SHARP else 1)
    return cv2.GaussianBlur(pixels, kernel, _sigma(right), sigmaY=_sigma(down), borderType=cv2.BORDER_REPLICATE)


def _sigma(shrinking: float) -> float:
    """Return the standard deviation that gives GaussianBlur's 3 pixels these weights."""
    weight = min(1 / 4, (shrinking**2 - 1) / 8)
    return math.sqrt(0.5 / math.log((1 - 2 * weight) / weight)) if shrinking >= _SHARP else 0.0


@cache
def _opencv() -> ModuleType:
    import cv2

    cv2.setNumThreads(1)  # threads already work on different images
    return cv2


def _middle(height: int, width: int, ratio: float, fraction: float = 1.0) -> Box:
    """Return the centre box of an image with this aspect ratio and `fraction` of the largest sides."""
    box_height = max(1, round(fraction * min(height, width / ratio)))
    box_width = max(1, round(fraction * min(width, height * ratio)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def check_crop_size(size: tuple[int, int]) -> None:
    """Raise `UserError` for a size without pixels."""
    if min(size) < 1:
        raise UserError(f"image size {size[0]}x{size[1]} is not positive; use 224 or 160x224")
