"""The Keras engine: the same pretraining on JAX or TensorFlow, for Cloud TPU teams that use those.

Keras fixes its backend when it is first imported, so every other module here is imported after `use_backend`.
"""

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simmim.config import PretrainConfig
    from simmim.loop import Outcome
    from simmim.run import Run
    from simmim.tpu_compiler import CompilerReport


def use_backend(backend: str) -> None:
    """Choose what Keras runs on, jax or tensorflow. One-line `ValueError` where that cannot be had."""
    for library in ("keras", backend):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"--engine keras --backend {backend} needs {library}; pip install 'simmim[keras]'")
    if "keras" in sys.modules:
        import keras

        if (loaded := keras.config.backend()) != backend:
            raise ValueError(f"this process has Keras on {loaded} already; use {backend} in a process of its own")
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
