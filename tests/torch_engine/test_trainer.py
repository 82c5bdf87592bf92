"""The engine under the loop."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from simmim.errors import TrainingDivergedError
from simmim.torch_engine.train.trainer import TorchTrainer
from simmim.torch_engine.train.update import Batch, Update
from simmim.training.checkpoint_directory import checkpoint_path, newest_checkpoint
from simmim.training.loop import Loop, Outcome
from simmim.training.run_directory import Run
from simmim.training.trainer import find_start

from . import tiny

SETTINGS = tiny.config(log_every_steps=10)


def loop(update: Update, out: Path, *, total: int, broken_from: int) -> Loop:
    def batches(start: int) -> Iterator[Batch]:
        for step in range(start, total):
            yield tiny.batch(SETTINGS, seed=step, broken=step >= broken_from)

    run = Run(out)
    trainer = TorchTrainer(update, run=run, config=SETTINGS, world=tiny.CPU)
    start = find_start(dataclasses.replace(SETTINGS, out=str(out)), tiny.CPU)
    trainer.resume(start)
    steps = {"start": start, "total_steps": total, "steps_per_epoch": 10, "save_every_steps": 4}
    return Loop(trainer, run, SETTINGS, **steps, batches=batches)


def test_ten_steps_in_a_row_that_are_not_finite_end_the_training_and_its_checkpoint_goes_on(tmp_path: Path) -> None:
    good = tiny.update(SETTINGS)
    for step in range(5):
        good(step, tiny.batch(SETTINGS, seed=step))
    with pytest.raises(TrainingDivergedError, match="for 10 steps in a row, up to step 16"):
        loop(tiny.update(SETTINGS), tmp_path, total=40, broken_from=5).fit()
    resumed = tiny.update(SETTINGS)
    mended = loop(resumed, tmp_path, total=14, broken_from=99)
    tiny.assert_same(tiny.state(resumed), tiny.state(good))
    assert mended.fit() == Outcome(14, 12)


def test_no_encoder_is_written_before_the_first_checkpoint_that_is_written_in_the_background(tmp_path: Path) -> None:
    config, run, seen = dataclasses.replace(SETTINGS, async_save=True), Run(tmp_path), []
    update = tiny.update(SETTINGS)

    def write_encoder() -> None:
        seen.append(newest_checkpoint(run.checkpoints))

    trainer = TorchTrainer(update, run=run, config=config, world=tiny.CPU, on_save=write_encoder)
    trainer.save(1)
    trainer.settle()
    assert seen == [checkpoint_path(run.checkpoints, 1)]
