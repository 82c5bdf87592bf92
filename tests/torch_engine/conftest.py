from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simmim.cli import main
from simmim.training.loop import Loop

from . import worker


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> None:
    """The models are too small for two threads, which on a busy machine wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def whole(tmp_path_factory: pytest.TempPathFactory) -> worker.Finished:
    """A training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return worker.finish(worker.settings(folder / "run"), folder / "log")


@pytest.fixture
def interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], list[str]], int], None]:
    """Runs a fine-tuning twice, once broken off as it logs a step and resumed, and compares what the two leave."""

    def check(command: Callable[[Path], list[str]], at: int) -> None:
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        assert main(command(whole)) == 0
        log = Loop._log

        def break_off(self: Loop, done: int, *rest: object) -> object:
            if done == at:
                raise KeyboardInterrupt
            return log(self, done, *rest)  # type: ignore[arg-type]

        words = [*command(broken), "--log-every-steps", "1"]
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_log", break_off)
            assert main(words) == 130
        assert main(words) == 0
        for name in ("model/model.safetensors", "metrics.json"):
            assert (whole / name).read_bytes() == (broken / name).read_bytes()

    return check
