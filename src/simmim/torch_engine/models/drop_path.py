"""Stochastic depth whose random numbers come in with the batch.

Shapes: `B` images.
"""

import torch
from timm.layers.drop import DropPath as TimmDropPath
from torch import Tensor, nn


class DropPathDraws:
    """The random numbers of one step's drop path: (B, number of drop-path layers), uniform in [0, 1)."""

    def __init__(self) -> None:
        self.uniform: Tensor | None = None
        self.layers = 0


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382) whose random numbers come in with the batch.

    So an image's draws depend on the seed, the epoch and the image only: the same after a resume and on any number of
    processes, and no accelerator needs a random generator inside the step.
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
    """Replace timm's drop path, which draws on the device, by ours; it has no parameters, so no name changes."""
    draws = DropPathDraws()
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, TimmDropPath):
                setattr(module, name, DropPath(child.drop_prob, draws))
    return draws
