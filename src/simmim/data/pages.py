"""Files that hold several images, such as a TIFF of many pages: the first of each is read, and users are told so."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np

from simmim.data.decode import open_picture
from simmim.data.dicom import count_frames, may_be_dicom
from simmim.data.picture import BadImage
from simmim.data.sources import ImageSource, Subset
from simmim.data.windows import Windows

_SUFFIXES = (".tif", ".tiff", ".gif", ".webp")
_LOOKED_AT = 16
_WINDOW = re.compile(r"#\d+$")


def say_pages(source: ImageSource) -> str | None:
    """Say in one line that files hold further pages, or frames, that are not read; `None` if none is found to.

    Some of the files that could are looked at, spread evenly over the source.
    """
    able = [index for index in range(len(source)) if _may_hold_several(_WINDOW.sub("", source.name(index)))]
    chosen = np.linspace(0, len(able) - 1, min(len(able), _LOOKED_AT)).round().astype(int)
    looked_at = {held.name(index): (held, index) for held, index in (_file_of(source, able[place]) for place in chosen)}
    found = {name: _count(*file) for name, file in looked_at.items()}
    several = {name: pages for name, pages in found.items() if pages > 1}
    if not several:
        return None
    name, pages = max(several.items(), key=lambda each: each[1])
    looked = f"{len(several)} of {len(found)} such files looked at" if len(found) > 1 else "one file"
    return (
        f"only the first page of each file is read, and {name} has {pages} ({looked}); to use all, save each page as a "
        "file of its own"
    )


def _file_of(source: ImageSource, index: int) -> tuple[ImageSource, int]:
    """Return the source that an image's file, or that of a window, is read from, and its number there."""
    while True:
        if isinstance(source, Subset):
            source, index = source.behind(index)
        elif isinstance(source, Windows):
            source, index = source.source, source.place(index)[0]
        else:
            return source, index


def _may_hold_several(name: str) -> bool:
    """Tell by its name whether a file may be of a format with pages."""
    return name.lower().endswith(_SUFFIXES) or may_be_dicom(name)


def _count(source: ImageSource, index: int) -> int:
    """Count the pages of a file, without the smaller copies of a TIFF pyramid; 0 for one that cannot be read."""
    try:
        raw = source.read(index)
        return count_pages(raw) if isinstance(raw, bytes | Path) else 1
    except (OSError, ValueError):
        return 0


def count_pages(raw: bytes | Path) -> int:
    """Count the images in a file, without the smaller copies of a TIFF pyramid. Raises `BadImage`."""
    from PIL import Image

    open_picture(raw)  # not bombs, nor formats that are not read
    if isinstance(raw, bytes) and raw[128:132] == b"DICM":
        return count_frames(io.BytesIO(raw))
    file = io.BytesIO(raw) if isinstance(raw, bytes) else raw
    try:
        image = Image.open(file)
        pages = int(getattr(image, "n_frames", 1))
        if image.format == "TIFF" and pages > 1:
            image.seek(1)
            return 1 if image.tag_v2.get(254, 0) & 1 else pages  # type: ignore[attr-defined]
        return pages
    except Image.UnidentifiedImageError:  # many bands: tifffile has read it
        import tifffile

        found: Any = tifffile.TiffFile(io.BytesIO(raw) if isinstance(raw, bytes) else raw).pages
        return 1 if len(found) > 1 and found[1].is_reduced else len(found)
    except Exception as error:
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from error
