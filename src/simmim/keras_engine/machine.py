"""Protocols of the machines that run the step: JAX or TensorFlow, on one device or many."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.keras_engine.model import MaskedImageModel
from simmim.keras_engine.optim import State
from simmim.training.plan import Batch


class Machine(Protocol):
    """The devices that train together."""

    device: str
    """cpu, cuda or tpu."""
    name: str
    """For a person."""
    devices: int
    """Of all processes together."""
    rank: int
    size: int
    """Processes that train together; `rank` is this one's number."""

    def building(self) -> AbstractContextManager[Any]:
        """Return the context in which models are built."""
        ...

    def start(self, model: MaskedImageModel, config: PretrainConfig) -> "Stepper": ...

    def largest(self, number: int) -> int:
        """Return the largest number of all processes, none of which is negative; it may take some calls to be seen."""
        ...

    def main_says(self, number: int) -> int:
        """Broadcast a number from rank 0, once all have come here."""
        ...

    def share(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Broadcast rank 0's numbers, which have the same shape on every rank."""
        ...


class Stepper(Protocol):
    """The training state on the devices. Every process calls these together, each with its part of the batch."""

    def step(self, batch: Batch, lr: float) -> Any:
        """Train on a batch; return the figures of `simmim.keras_engine.optim.advance` without waiting for them."""
        ...

    def fetch(self, figures: Sequence[Any]) -> list[list[float]]: ...

    def judge(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the two sums of `Loss.sums`, (2,), and the prediction (B, h, w, P), in evaluation mode.

        Every process gives the same batch.
        """
        ...

    def read(self) -> State:
        """Return the state as NumPy arrays, whole on every process."""
        ...

    def write(self, state: State) -> None:
        """Set the state that `read` returned."""
        ...


def first_state(model: MaskedImageModel) -> State:
    """Return the state of a new model, as NumPy arrays."""
    values = [np.asarray(variable, np.float32) for variable in model.trainable_variables]
    return State(
        parameters=values,
        statistics=[np.asarray(variable, np.float32) for variable in model.non_trainable_variables],
        means=[np.zeros_like(value) for value in values],
        squares=[np.zeros_like(value) for value in values],
        updates=np.float32(0),
        bad=np.float32(0),
    )
