"""The PyTorch engine as `simmim.training.loop` drives it: updates, checkpoints and processes."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from simmim.config.training import TrainingConfig
from simmim.torch_engine.train.checkpoint import load_checkpoint, save_checkpoint
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.update import Batch, Update
from simmim.training.checkpoint_directory import checkpoint_path, checkpoint_step, newest_checkpoint
from simmim.training.run_directory import Run


class TorchTrainer:
    """A `simmim.training.loop.Engine`: `batches(first_step)` gives a task's batches, `on_save` writes its encoder."""

    def __init__(
        self,
        update: Update,
        batches: Callable[[int], Iterator[Batch]],
        *,
        run: Run,
        config: TrainingConfig,
        world: World,
        on_save: Callable[[], None],
    ):
        self._update, self._batches = update, batches
        self.is_main = world.is_main
        self.bad_limit = update.bad_limit
        self._run, self._config, self._world, self._on_save = run, config, world, on_save

    def resume(self) -> int:
        # One process looks: it takes time to verify, and all have to start from the same.
        newest = newest_checkpoint(self._run.checkpoints) if self.is_main else None
        step = self._world.main_says(checkpoint_step(newest) if newest else 0)
        if step:
            path = checkpoint_path(self._run.checkpoints, step)
            self._update.load_state(load_checkpoint(path, self._update.model, self._update.optimizer))
        return step

    def batches(self, start_step: int) -> Iterator[Batch]:
        return self._batches(start_step)

    def update(self, step: int, batch: Batch) -> tuple[float, Tensor]:
        return self._update(step, batch)

    def any(self, flag: bool) -> bool:
        return self._world.any(flag)

    def fetch(self, figures: Sequence[Tensor]) -> list[list[float]]:
        return self._world.mean(torch.stack(list(figures))).cpu().tolist()

    def save(self, done: int) -> None:
        update, world = self._update, self._world
        save_checkpoint(
            self._run.checkpoints,
            done,
            update.model,
            update.optimizer,
            update.state(),
            world=world,
            keep=self._config.keep,
        )
        self._on_save()
