"""The Keras engine as `simmim.training.loop` drives it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simmim.config.training import TrainingConfig
from simmim.keras_engine.checkpoint import load_checkpoint, save_checkpoint
from simmim.keras_engine.machine import Machine, Stepper
from simmim.keras_engine.model import MaskedImageModel
from simmim.keras_engine.optim import BAD_LIMIT, State
from simmim.method.schedules import Schedule
from simmim.training.plan import Batch
from simmim.training.run_directory import Run
from simmim.training.trainer import Trainer


class KerasTrainer(Trainer):
    """Drive a `Stepper` and its checkpoints. `on_save` writes the encoder of each state that is saved or loaded."""

    def __init__(
        self,
        model: MaskedImageModel,
        stepper: Stepper,
        machine: Machine,
        schedule: Schedule,
        *,
        run: Run,
        config: TrainingConfig,
        on_save: Callable[[State], None],
    ):
        super().__init__(run, config, machine, bad_limit=BAD_LIMIT)
        self._model, self._stepper, self._schedule, self._on_save = model, stepper, schedule, on_save

    def load(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self._model)
        self._stepper.write(state)
        if self.is_main:
            self._on_save(state)  # a kill after the checkpoint may have kept the encoder from being written

    def update(self, step: int, batch: Batch) -> tuple[float, Any]:
        lr = self._schedule.at_update(step)
        return lr, self._stepper.step(batch, lr)

    def read(self, figures: Sequence[Any]) -> list[list[float]]:
        return self._stepper.fetch(figures)

    def save(self, done: int) -> None:
        state = self._stepper.read()
        if self.is_main:
            save_checkpoint(self._run.checkpoints, done, self._model, state, keep=self._config.keep)
            self._on_save(state)
        self._world.main_says(done)  # no process goes on, or ends, before it is written
