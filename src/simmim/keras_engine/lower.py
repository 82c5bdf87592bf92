"""Lower a training step on JAX or TensorFlow for the TPU compiler, without running it.

JAX's step is compiled for all devices of a topology at once, with its collectives. TensorFlow
compiles one replica's step and joins replicas at run time: its module is one device's, without the gradient exchange.
"""

import dataclasses
import re
from typing import Any

import keras
import numpy as np

from simmim.config.pretraining import PretrainConfig
from simmim.data.augment import FLIP_AXES
from simmim.hardware.tpu_compiler import (
    EFFORTS,
    CompilerReport,
    StepFacts,
    compile_stablehlo,
    report_of,
    topology_devices,
)
from simmim.keras_engine.model import MaskedImageModel, architecture_of, build_model
from simmim.keras_engine.pretrain import check_batch, check_options
from simmim.training.plan import Batch

_NO_EXCHANGE = "the exchange of gradients between devices, which TensorFlow puts in on the TPU itself"
# The compiler's reader no longer knows MLIR's copy; a reshape to the same shape is equivalent.
_COPY = re.compile(r"mhlo\.copy (%\w+) : (tensor<[^>]*>)")


def compile_step(config: PretrainConfig, topology: str) -> CompilerReport:
    """Compile the step of a training over all devices of `topology`. Raises `UserError` if that is impossible.

    Mean, std, precision and cluster centres must be set.
    """
    backend = keras.config.backend()
    architecture = architecture_of(config)
    check_options(config, backend, architecture.family)
    devices = topology_devices(topology)
    check_batch(config, len(devices))
    size = config.image_size or architecture.image_size
    config = dataclasses.replace(config, image_size=size)
    facts = StepFacts(
        engine="keras",
        backend=backend,
        model=config.model,
        image_size=size,
        precision=config.precision,
        topology=topology,
        devices=len(devices),
        batch_size=config.batch_size,
        notes=(_NO_EXCHANGE,) if backend == "tensorflow" and len(devices) > 1 else (),
    )
    if backend == "jax":
        step = lower_jax(config, devices)
        options = {"optimization_level": EFFORTS["O1"]}
        return report_of(lambda: step.compile(compiler_options=options).runtime_executable(), facts)
    module = lower_tensorflow(config, facts.batch_a_device)
    return report_of(lambda: compile_stablehlo(module, topology), facts)


def lower_jax(config: PretrainConfig, devices: list[Any]) -> Any:
    """Lower the step of `config` for `devices`, which may be absent: a `jax.stages.Lowered`."""
    from simmim.keras_engine.jax_machine import JaxMachine, JaxStepper

    machine = JaxMachine(devices)
    with machine.building():
        model = build_model(config)
    return JaxStepper(model, config, machine).lower(sketch_batch(config, model, config.batch_size))


def lower_tensorflow(config: PretrainConfig, batch_size: int) -> str:
    """Lower one replica's step of `config` for its share of the batch: StableHLO."""
    from simmim.keras_engine.tensorflow_machine import TensorFlowMachine

    machine = TensorFlowMachine.absent_tpu()
    with machine.building():
        model = build_model(config)
    text = machine.start(model, config).lower(sketch_batch(config, model, batch_size))
    return _COPY.sub(r"stablehlo.reshape \1 : (\2) -> \2", text)


def sketch_batch(config: PretrainConfig, model: MaskedImageModel, count: int) -> Batch:
    """Sketch a batch of `count` images: shapes and dtypes without memory."""
    assert config.image_size is not None
    H, W = config.image_size
    patch, layers = model.encoder.patch_size, model.encoder.drop_paths.layers
    shapes = {
        "image": ((H, W, config.channels), np.uint8),
        "flip": ((FLIP_AXES[config.flip or "horizontal"],), np.bool_),
        "mask": ((H // patch, W // patch), np.bool_),
    }
    if layers:
        shapes["drop_path"] = ((layers,), np.float32)
    return {name: np.broadcast_to(kind(0), (count, *shape)) for name, (shape, kind) in shapes.items()}
