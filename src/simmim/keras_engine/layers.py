"""Layers that the encoders share, with timm's arithmetic.

Every layer that holds weights is named as timm names its module ("encoder.backbone.blocks.0.attn.qkv"), which is how
`simmim.keras_engine.weights` finds them. Layers are built on creation, when their sizes are known.
Matrix products run in the compute dtype of the policy; norms, softmax and the residual stream in float32.

Shapes: `B` images, `H W` pixels, `h w` patches, `N` tokens, `D` features, `n` heads.
"""

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

Array = Any  # a tensor of the backend
ops: Any = keras.ops  # their annotations wrongly allow None


class Module(keras.layers.Layer):
    """Layer with float32 weights and no input casting by Keras; its children cast."""

    def __init__(self, name: str):
        super().__init__(name=name, dtype="float32", autocast=False)
        self.built = True

    def weight(self, name: str, shape: tuple[int, ...], *, trainable: bool = True) -> keras.Variable:
        """Create a parameter or statistic, zero until `simmim.keras_engine.weights` fills it."""
        return self.add_weight(name=name, shape=shape, initializer="zeros", trainable=trainable, autocast=False)


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> keras.layers.Dense:
    layer = keras.layers.Dense(outputs, use_bias=bias, kernel_initializer="zeros", name=name)
    layer.build((None, inputs))
    return layer


def layer_norm(name: str, features: int, epsilon: float) -> keras.layers.LayerNormalization:
    layer = keras.layers.LayerNormalization(epsilon=epsilon, name=name, dtype="float32")
    layer.build((None, features))
    return layer


def convolution(
    name: str, inputs: int, outputs: int, size: int, *, stride: int = 1, bias: bool = False
) -> keras.layers.Conv2D:
    """Convolve without padding; callers pad symmetrically, as PyTorch does and Keras does not."""
    layer = keras.layers.Conv2D(
        outputs, size, strides=stride, use_bias=bias, kernel_initializer="zeros", data_format="channels_last", name=name
    )
    layer.build((None, None, None, inputs))
    return layer


class DropPath:
    """Stochastic depth (arXiv 1603.09382) with random numbers from the batch: (B, layers), uniform in [0, 1)."""

    def __init__(self, rate: float, layer: int):
        self.keep = 1.0 - rate
        self.layer = layer

    def __call__(self, branch: Array, draws: Array | None) -> Array:
        if draws is None:
            return branch
        scale = ops.cast(draws[:, self.layer] < self.keep, branch.dtype) / self.keep
        return branch * ops.reshape(scale, (-1, *[1] * (len(branch.shape) - 1)))


class DropPaths:
    """Create a network's drop paths, numbered as in the PyTorch engine: layers that never drop have
    none."""

    def __init__(self) -> None:
        self.layers = 0

    def next(self, rate: float) -> DropPath | None:
        if rate <= 0:
            return None
        self.layers += 1
        return DropPath(rate, self.layers - 1)


def add_branch(stream: Array, branch: Array, drop_path: DropPath | None, draws: Array | None) -> Array:
    """Add a branch, which may be dropped, to the float32 residual stream."""
    branch = ops.cast(branch, stream.dtype)
    return stream + (branch if drop_path is None else drop_path(branch, draws))


class Blocks(Module):
    """A network of blocks that supports activation checkpointing."""

    recompute = False

    def run(self, block: keras.layers.Layer, *inputs: Array) -> Array:
        return keras.remat(block)(*inputs) if self.recompute else block(*inputs)


class PatchEmbed(Module):
    """(B, H, W, C) → (B, h, w, D)."""

    def __init__(self, name: str, patch: int, channels: int, features: int, *, norm: bool = False):
        super().__init__(name)
        self.proj = convolution(f"{name}.proj", channels, features, patch, stride=patch, bias=True)
        self.norm = layer_norm(f"{name}.norm", features, 1e-5) if norm else None

    def call(self, images: Array) -> Array:
        x = ops.cast(self.proj(images), "float32")
        return x if self.norm is None else self.norm(x)


class Mlp(Module):
    """Two linear layers with GELU between: (B, …, D) → (B, …, D)."""

    def __init__(self, name: str, features: int, hidden: int):
        super().__init__(name)
        self.fc1 = linear(f"{name}.fc1", features, hidden)
        self.fc2 = linear(f"{name}.fc2", hidden, features)

    def call(self, x: Array) -> Array:
        return self.fc2(keras.activations.gelu(self.fc1(x), approximate=False))


class Attention(Module):
    """Self-attention with a score bias that broadcasts to (B, n, N, N): (B, N, D) → (B, N, D).

    With `split_bias`, keys have no bias; queries and values have separate ones, as in BEiT.
    """

    def __init__(self, name: str, features: int, heads: int, *, qkv_bias: bool, split_bias: bool = False):
        super().__init__(name)
        self.heads = heads
        self.qkv = linear(f"{name}.qkv", features, 3 * features, bias=qkv_bias and not split_bias)
        self.q_bias = self.weight("q_bias", (features,)) if qkv_bias and split_bias else None
        self.v_bias = self.weight("v_bias", (features,)) if qkv_bias and split_bias else None
        self.proj = linear(f"{name}.proj", features, features)

    def call(self, x: Array, bias: Array | None = None) -> Array:
        N, D = x.shape[1:]
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            split = ops.concatenate([self.q_bias, ops.zeros(D), self.v_bias])
            qkv = qkv + ops.cast(split, qkv.dtype)
        qkv = ops.reshape(qkv, (-1, N, 3, self.heads, D // self.heads))
        query, key, value = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)), axis=0)  # each (B, n, N, D / n)
        scores = ops.matmul(query * (D // self.heads) ** -0.5, ops.swapaxes(key, -2, -1))
        scores = ops.cast(scores, "float32")
        shares = ops.softmax(scores if bias is None else scores + bias, axis=-1)
        mixed = ops.matmul(ops.cast(shares, value.dtype), value)
        return self.proj(ops.reshape(ops.swapaxes(mixed, 1, 2), (-1, N, D)))


class RelativeBias(Module):
    """Table of score biases by relative position; `prefix` adds a class token before the grid."""

    def __init__(self, name: str, grid: tuple[int, int], heads: int, *, prefix: bool):
        super().__init__(name)
        self._index = _relative_index(grid, prefix=prefix)  # (N, N)
        self.relative_position_bias_table = self.weight(
            "relative_position_bias_table", (int(self._index.max()) + 1, heads)
        )

    def scores(self) -> Array:
        """Look up the bias of each head: (n, N, N)."""
        bias = ops.take(ops.convert_to_tensor(self.relative_position_bias_table), self._index, axis=0)  # (N, N, n)
        return ops.transpose(bias, (2, 0, 1))


def _relative_index(grid: tuple[int, int], *, prefix: bool) -> NDArray[np.int32]:
    """Compute the table row for query i and key j: (N, N).

    Rows enumerate row distance, then column distance; a class token adds three: to it, from it, to itself.
    """
    h, w = grid
    place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 2)
    distance = place[:, None] - place[None] + np.array([h - 1, w - 1])
    index = (distance[..., 0] * (2 * w - 1) + distance[..., 1]).astype(np.int32)
    if not prefix:
        return index
    rows = (2 * h - 1) * (2 * w - 1)
    whole = np.pad(index, ((1, 0), (1, 0)))
    whole[0], whole[:, 0], whole[0, 0] = rows, rows + 1, rows + 2
    return whole
