"""Compiled steps are one graph that is compiled once, without spilled registers, on three generations of GPUs."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import compiled

_LONGEST = 1800  # seconds of a test, which compiles a case or four
pytestmark = [pytest.mark.slow, pytest.mark.timeout(_LONGEST)]
Run = Callable[..., subprocess.CompletedProcess[str]]
Row = dict[str, Any]
Found = Callable[[int, str], Row]
FAMILIES = ("vit", "beit", "swin", "resnet18")
EVERY = [
    *((90, case) for case in compiled.CASES if "sharded" not in case),
    *((sm, case) for sm in (80, 100) for case in FAMILIES),
]


def settings(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a run whose compiler begins with nothing."""
    caches = {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return {**caches, "TORCHINDUCTOR_COMPILE_THREADS": "1", **more}


def lines(done: subprocess.CompletedProcess[str]) -> dict[str, Row]:
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {row["case"]: row for row in rows}


@pytest.fixture(scope="module")
def found(on_null_gpu: Run, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What a case did on a compute capability, compiled when first asked for; `-s` shows it."""
    known: dict[tuple[int, str], Row] = {}
    folders: dict[int, Path] = {}

    def ask(sm: int, case: str) -> Row:
        if (sm, case) not in known:
            if sm not in folders:
                folders[sm] = tmp_path_factory.mktemp(f"sm_{sm}")
            folder = folders[sm]
            done = on_null_gpu(
                *("-m", "nullgpu.compiled", str(folder), case),
                timeout=_LONGEST,
                **settings(folder, NULLGPU_SM=str(sm)),
            )
            known[sm, case] = lines(done)[case]
            print(f"\nsm_{sm}:", known[sm, case], flush=True)
        return known[sm, case]

    return ask


@pytest.mark.parametrize(("sm", "case"), EVERY)
def test_a_run_compiles_one_graph_once(found: Found, sm: int, case: str) -> None:
    row = found(sm, case)
    assert row["error"] == ""
    assert (row["graphs"], row["breaks"], row["recompiles"]) == (1, [], [])
    steps = row["launches"][1:]
    assert len(steps) >= 4 and len(set(steps)) == 1, "steps after the first differ"
    assert 50 < steps[0] < row["eager"][-1]


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_no_kernel_keeps_registers_in_memory(found: Found, sm: int) -> None:
    for case in FAMILIES:
        found(sm, case)
    row = found(sm, compiled.CUBINS)
    assert row["kernels"] > 50
    assert row["spilled"] == {}


@pytest.mark.parametrize(("mode", "case"), [(mode, case) for mode, cases in compiled.MODES.items() for case in cases])
def test_a_mode_of_the_compiler_runs(found: Found, mode: str, case: str) -> None:
    row = found(90, f"{case} by {mode}")
    assert row["error"] == ""
    assert (row["graphs"], row["breaks"], row["recompiles"]) == (1, [], [])
    if mode == "reduce-overhead":  # forward and backward pass are a graph each; what is left is the optimiser's
        assert row["in_graphs"][-1] > row["launches"][-1]


@pytest.mark.parametrize(
    ("fault", "graphs", "breaks", "recompiles"),
    [
        ("a question to the device", 2, "item", 0),
        ("a print", 2, "builtin operator", 0),
        ("a smaller batch", 2, "", 1),
    ],
)
def test_a_fault_that_is_put_in_is_caught(found: Found, fault: str, graphs: int, breaks: str, recompiles: int) -> None:
    row = found(90, fault)
    assert row["graphs"] >= graphs
    assert len(row["recompiles"]) >= recompiles
    assert breaks in " ".join(row["breaks"])
    assert row["breaks"] if breaks else not row["breaks"]


@pytest.mark.parametrize(
    ("case", "breaks"),
    [("vit", []), ("vit, sharded", ["Call to `torch._dynamo.disable()`"])],  # FSDP2's own, around each block
)
def test_two_processes_train_compiled(on_null_gpu: Run, tmp_path: Path, case: str, breaks: list[str]) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nullgpu.compiled"]
    done = on_null_gpu(*launch, str(tmp_path), case, **settings(tmp_path, NULLGPU_DEVICES="2"))
    row = lines(done)[case]
    assert row["error"] == ""
    assert (row["breaks"], row["recompiles"]) == (breaks, [])
    assert row["launches"][-1] < row["eager"][-1]
