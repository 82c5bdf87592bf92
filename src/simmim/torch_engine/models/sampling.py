"""Resampling along a side as a product with a matrix: static shapes, on every accelerator, the same bits each time."""

import torch
from torch import Tensor


def resampling_weights(start: Tensor, length: Tensor, pixels: int, outputs: int) -> Tensor:
    """Return weights (B, outputs, pixels) of the pixels along a side, of which `start` and `length` (B,) are shares.

    Linear, with antialiasing, as Pillow resizes.
    """
    step = (length * pixels / outputs).view(-1, 1, 1)  # pixels from one output to the next
    centres = start.view(-1, 1, 1) * pixels + (torch.arange(outputs, device=start.device).view(1, -1, 1) + 0.5) * step
    distances = (torch.arange(pixels, device=start.device) + 0.5 - centres).abs()
    weights = (1 - distances / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(dim=2, keepdim=True)
