"""Decode image files to pixels (H, W, C).

Pixels are uint8, or float32 in the same 0..255 scale for data deeper than 8 bits. Pillow reads formats that it keeps
without loss. libjpeg-turbo (through simplejpeg) decodes JPEGs faster to the same values, and at a half, a quarter or an
eighth of the size for a fraction of the time. `tiff` and `dicom` read their formats.

Shapes: `H W` pixels, `C` channels.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.data.files import TIFF_MAGIC, try_again
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

# Pixel formats only: Pillow passes others, such as EPS, to external programs. JPEG first, as the most common.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "TGA")
ORIENTATION_TAG = 274

# Conversions of Pillow's modes; other modes stay unchanged.
_MODES = {"1": "L", "La": "LA", "P": "RGB", "PA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB"}
_MODES |= dict.fromkeys(("CMYK", "YCbCr", "LAB", "HSV"), "RGB")
_BANDS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_DEEP_MODES = {"I;16": np.uint16, "I;16B": np.uint16, "I;16L": np.uint16, "I": np.int32, "F": np.float32}


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
        with _BlameTheImage():
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
        with _BlameTheImage():
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


def decode(raw: Raw, *, channels: int, dtype: DTypeLike) -> NDArray[Any]:
    """Decode an image file's bytes, an array (H, W) or (H, W, C), or a Pillow image to pixels (H, W, `channels`).

    `dtype` is uint8 or float32, both in 0..255: 16-bit values are divided by 257; other deep values are unchanged.
    Transparency is blended with white, EXIF rotation undone, and the first frame taken. Raises `BadImage`.
    """
    return open_picture(raw).decode(channels=channels, dtype=dtype)


def open_picture(raw: Raw) -> Picture:
    """Read an image's header. Raises `BadImage`, also for more than `MAX_PIXELS` (of a TIFF when pixels are read)."""
    with _BlameTheImage():
        if isinstance(raw, Picture):
            return raw
        if isinstance(raw, np.ndarray):
            return _open_array(raw)
        if isinstance(raw, Path):
            from simmim.data.tiff import open_tiff

            return open_tiff(str(raw))
        if not isinstance(raw, bytes):
            return open_pillow(raw)
        if not raw:
            raise BadImage("the file is empty")
        if raw.startswith(b"\x93NUMPY"):
            return _open_npy(raw)
        if raw[128:132] == b"DICM":
            from simmim.data.dicom import open_dicom

            return open_dicom(raw)
        if raw[:4] in TIFF_MAGIC:
            from simmim.data.tiff import open_tiff

            return open_tiff(raw)
        if raw[344:348] == b"n+1\0" or raw.startswith(b"\x1f\x8b"):
            raise BadImage(
                "is a NIfTI volume or compressed; volumes are read as unlabelled images, of folders and lists"
            )
        return open_pillow(identify(raw), raw)


def count_pixels(path: Path) -> int:
    """Read how many pixels an image file has, from its header where that is enough. Raises `BadImage`."""
    with _BlameTheImage():
        return try_again(lambda: _count_pixels(path))


def _count_pixels(path: Path) -> int:
    if not path.is_file():
        raise BadImage("is no file")
    with path.open("rb") as file:
        if file.read(4) in TIFF_MAGIC:
            picture = open_picture(path)
            return picture.height * picture.width
        file.seek(0)
        try:
            width, height = identify(file).size
        except BadImage:
            picture = open_picture(path.read_bytes())
            return picture.height * picture.width
        return height * width


class _BlameTheImage:
    """Turn a decoder's errors (OSError, SyntaxError, struct.error, …) into `BadImage`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadImage):
            raise BadImage(" ".join(str(error).split()) or type(error).__name__) from error


def identify(raw: bytes | BinaryIO) -> "Image.Image":
    """Have Pillow read the header of a file, open or its bytes. Raises `BadImage` for a format that is not read."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("not an image in a format that is read here") from error


def open_pillow(image: "Image.Image", raw: bytes | None = None) -> Picture:
    """Open a Pillow image, of which `raw` are the bytes, if it is a file."""
    if image.format == "TIFF":
        image.load()  # loading turns the image upright and changes its size
    stored = image.getexif().get(ORIENTATION_TAG)
    orientation = next((known for known in range(1, 9) if known == stored), 1)  # other values mean no rotation
    width, height = image.size if orientation < 5 else image.size[::-1]
    mode = _MODES.get(image.mode, image.mode)
    if "transparency" in image.info and mode in ("L", "RGB"):
        mode += "A"

    # Pillow widens the 16 bits of a deep PGM to 32.
    dtype = np.dtype(np.uint16 if image.format == "PPM" and mode == "I" else _DEEP_MODES.get(mode, np.uint8))

    is_jpeg = image.format in ("JPEG", "MPO") and image.mode == mode

    def read(reduction: int) -> NDArray[Any]:
        if raw is not None and is_jpeg:
            return upright(_jpeg_pixels(raw, image, reduction), orientation)
        return upright(_pillow_pixels(image, mode).astype(dtype, copy=False), orientation)

    return Picture(
        height=height,
        width=width,
        bands=_BANDS.get(mode, 1),
        has_alpha=mode in ("LA", "RGBA"),
        dtype=dtype,
        read=read,
        jpeg_orientation=orientation if is_jpeg and _is_grey_or_ycbcr(image) else None,
    )


def _is_grey_or_ycbcr(jpeg: Any) -> bool:
    """Return whether a JPEG is grey or YCbCr. Adobe's marker or component names may declare RGB."""
    components = [component[0] for component in jpeg.layer]
    return len(components) == 1 or (components in ([1, 2, 3], [0, 1, 2]) and jpeg.info.get("adobe_transform", 1) == 1)


def _pillow_pixels(image: "Image.Image", mode: str) -> NDArray[Any]:
    image.load()  # np.asarray alone swallows the error of a truncated file
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1)


def _jpeg_pixels(raw: bytes, image: "Image.Image", reduction: int) -> NDArray[Any]:
    import simplejpeg

    colorspace = "RGB" if image.mode == "RGB" else "GRAY"
    width, height = image.size
    least_height, least_width = -(-height // reduction), -(-width // reduction)
    try:
        return simplejpeg.decode_jpeg(raw, colorspace, min_height=least_height, min_width=least_width)
    except ValueError:  # it is stricter than Pillow, which decides what is damaged
        return _pillow_pixels(image, image.mode)


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


def _open_array(pixels: NDArray[Any]) -> Picture:
    if pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise BadImage(f"an array of shape {pixels.shape} is neither (H, W) nor (H, W, C)")
    if pixels.dtype.kind not in "buif":
        raise BadImage(f"an array of {pixels.dtype} holds no pixels")
    native = pixels.dtype.newbyteorder("=")  # a file may hold the other byte order
    pixels = pixels.reshape(*pixels.shape[:2], -1).astype(native, copy=False)
    height, width, bands = pixels.shape
    check_size(height, width, bands)
    return Picture(height=height, width=width, bands=bands, dtype=pixels.dtype, read=lambda _: pixels)


def _open_npy(raw: bytes) -> Picture:
    # np.load would allocate the size in the header before it checks for the bytes.
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f"version {version[0]}.{version[1]} of .npy is for arrays with named fields")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise BadImage("an array of Python objects is not read, as it could run code")
    count = int(np.prod([int(side) for side in shape], dtype=object))
    if count * dtype.itemsize > len(raw) - file.tell():
        raise BadImage(f"the file ends before the {count} values of shape {shape} that it claims")
    values = np.frombuffer(raw, dtype, count, file.tell())
    return _open_array(values.reshape(shape, order="F" if fortran else "C"))


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
