"""Swin and SwinV2 that see visible cells only (UM-MAE, arXiv 2205.10063 §3).

A mask leaves one cell of each 2×2 visible, or none. The visible cells, each in the place of its 2×2, form an image of
half the sides. The unchanged backbone runs on it, with a quarter of the tokens.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` 2×2s of cells, `c` side of a cell in pixels, `D` features.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from simmim.errors import UserError
from simmim.method.masks import MaskStrategy, UniformMask
from simmim.torch_engine.models.masked import SwinEncoder
from simmim.torch_engine.models.savings import Chosen, replace_class

CELL = 16
"""Side of a cell in pixels, as in the paper: one vector of a head's map."""
_RATIO = 0.8125  # one cell of each 2×2, with the paper's secondary masking of a quarter of these


class CompactEncoder(SwinEncoder):
    """Images (B, C, H, W) and mask (B, H/p, W/p) → features of cells (B, H/c, W/c, D/r).

    r is the side, in cells, of the field of a vector of the last stage. Without a mask the result is the plain model's
    features, one vector of D for each r × r cells.

    Where a mask hides all four cells of a 2×2 (the paper's secondary masking), the mask token replaces the patches of
    one cell. After the last stage a linear layer, patch merging in reverse, makes r × r vectors of each vector. They
    return to the places of their cells (of four hidden cells: to the first). `hidden_token` fills all other places, for
    a head that mixes cells and adds its own positions.

    For the backbone, distances between patches are those on the half image. The paper's Swin computes a pair's bias
    from their places in the whole image.

    Raises:
        UserError: the image cannot be halved, the model's stages do not fit cells, or masks show more cells.
    """

    without_decay = frozenset({"mask_token", "hidden_token"})
    needs_visible = True

    def __init__(self, backbone: Any):
        super().__init__(backbone)
        last, features = super().stride, backbone.num_features
        _check_model(self.patch_size, last, backbone.patch_embed.img_size)
        self._spread = last // CELL
        self._patches = CELL // self.patch_size  # along the side of a cell
        self.expand = nn.Linear(features, self._spread * features)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, 1, features // self._spread))
        nn.init.trunc_normal_(self.hidden_token, std=0.02)
        backbone.patch_embed.strict_img_size = False
        for module in backbone.modules():
            if type(module) in _HALVES:
                _take_halves_too(module)

    @property
    def num_features(self) -> int:
        return self.backbone.num_features // self._spread

    @property
    def stride(self) -> int:
        return CELL

    def check_masks(self, masks: MaskStrategy, model: str) -> None:
        """Raise `UserError` for masks that show more than one cell of a 2×2."""
        if not isinstance(masks, UniformMask) or masks.cell != CELL or masks.ratio < 0.75:
            raise UserError(
                f"--encode visible of {model} takes masks that show at most one {CELL}-pixel cell of each 2x2, which "
                f"{masks.kind} masks of {masks.cell} pixels at ratio {masks.ratio:g} do not; "
                f"use --mask uniform --mask.cell {CELL} --mask.ratio {_RATIO} (or 0.75)"
            )

    def save_work(self, *, visible_patches: bool, last_block: bool) -> None:
        super().save_work(visible_patches=False, last_block=False)  # both need the map of the whole image

    def _seen(self, mask: Tensor | None, visible: Chosen | None) -> Chosen | None:
        if mask is not None and visible is None:
            self._check(mask)
        return None

    def _check(self, mask: Tensor) -> None:
        """Raise `UserError` for other masks. Waits for the device."""
        cells = mask[:, :: self._patches, :: self._patches]
        if (_squares(cells).sum(-1) < 3).any() or not torch.equal(self._of_patches(cells), mask):
            raise UserError(
                f"masks show more than one {CELL}-pixel cell of a 2x2, or parts of cells, and this encoder takes one "
                f"or none of each; give masks of UniformMask(ratio={_RATIO}, cell={CELL})"
            )

    def _hidden(self, mask: Tensor) -> Tensor:
        """Return which cells of each 2×2 are hidden: (B, h, w, 4)."""
        return _squares(mask[:, :: self._patches, :: self._patches])

    def _of_patches(self, cells: Tensor) -> Tensor:
        """Turn a mask of cells into one of patches."""
        return cells.repeat_interleave(self._patches, 1).repeat_interleave(self._patches, 2)

    def _hide(self, images: Tensor) -> Tensor:
        """Gather the visible cells: (B, C, H, W) → (B, C, H/2, W/2)."""
        mask = self._state.mask
        if mask is None:
            return images
        chosen = _first_visible(self._hidden(mask))
        B, h, w = chosen.shape
        cells = images.unflatten(3, (w, 2, CELL)).unflatten(2, (h, 2, CELL)).permute(0, 2, 5, 3, 6, 1, 4, 7)
        image, row, column = (torch.arange(n, device=images.device) for n in (B, h, w))
        some = cells[image[:, None, None], row[:, None], column, chosen // 2, chosen % 2]  # (B, h, w, C, c, c)
        return some.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def _token_mask(self, mask: Tensor) -> Tensor | None:
        return self._of_patches(self._hidden(mask).all(-1))  # 2×2s without a visible cell

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        mask = self._state.mask
        if mask is None:
            return features
        r = self._spread
        cells = self.expand(features).unflatten(3, (r, r, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        places = torch.arange(4, device=cells.device)
        here = _first_visible(self._hidden(mask)).unsqueeze(-1) == places  # (B, h, w, 4)
        four = torch.where(here.unsqueeze(-1), cells.unsqueeze(3), self.hidden_token.to(cells.dtype))
        return four.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _check_model(patch: int, last: int, image_size: tuple[int, int]) -> None:
    if last % CELL or CELL % patch:
        raise UserError(
            f"--encode visible moves cells of {CELL} pixels, and patches of {patch} or the last stage's of {last} do "
            "not fit them; use a Swin of 4 stages with patches of 4, or --encode all"
        )
    for side in image_size:
        if side % (2 * last):
            near = max(side // (2 * last), 1) * 2 * last
            raise UserError(
                f"image size {side} is not a multiple of {2 * last}, so that --encode visible cannot halve it for a "
                f"stride of {last}; use {near} or {near + 2 * last}"
            )


def _squares(cells: Tensor) -> Tensor:
    """Group each 2×2, row by row: (B, 2h, 2w) → (B, h, w, 4)."""
    _, rows, columns = cells.shape
    return cells.unflatten(2, (columns // 2, 2)).unflatten(1, (rows // 2, 2)).transpose(2, 3).flatten(3)


def _first_visible(squares: Tensor) -> Tensor:
    """Return the first visible cell of four, or the first if all are hidden: (B, h, w, 4) → (B, h, w)."""
    return squares.int().argmin(-1)


def _take_halves_too(block: Any) -> None:
    """Let a block also accept maps of half the sides, with the windows of a timm model of that size.

    A map smaller than the window is one window, with the biases from the middle of the table.
    """
    half = copy.copy(block)  # the same weights
    half.input_resolution = tuple(side // 2 for side in block.input_resolution)
    half.window_size, half.shift_size = half._calc_window_shift(block.window_size)
    half.window_area = half.window_size[0] * half.window_size[1]
    weight = block.norm1.weight
    block.register_buffer(
        "half_attn_mask", half.get_attn_mask(device=weight.device, dtype=weight.dtype), persistent=False
    )
    block.half = (half.input_resolution, half.window_size, half.shift_size)
    replace_class(block, _HALVES[type(block)])


class _HalvesToo:
    """Mixin of a Swin block for maps of half the sides."""

    half: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    half_attn_mask: Tensor | None
    attn: Any

    def _attn(self, x: Tensor) -> Tensor:
        plain: Any = super()
        size, window, shift = self.half
        if tuple(x.shape[1:3]) != size:
            return plain._attn(x)
        area, attention = window[0] * window[1], self.attn
        tall, wide = attention.window_size
        index = attention.relative_position_index.unflatten(1, (tall, wide)).unflatten(0, (tall, wide))
        index = index[: window[0], : window[1], : window[0], : window[1]].reshape(area, area)
        mine = {"window_size": window, "window_area": area}
        with (
            _with(self, **mine, shift_size=shift, attn_mask=self.half_attn_mask),
            _with(attention, **mine, relative_position_index=index),
        ):
            return plain._attn(x)


class _SwinBlock(_HalvesToo, SwinTransformerBlock):
    pass


class _SwinV2Block(_HalvesToo, SwinTransformerV2Block):
    pass


_HALVES: dict[type, type[nn.Module]] = {SwinTransformerBlock: _SwinBlock, SwinTransformerV2Block: _SwinV2Block}


@contextlib.contextmanager
def _with(module: Any, **values: Any) -> Iterator[None]:
    """Set existing attributes of a module within the context."""
    before = {name: getattr(module, name) for name in values if hasattr(module, name)}
    for name in before:
        setattr(module, name, values[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
