"""A power cut without cutting the power: keep what was synced (fsync), and lose the rest.

`note_all` begins a log, in which `record` notes what every fsync of this process and its forks would make durable: a
file's bytes, or the names in a directory. `cut` rebuilds the directory from these notes, in one of the two ways that
POSIX allows at worst: names that were not synced are lost, or they are kept and the bytes behind them are lost.
Libraries that sync beside Python are not seen, so that their files count as lost.
"""

import fcntl
import os
import pickle
import shutil
import stat
from pathlib import Path
from typing import Any, NamedTuple

_kept_open: list[int] = []  # so that no inode number is used twice


class Note(NamedTuple):
    """What an fsync made durable: bytes of a file, or names in a directory with the inodes that they stand for."""

    inode: int
    content: bytes | dict[str, int]


def note_all(root: Path, log: Path) -> None:
    """Begin `log` with what is below `root` now, which counts as durable."""
    with log.open("wb") as file:
        for path in (root, *root.rglob("*")):
            if path.is_dir() or path.is_file():
                pickle.dump(_note(path), file)


def record(log: Path) -> None:
    """Note in `log` whatever this process and its forks sync from now on."""
    os.fsync = lambda descriptor: _append(log, descriptor)  # type: ignore[assignment]


def cut(root: Path, log: Path, *, names_kept: bool) -> None:
    """Leave below `root` what a power cut would have."""
    durable = _read(log)
    if names_kept:
        for path in (root, *root.rglob("*")):
            if path.is_dir():
                durable[path.stat().st_ino] = _names(path)
    inode, old = root.stat().st_ino, root.with_name(f"{root.name} before")
    root.rename(old)
    kinds = {path.stat().st_ino: path.is_dir() for path in old.rglob("*")}
    _build(root, inode, durable, kinds)
    shutil.rmtree(old)


def _note(path: Path) -> Note:
    return Note(path.stat().st_ino, _names(path) if path.is_dir() else path.read_bytes())


def _names(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.iterdir()}


def _append(log: Path, descriptor: int) -> None:
    # Files may have no name by now, or another one; this finds them all the same.
    path, status = Path(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor)
    _kept_open.append(os.dup(descriptor))
    content: Any = _names(path) if stat.S_ISDIR(status.st_mode) else path.read_bytes()
    with log.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # threads and ranks
        file.write(pickle.dumps(Note(status.st_ino, content)))


def _read(log: Path) -> dict[int, Any]:
    durable: dict[int, Any] = {}
    with log.open("rb") as file:
        try:
            while True:
                note = pickle.load(file)
                durable[note.inode] = note.content
        except (EOFError, pickle.UnpicklingError):  # killed as it wrote: the fsync had not ended
            return durable


def _build(path: Path, inode: int, durable: dict[int, Any], directories: dict[int, bool]) -> None:
    content = durable.get(inode)
    if isinstance(content, dict) or (content is None and directories.get(inode)):
        path.mkdir()
        for name, below in (content or {}).items():
            _build(path / name, below, durable, directories)
    else:
        path.write_bytes(content or b"")
