"""Checkpoint directories of any engine: written aside and renamed, with checksums; the newest that verifies is used.

`RUN/checkpoints/step-00001000/` holds the engine's files and `manifest.json` (SHA-256 of every other file). A directory
without a manifest or with a file that does not match it is damaged, and the one before it is used.
"""

import contextlib
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from simmim.disk import find_write_error, to_disk
from simmim.errors import UserError

MANIFEST = "manifest.json"
ARRAYS = "state.safetensors"
"""What the keras engine keeps; it holds the model as `model.NAME`, under the torch engine's names and in its layout."""


@contextlib.contextmanager
def filling(directory: Path, step: int) -> Iterator[Path]:
    """Give the directory that a checkpoint's files are written to, until `publish`.

    Raises `WriteError` where the disk does not take them; then they are removed, and the checkpoints before stay.
    """
    aside = aside_path(directory, step)
    try:
        yield aside
    except BaseException as error:  # torch's error of a checkpoint is no `Exception`
        found = find_write_error(error, aside)
        if found is None:
            raise
        shutil.rmtree(aside, ignore_errors=True)
        raise found from error


def begin(directory: Path, step: int) -> Path:
    """Create a directory for the files of a checkpoint; it does not count as one until `publish`."""
    aside = aside_path(directory, step)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    to_disk(directory.parent)
    return aside


def publish(directory: Path, step: int, *, keep: int) -> Path:
    """Make the filled directory of `begin` the newest checkpoint; keep `keep` - 1 of those before it."""
    aside, final = aside_path(directory, step), checkpoint_path(directory, step)
    digests = {path.name: _digest(path) for path in sorted(aside.iterdir())}
    (aside / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in (*aside.iterdir(), aside):
        to_disk(path)
    if final.exists():  # a damaged one of the same step
        shutil.rmtree(final)
    aside.rename(final)
    to_disk(directory)
    _forget_others(directory, final, keep)
    return final


def newest_checkpoint(directory: Path) -> Path | None:
    """Find the newest checkpoint that verifies, `None` if there is none; warn of damaged ones that are passed over.

    Raises `UserError` where there are checkpoints and every one is damaged.
    """
    candidates = sorted(directory.glob("step-*"), reverse=True) if directory.is_dir() else []
    for path in candidates:
        if (damage := _damage(path)) is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({damage}); trying the one before it", stacklevel=2)
    if candidates:
        raise UserError(f"every checkpoint in {directory} is damaged; start again with --fresh")
    return None


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def aside_path(directory: Path, step: int) -> Path:
    return directory / f"writing-{step:08d}"


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _damage(path: Path) -> str | None:
    try:
        for name, digest in json.loads((path / MANIFEST).read_text(encoding="utf-8")).items():
            if _digest(path / name) != digest:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, AttributeError):
        return f"{MANIFEST} is not what was written"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _forget_others(directory: Path, newest: Path, keep: int) -> None:
    """Leave `newest` and the `keep` - 1 before it. Later ones are damaged, or the run had not resumed before them."""
    kept = [path for path in sorted(directory.glob("step-*")) if path.name <= newest.name][-keep:]
    for path in (*directory.glob("step-*"), *directory.glob("writing-*")):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
