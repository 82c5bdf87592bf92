"""Save and load training states, for JAX and TensorFlow alike: one safetensors file of named arrays.

`RUN/checkpoints/step-00001000/state.safetensors` holds `model.NAME`, `mean.NAME` and `square.NAME` (AdamW's averages)
under the torch engine's names and in PyTorch's layout, `updates` and `bad`. `simmim.training.checkpoint_directory`
verifies it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from simmim.keras_engine import weights
from simmim.keras_engine.model import MaskedImageModel
from simmim.keras_engine.optim import State
from simmim.training.checkpoint_directory import ARRAYS, begin, filling, publish


def save_checkpoint(directory: Path, step: int, model: MaskedImageModel, state: State, *, keep: int) -> Path:
    """Write the state after `step` steps; only one process calls it. Returns the checkpoint's directory."""
    with filling(directory, step):
        save_file(_named(model, state), begin(directory, step) / ARRAYS)
        return publish(directory, step, keep=keep)


def load_checkpoint(path: Path, model: MaskedImageModel) -> State:
    """Load a saved state."""
    arrays = load_file(path / ARRAYS)
    parameters = model.trainable_variables
    return State(
        parameters=weights.arrange(parameters, part(arrays, "model")),
        statistics=weights.arrange(model.non_trainable_variables, part(arrays, "model")),
        means=weights.arrange(parameters, part(arrays, "mean")),
        squares=weights.arrange(parameters, part(arrays, "square")),
        updates=arrays["updates"],
        bad=arrays["bad"],
    )


def load_weights(path: Path) -> weights.State:
    """Load the model's weights alone, under the PyTorch engine's names."""
    return part(load_file(path / ARRAYS), "model")


def part(arrays: Mapping[str, NDArray[Any]], kind: str) -> weights.State:
    prefix = f"{kind}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _named(model: MaskedImageModel, state: State) -> dict[str, NDArray[Any]]:
    parameters = model.trainable_variables
    groups = {
        "model": weights.export(parameters, state.parameters)
        | weights.export(model.non_trainable_variables, state.statistics),
        "mean": weights.export(parameters, state.means),
        "square": weights.export(parameters, state.squares),
    }
    named = {f"{kind}.{name}": array for kind, group in groups.items() for name, array in group.items()}
    return named | {"updates": np.asarray(state.updates), "bad": np.asarray(state.bad)}
