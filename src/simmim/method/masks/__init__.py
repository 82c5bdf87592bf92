"""Mask strategies: choose the cells of an image to hide from the encoder. `True` = masked."""

from simmim.method.masks.base import PAPER_CELL, Keys, Mask, MaskStrategy, RandomMask, upsample_mask
from simmim.method.masks.blocks import BlockMask, InverseBlockMask
from simmim.method.masks.grids import GridMask, SquareMask, UniformMask
from simmim.method.masks.guided import AttentionMask, GuidedMask, HardMask
from simmim.method.masks.noise import NoiseMask
from simmim.method.masks.strips import StripMask

__all__ = [
    "PAPER_CELL",
    "AttentionMask",
    "BlockMask",
    "GridMask",
    "GuidedMask",
    "HardMask",
    "InverseBlockMask",
    "Keys",
    "Mask",
    "MaskStrategy",
    "NoiseMask",
    "RandomMask",
    "SquareMask",
    "StripMask",
    "UniformMask",
    "upsample_mask",
]
