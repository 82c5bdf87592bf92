"""What on this machine would endanger a run: little disk or shared memory, few open files, no locks."""

import errno
import fcntl
import importlib
import os
import shutil
import tempfile
from pathlib import Path

_LEAST_DISK = 5e9  # a ViT-B keeps two checkpoints of 1 GB, and writes a third before it deletes one
_LEAST_SHARED = 2**30
_LEAST_FILES = 1024
_SHARED = Path("/dev/shm")
_MOUNTS = Path("/proc/mounts")
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "fuse.")


def find_dangers(directory: Path) -> dict[str, str]:
    """Return findings by name, one line each, of the machine and of the directory that runs are to be written to.

    What endangers a run begins with "DANGER".
    """
    return {
        "disk": _disk(directory),
        "file locks": _locks(directory),
        "shared memory": _shared_memory(),
        "open files": _open_files(),
    }


def _disk(directory: Path) -> str:
    try:
        free = shutil.disk_usage(_existing(directory)).free
    except OSError as error:
        return f"DANGER: {directory} cannot be looked at: {error.strerror}"
    text = f"{free / 1e9:.1f} GB free in {directory.absolute()}"
    if not os.access(_existing(directory), os.W_OK):
        return f"DANGER: {text}, which cannot be written to; give another --out"
    if free < _LEAST_DISK:
        return f"DANGER: {text}; a run of a ViT-B takes 3 GB: free some, or give --out on another disk"
    return text


def _locks(directory: Path) -> str:
    """Try a lock, by which a second training into one directory is refused."""
    kind = _file_system(directory)
    network = any(kind.startswith(start) for start in _NETWORK)
    where = f"{kind}, a network file system" if network else kind or "this file system"
    try:
        with tempfile.TemporaryFile(dir=_existing(directory)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            return f"not tried: {error.strerror}"
        return (
            f"DANGER: none on {where} ({error.strerror}): two trainings into one --out that start at once would not "
            "notice each other"
        )
    return f"work on {where}"


def _file_system(directory: Path) -> str:
    """Return the kind of the file system of a directory, as Linux names it; empty where it is not known."""
    place, best, kind = _existing(directory).resolve(), -1, ""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, mount, found, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if place.is_relative_to(mount) and len(mount) >= best:
            best, kind = len(mount), found
    return kind


def _shared_memory() -> str:
    if not _SHARED.is_dir():
        return "not a part of this system"
    size = shutil.disk_usage(_SHARED).total
    text = f"{size / 2**30:.2g} GiB in {_SHARED}"
    if size < _LEAST_SHARED:
        return f"DANGER: {text}: little for --readers processes and for several GPUs; docker run --shm-size=8g"
    return text


def _open_files() -> str:
    try:
        resource = importlib.import_module("resource")
    except ImportError:
        return "not limited by this system"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} at once (up to {hard} by ulimit -n)"
    if soft < _LEAST_FILES:
        return f"DANGER: {text}: few for packed shards and reader processes; ulimit -n {min(hard, 65536)}"
    return text


def _existing(directory: Path) -> Path:
    """Return the directory, or the nearest above it that is there."""
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
