"""Regression of a fixed descriptor of the whole image: shape by gradient histograms, colour by a small copy.

Shapes: `B` images, `C` channels, `H W` pixels, `S` raw values of a part, `K` principal axes, `D` features.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.method.objectives import DescriptorRegression
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep
    from simmim.torch_engine.train.distributed import World

_FITTED_ON = 4000
"""Training images, at most, of which the principal axes are found."""
_SIDE = 64  # pixels; larger images shrink first, so that a gradient spans a share of the image and not of a pixel
_CELLS = 8  # histograms along a side
_BINS = 9
_COLOUR_SIDE = 16
_CLIP = 0.2  # of a normalised histogram (Dalal and Triggs, L2-Hys)


def gradient_histograms(images: Tensor) -> Tensor:
    """Describe shape: images (B, C, H, W) → histograms of oriented gradients (B, 7·7·4·9).

    8 × 8 cells of 9 unsigned orientations, shared between the two nearest bins, from the channel with the steepest
    gradient; blocks of 2 × 2 cells are scaled to length 1, clipped at 0.2 and scaled again (Dalal and Triggs, CVPR
    2005, section 6; without the interpolation between cells).
    """
    padded = F.pad(_shrink(images, _SIDE), (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    steepest = (across.square() + down.square()).argmax(dim=1, keepdim=True)
    across, down = across.gather(1, steepest), down.gather(1, steepest)  # (B, 1, H, W)
    place = torch.atan2(down, across) / math.pi % 1 * _BINS  # in bins
    bins = torch.arange(_BINS, device=images.device).view(1, -1, 1, 1)
    distance = (place - bins + _BINS / 2) % _BINS - _BINS / 2
    votes = (1 - distance.abs()).clamp(min=0) * (across.square() + down.square()).sqrt()  # (B, 9, H, W)
    cells = F.adaptive_avg_pool2d(votes, _CELLS)
    blocks = torch.stack([cells[:, :, i : _CELLS - 1 + i, j : _CELLS - 1 + j] for i in (0, 1) for j in (0, 1)], dim=1)
    blocks = F.normalize(blocks.flatten(1, 2), dim=1, eps=1e-3)  # (B, 36, 7, 7)
    return F.normalize(blocks.clamp(max=_CLIP), dim=1, eps=1e-3).flatten(1)


def small_copy(images: Tensor) -> Tensor:
    """Describe colour: images (B, C, H, W) → their means over 16 × 16 squares (B, C·16·16)."""
    return F.adaptive_avg_pool2d(images, _COLOUR_SIDE).flatten(1)


def _shrink(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[2:]
    size = (min(height, side), min(width, side))
    return images if size == (height, width) else F.adaptive_avg_pool2d(images, size)


class Projection(nn.Module):
    """Project values (B, S) on K principal axes, half whitened: (B, K), of variance 1 on the average.

    Half whitening, a division by the fourth root of an axis's variance, lets small axes count without letting noise
    rule. Before `fit` the axes are zero.
    """

    centre: Tensor
    axes: Tensor

    def __init__(self, values: int, axes: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(values))
        self.register_buffer("axes", torch.zeros(values, axes))

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.centre) @ self.axes

    def fit(self, values: Tensor) -> None:
        """Find the axes of values (N, S); those beyond their rank stay zero."""
        data = values.double()
        centre = data.mean(dim=0)
        variances, vectors = torch.linalg.eigh((data - centre).T @ (data - centre) / len(data))
        count = min(self.axes.shape[1], len(variances), len(data) - 1)
        variances, vectors = variances.flip(0)[:count].clamp(min=1e-12), vectors.flip(1)[:, :count]
        scaled = vectors * variances**-0.25 / variances.sqrt().mean().sqrt()
        self.centre.copy_(centre)
        self.axes.zero_()
        self.axes[:, :count] = scaled.float()


class DescriptorObjective(ObjectiveModule):
    """Mean squared error of the descriptor, predicted by a linear layer from pooled features."""

    all_cells = True
    trains_latents = False

    def __init__(self, objective: DescriptorRegression, features: int, channels: int):
        super().__init__()
        self.passes = () if objective.needs_masked else ((),)
        self.colour_scale = objective.colour_scale
        blocks = (_CELLS - 1) ** 2 * 4 * _BINS
        self.shape = Projection(blocks, objective.shape_values)
        self.colour = Projection(channels * _COLOUR_SIDE**2, objective.colour_values)
        self.predictor = nn.Linear(features, objective.shape_values + objective.colour_values)

    def forward(self, step: "PretrainStep", batch: ObjectiveBatch) -> dict[str, Tensor]:
        pooled = batch.pooled() if self.needs_masked else batch.whole().float().mean(dim=(1, 2))
        with torch.autocast(batch.images.device.type, enabled=False):
            target = self.describe(batch.images)
            target = batch.again(target) if self.needs_masked else target
            return {"descriptor": (self.predictor(pooled) - target).square().mean()}

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Return the descriptor of images (B, C, H, W): (B, K), shape before colour."""
        images = images.float()
        colour = self.colour(small_copy(images)) * self.colour_scale
        return torch.cat((self.shape(gradient_histograms(images)), colour), dim=1)

    def prepare(self, sample: Callable[[int], Iterator[Tensor]], world: "World") -> None:
        if world.is_main:
            parts = [(gradient_histograms(images), small_copy(images)) for images in sample(_FITTED_ON)]
            for projection, values in zip((self.shape, self.colour), zip(*parts, strict=True), strict=True):
                projection.fit(torch.cat(values))
        for buffer in self.buffers():
            buffer.copy_(torch.from_numpy(world.share(buffer.numpy().astype(np.float64))))


@create_objective.register(DescriptorRegression)
def _(objective: DescriptorRegression, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    encoder = model.encoder  # whose features of masked images may differ from those of whole ones (UM-MAE's Swin)
    features = encoder.num_features if objective.needs_masked else encoder.backbone.num_features
    return DescriptorObjective(objective, features, config.channels)
