"""What others do to a training's files and processes while it runs: one line, and nothing lost that was saved."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simmim.config.pretraining import PretrainConfig
from simmim.errors import TrainingFailedError
from simmim.torch_engine.train.pretrain import pretrain
from simmim.training.checkpoint_directory import checkpoint_step, newest_checkpoint
from simmim.training.loop import Loop
from simmim.training.run_directory import Run

from . import tiny
from .worker import settings, weights

pytestmark = pytest.mark.slow
AT = 8
"""Step before which it happens; the checkpoint before is of step 6."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """An undisturbed training from images of its own."""
    root = tmp_path_factory.mktemp("whole")
    (root / "images").mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"images/{number}.png")
    config = settings(root / "run", data=str(root / "images"))
    pretrain(config)
    return config


def train(config: PretrainConfig, event: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """Pretrain until `event`, at step `AT`, ends it; return the line."""
    following = Loop._next

    def next_after_event(self: Loop, batches: Any) -> Any:
        if len(self._rows) + self._clock._step == AT:
            event()
        return following(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_next", next_after_event)
        with pytest.raises(TrainingFailedError) as error:
            pretrain(config)
    return str(error.value)


def here(whole: PretrainConfig, tmp_path: Path, **changes: Any) -> PretrainConfig:
    return settings(tmp_path / "run", data=whole.data, **changes)


def test_a_run_that_is_removed_ends_with_a_line_that_says_so(whole, tmp_path: Path, monkeypatch) -> None:
    line = train(here(whole, tmp_path), lambda: shutil.rmtree(tmp_path / "run"), monkeypatch)
    assert line.startswith(f"{tmp_path}/run/")
    assert line.endswith(
        "cannot be written: No such file or directory; its directory was removed, or its storage is gone; bring it "
        "back, then repeat the command"
    )


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"other")], ids=["deleted", "replaced"])
def test_images_that_are_gone_end_it_after_a_save_and_it_goes_on_when_they_are_back(
    whole, tmp_path: Path, monkeypatch, damage: Callable[[Path], object]
) -> None:
    images = Path(whole.data)
    kept = {path: path.read_bytes() for path in images.iterdir()}
    config = here(whole, tmp_path)
    try:
        line = train(config, lambda: [damage(path) for path in kept], monkeypatch)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert " of 20 images (" in line and "more than --max-bad-fraction 0.01" in line and "(stopped after step " in line
    newest = newest_checkpoint(Run(tmp_path / "run").checkpoints)
    assert newest and f"(stopped after step {checkpoint_step(newest)} " in line
    (tmp_path / "run/bad_images.txt").unlink()
    pretrain(config)
    tiny.assert_same(weights(config), weights(whole))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reading processes are found in /proc")
def test_a_reading_process_that_is_killed_ends_it_after_a_save(whole, tmp_path: Path, monkeypatch) -> None:
    def kill() -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        (reader,) = (pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(int(reader), signal.SIGKILL)

    config = here(whole, tmp_path, readers="processes", workers=1)
    line = train(config, kill, monkeypatch)
    assert line.startswith("a reading process ended with exit code -9, for want of memory, ")
    pretrain(config)
    tiny.assert_same(weights(config), weights(whole))
