"""Prediction of the encoder's own averaged features at hidden cells (data2vec 2.0, BootMAE).

Shapes: `B` images, `M` masks of an image, `h w` feature-map cells, `n` hidden ones of an image, `D` features.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simmim.errors import UserError
from simmim.method.objectives import EmaTeacher
from simmim.torch_engine.models.family import find_family
from simmim.torch_engine.models.heads import create_head
from simmim.torch_engine.models.moving_average import MovingAverage
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep


def average_blocks(maps: list[Tensor]) -> Tensor:
    """Average maps of several blocks, (B, D, h, w) each, to a target (B, h, w, D).

    Each map is normalised over the cells of its image, feature by feature; the mean is normalised over features
    (data2vec 2.0, section 3.1, and its settings for images).
    """
    mean = torch.stack([F.instance_norm(each.float()) for each in maps]).mean(dim=0)
    return F.layer_norm(mean.permute(0, 2, 3, 1), mean.shape[1:2])


class EmaObjective(ObjectiveModule):
    """Mean squared error of the predicted target at hidden cells.

    As data2vec 2.0 for images (fairseq, base_images_only_task.yaml: `loss_beta` 0, `instance_norm_target_layer`,
    `layer_norm_targets`), but the outputs of the blocks are averaged, not those of their MLPs; there is no term for the
    class token; and squares are averaged over features, where theirs are summed and divided by √D.
    """

    def __init__(self, objective: EmaTeacher, model: "MaskedImageModel", config: "PretrainConfig"):
        super().__init__()
        self.all_cells = not config.head.cell_by_cell
        blocks = len(model.encoder.backbone.feature_info) if find_family(config.model).stage_norms is None else 1
        self.top = max(blocks - 2, 1) if objective.top is None else objective.top
        if self.top > blocks:
            raise UserError(
                f"top {self.top} of objective ema is more than the {blocks} block{'s' * (blocks > 1)} of "
                f"{config.model} with maps of one size; use --ema.top {blocks} or less"
            )
        # Whole images have the backbone's features, whatever an encoder of visible cells makes of masked ones.
        self.head = create_head(config.head, model.encoder.num_features, model.encoder.backbone.num_features)
        self.teacher = MovingAverage(
            model.encoder,
            momentum=objective.momentum,
            momentum_end=objective.momentum_end,
            steps=objective.momentum_steps,
        )

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """Return the target of whole images (B, C, H, W): (B, h, w, D)."""
        backbone: Any = self.teacher.module.backbone
        maps = backbone.forward_intermediates(images, indices=self.top, norm=False, intermediates_only=True)
        with torch.autocast(images.device.type, enabled=False):
            return average_blocks(maps)

    def forward(self, step: "PretrainStep", batch: ObjectiveBatch) -> dict[str, Tensor]:
        target = batch.hidden_of(self.target(batch.images))
        prediction = batch.predict(self.head, all_cells=self.all_cells).float()
        batch.figures["ema_agreement"] = batch.mean_over_hidden(F.cosine_similarity(prediction, target, dim=-1))
        return {"ema": batch.mean_over_hidden((prediction - target).square().mean(dim=-1))}

    def after_update(self, step: "PretrainStep", finite: Tensor) -> None:
        self.teacher.update(step.model.encoder, finite)


@create_objective.register(EmaTeacher)
def _(objective: EmaTeacher, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    return EmaObjective(objective, model, config)
