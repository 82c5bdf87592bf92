"""The masks of a batch, drawn from the keys of its images.

Shapes: `B` images, `H W` pixels, `M` masks of an image.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.method.masks import GuidedMask, upsample_mask
from simmim.method.random_keys import sample_keys
from simmim.training.plan import Batch

ORDER = "mask_order"
"""Name of the cells' order for guided masks in a batch."""


def draw_masks(config: PretrainConfig, epoch: ArrayLike, index: ArrayLike, patch: int) -> NDArray[np.bool_]:
    """Draw masks (B, H/patch, W/patch) of images (B,) in epochs (B,) or one epoch."""
    return _draw(config, epoch, index, patch, number=0)["mask"]


def draw_all_masks(config: PretrainConfig, epoch: ArrayLike, index: ArrayLike, patch: int) -> Batch:
    """Draw what a step takes: mask (B, H/patch, W/patch), or (B, M, H/patch, W/patch) for M masks an image.

    For guided masks there is mask_order, (B, rows, columns) or (B, M, rows, columns), too.
    """
    drawn = [_draw(config, epoch, index, patch, number=number) for number in range(config.masks_per_image)]
    if len(drawn) == 1:
        return drawn[0]
    return {name: np.stack([each[name] for each in drawn], axis=1) for name in drawn[0]}


def _draw(config: PretrainConfig, epoch: ArrayLike, index: ArrayLike, patch: int, *, number: int) -> Batch:
    """Draw one of several masks of each image, and its order of the cells."""
    assert config.image_size is not None
    masks = config.mask.for_patch(patch)
    assert masks.cell is not None
    keys = sample_keys(config.seed, epoch, index, stream=f"mask {number}" if number else "mask")
    batch = {"mask": upsample_mask(masks(keys, config.image_size), masks.cell // patch)}
    return batch | {ORDER: masks.order(keys, config.image_size)} if isinstance(masks, GuidedMask) else batch
