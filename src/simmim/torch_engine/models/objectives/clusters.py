"""Clusters of patch features, found online, as what hidden patches are to predict.

Shapes: `B` images, `M` masks of an image, `h w` feature-map cells, `n` hidden ones of an image, `D` features, `K`
prototypes.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.method.objectives import LatentClusters
from simmim.torch_engine.models.collectives import logsumexp_over_ranks, mean_over_ranks
from simmim.torch_engine.models.heads import create_head
from simmim.torch_engine.models.moving_average import MovingAverage
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep

_PROTOTYPES_AN_IMAGE = 4
_FEWEST, _MOST = 64, 16384


@torch.no_grad()
def balance(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Assign cells to prototypes: logits (B, h, w, K) → shares (B, h, w, K), of which those of a cell sum to 1.

    Sinkhorn-Knopp (SwAV, arXiv 2006.09882): divide by the sum of each prototype, then by that of each cell, and repeat.
    As CAPI has it (arXiv 2502.08769), the sum of a prototype is taken at each position apart, over the images of all
    ranks. Every prototype is then used equally at every position and cannot stand for one.
    """
    shares = logits / temperature  # logarithms, so that no share is too small for fp32
    for _ in range(iterations):
        shares = shares - logsumexp_over_ranks(shares)
        shares = shares.log_softmax(dim=-1)
    return shares.exp()


def cross_entropy(shares: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of the softmax of logits (…, K) against shares (…, K): (…)."""
    return -(shares * (logits / temperature).log_softmax(dim=-1)).sum(dim=-1)


def choose_prototypes(batch_size: int) -> int:
    """Return the power of two nearest to four prototypes for each image of a batch, 64 to 16384."""
    return 2 ** round(math.log2(min(max(_PROTOTYPES_AN_IMAGE * batch_size, _FEWEST), _MOST)))


class ClusterObjective(ObjectiveModule):
    """Cross-entropy of the clusters that the head predicts at hidden cells, and of the prototypes' own softmax."""

    def __init__(self, objective: LatentClusters, model: "MaskedImageModel", config: "PretrainConfig"):
        super().__init__()
        self.settings = objective
        self.all_cells = not config.head.cell_by_cell  # a head that mixes cells needs them all
        prototypes = objective.prototypes or choose_prototypes(config.batch_size)
        self.head = create_head(config.head, model.encoder.num_features, prototypes)
        # Whole images have the backbone's features, whatever an encoder of visible cells makes of them.
        self.prototypes = nn.Linear(model.encoder.backbone.num_features, prototypes, bias=False)
        nn.init.normal_(self.prototypes.weight)
        momentum = {"momentum": objective.momentum, "momentum_end": objective.momentum_end}
        self.teacher = MovingAverage(model.encoder, **momentum, steps=objective.momentum_steps)

    def forward(self, step: "PretrainStep", batch: ObjectiveBatch) -> dict[str, Tensor]:
        seen = self.teacher(batch.images)  # (B, h, w, D)
        prediction = batch.predict(self.head, all_cells=self.all_cells)  # (M·B, n, K) or (M·B, h, w, K)
        settings = self.settings
        with torch.autocast(seen.device.type, enabled=False):
            logits = self.prototypes(F.normalize(seen.float(), dim=-1))
            shares = balance(logits, settings.target_temperature, settings.iterations)
            mean = mean_over_ranks(shares.mean(dim=(0, 1, 2)))
            batch.figures["clusters_used"] = (-torch.special.xlogy(mean, mean).sum()).exp()
            error = cross_entropy(batch.hidden_of(shares), prediction.float(), settings.temperature)
            return {
                "clusters": batch.mean_over_hidden(error),
                "clusters_prototypes": cross_entropy(shares, logits, settings.temperature).mean(),
            }

    def after_update(self, step: "PretrainStep", finite: Tensor) -> None:
        self.teacher.update(step.model.encoder, finite)


@create_objective.register(LatentClusters)
def _(objective: LatentClusters, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    return ClusterObjective(objective, model, config)
