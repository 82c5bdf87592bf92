"""Decode image files to pixels (H, W, C).

`arrays`, `dicom`, `pillow` and `tiff` read their formats.

Shapes: `H W` pixels, `C` channels.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.data.arrays import open_array, open_npy
from simmim.data.dicom import open_dicom
from simmim.data.files import TIFF_MAGIC, try_again
from simmim.data.picture import BadImage, BlameTheImage, Picture, Raw
from simmim.data.pillow import identify, open_pillow
from simmim.data.tiff import open_tiff


def decode(raw: Raw, *, channels: int, dtype: DTypeLike) -> NDArray[Any]:
    """Decode an image file's bytes, an array (H, W) or (H, W, C), or a Pillow image to pixels (H, W, `channels`).

    `dtype` is uint8 or float32, both in 0..255: 16-bit values are divided by 257; other deep values are unchanged.
    Transparency is blended with white, EXIF rotation undone, and the first frame taken. Raises `BadImage`.
    """
    return open_picture(raw).decode(channels=channels, dtype=dtype)


def open_picture(raw: Raw) -> Picture:
    """Read an image's header. Raises `BadImage`, also for more than `MAX_PIXELS` (of a TIFF when pixels are read)."""
    with BlameTheImage():
        if isinstance(raw, Picture):
            return raw
        if isinstance(raw, np.ndarray):
            return open_array(raw)
        if isinstance(raw, Path):
            return open_tiff(str(raw))
        if not isinstance(raw, bytes):
            return open_pillow(raw)
        if not raw:
            raise BadImage("the file is empty")
        if raw.startswith(b"\x93NUMPY"):
            return open_npy(raw)
        if raw[128:132] == b"DICM":
            return open_dicom(raw)
        if raw[:4] in TIFF_MAGIC:
            return open_tiff(raw)
        if raw[344:348] == b"n+1\0" or raw.startswith(b"\x1f\x8b"):
            raise BadImage(
                "is a NIfTI volume or compressed; volumes are read as unlabelled images, of folders and lists"
            )
        return open_pillow(identify(raw), raw)


def count_pixels(path: Path) -> int:
    """Read how many pixels an image file has, from its header where that is enough. Raises `BadImage`."""
    with BlameTheImage():
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
