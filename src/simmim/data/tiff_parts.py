"""Read a part of a TIFF's page: only the tiles or strips that it touches are read and decoded.

Shapes: `H W` pixels, `C` bands.
"""

import io
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.files import read_part, try_again
from simmim.data.picture import ORIENTATION_TAG, BadImage, Part, check_size, upright, upright_size

Fetch = Callable[[int, int], bytes]
"""Place and count of bytes in a file → those bytes."""


class Page:
    """A page of a TIFF whose file is closed, and what of its header a part takes."""

    def __init__(self, page: Any, orientation: int):
        """Raises `BadImage` for pixels that are not read."""
        if page.dtype is None or page.axes not in ("YX", "YXS", "SYX") or page.imagedepth != 1:
            raise BadImage(f"a TIFF page with axes {page.axes} and {page.bitspersample} bits is not read")
        self.page, self.orientation = page, orientation
        self.stored_height, self.stored_width, self.bands = page.imagelength, page.imagewidth, page.samplesperpixel
        self.height, self.width = upright_size(page.imagelength, page.imagewidth, orientation)
        self.dtype = np.dtype(page.dtype)
        self._planes = self.bands if page.axes == "SYX" else 1
        self._chunk_height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        self._chunk_width = page.tilewidth if page.is_tiled else page.imagewidth
        # All that comes from the file, while it is open.
        self._places, self._counts = (np.array(each, np.uint64) for each in (page.dataoffsets, page.databytecounts))
        self._decode, self._nodata = page.decode, page.nodata
        self._tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if _is_jpeg(page) else {}
        self._stored_rows = self._are_rows_stored()

    def read(self, part: Part, fetch: Fetch) -> NDArray[Any]:
        """Return the stored values of a part of the upright page, upright: (h, w, C). Raises `BadImage`."""
        top, left, height, width = turned_back(part, self.height, self.width, self.orientation)
        found = np.empty((height, width, self.bands), self.dtype)
        for plane in range(self._planes):
            bands = slice(plane, plane + 1) if self._planes > 1 else slice(None)
            for row, column, pixels in self._chunks(plane, (top, left, height, width), fetch):
                above, before = max(top - row, 0), max(left - column, 0)
                pixels = pixels[above : top + height - row, before : left + width - column]
                down, right = row + above - top, column + before - left
                found[down : down + pixels.shape[0], right : right + pixels.shape[1], bands] = pixels
        return upright(found, self.orientation)

    def _chunks(self, plane: int, part: Part, fetch: Fetch) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """Yield the tiles or strips of a plane that a part touches: first row, first column and pixels (h, w, c)."""
        top, left, height, width = part
        down, across = -(-self.stored_height // self._chunk_height), -(-self.stored_width // self._chunk_width)
        if not self._stored_rows:
            check_size(self._chunk_height, self._chunk_width, self.bands // self._planes)
        for y in range(top // self._chunk_height, (top + height - 1) // self._chunk_height + 1):
            if self._stored_rows:
                first = max(top, y * self._chunk_height)
                last = min(top + height, (y + 1) * self._chunk_height)
                yield first, 0, self._rows(plane * down + y, first - y * self._chunk_height, last - first, fetch)
                continue
            for x in range(left // self._chunk_width, (left + width - 1) // self._chunk_width + 1):
                yield y * self._chunk_height, x * self._chunk_width, self._chunk((plane * down + y) * across + x, fetch)

    def _chunk(self, number: int, fetch: Fetch) -> NDArray[Any]:
        """Decode a tile or strip: (h, w, c), without what lies beyond the page."""
        place, count = self._extent(number)
        data = fetch(place, count) if count else None
        if count and len(data or b"") < count:
            raise BadImage(f"the file is truncated within tile or strip {number}")
        try:
            pixels, _, shape = self._decode(data, number, **self._tables)
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise BadImage(f"{self.page.compression.name} needs imagecodecs; pip install simmim[data]") from None
            raise
        if pixels is None:  # a sparse file leaves it out
            return np.full(shape[1:], self._nodata, self.dtype)
        return pixels[0]

    def _rows(self, strip: int, first: int, count: int, fetch: Fetch) -> NDArray[Any]:
        """Read rows of a strip that is not compressed: (h, W, c)."""
        samples = self.bands // self._planes
        size = self.stored_width * samples * self.dtype.itemsize
        place, held = self._extent(strip)
        if not held:  # a sparse file leaves it out
            return np.full((count, self.stored_width, samples), self._nodata, self.dtype)
        data = fetch(place + first * size, count * size) if (first + count) * size <= held else b""
        if len(data) < count * size:
            raise BadImage(f"the file is truncated within strip {strip}")
        stored = np.frombuffer(data, self.dtype.newbyteorder(self.page.parent.byteorder))
        return stored.reshape(count, self.stored_width, samples).astype(self.dtype, copy=False)

    def _extent(self, number: int) -> tuple[int, int]:
        if number >= min(len(self._places), len(self._counts)):
            raise BadImage(f"tile or strip {number} is not in the file")
        return int(self._places[number]), int(self._counts[number])

    def _are_rows_stored(self) -> bool:
        """Tell whether rows lie in the file as they are, so that a strip need not be read whole."""
        page = self.page
        plain = (page.compression, page.predictor, page.fillorder) == (1, 1, 1) and not page.is_tiled
        sampled = page.photometric == 6 and page.subsampling not in (None, (1, 1))  # YCbCr of fewer values
        return plain and not sampled and page.bitspersample == 8 * self.dtype.itemsize


def _is_jpeg(page: Any) -> bool:
    return int(page.compression) in (6, 7, 34892, 33007)


def turned_back(part: Part, height: int, width: int, orientation: int) -> Part:
    """Return the part of the stored image that is `part` when an EXIF rotation is undone; sizes are upright."""
    top, left, rows, columns = part
    if orientation in (3, 4, 7, 8):
        top = height - top - rows
    if orientation in (2, 3, 6, 7):
        left = width - left - columns
    return (left, top, columns, rows) if orientation in (5, 6, 7, 8) else (top, left, rows, columns)


class Header:
    """The header of a TIFF, whose file is closed: its first page as tifffile has it, and the smaller copies of it."""

    def __init__(self, file: Any):
        """Read it of anything that tifffile opens."""
        import tifffile

        with tifffile.TiffFile(file) as tiff:
            self.first: Any = tiff.pages.first
            self.smaller = tuple(_smaller_copies(tiff, self.first))
            for page in (self.first, *self.smaller):
                # Read now what tifffile would read from the file later.
                _ = page.dataoffsets, page.databytecounts, page.jpegtables, page.jpegheader, page.nodata, page.decode

    @property
    def orientation(self) -> int:
        stored = self.first.tags.valueof(ORIENTATION_TAG, 1)
        return stored if stored in range(1, 9) else 1

    @cached_property
    def levels(self) -> list[Page]:
        """The first page, and its smaller copies. Raises `BadImage` for pixels that are not read."""
        return [Page(page, self.orientation) for page in (self.first, *self.smaller)]

    def level(self, reduction: int) -> Page:
        """Return the smallest level with at least 1/`reduction` of the first one's sides."""
        first = self.levels[0]
        least = (first.height // reduction, first.width // reduction)
        return min(
            (level for level in self.levels if level.height >= least[0] and level.width >= least[1]),
            key=lambda level: level.height,
        )


def _smaller_copies(tiff: Any, first: Any) -> Iterator[Any]:
    """Yield the further levels of a pyramid: SubIFDs, as in an OME-TIFF, a COG's overviews, or the pages of an SVS.

    The pages of a file are listed only if the second is one of these: a stack may have thousands.
    """
    if first.subifds:
        pages = (page.aspage() for page in first.pages)
    elif tiff.is_svs or _is_second_reduced(tiff):
        pages = (level.pages[0].aspage() for level in tiff.series[0].levels[1:])
    else:
        return
    for page in pages:
        kind = (page.axes, page.dtype, page.samplesperpixel, page.photometric)
        if kind == (first.axes, first.dtype, first.samplesperpixel, first.photometric):
            yield page


def _is_second_reduced(tiff: Any) -> bool:
    try:
        return tiff.pages[1].is_reduced
    except IndexError:
        return False


@lru_cache(maxsize=32)
def _cached(path: str, *_: int) -> Header:
    return Header(path)


def header_of(raw: bytes | str) -> Header:
    """Read the header of a file in memory, or of one on disk, by its path.

    Those of a few files on disk are kept, since that of a large one takes long to read.
    """
    if isinstance(raw, bytes):
        return Header(io.BytesIO(raw))
    status = try_again(Path(raw).stat)
    return try_again(lambda: _cached(raw, status.st_size, status.st_mtime_ns))


def fetch_from(raw: bytes | str) -> Fetch:
    """Return what reads bytes of a file that is in memory, or of one on disk, by its path."""
    if isinstance(raw, bytes):
        return lambda place, count: raw[place : place + count]
    return lambda place, count: read_part(raw, place, count)
