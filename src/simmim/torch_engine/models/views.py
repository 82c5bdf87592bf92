"""Views as tensors: crops of a batch's images, cut and recoloured on the device.

Shapes: `B` images, `C` channels, `H W` pixels.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from simmim.errors import UserError
from simmim.method.views import CROP_NUMBERS, View
from simmim.torch_engine.models.objective import ObjectiveModule
from simmim.torch_engine.models.sampling import resampling_weights

# RGB → YIQ, the colours of NTSC: Y is the luma of ITU-R BT.601.
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_RGB: list[list[float]] = np.linalg.inv(_YIQ).tolist()


def collect_views(objectives: Mapping[str, ObjectiveModule]) -> dict[str, View]:
    """Return the views of all objectives by name. Raises `UserError` where two of one name differ."""
    views: dict[str, View] = {}
    for kind, objective in objectives.items():
        for view in objective.views:
            if views.setdefault(view.name, view) != view:
                raise UserError(f"view {view.name!r} of objective {kind} differs from another's; give it another name")
    return views


def cut_view(images: Tensor, draws: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop and resize images (B, C, H, W) as the first five numbers of `View.draw` say: (B, C, *size).

    Bilinear with antialiasing, as Pillow resizes. Two products with matrices of weights, so that shapes are static and
    every accelerator has them.
    """
    top, left, height, width, mirrored = draws[:, :CROP_NUMBERS].float().unbind(1)
    with torch.autocast(images.device.type, enabled=False):
        rows = resampling_weights(top, height, images.shape[2], size[0])
        columns = resampling_weights(left, width, images.shape[3], size[1])
        columns = torch.where(mirrored.view(-1, 1, 1) > 0.5, columns.flip(1), columns)
        return rows.unsqueeze(1) @ images.float() @ columns.unsqueeze(1).transpose(2, 3)


def recolour(images: Tensor, draws: Tensor) -> Tensor:
    """Change the colours of images (B, C, H, W) in 0..1 as the numbers of `View.draw` after the fifth say.

    Torchvision's operations take one factor a call; these take one for each image. Brightness, contrast, saturation,
    grey and blur are torchvision's but for the blur's border. Hue turns the chroma of YIQ, which needs no branches;
    torchvision turns the hue of HSV. Images that are not RGB change in brightness, contrast and blur only.
    """
    brightness, contrast, saturation, hue, grey, sigma = (
        each.view(-1, 1, 1, 1) for each in draws[:, CROP_NUMBERS:].float().unbind(1)
    )
    with torch.autocast(images.device.type, enabled=False):
        images = (images.float() * brightness).clamp(0, 1)
        images = _blend(images, _luma(images).mean(dim=(1, 2, 3), keepdim=True), contrast)
        if images.shape[1] == 3:
            images = _blend(images, _luma(images), saturation)
            images = _turn_hue(images, hue)
            images = torch.where(grey > 0.5, _luma(images), images)
        rows, columns = (_blur_weights(sigma.view(-1, 1, 1), pixels, images.device) for pixels in images.shape[2:])
        return rows.unsqueeze(1) @ images @ columns.unsqueeze(1).transpose(2, 3)


def _blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Mix images (B, C, H, W), `share` of them (B, 1, 1, 1), with others; shares above 1 move away from these."""
    return (images * share + other * (1 - share)).clamp(0, 1)


def _luma(images: Tensor) -> Tensor:
    """Return the brightness of RGB images (B, 3, H, W), or the mean of other channels: (B, 1, H, W)."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    return _combine(_YIQ[:1], images)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the colours of RGB images (B, 3, H, W) around the grey axis by a share of a turn, (B, 1, 1, 1)."""
    y, i, q = _combine(_YIQ, images).split(1, dim=1)
    cos, sin = (2 * math.pi * turn).cos(), (2 * math.pi * turn).sin()
    return _combine(_RGB, torch.cat((y, i * cos + q * sin, q * cos - i * sin), dim=1)).clamp(0, 1)


def _combine(rows: Sequence[Sequence[float]], images: Tensor) -> Tensor:
    """Return channels that are weighted sums of those of `images`, one for each row of weights."""
    channels = images.unbind(1)
    return torch.stack([sum(w * channel for w, channel in zip(row, channels, strict=True)) for row in rows], dim=1)  # pyright: ignore


def _blur_weights(sigma: Tensor, pixels: int, device: torch.device) -> Tensor:
    """Weights (B, pixels, pixels) of a Gaussian along a side, of which `sigma` (B, 1, 1) is a share; 0 is no blur."""
    places = torch.arange(pixels, device=device)
    distances = (places.unsqueeze(1) - places) / (sigma * pixels).clamp(min=1e-3)
    weights = (-0.5 * distances.square()).exp()
    return weights / weights.sum(dim=2, keepdim=True)
