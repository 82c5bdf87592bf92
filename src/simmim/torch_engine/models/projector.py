"""A projector: features of images → values that an objective compares (SimCLR, arXiv 2002.05709).

Shapes: `B` images, `D` features.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from simmim.torch_engine.models.collectives import mean_over_ranks


class BatchNorm(nn.Module):
    """Batch norm of features (B, D) over the images of all ranks. It keeps no statistics, since it only ever trains.

    It equals one process with the whole batch on every device; PyTorch's synchronised norm needs GPUs.
    """

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - mean_over_ranks(x.mean(dim=0))
        variance = mean_over_ranks(centred.square().mean(dim=0))
        return centred * (variance + 1e-5).rsqrt() * self.weight + self.bias


class Projector(nn.Sequential):
    """Linear layers of the given widths, with batch norm and ReLU between them: (B, widths[0]) → (B, widths[-1])."""

    def __init__(self, widths: Sequence[int]):
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for before, after in pairwise(widths[1:]):
            layers += [BatchNorm(before), nn.ReLU(), nn.Linear(before, after)]
        super().__init__(*layers)
