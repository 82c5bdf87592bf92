"""The Keras engine: the same pretraining on JAX or TensorFlow, for Cloud TPU teams that use those.

Keras fixes its backend when it is first imported, so every other module here is imported after `use_backend`.
"""

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from simmim.errors import UserError

if TYPE_CHECKING:
    from simmim.config.training import PretrainConfig
    from simmim.hardware.tpu_compiler import CompilerReport
    from simmim.training.loop import Outcome
    from simmim.training.run_directory import Run


def use_backend(backend: str) -> None:
    """Choose what Keras runs on, jax or tensorflow. One-line `ValueError` where that cannot be had."""
    for library in ("keras", backend):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"--engine keras --backend {backend} needs {library}; pip install 'simmim[keras]'")
    if "keras" in sys.modules:
        import keras

        if (loaded := keras.config.backend()) != backend:
            raise UserError(f"this process has Keras on {loaded} already; use {backend} in a process of its own")
    os.environ["KERAS_BACKEND"] = backend


def pretrain(config: "PretrainConfig") -> "tuple[Run, Outcome]":
    """Pretrain, or resume; see `simmim.pretrain`. One-line `ValueError` for what a user can mend."""
    use_backend(config.backend or "jax")
    from simmim.keras_engine.pretrain import pretrain

    return pretrain(config)


def compile_step(config: "PretrainConfig", topology: str) -> "CompilerReport":
    """The training step, compiled for a TPU; see `simmim.keras_engine.lower`."""
    use_backend(config.backend or "jax")
    from simmim.keras_engine.lower import compile_step

    return compile_step(config, topology)
