"""Whole trainings in processes of their own, to be killed, signalled, or started side by side, and what they left.

The processes are forked from a server that has imported PyTorch already, so that each starts in a moment.
"""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import to_toml
from simmim.output import say
from simmim.torch_engine.train.pretrain import pretrain as run_pretraining
from simmim.torch_engine.train.storage import load_model
from simmim.training.loop import Loop
from simmim.training.run_directory import Run

from . import tiny

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["simmim.cli", "simmim.torch_engine.train.pretrain", "grain", "tensorboardX"])


STEPS = 16


def settings(out: Path, kind: str = "vit", **others: Any) -> PretrainConfig:
    """A short training with drop path and pictures, whose saves, logs and pictures fall on different steps."""
    usual = {
        "model_args": tiny.KINDS[kind].arguments | ({"depth": 1} if kind == "vit" else {}),
        "steps": STEPS,
        "save_every_steps": 3,
        "picture_every_steps": 8,
        "log_every_steps": 2,
        "val_images": 2,
        "drop_path": 0.0 if kind == "resnet18" else 0.2,
        "lr": 0.2,
    }
    return tiny.config(kind, out=str(out), **(usual | others))


@dataclass(frozen=True)
class Finished:
    """A run that nothing interrupted, and how many Python functions it called."""

    config: PretrainConfig
    calls: int


def finish(config: PretrainConfig, log: Path) -> Finished:
    assert run(config, log) == 0, log.read_text()
    calls = re.findall(r"(\d+) calls", log.read_text())
    return Finished(config, int(calls[-1]))


def weights(config: PretrainConfig) -> dict[str, Tensor]:
    assert config.out
    return load_model(config.out).state_dict()


def rows(config: PretrainConfig) -> list[dict[str, float]]:
    assert config.out
    return [json.loads(line) for line in Run(Path(config.out)).metrics.read_text().splitlines()]


def start(function: Callable[..., None], *arguments: Any, log: Path, **environment: str) -> BaseProcess:
    """Begin a call in another process, its output in `log`."""
    process = _context.Process(target=_call, args=(function, arguments, log, environment))
    process.start()
    return process


def start_pretrain(config: PretrainConfig, log: Path, *, kill_at_call: int | None = None) -> BaseProcess:
    """Begin `simmim pretrain`; `kill -9` comes at its so many-th call of a Python function."""
    return start(pretrain, config, kill_at_call, log=log)


def run(config: PretrainConfig, log: Path, *, kill_at_call: int | None = None) -> int:
    """`simmim pretrain` to its end; the exit code, which is negative where a signal ended it."""
    process = start_pretrain(config, log, kill_at_call=kill_at_call)
    process.join(timeout=120)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode


def break_off(config: PretrainConfig, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretrain in this process until step `at` is logged, which ends it uncleanly."""
    log = Loop._log

    def log_or_end(self: Loop, done: int, *rest: Any) -> None:
        if done == at:
            raise KeyboardInterrupt
        log(self, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", log_or_end)
        with pytest.raises(KeyboardInterrupt):
            run_pretraining(config)


def run_together(function: Callable[..., None], *arguments: Any, log: Path, processes: int = 2) -> None:
    """A call in so many processes, each with its rank in the environment, as `torchrun` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(processes)]
    ranks = [
        start(function, *arguments, log=logs[rank], **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(processes)
    ]
    for process in ranks:
        process.join(timeout=120)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * processes, "\n".join(file.read_text() for file in logs)


def _call(function: Callable[..., None], arguments: tuple[Any, ...], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    function(*arguments)


def pretrain(config: PretrainConfig, kill_at_call: int | None = None) -> None:
    """`simmim pretrain` in this process, which it ends."""
    from simmim import cli

    assert config.out
    settings = Path(f"{config.out}.{os.getpid()}.toml")
    settings.write_text(to_toml(config))
    counter = _CallCounter(kill_at_call)
    sys.setprofile(counter)
    code = cli.main(["pretrain", "--config", str(settings), "--out", config.out])
    sys.setprofile(None)
    say(f"{counter.calls} calls")
    sys.exit(code)


def command(argv: list[str]) -> None:
    """Run a command of simmim in this process, which it ends."""
    from simmim import cli

    sys.exit(cli.main(argv))


class _CallCounter:
    """Counts the Python functions that the main thread calls; at the one that is due, ends the process uncleanly."""

    def __init__(self, due: int | None):
        self.calls, self.due = 0, due

    def __call__(self, _frame: FrameType, event: str, _argument: Any) -> None:
        if event != "call":
            return
        self.calls += 1
        if self.calls == self.due:
            os.kill(os.getpid(), signal.SIGKILL)
