"""ViT and DeiT that see visible patches only (MAE, arXiv 2111.06377 §3).

Shapes: `B` images, `h w` patches, `N` tokens, `n` visible ones, `D` features.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from simmim.errors import UserError
from simmim.torch_engine.models.masked import TokenEncoder
from simmim.torch_engine.models.savings import Chosen, ForwardState, choose


class VisibleEncoder(TokenEncoder):
    """ViT and DeiT that see visible patches only (MAE, arXiv 2111.06377 §3).

    Hidden patches are dropped after positions are added. In the feature map the mask token takes their places, for a
    head that mixes cells and adds its own positions. All masks of a batch must leave the same number visible.
    """

    needs_visible = True

    def __init__(self, backbone: Any):
        super().__init__(backbone)
        backbone.norm_pre.register_forward_pre_hook(partial(_leave_out, self._state, backbone.num_prefix_tokens))

    def save_work(self, *, visible_patches: bool, last_block: bool) -> None:
        super().save_work(visible_patches=visible_patches, last_block=False)  # there are no hidden tokens

    def _seen(self, mask: Tensor | None, visible: Chosen | None) -> Chosen | None:
        return choose(mask, count_visible(mask), hidden=False) if mask is not None and visible is None else visible

    def _token_mask(self, mask: Tensor) -> Tensor | None:
        return None

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        visible, mask = self._state.patches, self._state.mask
        if visible is None or mask is None:
            return super()._to_map(features, images)
        seen = visible.put(features[:, self.backbone.num_prefix_tokens :], mask[0].numel())  # (B, N, D)
        cells = seen.unflatten(1, mask.shape[1:])
        return torch.where(mask.unsqueeze(-1), self.mask_token.to(cells.dtype), cells)


def _leave_out(state: ForwardState, prefix: int, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Drop hidden tokens, (B, prefix + N, D) → (B, prefix + n, D), as a pre-hook. Keep the first `prefix` tokens."""
    (tokens,) = inputs
    if state.patches is None:
        return tokens
    return torch.cat((tokens[:, :prefix], state.patches.of(tokens[:, prefix:])), dim=1)


def count_visible(mask: Tensor) -> int:
    """Return the number of visible patches of each mask in (B, h, w). Waits for the device.

    Raises:
        UserError: the masks differ in their number.
    """
    counts = (~mask).flatten(1).sum(1)
    least, most = int(counts.min()), int(counts.max())
    if least != most:
        raise UserError(
            f"masks leave {least} to {most} patches visible, but an encoder of visible patches needs equal numbers in "
            "every image; give masks that hide the same number"
        )
    return least
