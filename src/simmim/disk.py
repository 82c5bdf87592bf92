"""Errors of the disk as one line with path and remedy, and files that outlast a power cut."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from simmim.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "free space there, then repeat the command",
    errno.EDQUOT: "free some of your quota, then repeat the command",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), then repeat the command",
    errno.ENOENT: "its directory was removed, or its storage is gone; bring it back, then repeat the command",
    errno.EROFS: "make the file system writable, then repeat the command",
}
_UNKNOWN = "unexpected pos|PytorchStreamWriter failed|file write failed|iostream error"
"""What PyTorch says where a write failed, without a reason."""


class WriteError(OSError):
    """A file that cannot be written: path, reason, remedy."""

    def __str__(self) -> str:
        remedy = _REMEDIES.get(self.errno or 0, "check that the disk can be written and has space")
        return f"{self.filename} cannot be written: {self.strerror}; {remedy}"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `WriteError` for whatever shows that `path`, or a file in it, cannot be written. Others pass unchanged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = find_write_error(error, path)
        if found is None:
            raise
        raise found from error


def find_write_error(error: BaseException, path: Path) -> WriteError | None:
    """Return what an error says of the disk that holds `path`; `None` if it is of another kind.

    Libraries hide the system's error: behind one of their own, in a list of what went wrong on each rank, or in a text.
    """
    found: WriteError | None = None
    for each in _chain(error):
        number = each.errno if isinstance(each, OSError) else None
        if match := re.search(r"os error (\d+)", str(each)):  # as Rust has it
            number = int(match[1])
        ours = isinstance(each, OSError) and _is_of(str(each.filename or ""), path)
        if number is not None and (ours or (number in _REMEDIES and number != errno.ENOENT)):
            return WriteError(number, os.strerror(number), str(path))
        if re.search(_UNKNOWN, str(each)):
            found = WriteError(errno.EIO, "writing failed", str(path))
        if os.strerror(errno.ENOSPC) in str(each):
            return WriteError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return found


def _is_of(name: str, path: Path) -> bool:
    """Tell whether a name is that of `path`, of something in it, of its directory, or of where it is written first."""
    firsts = (path, path.with_name(f".{path.name}"), path.with_name(".writing-"))
    return name == str(path.parent) or name.startswith(tuple(map(str, firsts)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        failures: dict[int, tuple[BaseException, object]] = getattr(error, "failures", {})  # of a checkpoint's ranks
        for failure, _ in failures.values():
            yield from _chain(failure)
        error = error.__cause__ or error.__context__


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, would outlast a power cut (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its parents, where they are missing; their names would outlast a power cut.

    Raises `UserError` for a URL, which would else become folders such as `s3:`.
    """
    if re.fullmatch(r"[a-z][a-z0-9+.-]+:", path.parts[0] if path.parts else "") and not path.exists():
        raise UserError(
            f"{'//'.join(path.parts[:2])}/… is a URL; give a path on a disk: mount the storage first, or copy the "
            "result there (docs/data.md#object-storage)"
        )
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        to_disk(each.parent)
