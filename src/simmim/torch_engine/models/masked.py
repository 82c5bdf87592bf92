"""timm backbones that accept a mask. Which models can, and how they are made, is in `encoders`.

The backbone inside is a plain timm module with timm's parameter names; it is what a run saves as its encoder.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` patches or feature-map cells, `N` tokens, `D` features.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simmim.errors import UserError
from simmim.method.masks import MaskStrategy
from simmim.torch_engine.models.drop_path import route_drop_path
from simmim.torch_engine.models.savings import Choice, Chosen, choose, embed_visible, shorten_last_block


class Encoder(nn.Module):
    """Images (B, C, H, W) and mask (B, h, w) in units of `patch_size` → features (B, H / stride, W / stride, D).

    `visible` and `hidden`, which must be those of the mask, save what a loss of the hidden cells does not need: with
    `hidden` come the features of these n cells only, (B, n, D).
    """

    # Parameters that AdamW does not decay, besides biases and 1-D ones; see `simmim.torch_engine.train.optim`.
    without_decay: ClassVar[frozenset[str]] = frozenset({"mask_token"})
    # Whether it must know what is visible: of a mask whose count it is not told, it asks the device.
    needs_visible: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module, token_module: str = "patch_embed"):
        super().__init__()
        self.backbone: Any = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self._token_features()))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.drop_path_draws = route_drop_path(backbone)
        self._mask: Tensor | None = None
        self._choice = Choice()
        self._short = False
        backbone.get_submodule(token_module).register_forward_hook(self._put_mask_token)
        for name, parameter in backbone.named_parameters():
            # Parts that only a classifier uses: without a gradient DDP would wait for them for ever.
            if name.split(".")[0] in ("head", "fc_norm", "attn_pool"):
                parameter.requires_grad_(False)

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def stride(self) -> int:
        """Pixels of a side of a feature-map cell."""
        return self.backbone.feature_info[-1]["reduction"]

    @property
    def patch_size(self) -> int:
        """Pixels of a side of the unit in which masks are given."""
        raise AssertionError

    def check_masks(self, masks: MaskStrategy, model: str) -> None:
        """One-line `ValueError` for a strategy whose masks `model` cannot be given."""

    def _token_features(self) -> int:
        raise AssertionError

    def _put_mask_token(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        raise AssertionError

    def save_work(self, *, visible_patches: bool, last_block: bool) -> None:
        """From now on make these savings where a call says what is visible and hidden, and the backbone is known."""
        if visible_patches and hasattr(self.backbone, "patch_embed"):
            embed_visible(self.backbone.patch_embed, self._choice)
        self._short = last_block and shorten_last_block(self.backbone, self._choice)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        visible: Chosen | None = None,
        hidden: Chosen | None = None,
    ) -> Tensor:
        self._mask = mask
        self._choice.patches = self._seen(mask, visible)
        self._choice.tokens = self._places(hidden) if self._short and hidden is not None else None
        features = self.backbone.forward_features(self._hide(images))
        if self._choice.tokens is None:
            features = self._to_map(features, images)
            if hidden is not None:
                features = hidden.of(features.flatten(1, 2))
        if not self.training:  # else kept: activation checkpointing runs parts again in the backward pass
            self._mask, self._choice.patches, self._choice.tokens = None, None, None
        return features

    def _seen(self, mask: Tensor | None, visible: Chosen | None) -> Chosen | None:
        """The visible patches, where it is to be known which they are."""
        return visible

    def _places(self, cells: Chosen) -> Chosen:
        """Where the last block has these cells among its tokens."""
        return cells

    def _hide(self, images: Tensor) -> Tensor:
        return images

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        return features


class TokenEncoder(Encoder):
    """ViT, DeiT, BEiT: the mask token replaces the patch embedding before positions are added (SimMIM §3.2)."""

    without_decay = frozenset({"backbone.cls_token", "backbone.reg_token", "backbone.pos_embed"})

    @property
    def patch_size(self) -> int:
        return self.backbone.patch_embed.patch_size[0]

    @property
    def stride(self) -> int:
        return self.patch_size

    def _token_features(self) -> int:
        return self.backbone.patch_embed.proj.out_channels

    def _put_mask_token(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if self._mask is None:
            return output
        mask = self._mask.flatten(1) if output.ndim == 3 else self._mask  # (B, N, D) or (B, h, w, D)
        return torch.where(mask.unsqueeze(-1), self.mask_token.to(output.dtype), output)

    def _places(self, cells: Chosen) -> Chosen:
        return cells.after(getattr(self.backbone, "num_prefix_tokens", 0))

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        B, _, H, W = images.shape
        tokens = features[:, self.backbone.num_prefix_tokens :]
        return tokens.reshape(B, H // self.patch_size, W // self.patch_size, -1)


class VisibleEncoder(TokenEncoder):
    """ViT and DeiT that see visible patches only (MAE, arXiv 2111.06377 §3).

    Hidden ones are left out after positions are added. In the feature map the mask token is in their places, for a head
    that mixes cells and adds positions of its own. Every mask of a batch must leave as many visible.
    """

    needs_visible = True

    def __init__(self, backbone: Any):
        super().__init__(backbone)
        backbone.norm_pre.register_forward_pre_hook(self._leave_out)

    def save_work(self, *, visible_patches: bool, last_block: bool) -> None:
        super().save_work(visible_patches=visible_patches, last_block=False)  # which has no hidden tokens here

    def _seen(self, mask: Tensor | None, visible: Chosen | None) -> Chosen | None:
        return choose(mask, count_visible(mask), hidden=False) if mask is not None and visible is None else visible

    def _put_mask_token(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output

    def _leave_out(self, _module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (tokens,) = inputs
        visible, prefix = self._choice.patches, self.backbone.num_prefix_tokens
        if visible is None:
            return tokens
        return torch.cat((tokens[:, :prefix], visible.of(tokens[:, prefix:])), dim=1)

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        visible, mask = self._choice.patches, self._mask
        if visible is None or mask is None:
            return super()._to_map(features, images)
        seen = visible.put(features[:, self.backbone.num_prefix_tokens :], mask[0].numel())  # (B, N, D)
        cells = seen.unflatten(1, mask.shape[1:])
        return torch.where(mask.unsqueeze(-1), self.mask_token.to(cells.dtype), cells)


def count_visible(mask: Tensor) -> int:
    """How many patches each mask of (B, h, w) leaves visible. Waits for the device; `ValueError` where they differ."""
    counts = (~mask).flatten(1).sum(1)
    least, most = int(counts.min()), int(counts.max())
    if least != most:
        raise UserError(
            f"masks leave {least} to {most} patches visible, and an encoder of visible patches takes as many of every "
            "image; give masks that hide the same number"
        )
    return least


class SwinEncoder(TokenEncoder):
    """Swin and SwinV2: as for plain transformers; the last stage's map is the feature map."""

    without_decay = frozenset({"mask_token"})

    @property
    def stride(self) -> int:
        return self.backbone.feature_info[-1]["reduction"]

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        return features


class ConvEncoder(Encoder):
    """Convolutional nets, after A2MIM (arXiv 2205.13943).

    A token in place of the patch embedding gains nothing here (SimMIM on ResNet-50: 79.9 against 79.8 supervised),
    since a convolution mixes it with its neighbours at once. So the hidden pixels take the mean colour (0 after
    normalisation), and the mask token enters where features are already local summaries: it replaces the hidden cells
    of the third stage's output, at 16 pixels a cell.
    """

    def __init__(self, backbone: Any, stage: str):
        self._stage = next(info for info in backbone.feature_info if info["module"] == stage)
        module = backbone.get_submodule(stage)
        # timm's ResNet calls the blocks of a stage past it when it checkpoints activations; the others do not.
        super().__init__(backbone, f"{stage}.{len(module) - 1}" if isinstance(module, nn.Sequential) else stage)

    @property
    def patch_size(self) -> int:
        return self._stage["reduction"]

    def _token_features(self) -> int:
        return self._stage["num_chs"]

    def _hide(self, images: Tensor) -> Tensor:
        if self._mask is None:
            return images
        pixels = self._mask.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)
        images = torch.where(pixels.unsqueeze(1), 0.0, images)  # keeps channels last in memory, as pixels come
        if images.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            # In fp32 on a CPU convolutions are slower so, and PyTorch's batch norm sums less exactly.
            images = images.contiguous()
        return images

    def _put_mask_token(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if self._mask is None:
            return output
        return torch.where(self._mask.unsqueeze(1), self.mask_token.to(output.dtype).view(1, -1, 1, 1), output)

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)  # (B, D, h, w) → (B, h, w, D)
