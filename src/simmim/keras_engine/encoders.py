"""Encoders of Keras layers that accept a mask, numerically equal to the PyTorch engine's.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` patches or feature-map cells, `N` tokens, `D` features, `n` heads.
"""

from typing import Any, ClassVar

import numpy as np

from simmim.keras_engine.architectures import Architecture
from simmim.keras_engine.layers import (
    Array,
    Attention,
    Blocks,
    DropPath,
    DropPaths,
    Mlp,
    Module,
    PatchEmbed,
    RelativeBias,
    add_branch,
    layer_norm,
    ops,
)

BACKBONE = "encoder.backbone"


class Encoder(Module):
    """Images (B, H, W, C) and hidden patches (B, h, w), True = hidden → features (B, H / stride, W / stride, D).

    `hidden` is called mask elsewhere; Keras reserves an argument named `mask`.
    `draws` (B, drop_paths.layers) decide which layers an image skips; without them, none.
    """

    without_decay: ClassVar[frozenset[str]] = frozenset({"encoder.mask_token"})
    """Names of parameters without weight decay, besides biases and 1-D ones."""

    patch_size: int
    """Side of a mask's unit in pixels."""
    stride: int
    """Side of a feature-map cell in pixels."""
    num_features: int

    def __init__(self, token_features: int):
        super().__init__("encoder")
        self.mask_token = self.weight("mask_token", (1, 1, token_features))
        self.drop_paths = DropPaths()

    def call(self, images: Array, hidden: Array, draws: Array | None = None, training: bool = False) -> Array:
        raise AssertionError

    def hide(self, tokens: Array, hidden: Array) -> Array:
        """Replace hidden cells by the mask token: (B, h, w, D), (B, h, w) → (B, h, w, D)."""
        token = ops.reshape(ops.cast(self.mask_token, tokens.dtype), (-1,))
        return ops.where(hidden[..., None], token, tokens)


class Block(Module):
    """Pre-norm attention and MLP with residuals; `scale` adds LayerScale (BEiT)."""

    def __init__(self, name: str, arguments: dict[str, Any], drop: tuple[DropPath | None, DropPath | None]):
        super().__init__(name)
        features, beit = arguments["embed_dim"], "init_values" in arguments
        self.drop = drop
        self.norm1 = layer_norm(f"{name}.norm1", features, 1e-6)
        self.attn = Attention(
            f"{name}.attn", features, arguments["num_heads"], qkv_bias=arguments["qkv_bias"], split_bias=beit
        )
        self.norm2 = layer_norm(f"{name}.norm2", features, 1e-6)
        self.mlp = Mlp(f"{name}.mlp", features, int(features * arguments["mlp_ratio"]))
        scale = bool(arguments.get("init_values"))
        self.gamma_1 = self.weight("gamma_1", (features,)) if scale else None
        self.gamma_2 = self.weight("gamma_2", (features,)) if scale else None

    def call(self, x: Array, bias: Array | None, draws: Array | None) -> Array:
        x = add_branch(x, _scale(self.attn(self.norm1(x), bias), self.gamma_1), self.drop[0], draws)
        return add_branch(x, _scale(self.mlp(self.norm2(x)), self.gamma_2), self.drop[1], draws)


def _scale(branch: Array, gamma: Array | None) -> Array:
    return branch if gamma is None else ops.cast(branch, gamma.dtype) * gamma


class TokenEncoder(Encoder):
    """ViT, DeiT, BEiT: the mask token replaces the patch embedding before positions are added (SimMIM §3.2)."""

    without_decay = frozenset({f"{BACKBONE}.cls_token", f"{BACKBONE}.pos_embed"})

    def __init__(self, architecture: Architecture, image_size: tuple[int, int], channels: int, drop_path: float):
        arguments = architecture.arguments
        features = arguments["embed_dim"]
        super().__init__(features)
        self.num_features = features
        self.patch_size = self.stride = arguments["patch_size"]
        self.grid = (image_size[0] // self.patch_size, image_size[1] // self.patch_size)
        self.backbone = _Tokens(arguments, self.grid, channels, drop_path, self.drop_paths)

    def call(self, images: Array, hidden: Array, draws: Array | None = None, training: bool = False) -> Array:
        tokens = self.hide(self.backbone.patch_embed(images), hidden)
        tokens = ops.reshape(tokens, (-1, self.grid[0] * self.grid[1], self.num_features))
        features = self.backbone(tokens, draws if training else None)[:, 1:]
        return ops.reshape(features, (-1, *self.grid, self.num_features))


class _Tokens(Blocks):
    """Transformer: patch tokens (B, N, D) → normalised tokens (B, 1 + N, D)."""

    def __init__(
        self,
        arguments: dict[str, Any],
        grid: tuple[int, int],
        channels: int,
        drop_path: float,
        drop_paths: DropPaths,
    ):
        super().__init__(BACKBONE)
        features, heads, depth = arguments["embed_dim"], arguments["num_heads"], arguments["depth"]
        self.patch_embed = PatchEmbed(f"{BACKBONE}.patch_embed", arguments["patch_size"], channels, features)
        self.cls_token = self.weight("cls_token", (1, 1, features))
        absolute = arguments.get("use_abs_pos_emb", True)
        self.pos_embed = self.weight("pos_embed", (1, 1 + grid[0] * grid[1], features)) if absolute else None
        self.rel_pos_bias = (
            RelativeBias(f"{BACKBONE}.rel_pos_bias", grid, heads, prefix=True)
            if arguments.get("use_shared_rel_pos_bias")
            else None
        )
        rates = drop_path_rates(drop_path, depth)
        names = [f"{BACKBONE}.blocks.{index}" for index in range(depth)]
        self.blocks = [
            Block(name, arguments, (drop_paths.next(rate), drop_paths.next(rate)))
            for name, rate in zip(names, rates, strict=True)
        ]
        self.biases = [
            RelativeBias(f"{name}.attn", grid, heads, prefix=True) if arguments.get("use_rel_pos_bias") else None
            for name in names
        ]
        self.norm = layer_norm(f"{BACKBONE}.norm", features, 1e-6)

    def call(self, tokens: Array, draws: Array | None) -> Array:
        first = ops.broadcast_to(ops.cast(self.cls_token, tokens.dtype), (ops.shape(tokens)[0], 1, tokens.shape[-1]))
        x = ops.concatenate([first, tokens], axis=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias.scores()
        for block, own in zip(self.blocks, self.biases, strict=True):
            terms = [term for term in (shared, None if own is None else own.scores()) if term is not None]
            x = self.run(block, x, sum(terms) if terms else None, draws)
        return self.norm(x)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Drop-path rates that rise linearly from 0 in the first block to `last` in the last."""
    return [float(rate) for rate in np.linspace(0.0, last, depth)]
