"""Keras engine: pretraining on JAX or TensorFlow.

Keras fixes its backend at its first import: import every other module here after `use_backend`.
"""

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from simmim.errors import UserError

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.hardware.tpu_compiler import CompilerReport


def use_backend(backend: str) -> None:
    """Choose Keras's backend, jax or tensorflow. Raises `UserError` if it is not available."""
    for library in ("keras", backend):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"--engine keras --backend {backend} needs {library}; pip install 'simmim[keras]'")
    if "keras" in sys.modules:
        import keras

        if (loaded := keras.config.backend()) != backend:
            raise UserError(f"this process has Keras on {loaded} already; use {backend} in a process of its own")
    os.environ["KERAS_BACKEND"] = backend


def compile_step(config: "PretrainConfig", topology: str) -> "CompilerReport":
    """Compile the training step for a TPU; see `simmim.keras_engine.lower`."""
    use_backend(config.backend or "jax")
    from simmim.keras_engine.lower import compile_step

    return compile_step(config, topology)
