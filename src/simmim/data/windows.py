"""Windows of images at full resolution, for scenes that are too large to be resized or read whole.

An image counts as windows NAME#0, NAME#1, …, as many as its area holds. Each epoch draws a place anew for each of them,
by its key. Windows that are kept aside, and those that statistics are measured from, have a place that stays.

Shapes: `H W` pixels; a size is (H, W).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.data.augment import Box, check_crop_size
from simmim.data.decode import count_pixels, open_picture
from simmim.data.files import PathList, in_threads
from simmim.data.picture import BadImage, BlameTheImage, NothingButNodata, Picture, Raw
from simmim.data.sources import ImageSource, firsts_of, read_raw
from simmim.data.video.source import Clips
from simmim.data.volumes import Slices
from simmim.method.random_keys import draws, sample_key

MOST = 10_000
"""Windows of an image in an epoch, at most."""
_TRIES = 20
"""Places to draw before an image is given up as one of nothing but missing values."""


@dataclass(frozen=True, kw_only=True)
class RandomWindow:
    """Window of `size` pixels at a place drawn uniformly, which is not resized. Raises `UserError`.

    An image with a shorter side is enlarged until the window fits into it.
    """

    size: tuple[int, int]

    def __post_init__(self) -> None:
        check_crop_size(self.size)

    def cut(self, raw: Raw, key: int) -> Picture:
        """Read a window of an image by its key, as a picture of its own. Raises `BadImage`."""
        return self.draw(open_picture(raw), key)[1]

    def draw(self, picture: Picture, key: int) -> tuple[Box, Picture]:
        """Do what `cut` does, and return the window's place too.

        A place is drawn again where a band would hold nothing but missing values, or where the window would share
        pixels with one that is kept apart; up to 20 times, the last of them whatever it shares.
        """
        height, width = _sides(picture.height, picture.width, self.size)
        for first in range(0, 2 * _TRIES, 2):
            down, right = draws(key, first, 2)
            top, left = int(down * (picture.height - height + 1)), int(right * (picture.width - width + 1))
            box = Box(top, left, height, width)
            if first < 2 * (_TRIES - 1) and any(_share_pixels(box, Box(*each)) for each in picture.apart):
                continue
            try:
                return box, picture.cut(box)
            except NothingButNodata:
                continue
        raise BadImage(f"{_TRIES} windows drawn in it have a band of nothing but nodata")


def middle_window(raw: Raw, size: tuple[int, int]) -> Picture:
    """Read the window of `size` pixels in the middle of an image, as a picture. Raises `BadImage`.

    An image with a shorter side is enlarged, as by `RandomWindow`.
    """
    picture = open_picture(raw)
    height, width = _sides(picture.height, picture.width, size)
    return picture.cut(Box((picture.height - height) // 2, (picture.width - width) // 2, height, width))


def _sides(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the window's sides in pixels of an image: `size`, or less in one that has to be enlarged."""
    enlarged = max(1.0, size[0] / height, size[1] / width)
    return min(height, max(1, round(size[0] / enlarged))), min(width, max(1, round(size[1] / enlarged)))


def _share_pixels(one: Box, other: Box) -> bool:
    rows = min(one.top + one.height, other.top + other.height) - max(one.top, other.top)
    columns = min(one.left + one.width, other.left + other.width) - max(one.left, other.left)
    return rows > 0 and columns > 0


class Windows:
    """The windows of a source's images; an `ImageSource` that reads the image of which one is."""

    def __init__(self, source: ImageSource, size: tuple[int, int]):
        """Read the header of every image, to count its windows of `size` pixels; a broken one counts as one window."""
        counts = in_threads(lambda image: _count(source, image, size), len(source))
        self.source, self.size = source, size
        self._firsts = [0, *accumulate(counts)]
        self._apart: dict[int, tuple[Box, ...]] = {}

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def firsts(self) -> list[int]:
        """The numbers of the first windows of files."""
        return [self._firsts[image] for image in firsts_of(self.source)]

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of the image of which a window is, and the window's number in it."""
        image = bisect_right(self._firsts, index) - 1
        return image, index - self._firsts[image]

    def name(self, index: int) -> str:
        image, number = self.place(index)
        return f"{self.source.name(image)}#{number}"

    def read(self, index: int) -> Raw:
        image, _ = self.place(index)
        raw = self.source.read(image)
        return replace(open_picture(raw), apart=self._apart[image]) if image in self._apart else raw

    def keep_apart(self, still: "StillWindows", indices: NDArray[np.integer]) -> None:
        """Let random windows share no pixels with some that have a place."""
        for index in map(int, indices):
            try:
                box, image = still.draw(index)[0], self.place(index)[0]
            except BadImage:
                continue  # it is listed when it is read
            self._apart[image] = (*self._apart.get(image, ()), box)


class StillWindows:
    """Windows that have a place of their own, the same in every epoch; an `ImageSource`."""

    def __init__(self, windows: Windows, seed: int):
        self._windows, self._seed = windows, seed

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def firsts(self) -> list[int]:
        return self._windows.firsts

    def name(self, index: int) -> str:
        return self._windows.name(index)

    def read(self, index: int) -> Picture:
        return self.draw(index)[1]

    def draw(self, index: int) -> tuple[Box, Picture]:
        """Read a window; its place, and its pixels. Raises `BadImage`."""
        windows = self._windows
        picture = open_picture(read_raw(windows.source, windows.place(index)[0]))
        return RandomWindow(size=windows.size).draw(picture, sample_key(self._seed, 0, index, stream="still window"))


class MiddleWindows:
    """The window in the middle of each image of a source; an `ImageSource`."""

    def __init__(self, source: ImageSource, size: tuple[int, int]):
        self._source, self._size = source, size

    def __len__(self) -> int:
        return len(self._source)

    @property
    def firsts(self) -> Sequence[int]:
        return firsts_of(self._source)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def read(self, index: int) -> Picture:
        return middle_window(read_raw(self._source, index), self._size)


class GridWindows:
    """Windows side by side, which cover each image of a source; an `ImageSource`.

    The last of a row or column may overlap the one before. A name is NAME@ROW,COLUMN, of a window's first pixel.
    """

    def __init__(self, source: ImageSource, size: tuple[int, int]):
        """Read the size of each file's first image, which its others share; one that is broken has one window."""
        self._source, self._size = source, size
        files = [*firsts_of(source)]
        sizes = in_threads(lambda file: _read_size(source, files[file]), len(files))
        ends = [*files[1:], len(source)]
        self._sizes = [size for first, end, size in zip(files, ends, sizes, strict=True) for _ in range(first, end)]
        self._firsts = [0, *accumulate(rows * columns for rows, columns in map(self._layout, self._sizes))]
        self.firsts = [self._firsts[image] for image in files]
        """The numbers of the first windows of files."""
        self._opened = lru_cache(maxsize=2)(self._open)  # the image that is read, and the next

    def __len__(self) -> int:
        return self._firsts[-1]

    def name(self, index: int) -> str:
        image, box = self._place(index)
        return f"{self._source.name(image)}@{box.top},{box.left}"

    def read(self, index: int) -> Picture:
        image, box = self._place(index)
        return self._opened(image).cut(box)

    def _open(self, image: int) -> Picture:
        """Open an image, whose pixels are read here unless parts of it can be read alone. Raises `BadImage`."""
        picture = open_picture(read_raw(self._source, image))
        if (picture.height, picture.width) != self._sizes[image]:
            raise BadImage("is not of the size of the first image of its file")
        if picture.part is not None:
            return picture
        with BlameTheImage():
            pixels = picture.read(1)
        return replace(picture, read=lambda _: pixels)

    def _layout(self, size: tuple[int, int]) -> tuple[int, int]:
        """Count the rows and columns of windows of an image."""
        height, width = _sides(*size, self._size)
        return ceil(size[0] / height), ceil(size[1] / width)

    def _place(self, index: int) -> tuple[int, Box]:
        """Return the number of the image of which a window is, and the window's place."""
        image = bisect_right(self._firsts, range(len(self))[index]) - 1
        size = self._sizes[image]
        height, width = _sides(*size, self._size)
        row, column = divmod(index - self._firsts[image], self._layout(size)[1])
        return image, Box(min(row * height, size[0] - height), min(column * width, size[1] - width), height, width)


def _read_size(source: ImageSource, image: int) -> tuple[int, int]:
    """Read the height and width of an image; (1, 1) of one that cannot be read."""
    try:
        picture = open_picture(read_raw(source, image))
        return picture.height, picture.width
    except BadImage:
        return 1, 1


def _count(source: ImageSource, image: int, size: tuple[int, int]) -> int:
    """Count an image's windows in an epoch: as many as its area holds, at least 1 and at most `MOST`."""
    try:
        if isinstance(source, PathList):
            area = count_pixels(Path(source.name(image)))
        elif isinstance(source, Slices | Clips):
            area = source.count_pixels(image)
        else:
            picture = open_picture(read_raw(source, image))
            area = picture.height * picture.width
    except BadImage:
        return 1
    return min(max(area // (size[0] * size[1]), 1), MOST)
