"""Moving averages of modules, as teachers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from simmim.torch_engine.train.distributed import local_part


class MovingAverage(nn.Module):
    """Average a module's parameters and saved buffers over training (mean teacher, arXiv 1703.01780).

    `momentum` rises linearly to `momentum_end` over `steps` updates. Buffers of integers are copied. Calls run the
    average without gradients, in evaluation mode: normalisation uses averaged statistics, and no layer drops anything.
    """

    def __init__(self, source: nn.Module, *, momentum: float, momentum_end: float, steps: int | None):
        super().__init__()
        self.module = copy.deepcopy(source).requires_grad_(False).eval()
        self.momentum, self.momentum_end, self.steps = momentum, momentum_end, steps or 1
        self.register_buffer("updates", torch.zeros(()))
        self.updates: Tensor

    def train(self, mode: bool = True) -> "MovingAverage":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    @torch.no_grad()
    def update(self, source: nn.Module, finite: Tensor) -> None:
        """Move towards `source` after an optimiser step; where `finite` is false, change nothing."""
        progress = (self.updates / self.steps).clamp(max=1)
        weight = (1 - self.momentum - progress * (self.momentum_end - self.momentum)) * finite
        for mine, theirs in zip(_tensors(self.module), _tensors(source), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, weight.to(mine.dtype))
            else:
                mine.copy_(torch.where(finite, theirs, mine))
        self.updates += finite


def _tensors(module: nn.Module) -> list[Tensor]:
    """Return this rank's part of all parameters, and of the buffers that checkpoints hold: others never change."""
    buffers = [
        buffer
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    ]
    return [local_part(tensor.detach()) for tensor in (*module.parameters(), *buffers)]
