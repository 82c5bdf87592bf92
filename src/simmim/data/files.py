"""Image files: in a folder of any depth, or listed in a text file."""

import errno
import itertools
import json
import os
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from simmim.data.names import Names
from simmim.errors import UserError
from simmim.hardware.host import reading_cores

_SUFFIXES = ".avif .bmp .dcm .dicom .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .nii .nii.gz .npy .pbm .pgm .png .pnm .ppm"
_SUFFIXES += " .svs .tga .tif .tiff .webp"
SUFFIXES = tuple(_SUFFIXES.split())
"""Suffixes of the files in a folder that count as images."""
_SOUND_SUFFIXES = ".aif .aifc .aiff .au .caf .flac .mp3 .oga .ogg .opus .rf64 .w64 .wav"
SOUND_SUFFIXES = tuple(_SOUND_SUFFIXES.split())
"""Suffixes of the files in a folder that count as sounds, where it holds no image."""
_CLIP_SUFFIXES = ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .vob .webm .wmv"  # not .ts
CLIP_SUFFIXES = tuple(_CLIP_SUFFIXES.split())
"""Suffixes of the files in a folder that count as clips, where it holds neither image nor sound."""
_ARCHIVES = (".zip", ".tar")
_TIFF_SUFFIXES = (".tif", ".tiff", ".svs")
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LARGE = 1 << 24  # bytes; smaller files are read whole, in one request

# Errors that may pass on a network file system (NFS, SMB, FUSE), and how long to wait before each further try.
_PASSING = ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "ENETDOWN", "ENETUNREACH", "EHOSTUNREACH", "ECONNRESET",
            "EREMOTEIO", "ENOLINK")  # fmt: skip
_WAITS = (0.1, 1.0, 5.0)  # seconds

Found = TypeVar("Found")


class PathList:
    """Image files by path, relative to `root`; an `ImageSource`."""

    def __init__(self, names: Sequence[str | Path], root: str | Path = "", clips_left_out: int = 0):
        self._names = names
        self._root = str(root)
        self.clips_left_out = clips_left_out
        """Clips in the same folder."""

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        name = str(self._names[index])
        if "./" in name or "//" in name:
            return str(Path(self._root, name))
        return os.path.join(self._root, name)  # noqa: PTH118  # a third of a path's time, which counts for a million names

    def may_mention(self, text: str) -> bool:
        """Tell, without a look at each, whether a text in lower case may be in any name, in any case."""
        names = self._names
        return names.may_mention(text) if isinstance(names, Names) else any(text in str(each).lower() for each in names)

    def read(self, index: int) -> bytes | Path:
        path = self.name(index)
        return Path(path) if _is_large_tiff(path) else read_file(path)


def _is_large_tiff(path: str) -> bool:
    """Tell whether a file is a TIFF of which a part is read in less time and memory than the whole."""
    if not path.lower().endswith(_TIFF_SUFFIXES):
        return False
    status = try_again(Path(path).stat)
    return status.st_size > _LARGE and stat.S_ISREG(status.st_mode) and read_part(path, 0, 4) in TIFF_MAGIC


def read_file(path: str) -> bytes:
    """Read a file; try again, up to three times within 6 s, after an error that may pass on a network file system.

    Raises `ValueError` for what is no file, such as a named pipe, which would be waited for, else `OSError`.
    """
    return read_part(path, 0, -1)


def read_part(path: str, place: int, size: int) -> bytes:
    """Read `size` bytes of a file from `place` on, or fewer where it ends; all with -1. As `read_file`."""

    def read() -> bytes:
        with open(path, "rb", opener=_open_at_once) as file:  # Path.open takes no opener
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("is no regular file")
            file.seek(place)
            return file.read(size)

    return try_again(read)


def try_again(read: Callable[[], Found]) -> Found:
    """Return what `read` returns, called up to four times where it raises an error that may pass."""
    for wait in _WAITS:
        try:
            return read()
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) not in _PASSING:
                raise
            time.sleep(wait)
    return read()


def in_threads(work: Callable[[int], Found], count: int) -> list[Found]:
    """Return what `work` returns for 0 … `count` - 1, called in several threads at once."""
    threads = 4 * reading_cores()
    together = max(1, min(256, count // (16 * threads)))  # a future for each of a million files takes 1.6 GiB

    def part(first: int) -> list[Found]:
        return [work(number) for number in range(first, min(first + together, count))]

    with ThreadPoolExecutor(threads) as pool:
        return [*itertools.chain.from_iterable(pool.map(part, range(0, count, together)))]


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # of a regular file it changes nothing


def is_sound(name: str) -> bool:
    """Tell whether a file is a sound, by its name."""
    return name.lower().endswith(SOUND_SUFFIXES)


def is_clip(name: str) -> bool:
    """Tell whether a file is a clip, by its name."""
    return name.lower().endswith(CLIP_SUFFIXES)


def names_sounds(data: object) -> bool:
    """Tell whether `--data` names sounds: by its scheme, the files of a folder or archive, or the first of a list.

    Reads no more than that needs; what is wrong with the data shows when it is opened.
    """
    if not isinstance(data, str | os.PathLike):
        return False
    path = Path(data).expanduser()
    if str(data).startswith("audio:"):
        return True
    try:
        return is_sound(_first_name(path) or "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, tarfile.TarError, zipfile.BadZipFile):
        return False


def _first_name(path: Path) -> str | None:
    """Return the name of a picture of a folder, list or archive; else of a sound, of a clip, or `None`.

    In a list it is the first name, whatever it is.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        if (path / "pack.json").is_file():
            return next(iter(json.loads((path / "00000.json").read_bytes())["names"]), None)
        for suffixes in (SUFFIXES, SOUND_SUFFIXES, CLIP_SUFFIXES, _ARCHIVES):
            if found := next(_walk(path, "", set(), suffixes, unnamed=False), None):
                return _first_name(path / found) if suffixes is _ARCHIVES else found
    elif suffix in (".txt", ".lst") and path.is_file():
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            return next((name for line in lines if (name := line.strip()) and not name.startswith("#")), None)
    elif suffix == ".zip" and path.is_file():
        with zipfile.ZipFile(path) as archive:
            return next(iter(of_one_kind(archive.namelist())), None)
    elif suffix == ".tar" and path.is_file():
        with tarfile.open(path) as members:
            return next(iter(of_one_kind([each.name for each in members])), None)
    return None


def of_one_kind(names: Sequence[str]) -> list[str]:
    """Return the names of pictures; where there are none, those of sounds."""
    for suffixes in (SUFFIXES, SOUND_SUFFIXES):
        if found := [name for name in names if name.lower().endswith(suffixes)]:
            return found
    return []


def open_folder(folder: Path) -> PathList:
    """Open all images below a folder; where there are none, all sounds; where there are none either, all clips.

    Raises `UserError` if there is none of these, or the folder cannot be listed.
    """
    clips: list[str] = []
    try:
        images = Names(_without_clips(_walk(folder, "", set(), (*SUFFIXES, *CLIP_SUFFIXES), unnamed=False), clips))
        names = images or find_images(folder) or find_images(folder, SOUND_SUFFIXES) or clips
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}; check its permissions") from error
    if not names:
        raise UserError(f"folder {folder} holds no images; files read end in {', '.join(SUFFIXES)}")
    return PathList(names, root=folder, clips_left_out=0 if names is clips else len(clips))


def _without_clips(names: Iterator[str], clips: list[str]) -> Iterator[str]:
    """Yield the names of images; those of clips are put into `clips`."""
    for name in names:
        if is_clip(name):
            clips.append(name)
        else:
            yield name


def open_kind(folder: Path, suffixes: tuple[str, ...]) -> PathList | None:
    """Open the files of one kind below a folder, whatever else it holds; `None` where it is no folder or has none."""
    names = find_images(folder, suffixes) if folder.is_dir() else ()
    return PathList(names, root=folder) if names else None


def open_list(path: Path) -> PathList:
    """Open the images of a text file: one path a line, relative to the file's folder; `#` begins a comment.

    Raises `UserError` if it lists nothing or none of its first paths is a file.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        names = Names(name for line in lines if (name := line.strip()) and not name.startswith("#"))
    if not names:
        raise UserError(f"list {path} names no images; write one path a line")
    source = PathList(names, root=path.parent)
    first = min(len(source), 100)
    if not any(Path(source.name(index)).is_file() for index in range(first)):
        raise UserError(
            f"none of the first {first} paths in {path} is a file, such as {Path(source.name(0))}; "
            "write paths relative to the list's folder"
        )
    return source


def find_images(root: Path, suffixes: tuple[str, ...] = SUFFIXES) -> Names:
    """List image files in any depth, sorted, as paths relative to `root`. Hidden files and folders are left out.

    Where no file has one of the suffixes, those without any are looked at, as DICOM files may be.
    """
    found = Names(_walk(root, "", set(), suffixes, unnamed=False))
    return found if found or ".dcm" not in suffixes else Names(_walk(root, "", set(), suffixes, unnamed=True))


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a symbolic link to nothing, which is told as an image that cannot be read."""
    return entry.is_symlink() and not Path(entry.path).exists()


def _is_unnamed_dicom(entry: os.DirEntry[str]) -> bool:
    """Tell whether a file without a suffix, or with one of digits, as UIDs have, is DICOM; looks at 4 bytes of it.

    The index of a medium, `DICOMDIR`, holds no image.
    """
    _, dot, suffix = entry.name.rpartition(".")
    if (dot and not suffix.isdigit()) or entry.name.upper() == "DICOMDIR":
        return False
    try:
        return read_part(entry.path, 128, 4) == b"DICM"
    except (OSError, ValueError):
        return False


def _walk(
    root: Path, folder: str, seen: set[tuple[int, int]], suffixes: tuple[str, ...], *, unnamed: bool
) -> Iterator[str]:
    status = Path(root, folder).stat()
    if (status.st_dev, status.st_ino) in seen:  # a symbolic link to a folder that was walked already
        return
    seen.add((status.st_dev, status.st_ino))
    found: list[str] = []
    with os.scandir(Path(root, folder)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(suffixes) and (entry.is_file() or _leads_nowhere(entry)):
                found.append(entry.name)
            elif entry.is_dir():
                found.append(f"{entry.name}/")
            elif unnamed and _is_unnamed_dicom(entry):
                found.append(entry.name)
    found.sort()  # folders sort by name with the slash, so whole paths are in order without a list of all
    for name in found:
        if name.endswith("/"):
            yield from _walk(root, folder + name, seen, suffixes, unnamed=unnamed)
        else:
            yield folder + name
