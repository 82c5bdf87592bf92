"""Training on several devices, which here are parts of the CPU, and on several processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from .conftest import ENVIRONMENT, HERE, have

Report = Callable[..., Any]


JAX = ("jax", "8", "shard")


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        pytest.param(JAX, "copied", marks=have("keras", "jax")),
        pytest.param(JAX, "sharded", marks=have("keras", "jax")),
        pytest.param(("tensorflow", "2"), "copied", marks=[have("keras", "tensorflow"), pytest.mark.slow]),
    ],
)
def test_several_devices_train_as_one(report: Report, kind: tuple[str, ...], state: str) -> None:
    found = report("devices.py", *kind)[state]
    assert found["devices"] == int(kind[1])
    assert found["losses"][-1] < found["losses"][0] - 0.01
    assert found["apart"] < 1e-5
    assert found["weights apart"] < 1e-4  # AdamW magnifies the rounding of gradients near zero


@have("keras", "jax")
def test_shard_spreads_parameters_and_optimiser_over_the_devices(report: Report) -> None:
    found = report("devices.py", *JAX)
    assert found["copied"]["share"] == 1.0
    assert found["sharded"]["share"] < 0.2  # an eighth, but for what does not divide


@pytest.mark.slow
@have("keras", "jax")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    pretrain(tmp_path / "one", 1)
    pretrain(tmp_path / "two", 2)
    expected, found = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("one", "two"))
    assert max(float(np.abs(found[name] - expected[name]).max()) for name in expected) < 1e-4
    expected, found = (losses(tmp_path / name) for name in ("one", "two"))
    assert found == pytest.approx(expected, abs=1e-5)


def pretrain(out: Path, count: int) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(HERE / "processes.py"), str(out)]
    processes = [
        subprocess.Popen([*command, str(rank), str(count), port], env=os.environ | ENVIRONMENT) for rank in range(count)
    ]
    assert [process.wait(300) for process in processes] == [0] * count


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]
