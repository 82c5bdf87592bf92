"""The step runs on CUDA: devices, dtypes and wiring are right, nothing waits, every copy is from pinned memory.

Numbers are not looked at: the GPU computes nothing.
"""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from . import steps

pytestmark = pytest.mark.timeout(600)  # of a first test that runs all cases
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def found(on_null_gpu: Run) -> dict[str, dict[str, Any]]:
    done = on_null_gpu("-m", "nullgpu.steps", *steps.CASES, *steps.FAULTS)
    assert done.returncode == 0, done.stderr
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", steps.CASES)
def test_a_step_neither_fails_nor_waits(found: dict[str, dict[str, Any]], case: str) -> None:
    assert found[case]["error"] == ""
    assert found[case]["launches"] > 100


@pytest.mark.parametrize(
    ("case", "attention"),
    [
        ("vit, bf16", {"flash": 2, "efficient": 0}),
        ("vit, fp32", {"flash": 0, "efficient": 2}),
        ("beit, bf16", {"flash": 0, "efficient": 2}),  # which has a bias
        ("swin, bf16", {"flash": 0, "efficient": 0}),  # timm's choice
        ("vit, attention flash", {"flash": 2, "efficient": 0}),
        ("vit, attention efficient", {"flash": 0, "efficient": 2}),
        ("vit, attention products", {"flash": 0, "efficient": 0}),
        ("beit, attention products", {"flash": 0, "efficient": 0}),
        ("swin, attention efficient", {"flash": 0, "efficient": 5}),  # a launch for each of its blocks
    ],
)
def test_attention_is_by_the_kernel_that_is_named(
    found: dict[str, dict[str, Any]], case: str, attention: dict[str, int]
) -> None:
    assert found[case]["attention"] == attention


def test_attention_by_cudnn_is_used_only_where_it_is_named(found: dict[str, dict[str, Any]]) -> None:
    """PyTorch prefers it for compute capability 9.0."""
    chosen = {name: value for name, value in found["choices"].items() if name != "case"}
    assert chosen["before"] == chosen["named"] == "CUDNN_ATTENTION"
    assert (chosen["after"], chosen["biased"]) == ("FLASH_ATTENTION", "EFFICIENT_ATTENTION")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cpu tensor", "Expected all tensors to be on the same device"),
        ("wrong dtype", "must have the same dtype"),
        ("wait", "called a synchronizing CUDA operation"),
        ("copy of a constant", "called a synchronizing CUDA operation"),
        ("unpinned copy", "is not from pinned memory"),
    ],
)
def test_a_fault_that_is_put_in_is_caught(found: dict[str, dict[str, Any]], fault: str, message: str) -> None:
    assert message in found[fault]["error"]
