"""Trainings under torchrun itself: a rank that is killed, and what is said of a failure."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from simmim.torch_engine.train.storage import load_model

from . import tiny

pytestmark = pytest.mark.slow

COMMAND = (
    "pretrain --data demo --model vit_tiny_patch16_224 --model-args depth=1 embed_dim=48 num_heads=2 --image-size 32 "
    "--mask-cell 16 --objective pixels --batch-size 16 --steps 120 --precision fp32 --device cpu --workers 1 "
    "--save-every-steps 10 --log-every-steps 10 --val-images 0"
)


def start(words: list[str], log: Path, restarts: int = 0) -> subprocess.Popen[bytes]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*torchrun, "--monitor-interval", "0.1", "-m", "simmim", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def ranks(torchrun: subprocess.Popen[bytes]) -> Iterator[tuple[int, int]]:
    """Yield rank and process id of each worker."""
    for pid in map(int, Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                yield int(entry[5:]), pid


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert start([*COMMAND.split(), "--out", str(root / "run")], root / "log").wait(300) == 0, (
        root / "log"
    ).read_text()
    return root / "run"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are found in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_workers_restart_after_a_kill_and_end_in_the_same_bits(undisturbed: Path, tmp_path: Path, rank: int) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    torchrun = start([*COMMAND.split(), "--out", str(run)], log, restarts=1)
    deadline = time.monotonic() + 200
    while len(list((run / "checkpoints").glob("step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(dict(ranks(torchrun))[rank], signal.SIGKILL)
    assert torchrun.wait(300) == 0, log.read_text()
    assert "resumes    after step " in log.read_text()
    tiny.assert_same(load_model(run).state_dict(), load_model(undisturbed).state_dict())
    assert losses(run) == losses(undisturbed)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells of a parent's death")
def test_ranks_end_with_a_torchrun_that_was_killed_and_what_they_did_is_saved(
    undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    torchrun = start([*COMMAND.split(), "--out", str(run)], log)
    deadline = time.monotonic() + 200
    while len(list((run / "checkpoints").glob("step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [pid for _, pid in ranks(torchrun)]
    torchrun.kill()
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "stopped at step " in log.read_text()
    assert start([*COMMAND.split(), "--out", str(run)], log).wait(300) == 0, log.read_text()
    tiny.assert_same(load_model(run).state_dict(), load_model(undisturbed).state_dict())
    assert losses(run) == losses(undisturbed)


def test_torchruns_summary_says_why_a_rank_failed(tmp_path: Path) -> None:
    torchrun = start([*COMMAND.split(), "--mask-cell", "24", "--out", str(tmp_path / "run")], tmp_path / "log")
    assert torchrun.wait(300) == 1
    summary = (tmp_path / "log").read_text().split("Root Cause")[1]
    assert "traceback : image size 32 is not a multiple of the mask cell 24" in summary
