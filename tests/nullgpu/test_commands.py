"""Every command runs on CUDA, alone and in two processes, and says out of memory in one line."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import commands

pytestmark = pytest.mark.timeout(600)  # of a first test that runs all cases
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def found(on_null_gpu: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("commands")
    done = on_null_gpu("-m", "nullgpu.commands", str(folder), NULLGPU_ZEROS="1")
    assert done.returncode == 0, done.stderr
    return {row["command"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_command_runs_on_the_gpu(found: dict[str, dict[str, Any]], name: str) -> None:
    assert found[name]["status"] == 0, found[name]["said"]
    trains = name.split()[0] in ("pretrain", "finetune", "resume")
    assert ("Null H100" in found[name]["said"]) == (trains or name in ("doctor", "bench"))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["--no-shard", "--shard"])
def test_two_processes_train(on_null_gpu: Run, tmp_path: Path, shard: str) -> None:
    words = f"pretrain --data demo --out {tmp_path / 'run'} {commands.VIT} {commands.USUAL} {shard}".split()
    if shard == "--no-shard":  # an objective that compares the images of all ranks, none of which may wait in a trial
        words += [*commands.AUTO.split(), "--objective", "infonce"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "simmim"]
    done = on_null_gpu(*launch, *words, NULLGPU_DEVICES="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Null H100, bf16, 2 processes" in done.stderr and "done: 2 steps" in done.stderr


LARGE = f"{commands.USUAL} --batch-size 128 --model vit_tiny_patch16_224 --objective pixels"
SMALL = {"NULLGPU_BYTES": str(2 * 2**30), "NULLGPU_ZEROS": "1"}


def test_out_of_memory_is_one_line_with_a_remedy(on_null_gpu: Run, tmp_path: Path) -> None:
    words = f"pretrain --data demo --out {tmp_path / 'run'} {LARGE}".split()
    done = on_null_gpu("-m", "simmim", *words, **SMALL)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("simmim: out of memory: the step needs about ") and "Traceback" not in done.stderr
    assert "; use --accumulate-steps 2 (64 images at a time, " in line


@pytest.mark.slow
def test_auto_finds_the_remedy_and_it_fits(on_null_gpu: Run, tmp_path: Path) -> None:
    words = f"pretrain --data demo --out {tmp_path / 'run'} {LARGE} {commands.AUTO}".split()
    done = on_null_gpu("-m", "simmim", *words, **SMALL)
    assert done.returncode == 0, done.stderr
    assert "memory     2 accumulation steps of 64 images a process: what fits Null H100" in done.stderr  # as 1 does not


@pytest.mark.slow
@pytest.mark.parametrize("command", ["finetune classify --from scratch", "pretrain --objective infonce --probe demo"])
def test_an_evaluation_that_needs_more_than_the_training_goes_on_in_halves(
    on_null_gpu: Run, tmp_path: Path, command: str
) -> None:
    words = f"{command} --data demo --out {tmp_path / 'run'} {commands.TINY} {commands.USUAL}".split()
    words += ["--steps", "1", "--batch-size", "64", "--accumulate-steps", "64"]
    done = on_null_gpu("-m", "simmim", *words, NULLGPU_BYTES="130000000", NULLGPU_ZEROS="1")
    assert done.returncode == 0, done.stderr
    assert "failed with OOM" in done.stderr  # PyTorch's own line
