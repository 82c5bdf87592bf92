"""Regression of a fixed descriptor of the whole image: its shapes, colours and texture.

Shapes: `B` images, `C` channels, `H W` pixels, `K` values of the descriptor.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from simmim.method.objectives import DescriptorRegression
from simmim.torch_engine.models.descriptors import (
    COLOUR_SIDE,
    SHAPE_VALUES,
    Projection,
    VisualWords,
    gradient_histograms,
    shrink,
    small_copy,
)
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep
    from simmim.torch_engine.train.distributed import World

_FITTED_ON = 4000
"""Training images, at most, of which words and principal axes are found."""


class DescriptorObjective(ObjectiveModule):
    """Mean squared error of the descriptor, predicted by a linear layer from pooled features."""

    all_cells = True
    trains_latents = False

    def __init__(self, objective: DescriptorRegression, features: int, channels: int):
        super().__init__()
        self.passes = () if objective.needs_masked else ((),)
        self.scales = (1.0, objective.colour_scale, objective.texture_scale)
        self.words = VisualWords(channels, objective.words)
        self.shape = Projection(SHAPE_VALUES, objective.shape_values)
        self.colour = Projection(channels * COLOUR_SIDE**2, objective.colour_values)
        self.texture = Projection(objective.words, objective.texture_values)
        values = objective.shape_values + objective.colour_values + objective.texture_values
        self.predictor = nn.Linear(features, values)

    def forward(self, step: "PretrainStep", batch: ObjectiveBatch) -> dict[str, Tensor]:
        pooled = batch.pooled() if self.needs_masked else batch.whole().float().mean(dim=(1, 2))
        with torch.autocast(batch.images.device.type, enabled=False):
            target = self.describe(batch.images)
            target = batch.again(target) if self.needs_masked else target
            return {"descriptor": (self.predictor(pooled) - target).square().mean()}

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Return the descriptor of images (B, C, H, W): (B, K), shape before colour before texture."""
        projections = (self.shape, self.colour, self.texture)
        parts = zip(projections, self._parts(shrink(images.float())), self.scales, strict=True)
        return torch.cat([project(values) * scale for project, values, scale in parts], dim=1)

    def _parts(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gradient_histograms(images), small_copy(images), self.words(images)

    def prepare(self, sample: Callable[[int], Iterator[Tensor]], world: "World") -> None:
        if world.is_main:
            images = [shrink(part) for part in sample(_FITTED_ON)]
            self.words.fit(images)
            parts = zip(*map(self._parts, images), strict=True)
            for projection, values in zip((self.shape, self.colour, self.texture), parts, strict=True):
                projection.fit(torch.cat(values))
        for buffer in self.buffers():
            buffer.copy_(torch.from_numpy(world.share(buffer.numpy().astype(np.float64))))


@create_objective.register(DescriptorRegression)
def _(objective: DescriptorRegression, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    encoder = model.encoder  # whose features of masked images may differ from those of whole ones (UM-MAE's Swin)
    features = encoder.num_features if objective.needs_masked else encoder.backbone.num_features
    return DescriptorObjective(objective, features, config.channels)
