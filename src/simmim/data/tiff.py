"""Decode TIFFs: plain ones by Pillow; those of many bands, deep colour or missing values (GeoTIFF) by tifffile.

Shapes: `H W` pixels, `C` channels.
"""

import io
import logging
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.data.decode import ORIENTATION_TAG, BadImage, Picture, check_size, identify, open_pillow, upright

_NODATA_TAG = 42113
"""GDAL's: the value of missing pixels, as text (https://gdal.org/en/stable/drivers/raster/gtiff.html)."""


def open_tiff(raw: bytes) -> Picture:
    """Read the header of a TIFF's first page. Raises `BadImage`.

    Missing values become the mean of the others of their band. They are those that equal GDAL's nodata tag, in each
    band of its own; with the tag also those that are no number. A page of which a band has no other values is bad.
    8-bit pictures of up to four bands stay as they are: there 0 is a colour.
    """
    try:
        import tifffile
    except ImportError:
        return _without_tifffile(raw)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file, `BadImage` says
    page: Any = tifffile.TiffFile(io.BytesIO(raw)).pages.first
    bands = page.samplesperpixel
    nodata = None if page.dtype is None else _parse_nodata(page.tags.valueof(_NODATA_TAG), page.dtype)
    if (nodata is None or page.bitspersample <= 8) and _pillow_reads(bands, page.bitspersample, page.extrasamples):
        return open_pillow(identify(raw))
    if page.dtype is None or page.axes not in ("YX", "YXS", "SYX"):
        raise BadImage(f"a TIFF page with axes {page.axes} and {page.bitspersample} bits is not read")
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        raise BadImage("a palette with nodata is not read; expand it, as by gdal_translate -expand rgb")
    if page.compression == tifffile.COMPRESSION.LERC and nodata != nodata:
        raise BadImage("LERC with NaN as nodata is not read, as tifffile drops its mask; compress with DEFLATE")
    check_size(page.imagelength, page.imagewidth, bands)
    orientation = int(page.tags.valueof(ORIENTATION_TAG, 1))
    height, width = (page.imagelength, page.imagewidth)[:: 1 if orientation < 5 else -1]

    def stored() -> NDArray[Any]:
        try:
            pixels = page.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise BadImage(f"{page.compression.name} needs imagecodecs; pip install simmim[data]") from None
            raise
        pixels = np.moveaxis(pixels, 0, -1) if page.axes == "SYX" else pixels
        return upright(pixels.reshape(*pixels.shape[:2], -1), orientation)

    unassociated_alpha = 2
    has_alpha = bands in (2, 4) and page.extrasamples == (unassociated_alpha,)
    colours = bands - has_alpha  # transparency is never missing

    def read(_: int) -> NDArray[Any]:
        pixels = stored()
        return pixels if nodata is None else _filled(pixels, _is_missing(pixels, nodata, colours))

    return Picture(
        height=height,
        width=width,
        bands=bands,
        has_alpha=has_alpha,
        dtype=page.dtype,
        read=read,
        missing=None if nodata is None else lambda: _is_missing(stored(), nodata, colours),
    )


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
        raise BadImage("has a band of nothing but nodata")
    means = np.mean(pixels, axis=(0, 1), dtype=np.float64, where=~missing)
    means = means if pixels.dtype.kind == "f" else np.rint(means)
    return np.where(missing, means.astype(pixels.dtype), pixels)
