"""Objectives as PyTorch modules: what each asks of a step, and SimMIM's own.

Shapes: `B` images, `C` channels, `H W` pixels, `p` patch side, `h w` feature-map cells, `n` hidden ones of an image,
`D` features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from simmim.errors import UserError
from simmim.method.objectives import Objective, PixelReconstruction
from simmim.method.views import View
from simmim.torch_engine.models.savings import Chosen

if TYPE_CHECKING:
    from simmim.config.pretraining import PretrainConfig
    from simmim.torch_engine.models.masked_image_model import MaskedImageModel, PretrainStep


@dataclass(frozen=True, kw_only=True)
class ObjectiveBatch:
    """What a step gives its objectives of a batch. The encoder has seen the masked images once, for all objectives."""

    images: Tensor
    """(B, C, H, W), normalised and mirrored, not masked."""
    mask: Tensor
    """(B, H/p, W/p), True = hidden."""
    hidden: Chosen | None
    """The hidden feature-map cells, n of each image; `None` in a plain step, which computes all cells."""
    features: Tensor
    """The encoder's features of the masked images: all cells, (B, h, w, D), or, where no objective needs them all, the
    hidden cells, (B, n, D)."""
    views: Mapping[str, Tensor]
    """Images (B, C, height, width) of each view by its name, normalised."""

    def of_hidden(self) -> Tensor:
        """Return the features of the hidden cells, (B, n, D), or of all, (B, h, w, D), where `hidden` is `None`."""
        if self.hidden is None or self.features.ndim == 3:
            return self.features
        return self.hidden.of(self.features.flatten(1, 2))


class ObjectiveModule(nn.Module):
    """Base of an objective's module. It owns its parameters and buffers, which are trained and saved with the step.

    A call, `objective(step, batch)`, returns scalar losses by name, means over the batch's images. Names are unique in
    a training. `step.model.encoder` encodes views: images (B, C, H, W) → features (B, h, w, D).
    """

    views: tuple[View, ...] = ()
    """Views that it needs beside the masked images."""
    all_cells: bool = False
    """Whether it needs features of all cells rather than of the hidden ones."""

    def forward(self, step: PretrainStep, batch: ObjectiveBatch) -> dict[str, Tensor]:
        raise AssertionError

    def after_update(self, step: PretrainStep, finite: Tensor) -> None:
        """Called without gradients after each optimiser step, once whatever the accumulation.

        `finite` is a boolean on the device, false where the step was skipped: nothing may change then.
        """


@singledispatch
def create_objective(objective: Objective, model: MaskedImageModel, config: PretrainConfig) -> ObjectiveModule:
    """Build the module of an objective for a model of a complete configuration.

    Register an objective of your own by `@create_objective.register(YourObjective)`.
    """
    raise UserError(
        f"objective {objective.kind} has no PyTorch module; register one by "
        "simmim.torch_engine.models.objectives.create_objective"
    )


class PixelObjective(ObjectiveModule):
    """SimMIM: the loss of the model's head on the hidden pixels. The model owns all parameters."""

    def __init__(self, model: MaskedImageModel):
        super().__init__()
        self.all_cells = not model.cell_by_cell  # a head that mixes cells needs them all

    def forward(self, step: PretrainStep, batch: ObjectiveBatch) -> dict[str, Tensor]:
        model = step.model
        if self.all_cells:
            return {"pixels": model.judge(model.head(batch.features), batch.images, batch.mask)}
        prediction = model.head(batch.of_hidden())
        return {"pixels": model.judge(prediction, batch.images, batch.mask, batch.hidden)}


@create_objective.register(PixelReconstruction)
def _(objective: PixelReconstruction, model: MaskedImageModel, config: PretrainConfig) -> ObjectiveModule:
    return PixelObjective(model)


def collect_views(objectives: Mapping[str, ObjectiveModule]) -> dict[str, View]:
    """Return the views of all objectives by name. Raises `UserError` where two of one name differ."""
    views: dict[str, View] = {}
    for kind, objective in objectives.items():
        for view in objective.views:
            if views.setdefault(view.name, view) != view:
                raise UserError(f"view {view.name!r} of objective {kind} differs from another's; give it another name")
    return views


def cut_view(images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop and resize images (B, C, H, W) as `View.draw` says, (B, 5): (B, C, *size).

    Bilinear with antialiasing, as Pillow resizes. Two products with matrices of weights, so that shapes are static and
    every accelerator has them.
    """
    top, left, height, width, mirrored = draws.float().unbind(1)
    with torch.autocast(images.device.type, enabled=False):
        rows = _weights(top, height, images.shape[2], size[0])
        columns = _weights(left, width, images.shape[3], size[1])
        columns = torch.where(mirrored.view(-1, 1, 1) > 0.5, columns.flip(1), columns)
        return rows.unsqueeze(1) @ images.float() @ columns.unsqueeze(1).transpose(2, 3)


def _weights(start: Tensor, length: Tensor, pixels: int, outputs: int) -> Tensor:
    """Weights (B, outputs, pixels) of the pixels along a side, of which `start` and `length` (B,) are shares."""
    step = (length * pixels / outputs).view(-1, 1, 1)  # pixels from one output to the next
    centres = start.view(-1, 1, 1) * pixels + (torch.arange(outputs, device=start.device).view(1, -1, 1) + 0.5) * step
    distances = (torch.arange(pixels, device=start.device) + 0.5 - centres).abs()
    weights = (1 - distances / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(dim=2, keepdim=True)
