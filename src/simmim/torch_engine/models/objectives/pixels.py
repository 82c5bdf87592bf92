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
        if self.all_cells:
            return {"pixels": model.judge(model.head(batch.features), images, batch.mask)}
        prediction = model.head(batch.of_hidden())
        return {"pixels": model.judge(prediction, images, batch.mask, batch.hidden)}


@create_objective.register(PixelReconstruction)
def _(objective: PixelReconstruction, model: "MaskedImageModel", config: "PretrainConfig") -> ObjectiveModule:
    return PixelObjective(model)
