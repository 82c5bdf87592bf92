"""TensorFlow: a custom loop under tf.distribute, on one device, on several of a host, or on a TPU.

Each replica judges its part of the batch in one compiled function; gradients are averaged over replicas; each replica
then takes the same update. TPUStrategy follows tensorflow-tpu's documentation and was never run on hardware here.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores, cpu_name
from simmim.keras_engine.machine import first_state
from simmim.keras_engine.model import MaskedImageModel
from simmim.keras_engine.optim import Gradients, State, advance, in_pieces, rule_of
from simmim.training.plan import Batch


class TensorFlowMachine:
    """A `simmim.keras_engine.machine.Machine` of one strategy. One process drives it, of a TPU slice too."""

    rank = 0
    size = 1

    def __init__(self, strategy: tf.distribute.Strategy, device: str, name: str):
        self.strategy, self.device = strategy, device
        self.devices = strategy.num_replicas_in_sync
        self.name = f"{self.devices} × {name}" if self.devices > 1 else name

    @classmethod
    def find(cls, wanted: str) -> "TensorFlowMachine":
        """Find all devices of a kind; auto takes GPUs where there are some, else the CPU."""
        if wanted == "tpu":
            return cls._tpu()
        gpus = tf.config.list_logical_devices("GPU")
        if wanted == "cuda" and not gpus:
            raise UserError("device 'cuda' is not here: TensorFlow sees no GPU; use --device cpu")
        if wanted == "cpu" or not gpus:
            return cls(_strategy(tf.config.list_logical_devices("CPU")), "cpu", f"{cpu_name()} ({cpu_cores()} cores)")
        return cls(_strategy(gpus), "cuda", "GPU")

    @classmethod
    def _tpu(cls) -> "TensorFlowMachine":
        """Connect to this host's TPU or, if TPU_NAME is set, to that slice; this process drives all of its hosts."""
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=os.environ.get("TPU_NAME", "local"))
            tf.config.experimental_connect_to_cluster(resolver)
            tf.tpu.experimental.initialize_tpu_system(resolver)
        except (ValueError, RuntimeError, OSError, tf.errors.OpError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"device 'tpu' is not here: TensorFlow says {reason}; use tensorflow-tpu on a TPU VM"
            ) from None
        return cls(tf.distribute.TPUStrategy(resolver), "tpu", "TPU")

    @classmethod
    def absent_tpu(cls) -> "TensorFlowMachine":
        """Stand in for one device of a TPU that is not here: models are built on the CPU, steppers only `lower`."""
        return cls(tf.distribute.OneDeviceStrategy("CPU:0"), "tpu", "TPU")

    def building(self) -> AbstractContextManager[Any]:
        return self.strategy.scope()

    def start(self, model: MaskedImageModel, config: PretrainConfig) -> "TensorFlowStepper":
        return TensorFlowStepper(model, config, self)

    def largest(self, number: int) -> int:
        return number

    def main_says(self, number: int) -> int:
        return number

    def share(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        return numbers


def _strategy(devices: Sequence[Any]) -> tf.distribute.Strategy:
    names = [device.name for device in devices]
    return tf.distribute.MirroredStrategy(names) if len(names) > 1 else tf.distribute.OneDeviceStrategy(names[0])


def _traced(function: Callable[..., Any], *, jit_compile: bool | None = None) -> Any:
    """Trace a function as it is: it has no branches or loops over tensors for AutoGraph to rewrite."""
    return tf.function(function, autograph=False, jit_compile=jit_compile)


class TensorFlowStepper:
    """A `simmim.keras_engine.machine.Stepper` whose state is variables of the strategy, the model's own among them."""

    def __init__(self, model: MaskedImageModel, config: PretrainConfig, machine: TensorFlowMachine):
        self._model, self._config, self._strategy = model, config, machine.strategy
        self._rule = rule_of(config, model)
        # Else GPUs and TPUs round the factors of products: TensorFlow asks the same of both by this one switch.
        tf.config.experimental.enable_tensor_float_32_execution(config.precision != "fp32")
        # A TPU compiles whatever runs on it, and takes no further request to.
        self._compile = bool(config.compile) and machine.device != "tpu"
        first = first_state(model)
        with self._strategy.scope():
            self._variables = State(
                parameters=[variable.value for variable in model.trainable_variables],
                statistics=[variable.value for variable in model.non_trainable_variables],
                means=[tf.Variable(value, trainable=False) for value in first.means],
                squares=[tf.Variable(value, trainable=False) for value in first.squares],
                updates=tf.Variable(first.updates, trainable=False),
                bad=tf.Variable(first.bad, trainable=False),
            )

    def step(self, batch: Batch, lr: float) -> Any:
        figures = self._train(self._split(batch), tf.constant(lr, tf.float32))
        return self._strategy.experimental_local_results(figures)[0]

    def lower(self, batch: Batch) -> str:
        """Lower the step of one replica, for its part of a batch of these shapes, to StableHLO."""

        def step(lr: Any, *arrays: Any) -> Any:
            return self._strategy.run(self._replica, args=(dict(zip(batch, arrays, strict=True)), lr))

        shapes = [tf.TensorSpec(array.shape, array.dtype) for array in batch.values()]
        lowered = _traced(step, jit_compile=True).experimental_get_compiler_ir(tf.TensorSpec(()), *shapes)
        return lowered(stage="stablehlo")

    def fetch(self, figures: Sequence[Any]) -> list[list[float]]:
        return [row.numpy().tolist() for row in figures]

    def judge(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        _, prediction, sums = self._judge({name: tf.constant(array) for name, array in batch.items()})
        return sums.numpy(), prediction.numpy()

    def read(self) -> State:
        return tf.nest.map_structure(lambda variable: variable.numpy(), self._variables)

    def write(self, state: State) -> None:
        for variable, value in zip(tf.nest.flatten(self._variables), tf.nest.flatten(state), strict=True):
            variable.assign(value)

    def _split(self, batch: Batch) -> dict[str, Any]:
        """Put each replica's part of the batch on its device."""
        count = self._strategy.num_replicas_in_sync
        parts = {name: np.split(array, count) for name, array in batch.items()}
        return {
            name: self._strategy.experimental_distribute_values_from_function(
                lambda context, name=name: tf.constant(parts[name][context.replica_id_in_sync_group])
            )
            for name in parts
        }

    @cached_property
    def _train(self) -> Any:
        return _traced(lambda batch, lr: self._strategy.run(self._replica, args=(batch, lr)))

    def _replica(self, batch: dict[str, Any], lr: Any) -> Any:
        """Do one replica's part of a step; return the figures, which are equal on all."""
        state = tf.nest.map_structure(tf.convert_to_tensor, self._variables)
        found = self._find(state, batch)
        if self._strategy.num_replicas_in_sync > 1:
            context = tf.distribute.get_replica_context()
            found = context.all_reduce(tf.distribute.ReduceOp.MEAN, found)
        after, figures = self._advance(state, found, lr)
        # What Keras's optimizers use: in place where a strategy allows that, else from outside the replicas.
        tf.__internal__.distribute.interim.maybe_merge_call(self._assign, self._strategy, after)
        return figures

    def _assign(self, strategy: Any, state: Any) -> None:
        for variable, value in zip(tf.nest.flatten(self._variables), tf.nest.flatten(state), strict=True):
            strategy.extended.update(variable, lambda own, new: own.assign(new), args=(value,), group=False)

    @cached_property
    def _find(self) -> Any:
        def judge(state: State, part: dict[str, Any], statistics: list[Any]) -> Gradients:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(state.parameters)
                called: Any = self._model.stateless_call(state.parameters, statistics, part, training=True)
                (loss, *_), after = called
            gradients = tape.gradient(loss, state.parameters)
            return Gradients(loss, [tf.convert_to_tensor(gradient) for gradient in gradients], after)

        def find(state: State, batch: dict[str, Any]) -> Gradients:
            pieces = self._config.pieces
            return in_pieces(pieces, batch, state.statistics, lambda part, after: judge(state, part, after))

        return _traced(find, jit_compile=self._compile)

    @cached_property
    def _advance(self) -> Any:
        return _traced(lambda *args: advance(self._rule, *args), jit_compile=self._compile)

    @cached_property
    def _judge(self) -> Any:
        return _traced(lambda batch: self._model(batch, training=False), jit_compile=self._compile)
