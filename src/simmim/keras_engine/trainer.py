"""The Keras engine as `simmim.training.loop` drives it: updates, checkpoints and processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from simmim.config.training import TrainingConfig
from simmim.keras_engine.checkpoint import load_checkpoint, save_checkpoint
from simmim.keras_engine.machine import Machine, Stepper
from simmim.keras_engine.model import MaskedImageModel
from simmim.keras_engine.optim import BAD_LIMIT, State
from simmim.method.schedules import Schedule
from simmim.training.checkpoint_directory import checkpoint_path, checkpoint_step, newest_checkpoint
from simmim.training.plan import Batch
from simmim.training.run_directory import Run


class KerasTrainer:
    """Implement `simmim.training.loop.Engine`; `batches(first_step)` yields batches, `on_save` writes the encoder."""

    def __init__(
        self,
        model: MaskedImageModel,
        stepper: Stepper,
        machine: Machine,
        schedule: Schedule,
        batches: Callable[[int], Iterator[Batch]],
        *,
        run: Run,
        config: TrainingConfig,
        on_save: Callable[[State], None],
    ):
        self._model, self._stepper, self._machine, self._schedule = model, stepper, machine, schedule
        self._batches, self._run, self._config, self._on_save = batches, run, config, on_save
        self.is_main = machine.rank == 0
        self.bad_limit = BAD_LIMIT

    def resume(self) -> int:
        # One process looks: it takes time to verify, and all have to start from the same.
        newest = newest_checkpoint(self._run.checkpoints) if self.is_main else None
        step = self._machine.main_says(checkpoint_step(newest) if newest else 0)
        if step:
            self._stepper.write(load_checkpoint(checkpoint_path(self._run.checkpoints, step), self._model))
        return step

    def batches(self, start_step: int) -> Iterator[Batch]:
        return self._batches(start_step)

    def update(self, step: int, batch: Batch) -> tuple[float, Any]:
        lr = self._schedule.at_update(step)
        return lr, self._stepper.step(batch, lr)

    def any(self, flag: bool) -> bool:
        return self._machine.any(flag)

    def fetch(self, figures: Sequence[Any]) -> list[list[float]]:
        return self._stepper.fetch(figures)

    def save(self, done: int) -> None:
        state = self._stepper.read()
        if self.is_main:
            save_checkpoint(self._run.checkpoints, done, self._model, state, keep=self._config.keep)
            self._on_save(state)
        self._machine.main_says(done)  # nobody goes on, or ends, before it is written
