"""One training at a time writes a run directory. Readers need no lock.

The lock is the operating system's (flock) on `RUN/.lock`, so that it ends with its process, however that ends. The file
names the holder for whoever finds it locked. On a file system without locks the name decides: a holder that lives on
this machine, or is of another machine and left its file, refuses the run.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simmim.disk import make_directory
from simmim.errors import UserError

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, made if new. Raises `UserError` where another process holds it.

    A new directory in which nothing was written is removed.
    """
    new = not directory.exists()
    make_directory(directory)
    descriptor = _acquire(directory)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_at(descriptor, directory / LOCK):
                (directory / LOCK).unlink()  # while it is held: `_acquire` notices
            if new:
                directory.rmdir()
        os.close(descriptor)


def is_locked(directory: Path) -> bool:
    """Tell whether a process holds the lock of a directory, as far as its file system says; changes nothing."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _NO_LOCKS
    finally:
        os.close(descriptor)
    return False


def move_lock(old: Path, new: Path) -> None:
    """Take a held lock along from a directory that was moved to `old` to the new one in its place."""
    if (old / LOCK).exists():
        new.mkdir()
        (old / LOCK).rename(new / LOCK)


def _acquire(directory: Path) -> int:
    path = directory / LOCK
    while True:
        directory.mkdir(parents=True, exist_ok=True)  # its holder may have removed it
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read(descriptor)
            if error.errno not in _NO_LOCKS or _may_live(holder):
                os.close(descriptor)
                raise _in_use(directory, holder, certain=error.errno not in _NO_LOCKS) from None
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # its holder has just removed it
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # on a full disk it holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    try:
        return dict(json.loads(os.pread(descriptor, 1000, 0)))
    except (OSError, ValueError, TypeError):
        return {}


def _may_live(holder: dict[str, Any]) -> bool:
    """Tell whether a holder may be at work, where no lock says so."""
    if holder.get("host") != socket.gethostname():
        return bool(holder)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return int(holder["pid"]) != os.getpid()


def _in_use(directory: Path, holder: dict[str, Any], *, certain: bool) -> UserError:
    who = "process {pid} on {host}, since {start}".format(**holder) if len(holder) == 3 else "another process"
    if certain:
        return UserError(f"{directory} is in use by {who}; wait for it or stop it, or give another --out")
    return UserError(
        f"{directory} may be in use by {who}, and its file system has no locks; if that process is gone, remove "
        f"{directory / LOCK}"
    )
