"""The lock of a run directory: one training at a time, none left by a crash."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import socket
import time
from pathlib import Path

import pytest

from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.training.resume import hold_run, open_run
from simmim.training.run_directory import Run
from simmim.training.run_lock import LOCK, is_locked, locked

_fork = multiprocessing.get_context("fork")


def hold(directory: Path, held: Path) -> None:
    with locked(directory):
        held.touch()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds `run`."""
    process = _fork.Process(target=hold, args=(tmp_path / "run", tmp_path / "held"))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_second_training_is_refused_and_told_who_holds_the_run(tmp_path: Path, holder) -> None:
    with pytest.raises(UserError) as error, locked(tmp_path / "run"):
        pass
    who = f"process {holder.pid} on {socket.gethostname()}, since 20..-..-.. ..:..:.."
    rest = "; wait for it or stop it, or give another --out"
    assert re.fullmatch(re.escape(f"{tmp_path}/run is in use by ") + who + rest, str(error.value))


def test_a_reader_sees_whether_a_process_holds_the_run(tmp_path: Path, holder) -> None:
    assert is_locked(tmp_path / "run")
    holder.kill()
    holder.join()
    assert not is_locked(tmp_path / "run")
    assert not is_locked(tmp_path / "none")


def test_a_killed_process_leaves_no_lock(tmp_path: Path, holder) -> None:
    holder.kill()
    holder.join()
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_one_process_does_not_train_twice_into_a_run(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="in use"), locked(tmp_path):
        pass


def test_a_new_directory_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_lock_that_was_released_while_we_took_it_is_taken_anew(tmp_path: Path, monkeypatch) -> None:
    flock, calls = fcntl.flock, []

    def release_first(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(how)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", release_first)
    with locked(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK).exists()


def test_fresh_takes_the_lock_along_to_the_new_run(tmp_path: Path) -> None:
    config = PretrainConfig(
        data="demo", out=str(tmp_path / "run"), image_size=(64, 64), flip="none", crop_scale=(1, 1), crop_ratio=(1, 1)
    )
    open_run(config)
    fresh = PretrainConfig(**vars(config) | {"fresh": True})
    with hold_run(fresh, is_main=True):
        open_run(fresh)
        with pytest.raises(UserError, match="in use"), locked(tmp_path / "run"):
            pass
    (old,) = tmp_path.glob("run.old-*")
    files = {path.name for path in (*old.iterdir(), *Run(tmp_path / "run").path.iterdir())}
    assert files == {"config.toml", "machine.json"}


def test_only_the_main_process_holds_a_run(tmp_path: Path) -> None:
    config = PretrainConfig(out=str(tmp_path / "run"))
    with hold_run(config, is_main=True), hold_run(config, is_main=False):
        pass


def test_without_locks_the_name_in_the_file_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    here = {"host": socket.gethostname(), "start": "2026-11-28 12:00:00"}
    ended = _fork.Process(target=int)
    ended.start()
    ended.join()
    for holder, free in (
        ({**here, "pid": os.getppid()}, False),
        ({**here, "pid": ended.pid}, True),
        ({**here, "host": "elsewhere", "pid": 1}, False),
    ):
        (tmp_path / LOCK).write_text(json.dumps(holder))
        if free:
            with locked(tmp_path):
                pass
        else:
            refused = pytest.raises(UserError, match=r"has no locks; if that process is gone, remove .*\.lock")
            with refused, locked(tmp_path):
                pass
