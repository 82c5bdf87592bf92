"""Files of several images: the slices of a NIfTI volume, and the frames of a DICOM file.

Of a volume each axial slice is an image, anterior up and the patient's left on the left. nibabel reads headers and
values. Of a `.nii` one slice is read; a `.nii.gz` is decompressed whole, and a few such volumes are kept in memory for
the slices that are asked for next.

Shapes: `H W` pixels; a volume is (i, j, k) or (i, j, k, time), as stored.
"""

import logging
import threading
from bisect import bisect_right
from collections import OrderedDict
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.decode import count_pixels
from simmim.data.dicom import DICOM_SUFFIXES, count_frames_of, may_be_dicom, read_frame
from simmim.data.files import PathList, in_threads, try_again
from simmim.data.picture import BadImage, Raw, check_size

SUFFIXES = (".nii", ".nii.gz")
_KEPT = 1 << 29
"""Bytes of decompressed volumes that a process keeps, at least one volume."""
_LARGEST = 1 << 33
"""Bytes of a decompressed volume, against files that claim any size."""


def is_volume(name: str) -> bool:
    """Tell whether a file is a NIfTI volume, by its name."""
    return name.lower().endswith(SUFFIXES)


def as_slices(source: PathList) -> "PathList | Slices":
    """Return files of which some hold several images as all of these; the same files where none does."""
    has_volumes = source.may_mention(SUFFIXES[0]) and any(map(is_volume, map(source.name, range(len(source)))))
    unnamed = len(source) > 0 and may_be_dicom(source.name(0))  # DICOM without suffixes
    if not (has_volumes or unnamed or any(map(source.may_mention, DICOM_SUFFIXES))):
        return source
    found = Slices(source)
    return found if has_volumes or len(found) > len(source) else source


class Slices:
    """The slices of volumes and the frames of DICOM files, named PATH#000, PATH#001, …, and other files.

    An `ImageSource`.
    """

    def __init__(self, files: PathList):
        """Read the header of each such file, to count its images; one that is broken counts as one."""
        self.files = files
        self._firsts = [0, *accumulate(in_threads(lambda number: _count(files.name(number)), len(files)))]

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def firsts(self) -> list[int]:
        """The numbers of the first images of files."""
        return self._firsts[:-1]

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of an image's file, and that of the slice in it."""
        number = bisect_right(self._firsts, index) - 1
        return number, index - self._firsts[number]

    def name(self, index: int) -> str:
        number, image = self.place(index)
        name = self.files.name(number)
        return f"{name}#{image:03d}" if self._is_one_of_several(number) or is_volume(name) else name

    def count_pixels(self, index: int) -> int:
        """Count an image's pixels, by its header where that is enough. Raises `BadImage`."""
        number, _ = self.place(index)
        name = self.files.name(number)
        if not is_volume(name):
            return _count_pixels(name)
        rows, columns = slice_size(name)
        return rows * columns

    def read(self, index: int) -> Raw:
        number, image = self.place(index)
        name = self.files.name(number)
        if is_volume(name):
            return read_slice(name, image)
        return read_frame(name, image) if self._is_one_of_several(number) else self.files.read(number)

    def _is_one_of_several(self, number: int) -> bool:
        return self._firsts[number + 1] - self._firsts[number] > 1


@lru_cache(maxsize=256)
def _count_pixels(path: str) -> int:
    return count_pixels(Path(path))


class _Blame:
    """Turn nibabel's errors into `BadImage`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadImage | OSError):
            reason = " ".join(str(error).split())[:200]
            raise BadImage(f"is a damaged NIfTI file ({reason or type(error).__name__})") from None


@cache
def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError:
        raise BadImage("a NIfTI file needs nibabel; pip install 'simmim[medical]'") from None
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    return nibabel


def _open(path: str) -> Any:
    """Read the header of a volume. Raises `BadImage`, or `OSError`."""
    if not Path(path).is_file():
        raise BadImage("is no file")
    with _Blame():
        image = try_again(lambda: _nibabel().load(path))
        if len(image.shape) < 2 or 0 in image.shape:
            raise BadImage(f"is a volume of shape {image.shape}, which has no slices")
        if image.get_data_dtype().kind not in "iuf":
            raise BadImage(f"holds {image.get_data_dtype()} values, which are not read; save them as float32")
        return image


def _axial_axis(image: Any) -> tuple[int, NDArray[np.float64]]:
    """Return the stored axis that is nearest to foot → head, and nibabel's orientations of all three."""
    orientation = _nibabel().orientations.io_orientation(image.affine)
    if np.isnan(orientation).any():
        raise BadImage("has an affine that gives an axis no direction")
    return int(np.flatnonzero(orientation[:, 0] == 2)[0]), orientation


def _count(path: str) -> int:
    if not is_volume(path):
        return count_frames_of(path) if may_be_dicom(path) else 1
    try:
        image = _open(path)
        with _Blame():
            axis, _ = _axial_axis(image)
            shape = _shape(image)
            return shape[axis] * shape[3]
    except (BadImage, OSError):
        return 1


@lru_cache(maxsize=256)
def slice_size(path: str) -> tuple[int, int]:
    """Read how large the slices of a volume are, two sides in the order of the file. Raises `BadImage`."""
    image = _open(path)
    with _Blame():
        return _plane(image, _axial_axis(image)[0])


def _shape(image: Any) -> tuple[int, int, int, int]:
    """Return the sides of a volume and the number of volumes, whatever dimensions a file has."""
    i, j, k, *times = (*image.shape, 1)[: max(3, len(image.shape))]
    return i, j, k, int(np.prod(times, dtype=object))


def read_slice(path: str, number: int) -> NDArray[np.float32]:
    """Read a slice, (H, W): slices count from the feet up, all of the first time, then of the next.

    Values are stored value · scl_slope + scl_inter. Raises `BadImage`, or `OSError`.
    """
    image = _open(path)
    with _Blame():
        axis, orientation = _axial_axis(image)
        shape = _shape(image)
        time, level = divmod(number, shape[axis])
        check_size(*_plane(image, axis), 1)
        place = level if orientation[axis, 1] > 0 else shape[axis] - 1 - level
        stored = _stored(path, image, axis, place, time).astype(np.float64)
        slope, inter = image.dataobj.slope, image.dataobj.inter
        values = (stored * slope + inter).astype(np.float32)
        first, second = (orientation[each] for each in range(3) if each != axis)
        values = values[:: int(first[1]), :: int(second[1])]
        # Now both axes grow towards right (0) and anterior (1), in either order: rows go from anterior to posterior.
        values = values if first[0] == 1 else values.T
        return np.ascontiguousarray(values[::-1])


def _stored(path: str, image: Any, axis: int, place: int, time: int) -> NDArray[Any]:
    """Return the stored values of a slice, two axes in the order of the file."""
    where: list[Any] = [slice(None)] * 3
    where[axis] = place
    if not path.lower().endswith(".gz"):
        times = np.unravel_index(time, image.shape[3:], order="F") if len(image.shape) > 3 else ()
        index = (*where[: len(image.shape)], *map(int, times))
        found = image.dataobj.get_unscaled() if len(image.shape) < 3 else _unscaled(image, index)
        return found if found.ndim == 2 else found.reshape(_plane(image, axis))
    return _VOLUMES.get(path, image)[(*where, time)]


def _plane(image: Any, axis: int) -> tuple[int, int]:
    first, second = (side for place, side in enumerate(_shape(image)[:3]) if place != axis)
    return first, second


def _unscaled(image: Any, index: tuple[Any, ...]) -> NDArray[Any]:
    """Read part of an uncompressed file without its scale."""
    nibabel = _nibabel()
    proxy = image.dataobj
    with open(image.get_filename(), "rb") as file:  # noqa: PTH123
        return nibabel.fileslice.fileslice(file, index, proxy.shape, proxy.dtype, proxy.offset, order="F")


class _Volumes:
    """Decompressed volumes, the ones used last, of up to `_KEPT` bytes."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, path: str, image: Any) -> NDArray[Any]:
        """Return the stored values of a file, (i, j, k, time)."""
        key = (path, Path(path).stat().st_mtime_ns)
        with self._lock:
            one = self._locks.setdefault(path, threading.Lock())
        with one:  # a volume is decompressed once, whoever waits for it
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key]
            size = int(np.prod(image.shape, dtype=object)) * image.get_data_dtype().itemsize
            if size > _LARGEST:
                raise BadImage(f"holds {size / 2**30:.0f} GiB when decompressed; gunzip it")
            values = np.asarray(image.dataobj.get_unscaled()).reshape(_shape(image), order="F")
            with self._lock:
                self._held[key] = values
                while len(self._held) > 1 and sum(each.nbytes for each in self._held.values()) > _KEPT:
                    self._held.popitem(last=False)
            return values


_VOLUMES = _Volumes()
