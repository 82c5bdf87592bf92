"""The part of an engine that does not depend on its array library: processes, checkpoints found, figures by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.config.training import TrainingConfig
from simmim.training.checkpoint_directory import checkpoint_path, checkpoint_step, newest_checkpoint
from simmim.training.meter import Meter
from simmim.training.run_directory import Run

FIGURES = ("loss", "grad_norm", "skipped_in_a_row")
"""Figures of every step: the loss, the gradient norm before clipping, and consecutive steps that were not finite."""


class World(Protocol):
    """The processes of a training, as the engine joined them."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def largest(self, number: int) -> int:
        """Return the largest number of all processes, none of which is negative; it may take some calls to be seen."""
        ...

    def main_says(self, number: int) -> int:
        """Broadcast a number from rank 0, once rank 0 has come here."""
        ...

    def share(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Broadcast rank 0's numbers, which have the same shape on every rank."""
        ...


class Trainer(ABC):
    """Base of every engine's `simmim.training.loop.Engine`."""

    def __init__(self, run: Run, config: TrainingConfig, world: World, *, bad_limit: int, meter: Meter | None = None):
        self._run, self._config, self._world = run, config, world
        self.is_main = world.rank == 0
        self.alone = world.size == 1
        self.bad_limit = bad_limit
        self.meter = meter or Meter()

    def resume(self, step: int) -> None:
        """Load the checkpoint after `step` steps; 0 is a new run, which has none."""
        if step:
            self.load(checkpoint_path(self._run.checkpoints, step))

    def largest(self, number: int) -> int:
        return self._world.largest(number)

    def settle(self) -> None:
        """Wait until what `save` began is written."""
        return  # `save` itself has waited

    @property
    def save_failed(self) -> bool:
        return False

    def fetch(self, figures: Sequence[Any]) -> list[dict[str, float]]:
        return [dict(zip(self.names, row, strict=True)) for row in self.read(figures)]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of a step's figures, in order."""
        return FIGURES

    @abstractmethod
    def load(self, checkpoint: Path) -> None:
        """Load the whole state of a checkpoint directory that verified."""

    @abstractmethod
    def read(self, figures: Sequence[Any]) -> list[list[float]]:
        """Fetch the values of several steps' figures from the device."""

    @abstractmethod
    def update(self, step: int, batch: Any) -> tuple[float, Any]: ...

    @abstractmethod
    def save(self, done: int) -> None: ...


def find_start(config: TrainingConfig, world: World) -> int:
    """Return the number of steps in the run's newest checkpoint that verifies; 0 where training starts anew.

    Only rank 0 looks: verification takes time, and all ranks must agree. Raises `UserError` where every checkpoint is
    damaged.
    """
    assert config.out is not None
    newest = None
    if world.rank == 0 and not config.fresh:
        newest = newest_checkpoint(Run(Path(config.out)).checkpoints)
    return world.main_says(checkpoint_step(newest) if newest else 0)
