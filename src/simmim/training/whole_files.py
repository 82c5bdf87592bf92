"""Files and directories that appear whole or not at all."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simmim.disk import make_directory, to_disk, writing
from simmim.errors import UserError
from simmim.training.run_lock import locked


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write, renamed to `path` at the end: readers see the old file or the new one, whole.

    Raises `WriteError` where the disk does not take it; the old file stays.
    """
    aside = aside_of(path)  # always the same name: what a killed process left is written over
    with writing(path):
        make_directory(path.parent)
        try:
            yield aside
            to_disk(aside)
            aside.replace(path)
        finally:
            with contextlib.suppress(OSError):  # of a file system that is read-only
                aside.unlink(missing_ok=True)
        to_disk(path.parent)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all."""
    with written_whole(path) as aside:
        aside.write_text(json.dumps(value, indent=indent), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, `{}` where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def aside_of(path: Path) -> Path:
    """Return where a file is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """Give a directory to fill, renamed to `out` at the end; after an error, nothing is there.

    Raises `UserError` if `out` exists and is not an empty directory, or another process is filling it.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--out {out} exists already; give a new directory")
    with writing(target):
        parent = target.with_name(f".writing-{target.name}")  # always the same: what a killed process left is removed
        try:
            with locked(parent):
                aside = parent / target.name
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                try:
                    yield aside
                    for path in (*aside.rglob("*"), aside):
                        to_disk(path)
                    aside.rename(target)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        finally:
            with contextlib.suppress(OSError):  # another process fills it now
                parent.rmdir()
        to_disk(target.parent)
