"""Images that Pillow opens: the formats that it keeps without loss, and JPEGs.

libjpeg-turbo (through simplejpeg) decodes JPEGs faster to the same values, and at a half, a quarter or an eighth of the
size for a fraction of the time.
"""

import io
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from simmim.data.picture import ORIENTATION_TAG, BadImage, Picture, upright

if TYPE_CHECKING:
    from PIL import Image

# Pixel formats only: Pillow passes others, such as EPS, to external programs. JPEG first, as the most common.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "TGA")

# Conversions of Pillow's modes; other modes stay unchanged.
_MODES = {"1": "L", "La": "LA", "P": "RGB", "PA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB"}
_MODES |= dict.fromkeys(("CMYK", "YCbCr", "LAB", "HSV"), "RGB")
_BANDS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_DEEP_MODES = {"I;16": np.uint16, "I;16B": np.uint16, "I;16L": np.uint16, "I": np.int32, "F": np.float32}


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
