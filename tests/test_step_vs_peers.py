"""The benchmark against peers fails where our step is behind one."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("step_vs_peers")
    monkeypatch.setattr(module, "save", lambda *_, **__: None)
    return module


@pytest.mark.parametrize(("ours", "status"), [(0.02, 1), (0.005, 0)])
def test_the_exit_status_is_1_where_ours_is_behind_a_peer(
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ours: float,
    status: int,
) -> None:
    now = 0.0

    def contender(seconds: float) -> Callable[[], Callable[[], torch.Tensor]]:
        def step() -> torch.Tensor:
            nonlocal now
            now += seconds
            return torch.tensor(0.0)

        return lambda: step

    # A clock that only steps move: a sleep of 10 ms takes 30 on a busy machine.
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: now))
    steps = {"timm fp32": contender(0.01), "simmim fp32": contender(ours)}
    monkeypatch.setattr(benchmark, "contenders", lambda *_, **__: steps)
    monkeypatch.setattr("sys.argv", ["step_vs_peers.py", "--cases", "vit", "--device", "cpu", "--rounds", "3"])
    assert benchmark.main() == status
    shown = "BEHIND A PEER  vit: simmim fp32 / timm fp32 is 0.50" in capsys.readouterr().out
    assert shown == bool(status)
