"""SpecAugment (arXiv 1904.08779): hide a random span of time and a random range of bands of each spectrogram.

Shapes: `B` sounds, `T` frames, `M` mel bands.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from simmim.method.random_keys import sample_keys, uniforms


def draw_strips(
    seed: int, epoch: ArrayLike, index: ArrayLike, size: tuple[int, int], most: tuple[int, int]
) -> NDArray[np.int64]:
    """Draw the first and the last + 1 of hidden frames and of hidden bands by each sound's key: (B, 4).

    A strip has 0 to `most` (frames, bands), every number equally likely, and lies anywhere within `size` (T, M).
    """
    numbers = uniforms(sample_keys(seed, epoch, index, stream="strips"), 4)
    ends = []
    for axis, (side, longest) in enumerate(zip(size, most, strict=True)):
        length = (numbers[:, 2 * axis] * (min(longest, side) + 1)).astype(np.int64)
        first = (numbers[:, 2 * axis + 1] * (side - length + 1)).astype(np.int64)
        ends += [first, first + length]
    return np.stack(ends, axis=1)


def hide_strips(images: Tensor, strips: Tensor) -> Tensor:
    """Set strips (B, 4) of normalised spectrograms (B, 1, T, M) to 0, their mean."""
    first, last, low, high = strips.unbind(1)
    frames, bands = (torch.arange(side, device=images.device) for side in images.shape[2:])
    in_time = (frames >= first[:, None]) & (frames < last[:, None])  # (B, T)
    in_bands = (bands >= low[:, None]) & (bands < high[:, None])  # (B, M)
    return torch.where((in_time[:, :, None] | in_bands[:, None, :]).unsqueeze(1), 0.0, images)
