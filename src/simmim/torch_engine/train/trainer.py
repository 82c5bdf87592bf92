"""The PyTorch engine as `simmim.training.loop` drives it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from simmim.config.training import TrainingConfig
from simmim.torch_engine.train.checkpoint import CheckpointSaver, load_checkpoint
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.meter import TorchMeter
from simmim.torch_engine.train.update import Batch, Update
from simmim.training.run_directory import Run
from simmim.training.trainer import Trainer


class TorchTrainer(Trainer):
    """Drive an `Update` and its checkpoints. `on_save` writes the encoder, after each checkpoint is saved or loaded."""

    def __init__(
        self,
        update: Update,
        *,
        run: Run,
        config: TrainingConfig,
        world: World,
        on_save: Callable[[], None] = lambda: None,
    ):
        super().__init__(run, config, world, bad_limit=update.bad_limit, meter=TorchMeter(world.device))
        self._update, self._processes, self._on_save = update, world, on_save
        background = world.device.type == "cuda" if config.async_save is None else config.async_save
        self._saver = CheckpointSaver(run.checkpoints, world, keep=config.keep, background=background)
        self._has_checkpoint = False

    @property
    def names(self) -> tuple[str, ...]:
        return self._update.names

    def load(self, checkpoint: Path) -> None:
        update = self._update
        update.load_state(load_checkpoint(checkpoint, update.model, update.optimizer))
        self._has_checkpoint = True
        self._on_save()  # a kill after the checkpoint may have kept the encoder from being written

    def update(self, step: int, batch: Batch) -> tuple[float, Tensor]:
        return self._update(step, batch)

    def read(self, figures: Sequence[Tensor]) -> list[list[float]]:
        return self._processes.mean(torch.stack(list(figures))).cpu().tolist()

    def save(self, done: int) -> None:
        update = self._update
        self._saver.save(done, update.model, update.optimizer, update.state())
        if not self._has_checkpoint:  # a run with an encoder and no checkpoint counts as one whose work was deleted
            self._saver.settle()
            self._has_checkpoint = True
        self._on_save()

    def settle(self) -> None:
        self._saver.settle()

    @property
    def save_failed(self) -> bool:
        return self._saver.failed
