"""An image of any format with its header read, and its pixels (H, W, C) on demand.

Pixels are uint8, or float32 in the same 0..255 scale for data deeper than 8 bits.

Shapes: `H W` pixels, `C` channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Raw: TypeAlias = "bytes | NDArray[Any] | Image.Image | Picture | Path"
"""An image as stored: a file's bytes, or the path of a large TIFF, of which no more is read than is shown."""

Part: TypeAlias = tuple[int, int, int, int]
"""First row, first column, rows and columns of a part of an upright image."""

MAX_PIXELS = 178_956_970
"""Limit against decompression bombs, Pillow's default."""
_CHECKED = 64  # pixels of the shorter side, at least, when an image is read only to see whether it can be

ORIENTATION_TAG = 274


class BadImage(UserError):
    """Unusable image; the message is the reason, in one line."""


class NothingButNodata(BadImage):
    """A band of an image, or of a part of it, holds no values but missing ones."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Image with a parsed header: its upright size, and its pixels on demand."""

    height: int
    width: int
    bands: int
    """Stored values per pixel, including transparency."""
    has_alpha: bool = False
    """Whether the last band is transparency."""
    dtype: np.dtype[Any]
    """Type of the stored values."""
    read: Callable[[int], NDArray[Any]]
    """Reduction (a power of 2) allowed for a JPEG or a pyramid → stored values (h, w, bands), upright."""
    missing: Callable[[], NDArray[np.bool_]] | None = None
    """Which of the stored values (H, W, bands), upright, were missing and filled; `None` where none can be."""
    part: Callable[[Part], tuple[NDArray[Any], NDArray[np.bool_] | None]] | None = None
    """Stored values (h, w, bands) of a part, and which of them were missing, where no more than that need be read."""
    apart: tuple[Part, ...] = ()
    """Parts that are kept aside, with which a random window shares no pixels where it can."""
    jpeg_orientation: int | None = None
    """EXIF rotation (1..8) of a grey or YCbCr JPEG, which all decoders accept; else `None`."""

    @property
    def channels(self) -> int:
        """Values per pixel, without transparency."""
        return self.bands - self.has_alpha

    def fits(self, channels: int) -> bool:
        """Return whether `decode` can return this many channels: as stored, or grey ↔ colour."""
        return channels == self.bands or {channels, self.channels} <= {1, 3}

    def decode(self, *, channels: int, dtype: DTypeLike, reduction: int = 1) -> NDArray[Any]:
        """Return pixels (H, W, `channels`), of a JPEG at 1/`reduction` of the size. Raises `BadImage`."""
        if not self.fits(channels):
            raise BadImage(f"has {self.channels} channels, not {channels}")
        with BlameTheImage():
            pixels = _scaled_to_255(self.read(reduction))
            if channels != self.bands:
                pixels = _grey_or_colour(_on_white(pixels) if self.has_alpha else pixels, channels)
            if pixels.dtype == dtype:
                return pixels
            if dtype == np.float32:
                return pixels.astype(np.float32)
            if self.dtype != np.uint16:
                raise BadImage(f"has {self.dtype} values, but earlier images have 8 bits")
            return np.rint(pixels).astype(np.uint8)

    def cut(self, part: Part) -> "Picture":
        """Read a part, as a picture; what was missing is filled from the part alone. Raises `BadImage`."""
        top, left, height, width = part
        with BlameTheImage():
            if self.part is not None:
                stored, missing = self.part(part)
            else:
                whole, missing = self.read(1), None
                stored = np.ascontiguousarray(whole[top : top + height, left : left + width])
        return Picture(
            height=height,
            width=width,
            bands=self.bands,
            has_alpha=self.has_alpha,
            dtype=self.dtype,
            read=lambda _: stored,
            missing=None if missing is None else lambda: missing,
        )

    def check(self, channels: int | None = None, dtype: DTypeLike = np.float32) -> None:
        """Read all of it, of a JPEG or a pyramid at a fraction, to see whether that is possible. Raises `BadImage`."""
        fraction = max(1, min(self.height, self.width) // _CHECKED)
        reduction = 1 << (fraction.bit_length() - 1)
        self.decode(channels=channels or self.channels, dtype=dtype, reduction=reduction)


class BlameTheImage:
    """Turn a decoder's errors (OSError, SyntaxError, struct.error, …) into `BadImage`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadImage):
            raise BadImage(" ".join(str(error).split()) or type(error).__name__) from error


def upright_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """Return the sides of an image whose EXIF rotation (1..8) is undone."""
    return (height, width) if orientation < 5 else (width, height)


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo an EXIF rotation (1..8)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def check_size(height: int, width: int, bands: int) -> None:
    """Raise `BadImage` for more pixels or values than are read."""
    if height * width > MAX_PIXELS or height * width * bands > 3 * MAX_PIXELS:
        raise BadImage(f"claims {width} x {height} pixels of {bands} values; more than {MAX_PIXELS} are not read")


def _scaled_to_255(values: NDArray[Any]) -> NDArray[Any]:
    """Convert stored values to uint8 or float32; only 8- and 16-bit values have a known scale."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused below
        pixels = values.astype(np.float32)
    if values.dtype == np.uint16:
        pixels /= 257
    if not np.isfinite(pixels).all():
        raise BadImage("has values that are not finite")
    return pixels


def _on_white(pixels: NDArray[Any]) -> NDArray[Any]:
    """Blend (H, W, C + transparency) with white: (H, W, C)."""
    opacity = pixels[..., -1:].astype(np.float32) / 255
    laid = pixels[..., :-1] * opacity + 255 * (1 - opacity)
    return np.rint(laid).astype(np.uint8) if pixels.dtype == np.uint8 else laid


def _grey_or_colour(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    import cv2

    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
