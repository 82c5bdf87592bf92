"""Stochastic depth with random numbers from the batch.

Shapes: `B` images.
"""

import torch
from timm.layers.drop import DropPath as TimmDropPath
from torch import Tensor, nn


class DropPathDraws:
    """Random numbers of one step's drop path: (B, number of drop-path layers), uniform in [0, 1)."""

    def __init__(self) -> None:
        self.uniform: Tensor | None = None
        self.layers = 0


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382) with random numbers from the batch.

    An image's draws depend only on the seed, the epoch and the image. They are the same after a resume and for any
    world size, and no accelerator needs a random generator inside the step.
    """

    def __init__(self, rate: float, draws: DropPathDraws):
        super().__init__()
        self.keep = 1.0 - rate
        self.draws = draws
        self.layer = draws.layers
        draws.layers += 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        uniform = self.draws.uniform
        column = torch.rand(len(x), device=x.device) if uniform is None else uniform[:, self.layer]
        scale = (column < self.keep).to(x.dtype) / self.keep
        return x * scale.view(-1, *[1] * (x.ndim - 1))


def route_drop_path(backbone: nn.Module) -> DropPathDraws:
    """Replace timm's drop path, which draws on the device. It has no parameters, so no name changes."""
    draws = DropPathDraws()
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, TimmDropPath):
                setattr(module, name, DropPath(child.drop_prob, draws))
    return draws
