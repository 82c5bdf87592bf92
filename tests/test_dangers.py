"""`simmim doctor` tells what on this machine would endanger a run."""

import errno
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simmim.commands import dangers
from simmim.commands.dangers import find_dangers
from simmim.torch_engine.perf import nvidia
from simmim.torch_engine.perf.nvidia import describe_nvidia


def usage(total: float, free: float) -> Any:
    return lambda _path: SimpleNamespace(total=total, used=total - free, free=free)


def test_a_machine_with_enough_of_all_has_no_danger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(1e12, 1e11))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 65536))
    found = find_dangers(tmp_path / "runs" / "new")
    assert found["disk"] == f"100.0 GB free in {tmp_path}/runs/new"
    assert found["file locks"].startswith("work on ")
    assert not [line for line in found.values() if "DANGER" in line]


def test_little_disk_shared_memory_and_few_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", usage(64 * 2**20, 1e6))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    monkeypatch.setattr(dangers, "_SHARED", tmp_path)
    found = find_dangers(tmp_path)
    assert found["disk"].startswith(f"DANGER: 0.0 GB free in {tmp_path}; a run of a ViT-B takes 3 GB")
    assert found["shared memory"].startswith(f"DANGER: 0.062 GiB in {tmp_path}: little")
    assert found["open files"] == (
        "DANGER: 256 at once (up to 512 by ulimit -n): few for packed shards and reader processes; ulimit -n 512"
    )


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nserver:/a {tmp_path} nfs4 rw 0 0\nserver:/b {tmp_path}2 lustre rw 0 0\n")
    monkeypatch.setattr(dangers, "_MOUNTS", mounts)
    monkeypatch.setattr("fcntl.flock", no_lock)
    assert find_dangers(tmp_path)["file locks"] == (
        "DANGER: none on nfs4, a network file system (No locks available): two trainings into one --out that start at "
        "once would not notice each other"
    )


def test_a_driver_that_is_older_than_pytorch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nvidia, "_DRIVER", tmp_path / "version")
    assert describe_nvidia() == {}
    (tmp_path / "version").touch()
    monkeypatch.setattr(nvidia, "_driver_version", lambda: 12040)
    assert describe_nvidia()["driver"].startswith("DANGER: it is for CUDA 12.4, and torch for 13.0; update it")
    monkeypatch.setattr(nvidia, "_driver_version", lambda: 13000)
    assert describe_nvidia()["driver"].startswith("DANGER: it is there, and torch, built for CUDA 13.0, sees no GPU")


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (0, "", "works"),
        (
            1,
            "Traceback …\nRuntimeError: not compiled with nvJPEG",
            "DANGER: does not work: RuntimeError: not compiled ",
        ),
        (-11, "", "DANGER: does not work: it ended the process with code -11; do not use --decode gpu"),
    ],
)
def test_nvjpeg_that_does_not_work_is_told_and_ends_a_process_of_its_own(
    code: int, said: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(returncode=code, stderr=said))
    assert describe_nvidia()["nvJPEG"].startswith(expected)


def test_what_that_process_runs_decodes() -> None:
    nvidia.decode_jpeg("cpu")
