"""Decode TIFFs: plain ones by Pillow; those of many bands, deep colour or missing values (GeoTIFF) by tifffile.

Shapes: `H W` pixels, `C` channels.
"""

import importlib.util
import logging
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.data.files import read_file
from simmim.data.picture import BadImage, NothingButNodata, Part, Picture, check_size
from simmim.data.pillow import identify, open_pillow
from simmim.data.tiff_parts import fetch_from, header_of

_NODATA_TAG = 42113
"""GDAL's: the value of missing pixels, as text (https://gdal.org/en/stable/drivers/raster/gtiff.html)."""
_UNASSOCIATED_ALPHA = 2


def open_tiff(raw: bytes | str) -> Picture:
    """Read the header of a TIFF's first page, of a file's bytes or by its path. Raises `BadImage`.

    Missing values become the mean of the others of their band. They are those that equal GDAL's nodata tag, in each
    band of its own; with the tag also those that are no number. A page of which a band has no other values is bad.
    8-bit pictures of up to four bands stay as they are: there 0 is a colour. Of a pyramid the smallest level is read
    that has the reduced size.
    """
    try:
        import tifffile
    except ImportError:
        return _without_tifffile(_whole(raw))
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file, `BadImage` says
    header = header_of(raw)
    page, fetch = header.first, fetch_from(raw)
    bands = page.samplesperpixel
    nodata = None if page.dtype is None else _parse_nodata(page.tags.valueof(_NODATA_TAG), page.dtype)
    if (nodata is None or page.bitspersample <= 8) and _pillow_reads(bands, page.bitspersample, page.extrasamples):
        nodata = None
        if not _stores_what_is_shown(page):
            return open_pillow(identify(_whole(raw)))
    elif page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        raise BadImage("a palette with nodata is not read; expand it, as by gdal_translate -expand rgb")
    if page.compression == tifffile.COMPRESSION.LERC and nodata != nodata:
        raise BadImage("LERC with NaN as nodata is not read, as tifffile drops its mask; compress with DEFLATE")
    first = header.levels[0]
    has_alpha = bands in (2, 4) and page.extrasamples == (_UNASSOCIATED_ALPHA,)
    colours = bands - has_alpha  # transparency is never missing

    def stored(reduction: int = 1) -> NDArray[Any]:
        level = header.level(reduction)
        check_size(level.height, level.width, bands)
        if level is first and _pillow_is_faster(page):
            return open_pillow(identify(_whole(raw))).read(1)
        return level.read((0, 0, level.height, level.width), fetch)

    def read(reduction: int) -> NDArray[Any]:
        pixels = stored(reduction)
        return pixels if nodata is None else _filled(pixels, _is_missing(pixels, nodata, colours))

    def part(where: Part) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        check_size(*where[2:], bands)
        pixels = first.read(where, fetch)
        if nodata is None:
            return pixels, None
        missing = _is_missing(pixels, nodata, colours)
        return _filled(pixels, missing), missing

    return Picture(
        height=first.height,
        width=first.width,
        bands=bands,
        has_alpha=has_alpha,
        dtype=first.dtype,
        read=read,
        missing=None if nodata is None else lambda: _is_missing(stored(), nodata, colours),
        part=part,
    )


def _whole(raw: bytes | str) -> bytes:
    return raw if isinstance(raw, bytes) else read_file(raw)


def _pillow_is_faster(page: Any) -> bool:
    """Tell whether Pillow takes half of tifffile's time for a whole page: 8-bit LZW, bands beside each other."""
    return page.compression == 5 and page.dtype == np.uint8 and page.axes != "SYX" and page.samplesperpixel in (1, 3)


def _stores_what_is_shown(page: Any) -> bool:
    """Tell whether the stored values are grey or RGB as they are, and tifffile decodes them, also a part of them.

    Pillow converts others: palettes, CMYK, inverted greys, single bits, associated transparency.
    """
    alpha = (_UNASSOCIATED_ALPHA,)
    bands = (page.samplesperpixel, page.extrasamples) in ((1, ()), (2, alpha), (3, ()), (4, alpha))
    colour = page.photometric in (1, 2) or (page.photometric == 6 and page.compression == 7)  # grey, RGB, JPEG's YCbCr
    bits = page.dtype is not None and page.bitspersample == 8 * np.dtype(page.dtype).itemsize
    decodes = page.compression in (1, 8, 32946) or _has_imagecodecs()
    if page.compression == 7 and page.axes == "SYX":
        return False  # tifffile takes each plane for RGB
    return decodes and bands and colour and bits and page.dtype in (np.uint8, np.uint16, np.int16, np.int32, np.float32)


def _without_tifffile(raw: bytes) -> Picture:
    image: Any = identify(raw)
    tags = image.tag_v2
    bits = max(tags.get(258, (1,)))
    if (_NODATA_TAG in tags and bits > 8) or not _pillow_reads(tags.get(277, 1), bits, tags.get(338, ())):
        raise BadImage("a TIFF with many bands, deep colour or nodata needs tifffile; pip install simmim[data]")
    return open_pillow(image)


def _pillow_reads(bands: int, bits: int, extra: tuple[int, ...]) -> bool:
    """Return whether Pillow keeps every bit: it drops low bytes of deep colour, and bands of unknown meaning (0)."""
    return (bands == 1 and bits <= 32) or (bands <= 4 and bits <= 8 and 0 not in extra)


@cache
def _has_imagecodecs() -> bool:
    return importlib.util.find_spec("imagecodecs") is not None


def _parse_nodata(text: Any, dtype: DTypeLike) -> Any:
    """Return the nodata value that pixels of a dtype are compared with; `None` where none can equal it."""
    try:
        value = float(str(text).strip(" \0"))
    except ValueError:
        return None
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(value)
    holds = dtype.kind in "iu" and value.is_integer() and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
    return dtype.type(int(value)) if holds else None


def _is_missing(pixels: NDArray[Any], nodata: Any, colours: int) -> NDArray[np.bool_]:
    missing = pixels == nodata
    if pixels.dtype.kind == "f":
        missing |= np.isnan(pixels)
    missing[..., colours:] = False
    return missing


def _filled(pixels: NDArray[Any], missing: NDArray[np.bool_]) -> NDArray[Any]:
    """Put the mean of a band's other values in the place of those that are missing."""
    if not missing.any():
        return pixels
    if missing.all(axis=(0, 1)).any():
        raise NothingButNodata("has a band of nothing but nodata")
    means = np.mean(pixels, axis=(0, 1), dtype=np.float64, where=~missing)
    means = means if pixels.dtype.kind == "f" else np.rint(means)
    return np.where(missing, means.astype(pixels.dtype), pixels)
