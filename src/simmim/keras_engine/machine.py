"""What runs the step: JAX or TensorFlow, on one device or many. The rest of the engine knows this protocol only."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.config.training import PretrainConfig
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
    """This process among `processes`."""
    processes: int

    def building(self) -> AbstractContextManager[Any]:
        """Where models are built."""
        ...

    def start(self, model: MaskedImageModel, config: PretrainConfig) -> "Stepper": ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process; it may take some calls to be seen."""
        ...

    def main_says(self, value: int) -> int:
        """The value of process 0, once all have come here."""
        ...


class Stepper(Protocol):
    """The training state on the devices. Every process calls these together, each with its part of the batch."""

    def step(self, batch: Batch, lr: float) -> Any:
        """Train on a batch; the figures of `simmim.keras_engine.optim.advance`, not waited for."""
        ...

    def fetch(self, figures: Sequence[Any]) -> list[list[float]]: ...

    def judge(self, batch: Batch) -> tuple[float, NDArray[np.float32]]:
        """Loss and prediction (B, h, w, P) of the model in evaluation mode; each process gives the same batch."""
        ...

    def read(self) -> State:
        """The state as NumPy arrays, whole on every process."""
        ...

    def write(self, state: State) -> None:
        """The reverse of `read`."""
        ...


def first_state(model: MaskedImageModel) -> State:
    """The state of a new model, as NumPy arrays."""
    values = [np.asarray(variable, np.float32) for variable in model.trainable_variables]
    return State(
        parameters=values,
        statistics=[np.asarray(variable, np.float32) for variable in model.non_trainable_variables],
        means=[np.zeros_like(value) for value in values],
        squares=[np.zeros_like(value) for value in values],
        updates=np.float32(0),
        bad=np.float32(0),
    )


def open_machine(backend: str, config: PretrainConfig) -> Machine:
    """The machine of a backend. One-line `ValueError` for a device that is not here, or that cannot shard."""
    if backend == "jax":
        from simmim.keras_engine.jax_machine import JaxMachine

        return JaxMachine.find(config.device)
    from simmim.keras_engine.tensorflow_machine import TensorFlowMachine

    return TensorFlowMachine.find(config.device)
