"""Contrast: tell which image of the batch a masked image is.

Shapes: `B` images, `M` masks of an image, `D` features, `K` projected values, `R` ranks.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from simmim.errors import UserError
from simmim.method.objectives import Contrast
from simmim.method.views import View
from simmim.torch_engine.models.collectives import gather_from_ranks, this_rank
from simmim.torch_engine.models.moving_average import MovingAverage
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective
from simmim.torch_engine.models.projector import Projector

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep

_WIDTH = 2048  # of projector and predictor


def contrast(online: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return InfoNCE (van den Oord et al., arXiv 1807.03748, equation 4) and the mean cosine of the pairs.

    The cross-entropy of finding the target of each `online` (M·B, K), M rounds of the batch, by its cosine to each of
    the `target` (B, K) of all ranks. Gradients go to `online`.
    """
    online, target = F.normalize(online, dim=1), F.normalize(target, dim=1)
    images = len(target)
    masks = len(online) // images
    cosines = online @ gather_from_ranks(target).T  # (M·B, R·B)
    own = torch.arange(images, device=online.device).repeat(masks) + this_rank() * images
    return F.cross_entropy(cosines / temperature, own), (online.unflatten(0, (masks, images)) * target).sum(-1).mean()


class ContrastObjective(ObjectiveModule):
    """InfoNCE between the visible cells of a masked image and another crop, which a moving average sees (CMAE).

    With accumulation the negatives are the images of each piece of the batch.
    """

    all_cells = True

    def __init__(self, objective: Contrast, model: "MaskedImageModel"):
        super().__init__()
        self.settings = objective
        self.views = (View(name="infonce", scale=(0.6, 1.0), jitter=objective.jitter),)
        features, values = model.encoder.num_features, objective.values
        if features != model.encoder.backbone.num_features:
            raise UserError(
                "objective infonce is not for --encode visible of Swin, whose masked images have other features than "
                "whole ones; use --encode all"
            )
        self.projector = Projector((features, _WIDTH, values))
        self.predictor = Projector((values, _WIDTH, values))
        momentum = {"momentum": objective.momentum, "momentum_end": objective.momentum_end}
        self.teacher = MovingAverage(model.encoder, **momentum, steps=objective.momentum_steps)
        self.teacher_projector = MovingAverage(self.projector, **momentum, steps=objective.momentum_steps)

    def forward(self, step: "PretrainStep", batch: ObjectiveBatch) -> dict[str, Tensor]:
        seen = self.teacher(batch.views["infonce"]).float().mean(dim=(1, 2))  # (B, D)
        with torch.autocast(seen.device.type, enabled=False):
            online = self.predictor(self.projector(batch.pooled()))
            loss, agreement = contrast(online, self.teacher_projector(seen), self.settings.temperature)
        batch.figures["infonce_agreement"] = agreement
        return {"infonce": loss}

    def after_update(self, step: "PretrainStep", finite: Tensor) -> None:
        self.teacher.update(step.model.encoder, finite)
        self.teacher_projector.update(self.projector, finite)


@create_objective.register(Contrast)
def _(objective: Contrast, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    return ContrastObjective(objective, model)
