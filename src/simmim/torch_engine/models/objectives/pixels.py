"""SimMIM's objective: the loss of the model's head on the hidden pixels."""

from typing import TYPE_CHECKING

from torch import Tensor

from simmim.method.objectives import PixelReconstruction
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep


class PixelObjective(ObjectiveModule):
    """Judge the prediction of hidden pixels (SimMIM §3.4). The model owns all parameters."""

    trains_latents = False

    def __init__(self, model: "MaskedImageModel"):
        super().__init__()
        self.all_cells = not model.cell_by_cell  # a head that mixes cells needs them all

    def forward(self, step: "PretrainStep", batch: ObjectiveBatch) -> dict[str, Tensor]:
        assert batch.mask is not None
        model, images = step.model, batch.again(batch.images)
        hidden = None if self.all_cells else batch.hidden
        prediction = model.head(batch.features if self.all_cells else batch.of_hidden())
        weighted, weights = model.errors(prediction, images, batch.mask, hidden)
        if batch.cell_losses is not None:
            losses = weighted.detach().sum(-1) / weights.sum(-1).clamp(min=1e-5)  # (B, h, w) or (B, n, 1)
            if hidden is not None:
                h, w = (side // batch.encoder.stride for side in images.shape[2:])
                losses = hidden.put(losses, h * w).unflatten(1, (h, w))[..., 0]
            batch.cell_losses["pixels"] = losses
        return {"pixels": model.loss.mean(weighted.sum(), weights.sum())}


@create_objective.register(PixelReconstruction)
def _(objective: PixelReconstruction, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    return PixelObjective(model)
