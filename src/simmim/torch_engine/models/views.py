"""Views as tensors: crops of a batch's images, cut and recoloured on the device.

Shapes: `B` images, `C` channels, `H W` pixels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from simmim.errors import UserError
from simmim.method.views import View
from simmim.torch_engine.models.objective import ObjectiveModule


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
