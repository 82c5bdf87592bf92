"""timm backbones that accept a mask. `families/` selects the wrapper of a model.

The backbone inside is a plain timm module with timm's parameter names; a run saves it as its encoder. Hooks and
replaced classes in the backbone share a `ForwardState` with the encoder. They do not refer to the encoder itself, so
that a discarded encoder frees its memory at once.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` patches or feature-map cells, `N` tokens, `D` features.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from simmim.errors import UserError
from simmim.method.masks import MaskStrategy
from simmim.torch_engine.models.drop_path import route_drop_path
from simmim.torch_engine.models.heads import sine_positions
from simmim.torch_engine.models.sampling import resampling_weights
from simmim.torch_engine.models.savings import Chosen, ForwardState, LastBlock, embed_visible, shorten_last_block

NEEDS_WHOLE_MAPS = "needs whole maps for its convolutions"
"""Reason why a convolutional family has no encoder of visible patches."""


class Encoder(nn.Module):
    """Encode images (B, C, H, W) and mask (B, h, w) as features (B, H / stride, W / stride, D).

    The mask is in units of `patch_size`.

    `visible` and `hidden` must be the cells of the mask. They skip work that a loss over hidden cells does not need:
    with `hidden`, the result is the features of these n cells only, (B, n, D).
    """

    # Parameters that AdamW does not decay, besides biases and 1-D ones; see `simmim.torch_engine.train.optim`.
    without_decay: ClassVar[frozenset[str]] = frozenset({"mask_token"})
    # Whether the encoder needs `visible`. Without it, the encoder counts the mask, which waits for the device.
    needs_visible: ClassVar[bool] = False
    # `Family.last_blocks`
    last_blocks: Mapping[type[nn.Module], type[LastBlock]] = {}

    def __init__(self, backbone: nn.Module, token_module: str = "patch_embed"):
        super().__init__()
        self.backbone: Any = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self._token_features()))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.drop_path_draws = route_drop_path(backbone)
        self._state = ForwardState()
        self._short = False
        backbone.get_submodule(token_module).register_forward_hook(partial(self._put_mask_token, self._state))
        for name, parameter in backbone.named_parameters():
            # Only a classifier uses these parts. DDP would wait for their gradients forever.
            if name.split(".")[0] in ("head", "fc_norm", "attn_pool"):
                parameter.requires_grad_(False)

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def width(self) -> int | None:
        """Number of features of a token of the last stage; `None` for a convolutional net."""
        return self.num_features

    @property
    def stride(self) -> int:
        """Side of a feature-map cell in pixels."""
        return self.backbone.feature_info[-1]["reduction"]

    @property
    def patch_size(self) -> int:
        """Side of the unit of masks in pixels."""
        raise AssertionError

    def check_masks(self, masks: MaskStrategy, model: str) -> None:
        """Raise `UserError` if `model` does not support a strategy's masks."""

    def set_sine_positions(self) -> None:
        """Start the position table with sines and cosines. Raises `UserError` where there is none."""
        raise UserError(
            f"--positions sincos needs a table of positions, and {type(self.backbone).__name__} has none; leave it out"
        )

    def _token_features(self) -> int:
        """Return the number of features of the mask token."""
        raise AssertionError

    def _token_mask(self, mask: Tensor) -> Tensor | None:
        """Return the places of the mask token, (B, h, w), or `None`."""
        return mask

    @staticmethod
    def _put_mask_token(state: ForwardState, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Insert the mask token into the output of `token_module`, as a forward hook."""
        raise AssertionError

    def save_work(self, *, visible_patches: bool, last_block: bool) -> None:
        """Enable savings in calls with `visible` or `hidden`, if the backbone supports them."""
        if visible_patches and hasattr(self.backbone, "patch_embed"):
            embed_visible(self.backbone.patch_embed, self._state)
        self._short = last_block and shorten_last_block(self.backbone, self._state, self.last_blocks)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        visible: Chosen | None = None,
        hidden: Chosen | None = None,
    ) -> Tensor:
        state = self._state
        state.mask = mask
        state.token_mask = None if mask is None else self._token_mask(mask)
        state.mask_token = self.mask_token
        state.patches = self._seen(mask, visible)
        state.tokens = self._places(hidden) if self._short and hidden is not None else None
        features = self.backbone.forward_features(self._hide(images))
        if state.tokens is None:
            features = self._to_map(features, images)
            if hidden is not None:
                features = hidden.of(features.flatten(1, 2))
        if not self.training:  # activation checkpointing runs parts again in the backward pass
            state.clear()
        return features

    def allow(self, size: tuple[int, int]) -> bool:
        """Prepare for `at_size` with images of `size` (height, width); return whether the encoder takes them."""
        return False

    def at_size(self, images: Tensor) -> Tensor:
        """Encode images of a size that `allow` allowed, without mask: (B, C, H, W) → (B, H / stride, W / stride, D)."""
        return self(images)

    def _seen(self, mask: Tensor | None, visible: Chosen | None) -> Chosen | None:
        """Return the visible patches, if the backbone uses them."""
        return visible

    def _places(self, cells: Chosen) -> Chosen:
        """Return the places of cells among the tokens of the last block."""
        return cells

    def _hide(self, images: Tensor) -> Tensor:
        """Return the input images of the backbone."""
        return images

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        """Return the backbone's features as a map (B, h, w, D)."""
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

    def set_sine_positions(self) -> None:
        table, (h, w) = getattr(self.backbone, "pos_embed", None), self.backbone.patch_embed.grid_size
        if table is None:
            super().set_sine_positions()
            return
        with torch.no_grad():
            table[:, table.shape[1] - h * w :] = sine_positions(h, w, table.shape[2], table.device).flatten(0, 1)

    def allow(self, size: tuple[int, int]) -> bool:
        """Allow multiples of the patch if only a table of positions depends on the image size (ViT, DeiT).

        A bias between patches (BEiT) or windows (Swin) would need more than another table.
        """
        net = self.backbone
        table = isinstance(net, VisionTransformer) and net.pos_embed is not None and not net.dynamic_img_size
        if not table or any(side % self.patch_size for side in size):
            return False
        net.patch_embed.strict_img_size = False
        return True

    def at_size(self, images: Tensor) -> Tensor:
        """Encode images of another size, for which the table of positions is resized. The backbone keeps its table."""
        table, (h, w) = self.backbone.pos_embed, self.backbone.patch_embed.grid_size
        table = resize_positions(
            table, (h, w), (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        )
        return functional_call(self, {"backbone.pos_embed": table}, (images,))

    def _token_features(self) -> int:
        return self.backbone.patch_embed.proj.out_channels

    @staticmethod
    def _put_mask_token(state: ForwardState, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if state.token_mask is None or state.mask_token is None:
            return output
        mask = state.token_mask.flatten(1) if output.ndim == 3 else state.token_mask  # (B, N, D) or (B, h, w, D)
        return torch.where(mask.unsqueeze(-1), state.mask_token.to(output.dtype), output)

    def _places(self, cells: Chosen) -> Chosen:
        return cells.after(getattr(self.backbone, "num_prefix_tokens", 0))

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        B, _, H, W = images.shape
        tokens = features[:, self.backbone.num_prefix_tokens :]
        return tokens.reshape(B, H // self.patch_size, W // self.patch_size, -1)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a table of positions, (1, prefix + h·w, D), from the grid (h, w) `old` to `new`; keep its prefix."""
    prefix = table.shape[1] - old[0] * old[1]
    whole = (table.new_zeros(1), table.new_ones(1))
    rows, columns = (resampling_weights(*whole, *sides)[0] for sides in zip(old, new, strict=True))
    with torch.autocast(table.device.type, enabled=False):
        grid = torch.einsum("yh,xw,hwd->yxd", rows, columns, table[0, prefix:].unflatten(0, old))
    return torch.cat((table[:, :prefix], grid.flatten(0, 1).unsqueeze(0)), dim=1)


class SwinEncoder(TokenEncoder):
    """Swin and SwinV2: masked like ViT; the last stage's map is the feature map."""

    without_decay = frozenset({"mask_token"})

    @property
    def stride(self) -> int:
        return self.backbone.feature_info[-1]["reduction"]

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        return features


class ConvEncoder(Encoder):
    """Convolutional networks, after A2MIM (arXiv 2205.13943).

    A token in place of the patch embedding gains nothing (SimMIM on ResNet-50: 79.9 against 79.8 supervised), because
    a convolution mixes it with its neighbours at once. Therefore hidden pixels take the mean colour (0 after
    normalisation), and the mask token replaces hidden cells of the third stage's output (16 pixels a side), whose
    features already summarise their surroundings.
    """

    def __init__(self, backbone: Any, stage: str):
        self._stage = next(info for info in backbone.feature_info if info["module"] == stage)
        module = backbone.get_submodule(stage)
        # With activation checkpointing, timm's ResNet calls the blocks of a stage instead of the stage.
        super().__init__(backbone, f"{stage}.{len(module) - 1}" if isinstance(module, nn.Sequential) else stage)

    @property
    def patch_size(self) -> int:
        return self._stage["reduction"]

    @property
    def width(self) -> None:
        return None

    def allow(self, size: tuple[int, int]) -> bool:
        return not any(side % self.stride for side in size)

    def _token_features(self) -> int:
        return self._stage["num_chs"]

    def _hide(self, images: Tensor) -> Tensor:
        mask = self._state.mask
        if mask is None:
            return images
        pixels = mask.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)
        return torch.where(pixels.unsqueeze(1), 0.0, images)  # channels last in memory, like the input

    @staticmethod
    def _put_mask_token(state: ForwardState, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if state.token_mask is None or state.mask_token is None:
            return output
        token = state.mask_token.to(output.dtype).view(1, -1, 1, 1)
        return torch.where(state.token_mask.unsqueeze(1), token, output)

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)  # (B, D, h, w) → (B, h, w, D)
