"""Prediction heads: feature map → prediction vector of every feature-map cell.

A head does not shuffle pixels itself: a cell's vector holds its stride × stride pixels in PixelShuffle's order
(`simmim.method.targets`), so the loss is taken before the shuffle and pictures after it.

Shapes: `B` images, `h w` feature-map cells, `N` tokens, `D` features, `P` predicted values a cell.
"""

import math
from functools import singledispatch

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from simmim.errors import UserError
from simmim.method.heads import ATTENTION_FEATURES, Head, LinearHead, MLPHead, TransformerHead


class LinearDecoder(nn.Linear):
    """One linear layer (SimMIM §3.3): (B, h, w, D) → (B, h, w, P)."""

    def __init__(self, features: int, outputs: int):
        super().__init__(features, outputs)


class MLPDecoder(nn.Sequential):
    """Two layers with GELU between (SimMIM table 3): (B, h, w, D) → (B, h, w, P)."""

    def __init__(self, features: int, outputs: int):
        super().__init__(nn.Linear(features, features), nn.GELU(), nn.Linear(features, outputs))


class TransformerDecoder(nn.Module):
    """A light transformer decoder over all cells, as in MAE (arXiv 2111.06377): (B, h, w, D) → (B, h, w, P).

    `depth` blocks of `width` features, a multiple of `ATTENTION_FEATURES`.
    """

    def __init__(self, features: int, outputs: int, *, width: int, depth: int):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.blocks = nn.Sequential(*(Block(width, width // ATTENTION_FEATURES, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, outputs)

    def forward(self, features: Tensor) -> Tensor:
        h, w = features.shape[1:3]
        x = self.embed(features)
        x = x + sine_positions(h, w, x.shape[-1], x.device).to(x.dtype)
        x = self.blocks(x.flatten(1, 2))  # (B, N, width)
        return self.predict(self.norm(x)).unflatten(1, (h, w))


def sine_positions(h: int, w: int, width: int, device: torch.device) -> Tensor:
    """Fixed sine-cosine positions (h, w, width), half for rows and half for columns (MAE, appendix A)."""
    rates = torch.exp(torch.arange(width // 4, device=device) * (-math.log(10000.0) / (width // 4)))

    def code(n: int) -> Tensor:  # (n, width / 2)
        angles = torch.arange(n, device=device)[:, None] * rates
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    rows = code(h)[:, None].expand(h, w, -1)
    columns = code(w)[None].expand(h, w, -1)
    return torch.cat((rows, columns), dim=-1)


@singledispatch
def create_head(head: Head, features: int, outputs: int) -> nn.Module:
    """Build a head with random weights: (B, h, w, `features`) → (B, h, w, `outputs`).

    Register a head of your own by `@create_head.register`.
    """
    raise UserError(
        f"head {head.kind} has no PyTorch module; register one by simmim.torch_engine.models.heads.create_head"
    )


@create_head.register
def _(head: LinearHead, features: int, outputs: int) -> nn.Module:
    return LinearDecoder(features, outputs)


@create_head.register
def _(head: MLPHead, features: int, outputs: int) -> nn.Module:
    return MLPDecoder(features, outputs)


@create_head.register
def _(head: TransformerHead, features: int, outputs: int) -> nn.Module:
    return TransformerDecoder(features, outputs, width=head.width, depth=head.depth)
