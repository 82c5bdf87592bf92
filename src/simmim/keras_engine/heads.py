"""Prediction heads, equal to the PyTorch engine's: feature map (B, h, w, D) → prediction (B, h, w, P).

Shapes: `B` images, `h w` feature-map cells, `N` tokens, `D` features, `P` predicted values a cell.
"""

from functools import singledispatch

import keras
import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError
from simmim.keras_engine.encoders import Block
from simmim.keras_engine.layers import Array, Module, layer_norm, linear, ops
from simmim.method.heads import Head, LinearHead, MLPHead, TransformerHead


class MLPDecoder(Module):
    """Two layers with GELU between (SimMIM table 3)."""

    def __init__(self, features: int, outputs: int):
        super().__init__("head")
        self.first = linear("head.0", features, features)
        self.last = linear("head.2", features, outputs)

    def call(self, features: Array) -> Array:
        return self.last(keras.activations.gelu(self.first(features), approximate=False))


class TransformerDecoder(Module):
    """A light transformer decoder over all cells, as in MAE (arXiv 2111.06377)."""

    def __init__(self, features: int, outputs: int, width: int = 256, depth: int = 2, heads: int = 8):
        super().__init__("head")
        self.embed = linear("head.embed", features, width)
        arguments = {"embed_dim": width, "num_heads": heads, "mlp_ratio": 4.0, "qkv_bias": True}
        self.blocks = [Block(f"head.blocks.{index}", arguments, (None, None)) for index in range(depth)]
        self.norm = layer_norm("head.norm", width, 1e-5)
        self.predict = linear("head.predict", width, outputs)

    def call(self, features: Array) -> Array:
        h, w = features.shape[1:3]
        x = ops.cast(self.embed(features), "float32")
        x = x + sine_positions(h, w, x.shape[-1])
        x = ops.reshape(x, (-1, h * w, x.shape[-1]))
        for block in self.blocks:
            x = block(x, None, None)
        x = self.predict(self.norm(x))
        return ops.reshape(x, (-1, h, w, x.shape[-1]))


def sine_positions(h: int, w: int, width: int) -> NDArray[np.float32]:
    """Fixed sine-cosine positions (h, w, width), half for rows and half for columns (MAE, appendix A)."""
    rates = 10000.0 ** (-np.arange(width // 4) / (width // 4))

    def code(n: int) -> NDArray[np.floating]:  # (n, width / 2)
        angles = np.arange(n)[:, None] * rates
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows = np.broadcast_to(code(h)[:, None], (h, w, width // 2))
    columns = np.broadcast_to(code(w)[None], (h, w, width // 2))
    return np.concatenate([rows, columns], axis=-1).astype(np.float32)


@singledispatch
def create_head(head: Head, features: int, outputs: int) -> keras.layers.Layer:
    """Build a head: (B, h, w, `features`) → (B, h, w, `outputs`).

    Register a head of your own by `@create_head.register`.
    """
    raise UserError(f"head {head.kind} has no Keras layer; use --engine torch, or register one by create_head.register")


@create_head.register
def _(head: LinearHead, features: int, outputs: int) -> keras.layers.Layer:
    return linear("head", features, outputs)


@create_head.register
def _(head: MLPHead, features: int, outputs: int) -> keras.layers.Layer:
    return MLPDecoder(features, outputs)


@create_head.register
def _(head: TransformerHead, features: int, outputs: int) -> keras.layers.Layer:
    return TransformerDecoder(features, outputs)
