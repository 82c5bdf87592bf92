"""Images in zip and tar archives, WebDataset's among them, read where they are.

The directory of an archive is read once. An image is then read by its place in the file, so that threads and processes
share nothing, and any image can be read first.
"""

import bisect
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simmim.data.decode import BadImage
from simmim.data.files import SUFFIXES, read_part
from simmim.data.names import Names
from simmim.errors import UserError

ARCHIVES = (".zip", ".tar")
"""Suffixes of archives whose images can be read one by one."""
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_LOCAL_HEADER, _LENGTHS = 30, slice(26, 30)  # bytes; lengths of name and extra field (APPNOTE.TXT, 4.3.7)
_LARGEST = 2**30  # bytes of an image file


class _Member(NamedTuple):
    name: str
    place: int
    """Offset of its bytes in a tar, of its header in a zip."""
    stored: int
    """Bytes in the archive."""
    size: int
    """Bytes of the file."""
    deflated: bool
    crc: int


class ArchiveImages:
    """Images of archives, by name within each; an `ImageSource`. A name is `ARCHIVE/NAME`."""

    def __init__(self, paths: Sequence[Path]):
        """Raise `UserError` for an archive that is damaged, encrypted, or holds no image."""
        self._paths = [str(path) for path in paths]
        self._ends, self._labels = [], []
        members: list[_Member] = []
        for path in paths:
            found, labels = _read_directory(path)
            members += found
            self._ends.append(len(members))
            self._labels += labels
        if not members:
            raise UserError(f"{self._paths[0]} holds no images; files read end in {', '.join(SUFFIXES)}")
        self._names = Names(member.name for member in members)
        self._places = array("Q", (member.place for member in members))
        self._stored = array("Q", (member.stored for member in members))
        self._sizes = array("Q", (member.size for member in members))
        self._deflated = array("B", (member.deflated for member in members))
        self._crcs = array("L", (member.crc for member in members))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self._archive(index)}/{self._names[index]}"

    def names(self) -> Sequence[str]:
        """Return the names of all images within their archives."""
        return self._names

    def labels(self) -> list[str] | None:
        """Return the text of the `.cls` file beside each image, as WebDataset has it; `None` if any has none."""
        return None if None in self._labels else [str(label) for label in self._labels]

    def parts(self) -> list[str]:
        """Return train, val or test for each image, where its archive's name begins so, else an empty word."""
        starts = [Path(path).name.lower() for path in self._paths]
        words = [next((part for part in ("train", "val", "test") if name.startswith(part)), "") for name in starts]
        return [words[self._number(index)] for index in range(len(self))]

    def read(self, index: int) -> bytes:
        path, place, size = self._archive(index), self._places[index], self._sizes[index]
        if max(size, self._stored[index]) > _LARGEST:
            raise BadImage(f"is a file of {size} bytes; {_LARGEST} are read at most")
        if not path.lower().endswith(".zip"):
            return _all_of(read_part(path, place, size), size)
        header = _all_of(read_part(path, place, _LOCAL_HEADER), _LOCAL_HEADER)
        place += _LOCAL_HEADER + sum(struct.unpack("<HH", header[_LENGTHS]))
        data = _all_of(read_part(path, place, self._stored[index]), self._stored[index])
        if self._deflated[index]:
            data = _inflate(data, size)
        if zlib.crc32(data) != self._crcs[index]:
            raise BadImage("does not match its checksum in the archive")
        return data

    def _archive(self, index: int) -> str:
        return self._paths[self._number(index)]

    def _number(self, index: int) -> int:
        return bisect.bisect_right(self._ends, range(len(self))[index])


def find_archives(folder: Path) -> list[Path]:
    """List the archives in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.name.lower().endswith(ARCHIVES) and path.is_file())


def _all_of(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise BadImage("lies beyond the end of its archive")
    return data


def _inflate(data: bytes, size: int) -> bytes:
    try:
        found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise BadImage(f"cannot be unpacked: {error}") from None
    if len(found) != size:
        raise BadImage("has another size than its archive says")
    return found


def _read_directory(path: Path) -> tuple[list[_Member], list[str | None]]:
    """List the images of an archive by name, and the label beside each."""
    try:
        members = list(_zipped(path) if path.name.lower().endswith(".zip") else _tarred(path))
        size = path.stat().st_size
    except UserError:
        raise
    except Exception as error:  # damaged files raise arbitrary errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as an archive ({reason}); copy it again, or write it anew") from error
    if beyond := next((each for each in members if not 0 <= each.place <= size - each.stored), None):
        raise UserError(f"{path} is cut off, and {beyond.name} beyond its end; copy it again")
    images = sorted((each for each in members if each.name.lower().endswith(SUFFIXES)), key=lambda each: each.name)
    texts = {_key(each.name): each for each in members if each.name.lower().endswith(".cls") and each.size <= 1000}
    return images, [_read_label(path, texts.get(_key(each.name))) for each in images]


def _read_label(path: Path, member: _Member | None) -> str | None:
    if member is None or member.deflated or path.name.lower().endswith(".zip"):
        return None
    return read_part(str(path), member.place, member.size).decode(errors="replace").strip()


def _key(name: str) -> str:
    """Return what the files of a WebDataset's sample share: the name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".")[0]


def _is_wanted(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/")) or name.startswith("__MACOSX/")
    return not hidden and name.lower().endswith((*SUFFIXES, ".cls"))


def _zipped(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        for each in archive.infolist():
            if not _is_wanted(each.filename):
                continue
            if each.flag_bits & 1:
                raise UserError(f"{path} is encrypted; unpack it and give the folder")
            if each.compress_type not in (_STORED, _DEFLATED):
                raise UserError(
                    f"{path} is compressed by method {each.compress_type}, which is not read; unpack it, or zip again "
                    "by deflate or without compression"
                )
            yield _Member(
                each.filename,
                each.header_offset,
                each.compress_size,
                each.file_size,
                each.compress_type == _DEFLATED,
                each.CRC,
            )


def _tarred(path: Path) -> Iterator[_Member]:
    archive: Any
    with tarfile.open(path, "r:") as archive:  # not compressed: an image must be found without reading those before it
        for each in archive:
            archive.members = []  # which would hold every header in memory
            name = each.name.removeprefix("./")
            if each.isreg() and not each.issparse() and _is_wanted(name):
                yield _Member(name, each.offset_data, each.size, each.size, False, 0)
