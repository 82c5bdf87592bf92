"""Swin Transformer (arXiv 2103.14030).

Shapes: `B` images, `H W` pixels, `h w` cells of a stage, `D` its features, `a b` window sides, `N` = a·b tokens,
`n` heads.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.keras_engine.architectures import Architecture
from simmim.keras_engine.encoders import BACKBONE, Encoder, drop_path_rates
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
    linear,
    ops,
)

_EPSILON = 1e-5
_FORBIDDEN = -100.0  # added to scores of tokens that only the cyclic shift made neighbours


class SwinEncoder(Encoder):
    """As for plain transformers; the last stage's map is the feature map."""

    def __init__(self, architecture: Architecture, image_size: tuple[int, int], channels: int, drop_path: float):
        arguments = architecture.arguments
        super().__init__(arguments["embed_dim"])
        stages = len(arguments["depths"])
        self.patch_size = arguments["patch_size"]
        self.stride = self.patch_size * 2 ** (stages - 1)
        self.num_features = arguments["embed_dim"] * 2 ** (stages - 1)
        grid = (image_size[0] // self.patch_size, image_size[1] // self.patch_size)
        self.backbone = _Stages(arguments, grid, channels, drop_path, self.drop_paths)

    def call(self, images: Array, hidden: Array, draws: Array | None = None, training: bool = False) -> Array:
        tokens = self.hide(self.backbone.patch_embed(images), hidden)
        return self.backbone(tokens, draws if training else None)


class _Stages(Blocks):
    def __init__(
        self,
        arguments: dict[str, Any],
        grid: tuple[int, int],
        channels: int,
        drop_path: float,
        drop_paths: DropPaths,
    ):
        super().__init__(BACKBONE)
        features, depths = arguments["embed_dim"], arguments["depths"]
        self.patch_embed = PatchEmbed(f"{BACKBONE}.patch_embed", arguments["patch_size"], channels, features, norm=True)
        rates = iter(drop_path_rates(drop_path, sum(depths)))
        self.stages = []
        for stage, depth in enumerate(depths):
            name = f"{BACKBONE}.layers.{stage}"
            if stage:
                self.stages.append(PatchMerging(f"{name}.downsample", features))
                features, grid = 2 * features, ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
            for index in range(depth):
                rate = next(rates)
                drop = (drop_paths.next(rate), drop_paths.next(rate))
                heads = arguments["num_heads"][stage]
                block = f"{name}.blocks.{index}"
                self.stages.append(WindowBlock(block, arguments, features, heads, grid, drop, shifted=index % 2 == 1))
        self.norm = layer_norm(f"{BACKBONE}.norm", features, _EPSILON)

    def call(self, x: Array, draws: Array | None) -> Array:
        for stage in self.stages:
            x = self.run(stage, x, draws)
        return self.norm(x)


class PatchMerging(Module):
    """Four cells become one of twice the features: (B, h, w, D) → (B, ⌈h/2⌉, ⌈w/2⌉, 2 D)."""

    def __init__(self, name: str, features: int):
        super().__init__(name)
        self.norm = layer_norm(f"{name}.norm", 4 * features, _EPSILON)
        self.reduction = linear(f"{name}.reduction", 4 * features, 2 * features, bias=False)

    def call(self, x: Array, _draws: Array | None) -> Array:
        h, w, D = x.shape[1:]
        x = ops.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        x = ops.reshape(x, (-1, (h + 1) // 2, 2, (w + 1) // 2, 2, D))
        x = ops.reshape(ops.transpose(x, (0, 1, 3, 4, 2, 5)), (-1, (h + 1) // 2, (w + 1) // 2, 4 * D))
        return ops.cast(self.reduction(self.norm(x)), "float32")


class WindowBlock(Module):
    """Window attention; every other block shifts windows by half: (B, h, w, D) → (B, h, w, D)."""

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        features: int,
        heads: int,
        grid: tuple[int, int],
        drop: tuple[DropPath | None, DropPath | None],
        *,
        shifted: bool,
    ):
        super().__init__(name)
        size = _pair(arguments["window_size"])
        self.drop = drop
        self.window = (min(size[0], grid[0]), min(size[1], grid[1]))
        # A window that covers the whole side needs no shift.
        shift = [0 if side <= window else window // 2 for side, window in zip(grid, self.window, strict=True)]
        self.shift = (shift[0], shift[1]) if shifted else (0, 0)
        padded = [-(-side // window) * window for side, window in zip(grid, self.window, strict=True)]
        self.padded = (padded[0], padded[1])
        self.forbidden = _shift_mask(self.padded, self.window, self.shift) if any(self.shift) else None
        self.norm1 = layer_norm(f"{name}.norm1", features, _EPSILON)
        self.bias = RelativeBias(f"{name}.attn", self.window, heads, prefix=False)
        self.attn = Attention(f"{name}.attn", features, heads, qkv_bias=arguments["qkv_bias"])
        self.norm2 = layer_norm(f"{name}.norm2", features, _EPSILON)
        self.mlp = Mlp(f"{name}.mlp", features, int(features * arguments["mlp_ratio"]))

    def call(self, x: Array, draws: Array | None) -> Array:
        x = add_branch(x, self._attend(self.norm1(x)), self.drop[0], draws)
        return add_branch(x, self.mlp(self.norm2(x)), self.drop[1], draws)

    def _attend(self, x: Array) -> Array:
        h, w, D = x.shape[1:]
        (H, W), (a, b) = self.padded, self.window
        x = ops.roll(x, (-self.shift[0], -self.shift[1]), axis=(1, 2))
        x = ops.pad(x, ((0, 0), (0, H - h), (0, W - w), (0, 0)))
        windows = ops.reshape(x, (-1, H // a, a, W // b, b, D))
        windows = ops.reshape(ops.transpose(windows, (0, 1, 3, 2, 4, 5)), (-1, a * b, D))  # (B · windows, N, D)
        windows = self.attn(windows, self._score_bias(windows))
        windows = ops.reshape(windows, (-1, H // a, W // b, a, b, D))
        x = ops.reshape(ops.transpose(windows, (0, 1, 3, 2, 4, 5)), (-1, H, W, D))[:, :h, :w]
        return ops.roll(x, self.shift, axis=(1, 2))

    def _score_bias(self, windows: Array) -> Array:
        """Compute the scores' bias: (n, N, N), or (B · windows, n, N, N) where windows differ."""
        bias = self.bias.scores()
        if self.forbidden is None:
            return bias
        bias = bias + ops.convert_to_tensor(self.forbidden)  # (windows, n, N, N)
        return ops.tile(bias, (ops.shape(windows)[0] // len(self.forbidden), 1, 1, 1))


def _shift_mask(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> NDArray[np.float32]:
    """Compute the score mask that restricts attention to tokens that were neighbours before the shift.

    (windows, 1, N, N); a window of the shifted map holds parts of up to four regions.
    """
    ids = []
    for side, length, offset in zip(grid, window, shift, strict=True):
        place = np.arange(side)
        ids.append((place >= side - length).astype(int) + (place >= side - offset))
    region = ids[0][:, None] * 3 + ids[1][None]  # (H, W)
    (H, W), (a, b) = grid, window
    region = region.reshape(H // a, a, W // b, b).transpose(0, 2, 1, 3).reshape(-1, 1, a * b)
    return np.where(region[..., :, None] == region[..., None, :], 0.0, _FORBIDDEN).astype(np.float32)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
