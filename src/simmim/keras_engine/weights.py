"""Convert between Keras variables and arrays with timm's names and PyTorch's layout, the storage format.

A variable's name is its layer's (timm's module) and its own: `encoder.backbone.norm/gamma` →
`encoder.backbone.norm.weight`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

State = dict[str, NDArray[Any]]

_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def torch_name(variable: keras.Variable) -> str:
    module, leaf = variable.path.rsplit("/", 2)[-2:]
    return f"{module}.{_LEAVES.get(leaf, leaf)}"


def torch_shape(variable: keras.Variable) -> tuple[int, ...]:
    shape = tuple(variable.shape)
    return tuple(shape[axis] for axis in _to_torch(variable, len(shape)))


def export(variables: Iterable[keras.Variable], arrays: Iterable[NDArray[Any]]) -> State:
    """Convert variables or optimiser averages to PyTorch's names and layouts."""
    return {
        torch_name(variable): np.ascontiguousarray(np.transpose(array, _to_torch(variable, array.ndim)))
        for variable, array in zip(variables, arrays, strict=True)
    }


def arrange(variables: Iterable[keras.Variable], state: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Invert `export`."""
    return [
        np.ascontiguousarray(np.transpose(array, np.argsort(_to_torch(variable, array.ndim))))
        for variable in variables
        for array in (np.asarray(state[torch_name(variable)], np.float32),)
    ]


def assign(layer: keras.layers.Layer, state: Mapping[str, NDArray[Any]]) -> None:
    """Set every variable of a layer."""
    for variable, array in zip(layer.variables, arrange(layer.variables, state), strict=True):
        variable.assign(array)


def read(layer: keras.layers.Layer) -> State:
    return export(layer.variables, [np.asarray(variable) for variable in layer.variables])


def _to_torch(variable: keras.Variable, ndim: int) -> tuple[int, ...]:
    """Transpose to PyTorch's order: (in, out) → (out, in), (rows, columns, in, out) → (out, in, rows, columns)."""
    if variable.path.endswith("/kernel"):
        return (1, 0) if ndim == 2 else (3, 2, 0, 1)
    return tuple(range(ndim))
