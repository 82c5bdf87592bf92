"""Initial weights with timm's distributions, identical on every backend.

Shapes are PyTorch's: (outputs, inputs, …).
"""

import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from simmim.keras_engine.architectures import Architecture

Shape = tuple[int, ...]
Values = NDArray[np.floating]


def first_values(shapes: Mapping[str, Shape], architecture: Architecture, seed: int) -> dict[str, Values]:
    """Draw initial weights of a `MaskedImageModel` by name; each depends only on seed, name and shape."""
    return {
        name: _draw(name, shapes, architecture, np.random.default_rng((seed, zlib.crc32(name.encode()))))
        for name in shapes
    }


def _draw(name: str, shapes: Mapping[str, Shape], architecture: Architecture, rng: np.random.Generator) -> Values:
    shape = shapes[name]
    module, _, leaf = name.rpartition(".")
    weight = shapes.get(f"{module}.weight", shape)  # the layer that a bias belongs to
    if leaf in ("running_mean", "q_bias", "v_bias") or (leaf == "bias" and len(weight) == 1):
        return np.zeros(shape)
    if leaf == "weight" and module.endswith("bn3" if architecture.bottleneck else "bn2"):
        return np.zeros(shape)  # zero-initialised residual branch
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return np.ones(shape)
    if leaf in ("gamma_1", "gamma_2"):
        return np.full(shape, architecture.arguments["init_values"])
    if leaf == "mask_token":
        return _truncated_normal(shape, rng)
    if name.startswith("head.") or module.endswith("patch_embed.proj"):
        return _pytorch_default(shape, weight, rng)
    if architecture.family == "resnet":
        return rng.normal(0.0, np.sqrt(2 / (shape[0] * np.prod(shape[2:]))), shape)  # He et al., by fan-out
    return _transformer(name, leaf, shape, architecture, rng)


def _transformer(name: str, leaf: str, shape: Shape, architecture: Architecture, rng: np.random.Generator) -> Values:
    beit = architecture.family == "beit"
    if leaf == "bias" or (beit and leaf == "relative_position_bias_table"):
        return np.zeros(shape)
    if leaf == "cls_token" and not beit:
        return rng.normal(0.0, 1e-6, shape)
    values = _truncated_normal(shape, rng)
    if beit and name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
        block = int(name.split("blocks.")[1].split(".")[0])
        return values / np.sqrt(2.0 * (block + 1))  # deeper branches start smaller
    return values


def _truncated_normal(shape: Shape, rng: np.random.Generator) -> Values:
    # timm cuts at ±2, a hundred deviations: that cuts nothing.
    return rng.normal(0.0, 0.02, shape)


def _pytorch_default(shape: Shape, weight: Shape, rng: np.random.Generator) -> Values:
    """Uniform within ±1/√fan-in, for weights and biases alike."""
    limit = 1 / np.sqrt(np.prod(weight[1:]))
    return rng.uniform(-limit, limit, shape)
