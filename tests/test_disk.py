"""What a disk that takes no more says, and in which order files reach it."""

import contextlib
import errno
import multiprocessing
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from simmim import disk
from simmim.cli import explain
from simmim.disk import WriteError, writing
from simmim.errors import UserError
from simmim.training import checkpoint_directory, whole_files
from simmim.training.checkpoint_directory import begin, checkpoint_path, filling, newest_checkpoint, publish
from simmim.training.run_directory import Run
from simmim.training.run_lock import locked
from simmim.training.tracking import MetricsFile, TensorBoard
from simmim.training.whole_files import new_directory, written_whole


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free space there"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded; free some of your quota"),
        (OSError(errno.EROFS, "x", "/elsewhere"), "Read-only file system; make the file system writable"),
        (
            RuntimeError("I/O error: File too large (os error 27)"),
            "File too large; raise the limit on the size of a file",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
            "writing failed; check",
        ),
        (RuntimeError("flush: No space left on device"), "No space left on device; free space there"),
    ],
)
def test_whatever_a_library_makes_of_it_the_line_has_path_reason_and_remedy(
    error: Exception, text: str, tmp_path: Path
) -> None:
    with pytest.raises(WriteError) as found, writing(tmp_path / "file"):
        raise error
    assert str(found.value).startswith(f"{tmp_path}/file cannot be written: {text}")
    assert explain(found.value) == str(found.value)


def test_an_error_that_hides_the_disks_is_seen_through(tmp_path: Path) -> None:
    class RanksError(BaseException):
        failures: ClassVar = {0: (RuntimeError("unexpected pos"), None), 1: (OSError(errno.ENOSPC, ""), None)}

    begin(tmp_path, 5)
    with pytest.raises(WriteError, match="writing-00000005 cannot be written: No space left"), filling(tmp_path, 5):
        raise RanksError
    assert list(tmp_path.iterdir()) == []  # what was written takes no more space


@pytest.mark.parametrize(
    "error", [UserError("No space left on device"), FileNotFoundError(2, "x", "/a"), KeyError("a")]
)
def test_other_errors_pass_unchanged(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as found, writing(tmp_path / "file"):
        raise error
    assert found.value is error


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place: Path) -> None:
    with contextlib.suppress(OSError), (place / "filling").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_on_a_full_disk_the_old_file_the_metrics_and_the_checkpoint_stay(small: Path) -> None:
    checkpoints = small / "run" / "checkpoints"
    (begin(checkpoints, 1) / "state").write_bytes(b"one")
    publish(checkpoints, 1, keep=2)
    with written_whole(small / "file") as aside:
        aside.write_text("old")
    metrics = MetricsFile(small / "metrics.jsonl")
    metrics.scalars(1, {"loss": 1.0})
    board = TensorBoard(small / "tensorboard", 0)
    fill(small)

    def write_file() -> None:
        with written_whole(small / "file") as aside:
            aside.write_bytes(bytes(5000))

    def save() -> None:
        with filling(checkpoints, 2):
            (begin(checkpoints, 2) / "state").write_bytes(b"two")
            publish(checkpoints, 2, keep=2)

    def export() -> None:
        with new_directory(small / "new") as new, written_whole(new / "weights") as aside:
            aside.write_bytes(bytes(5000))

    def log() -> None:
        for step in range(2, 1000):
            metrics.scalars(step, {"loss": 1.0})

    for function, name in (
        (write_file, "file"),
        (save, "run/checkpoints/writing-00000002"),
        (export, "new"),
        (log, "metrics.jsonl"),
    ):
        with pytest.raises(WriteError, match=f"small/{name} cannot be written: No space left on device"):
            function()
    assert (small / "file").read_text() == "old"
    assert newest_checkpoint(checkpoints) == checkpoint_path(checkpoints, 1)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
    assert not (small / "new").exists()
    metrics.close()
    for step in range(1000):  # longer than the queue to the thread that writes
        board.scalars(step, {"loss": 1.0})
    board.close()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def name(path: Any) -> str:
        return str(Path(path).relative_to(tmp_path))

    rename = Path.rename
    monkeypatch.setattr(checkpoint_directory, "to_disk", lambda path: calls.append(f"sync {name(path)}"))
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (calls.append(f"rename {name(path)} {name(to)}"), rename(path, to))[1]
    )
    run = Run(tmp_path / "run")
    (begin(run.checkpoints, 7) / "state").write_bytes(b"state")
    publish(run.checkpoints, 7, keep=2)
    written = "run/checkpoints/writing-00000007"
    assert calls[0] == "sync run"  # the directory of checkpoints has a name
    assert set(calls[1:3]) == {f"sync {written}/state", f"sync {written}/manifest.json"}
    assert calls[3:] == [
        f"sync {written}",
        f"rename {written} run/checkpoints/step-00000007",
        "sync run/checkpoints",
    ]


def test_the_names_of_new_directories_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(disk, "to_disk", synced.append)
    with locked(tmp_path / "runs/a"):
        assert {tmp_path, tmp_path / "runs"} == set(synced)
        synced.clear()
        with written_whole(tmp_path / "runs/a/pictures/file") as aside:
            aside.write_text("new")
        assert tmp_path / "runs/a" in synced


@pytest.mark.parametrize("opened", [locked, new_directory, written_whole])
def test_nothing_is_written_to_a_folder_that_is_named_as_a_url(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "s3://bucket/… is a URL; give a path on a disk: mount the storage first, or copy the result there (docs/data"
    with pytest.raises(UserError, match=re.escape(line)), opened(Path("s3://bucket/a/b")):
        pass
    assert list(tmp_path.iterdir()) == []


def fill_and_wait(target: Path, begun: Path) -> None:
    with new_directory(target) as new:
        (new / "half").touch()
        begun.touch()
        time.sleep(60)


def test_a_directory_being_filled_refuses_a_second_and_a_kill_leaves_nothing(tmp_path: Path) -> None:
    place, begun = tmp_path / "place", tmp_path / "begun"
    process = multiprocessing.get_context("fork").Process(target=fill_and_wait, args=(place / "new", begun))
    process.start()
    while not begun.exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"is in use by process {process.pid} on "), new_directory(place / "new"):
        pass
    process.kill()
    process.join()
    with new_directory(place / "new") as new:
        assert list(new.iterdir()) == []
    assert [path.name for path in place.iterdir()] == ["new"]


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(whole_files, "to_disk", lambda path: calls.append(f"sync {Path(path).name}"))
    monkeypatch.setattr(Path, "replace", lambda path, to: (calls.append(f"replace {to.name}"), replace(path, to))[1])
    with written_whole(tmp_path / "file") as aside:
        aside.write_text("new")
    assert calls == ["sync .file.part", "replace file", f"sync {tmp_path.name}"]
