"""JAX: one jitted step over a mesh of all devices, of all hosts; XLA puts in the collectives.

Parameters are copied to every device or, with --shard, spread over them; the batch is always spread.
"""

import contextlib
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores, cpu_name
from simmim.keras_engine.machine import first_state
from simmim.keras_engine.model import MaskedImageModel
from simmim.keras_engine.optim import Gradients, State, advance, in_pieces, rule_of
from simmim.training.plan import Batch

_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
_AXIS = "data"
_ASK_EVERY = 10  # steps between exchanges of stop signals, each of which waits for the devices


class JaxMachine:
    """A `simmim.keras_engine.machine.Machine` of devices that JAX sees, or that it compiles for without having them."""

    def __init__(self, devices: Sequence[Any]):
        self.mesh = Mesh(np.array(devices), (_AXIS,))
        platform, kind = devices[0].platform, devices[0].device_kind
        self.device = next(name for name, known in _PLATFORMS.items() if known == platform)
        single = f"{cpu_name()} ({cpu_cores()} cores)" if platform == "cpu" else kind
        self.name = f"{len(devices)} × {single}" if len(devices) > 1 else single
        self.devices = len(devices)
        self.rank, self.size = jax.process_index(), jax.process_count()
        self._asked = 0

    @classmethod
    def find(cls, wanted: str) -> "JaxMachine":
        """Find all devices of a kind; auto is the best that JAX sees. `tpu` joins the other hosts of a slice first.

        A program that has called `jax.distributed.initialize` itself is taken as it is.
        """
        if wanted == "cpu":
            jax.config.update("jax_platforms", "cpu")  # so that no accelerator is looked for
        if wanted == "tpu" and not jax.distributed.is_initialized():
            with contextlib.suppress(ValueError):  # it knows of no slice: one host
                jax.distributed.initialize()
        try:
            return cls(jax.devices(_PLATFORMS.get(wanted)))
        except RuntimeError as error:
            raise UserError(
                f"device {wanted!r} is not here: JAX says {str(error).splitlines()[0]}; use --device cpu, or install "
                f"JAX for it"
            ) from None

    def building(self) -> contextlib.AbstractContextManager[Any]:
        """Keep Keras's own copy of the weights in the host's memory."""
        return jax.default_device(jax.local_devices(backend="cpu")[0])

    def start(self, model: MaskedImageModel, config: PretrainConfig) -> "JaxStepper":
        stepper = JaxStepper(model, config, self)
        stepper.write(first_state(model))
        return stepper

    def largest(self, number: int) -> int:
        if self.size == 1:
            return number
        self._asked += 1
        if self._asked % _ASK_EVERY:
            return 0
        return int(multihost_utils.process_allgather(np.array(number, np.int32)).max())

    def main_says(self, number: int) -> int:
        return number if self.size == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))

    def share(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.size == 1:
            return numbers
        bits = np.ascontiguousarray(numbers).view(np.int32)  # JAX would round 64 bits to 32
        return np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64)

    @property
    def copied(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def split(self) -> NamedSharding:
        """Along the first axis."""
        return NamedSharding(self.mesh, PartitionSpec(_AXIS))

    def spread(self, shape: tuple[int, ...]) -> NamedSharding:
        """Split along the longest axis that divides; copy where none does."""
        fitting = [axis for axis, length in enumerate(shape) if length and length % self.devices == 0]
        if not fitting:
            return self.copied
        longest = max(fitting, key=lambda axis: shape[axis])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, _AXIS))


class JaxStepper:
    """A `simmim.keras_engine.machine.Stepper`. `lower` works without devices, for `write` was not called yet."""

    def __init__(self, model: MaskedImageModel, config: PretrainConfig, machine: JaxMachine):
        self._model, self._config, self._machine = model, config, machine
        self._rule = rule_of(config, model)
        self._state: State | None = None

    def step(self, batch: Batch, lr: float) -> Any:
        split = self._machine.split
        placed = {name: jax.make_array_from_process_local_data(split, array) for name, array in batch.items()}
        self._state, figures = self._train(self._state, placed, np.float32(lr))
        return figures

    def lower(self, batch: Batch) -> Any:
        """Trace the step for a whole batch of these shapes; `.compile()` compiles it for the machine's devices."""

        def typed(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

        split, copied = self._machine.split, self._machine.copied
        state = jax.tree.map(typed, first_state(self._model), self._shardings)
        rate = jax.ShapeDtypeStruct((), np.float32, sharding=copied)
        return self._train.lower(state, {name: typed(array, split) for name, array in batch.items()}, rate)

    def fetch(self, figures: Sequence[Any]) -> list[list[float]]:
        return [np.asarray(row).tolist() for row in jax.device_get(list(figures))]

    def judge(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        assert self._state is not None
        copied = self._machine.copied
        placed = {name: _place(array, copied) for name, array in batch.items()}
        _, prediction, sums = self._judge(self._state.parameters, self._state.statistics, placed)
        return np.asarray(sums), np.asarray(prediction)

    def read(self) -> State:
        assert self._state is not None
        copy = jax.jit(lambda state: state, out_shardings=self._machine.copied) if self._config.shard else lambda x: x
        return jax.tree.map(np.array, copy(self._state))

    def write(self, state: State) -> None:
        self._state = jax.tree.map(_place, state, self._shardings)

    @cached_property
    def _shardings(self) -> State:
        machine = self._machine
        choose = machine.spread if self._config.shard else lambda _: machine.copied
        return jax.tree.map(lambda array: choose(np.shape(array)), first_state(self._model))

    @cached_property
    def _train(self) -> Any:
        outputs = (self._shardings, self._machine.copied)
        return jax.jit(self._precisely(self._update), donate_argnums=0, out_shardings=outputs)

    @cached_property
    def _judge(self) -> Any:
        def judge(parameters: list[Any], statistics: list[Any], batch: dict[str, Any]) -> Any:
            return self._model.stateless_call(parameters, statistics, batch, training=False)[0]

        return jax.jit(self._precisely(judge), out_shardings=self._machine.copied)

    def _update(self, state: State, batch: dict[str, Any], lr: Any) -> tuple[State, Any]:
        def judge(part: dict[str, Any], statistics: list[Any]) -> Gradients:
            def loss_of(parameters: list[Any]) -> tuple[Any, list[Any]]:
                called: Any = self._model.stateless_call(parameters, statistics, part, training=True)
                (loss, *_), after = called
                return loss, after

            (loss, after), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.parameters)
            return Gradients(loss, gradients, after)

        found = in_pieces(self._config.pieces, batch, state.statistics, judge)
        return advance(self._rule, state, found, lr)

    def _precisely(self, function: Any) -> Any:
        """Trace a function so that fp32 means fp32: TPUs and GPUs would round the factors of products."""
        if self._config.precision != "fp32":
            return function
        return partial(_with_full_precision, function)


def _with_full_precision(function: Any, *args: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return function(*args)


def _place(array: NDArray[Any], sharding: NamedSharding) -> Any:
    """Put a whole array, given on every process, on the devices."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
