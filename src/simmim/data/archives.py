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

from simmim.data.files import SOUND_SUFFIXES, SUFFIXES, find_images, of_one_kind, read_part
from simmim.data.names import Names
from simmim.data.picture import BadImage
from simmim.errors import UserError

ARCHIVES = (".zip", ".tar")
"""Suffixes of archives whose images can be read one by one."""
_LABEL = ".cls"
_READ = (*SUFFIXES, *SOUND_SUFFIXES)
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
    crc: int | None
    """Checksum; a tar has none."""


class ArchiveImages:
    """Images of archives, or sounds where there are none, by name within each; an `ImageSource`.

    A name is `ARCHIVE/NAME`.
    """

    def __init__(self, paths: Sequence[Path]):
        """Raise `UserError` for an archive that is damaged or encrypted, or where none holds an image."""
        self._paths = [str(path) for path in paths]
        self._ends: list[int] = []
        self._texts: list[dict[str, _Member]] = []  # WebDataset's labels, by the key of a sample
        members: list[_Member] = []
        directories = [_read_directory(path) for path in paths]
        kept = set(of_one_kind([member.name for found in directories for member in found]))
        for found in directories:
            members += sorted((each for each in found if each.name in kept), key=lambda each: each.name)
            self._ends.append(len(members))
            self._texts.append({_key(each.name): each for each in found if each.name.lower().endswith(_LABEL)})
        if not members:
            raise UserError(f"{self._paths[0]} holds no images; files read end in {', '.join(SUFFIXES)}")
        self._names = Names(member.name for member in members)
        self._places = array("Q", (member.place for member in members))
        self._stored = array("Q", (member.stored for member in members))
        self._sizes = array("Q", (member.size for member in members))
        self._deflated = array("B", (member.deflated for member in members))
        self._crcs = array("q", (-1 if member.crc is None else member.crc for member in members))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self._paths[self._number(index)]}/{self._names[index]}"

    def names(self) -> Sequence[str]:
        """Return the names of all images within their archives."""
        return self._names

    def labels(self) -> list[str] | None:
        """Read the text of the `.cls` file beside each image, as WebDataset has it; `None` if any image has none."""
        found = []
        for index, name in enumerate(self._names):
            number = self._number(index)
            member = self._texts[number].get(_key(name))
            if member is None:
                return None
            found.append(_read_member(self._paths[number], member).decode(errors="replace").strip())
        return found

    def parts(self) -> list[str]:
        """Return train, val or test for each image, where its archive's name begins so, else an empty word."""
        starts = [Path(path).name.lower() for path in self._paths]
        words = [next((part for part in ("train", "val", "test") if name.startswith(part)), "") for name in starts]
        return [words[self._number(index)] for index in range(len(self))]

    def read(self, index: int) -> bytes:
        crc = self._crcs[index]
        member = _Member(
            self._names[index],
            self._places[index],
            self._stored[index],
            self._sizes[index],
            bool(self._deflated[index]),
            None if crc < 0 else crc,
        )
        return _read_member(self._paths[self._number(index)], member)

    def _number(self, index: int) -> int:
        return bisect.bisect_right(self._ends, range(len(self))[index])


def open_archives(path: Path) -> ArchiveImages | None:
    """Open an archive, or the archives in a folder that holds no loose image; `None` where `path` is neither.

    Raises `UserError` for what `ArchiveImages` does not read.
    """
    if not path.is_dir():
        return ArchiveImages([path]) if path.name.lower().endswith(ARCHIVES) and path.is_file() else None
    found = find_archives(path)
    return ArchiveImages(found) if found and not find_images(path, _READ) else None


def find_archives(folder: Path) -> list[Path]:
    """List the archives in a folder, sorted by name; none in a closed one, of which who opens it says so."""
    try:
        return sorted(path for path in folder.iterdir() if path.name.lower().endswith(ARCHIVES) and path.is_file())
    except OSError:
        return []


def _read_member(path: str, member: _Member) -> bytes:
    """Read a file of an archive. Raises `BadImage` for a damaged one, and `OSError`."""
    place, stored = member.place, member.stored
    if max(member.size, stored) > _LARGEST:
        raise BadImage(f"is a file of {member.size} bytes; {_LARGEST} are read at most")
    if path.lower().endswith(".zip"):
        header = _all_of(read_part(path, place, _LOCAL_HEADER), _LOCAL_HEADER)
        place += _LOCAL_HEADER + sum(struct.unpack("<HH", header[_LENGTHS]))
    data = _all_of(read_part(path, place, stored), stored)
    if member.deflated:
        data = _inflate(data, member.size)
    if member.crc is not None and zlib.crc32(data) != member.crc:
        raise BadImage("does not match its checksum in the archive")
    return data


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


def _read_directory(path: Path) -> list[_Member]:
    """List the images of an archive and WebDataset's labels beside them. Raises `UserError`."""
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
    return members


def _key(name: str) -> str:
    """Return what the files of a WebDataset's sample share: the name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".")[0]


def _is_wanted(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/")) or name.startswith("__MACOSX/")
    return not hidden and name.lower().endswith((*_READ, _LABEL))


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
                yield _Member(name, each.offset_data, each.size, each.size, False, None)
