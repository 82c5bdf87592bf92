"""A quota that is used up, at every write of a training: one line, and nothing lost that was saved."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from simmim.config.pretraining import PretrainConfig
from simmim.training.run_directory import Run

from . import tiny, worker
from .worker import weights

STEPS = 6
EVERY = 4
"""Writes from one that fails to the next; set to 1, the test takes 10 minutes."""


def pretrain_until(config: PretrainConfig, root: str, number: int) -> None:
    """Pretrain; the `number`-th write below `root` fails with EDQUOT, and all after it. Prints how many there were."""
    count, fsync = 0, os.fsync

    def write(path: Any) -> None:
        nonlocal count
        if str(path) == root or str(path).startswith(f"{root}/"):
            count += 1
            if count >= number:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir" or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            write(arguments[0])
        elif event == "os.rename":
            write(arguments[1])

    def sync(descriptor: int) -> None:
        write(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    sys.addaudithook(audit)
    os.fsync = sync
    try:
        worker.pretrain(config)
    finally:
        os.write(1, f"{count} writes\n".encode())


def attempt(config: PretrainConfig, log: Path, number: int) -> tuple[int, str]:
    log.unlink(missing_ok=True)
    process = worker.start(pretrain_until, config, str(config.out), number, log=log)
    process.join(120)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode, log.read_text()


def settings(out: Path, **changes: Any) -> PretrainConfig:
    return worker.settings(out, steps=STEPS, save_every_steps=2, picture_every_steps=3, drop_path=0.0, **changes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("background", [False, True])
def test_a_quota_used_up_is_one_line_at_any_write_and_the_run_goes_on_when_there_is_space(
    tmp_path: Path, background: bool
) -> None:
    whole = settings(tmp_path / "whole", async_save=background)
    code, log = attempt(whole, tmp_path / "log", sys.maxsize)
    assert code == 0, log
    writes = int(log.split(" writes")[0].rsplit("\n", 1)[-1])
    assert writes > 150
    for number in range(1, writes + 1, EVERY):
        config = settings(tmp_path / f"run-{number}", async_save=background)
        code, log = attempt(config, tmp_path / "log", number)
        lines = [line for line in log.splitlines() if "Disk quota exceeded" in line]
        assert "Traceback" not in log, (number, log)
        assert code in (0, 1, 2), (number, code, log)
        if code:
            assert len(lines) == 1 and lines[0].startswith("simmim: "), (number, log)
        if number % 5 == 0 or code == 0:
            assert worker.run(config, tmp_path / "log") == 0, (number, (tmp_path / "log").read_text())
            tiny.assert_same(weights(config), weights(whole))
            assert len(Run(Path(str(config.out))).metrics.read_text().splitlines()) == STEPS
