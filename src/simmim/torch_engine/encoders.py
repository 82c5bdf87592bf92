"""Encoders: timm backbones that accept a mask. Adding a family touches `FAMILIES` only.

The backbone inside is a plain timm module with timm's parameter names; it is what a run saves as its encoder.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` patches or feature-map cells, `N` tokens, `D` features.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import timm
import torch
from timm.layers.drop import DropPath as TimmDropPath
from torch import Tensor, nn

from simmim.torch_engine.savings import Choice, Chosen, embed_visible, shorten_last_block


class Encoder(nn.Module):
    """Images (B, C, H, W) and mask (B, h, w) in units of `patch_size` → features (B, H / stride, W / stride, D).

    `visible` and `hidden`, which must be those of the mask, save what a loss of the hidden cells does not need: with
    `hidden` come the features of these n cells only, (B, n, D).
    """

    # Parameters that AdamW does not decay, besides biases and 1-D ones; see `simmim.torch_engine.optim`.
    without_decay: ClassVar[frozenset[str]] = frozenset({"mask_token"})

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
        self._choice.patches = visible
        self._choice.tokens = self._places(hidden) if self._short and hidden is not None else None
        features = self.backbone.forward_features(self._hide(images))
        if self._choice.tokens is None:
            features = self._to_map(features, images)
            if hidden is not None:
                features = hidden.of(features.flatten(1, 2))
        if not self.training:  # else kept: activation checkpointing runs parts again in the backward pass
            self._mask, self._choice.patches, self._choice.tokens = None, None, None
        return features

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
        return images.masked_fill(pixels.unsqueeze(1), 0.0)

    def _put_mask_token(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if self._mask is None:
            return output
        return torch.where(self._mask.unsqueeze(1), self.mask_token.to(output.dtype).view(1, -1, 1, 1), output)

    def _to_map(self, features: Tensor, images: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)  # (B, D, h, w) → (B, h, w, D)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of one timm file have in common."""

    name: str
    wrap: Callable[[nn.Module], Encoder]
    sized: bool = True  # takes img_size
    arguments: tuple[tuple[str, Any], ...] = ()


# The final norm must act on every token and not on a pooled vector, since every token is predicted from; pooling is
# the mean, since the class token is never trained. Both keep the parameters' names.
_NORM_ON_TOKENS = (("global_pool", "avg"), ("fc_norm", False))
FAMILIES = {
    "vision_transformer": Family(name="vit_*", wrap=TokenEncoder, arguments=_NORM_ON_TOKENS),
    "deit": Family(name="deit*", wrap=TokenEncoder, arguments=_NORM_ON_TOKENS),
    "beit": Family(name="beit*", wrap=TokenEncoder, arguments=(("use_fc_norm", False),)),
    "swin_transformer": Family(name="swin_*", wrap=SwinEncoder),
    "swin_transformer_v2": Family(name="swinv2_*", wrap=SwinEncoder),
    "resnet": Family(name="resnet*", wrap=lambda net: ConvEncoder(net, "layer3"), sized=False),
    "convnext": Family(name="convnext*", wrap=lambda net: ConvEncoder(net, "stages.2"), sized=False),
    "regnet": Family(name="regnet*", wrap=lambda net: ConvEncoder(net, "s3"), sized=False),
}


def find_family(model: str) -> Family:
    """The family of a timm model name; one-line `ValueError` for an unknown name or a model that takes no mask."""
    architecture = model.split(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise ValueError(f"model {model!r} is not known to timm {timm.__version__}; {remedy}")
    file = timm.models.model_entrypoint(architecture).__module__.rsplit(".", 1)[-1]
    if file not in FAMILIES or "distilled" in architecture:
        names = ", ".join(family.name for family in FAMILIES.values())
        raise ValueError(f"model {model!r} cannot take a mask; use one of the families {names}")
    return FAMILIES[file]


def default_image_size(model: str) -> tuple[int, int]:
    """(H, W) for which timm defines the model."""
    find_family(model)
    _, height, width = timm.get_pretrained_cfg(model).input_size  # type: ignore[union-attr]
    return height, width


def create_backbone(
    model: str,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    drop_path: float = 0.0,
    model_args: dict[str, Any] | None = None,
) -> nn.Module:
    """A timm module without classifier, for any size and number of channels; random weights."""
    family = find_family(model)
    arguments: dict[str, Any] = dict(family.arguments) | ({"img_size": image_size} if family.sized else {})
    arguments |= {"drop_path_rate": drop_path} | (model_args or {})  # said always: timm's Swin has one of its own
    try:
        return timm.create_model(model, num_classes=0, in_chans=channels, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        given = {"image size": "x".join(map(str, image_size))} | (model_args or {})
        settings = ", ".join(f"{name} {value}" for name, value in given.items())
        raise ValueError(
            f"model {model!r} cannot be built with {settings}: {reason}; change --model-args or --image-size"
        ) from error


def create_encoder(model: str, **settings: Any) -> Encoder:
    """An `Encoder` of a timm model; settings as for `create_backbone`."""
    return find_family(model).wrap(create_backbone(model, **settings))


def sketch_encoder(model: str, image_size: tuple[int, int], model_args: Mapping[str, Any]) -> Encoder:
    """The encoder without memory for its weights, for what its sizes tell."""
    with torch.device("meta"):
        return create_encoder(model, image_size=image_size, model_args=dict(model_args))


class DropPathDraws:
    """The random numbers of one step's drop path: (B, number of drop-path layers), uniform in [0, 1)."""

    def __init__(self) -> None:
        self.uniform: Tensor | None = None
        self.layers = 0


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382) whose random numbers come in with the batch.

    So an image's draws depend on the seed, the epoch and the image only: the same after a resume and on any number of
    processes, and no accelerator needs a random generator inside the step.
    """

    def __init__(self, rate: float, draws: DropPathDraws):
        super().__init__()
        self.keep = 1.0 - rate
        self.draws = draws
        self.layer = draws.layers
        draws.layers += 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        uniform = self.draws.uniform
        column = torch.rand(len(x), device=x.device) if uniform is None else uniform[:, self.layer]
        scale = (column < self.keep).to(x.dtype) / self.keep
        return x * scale.view(-1, *[1] * (x.ndim - 1))


def route_drop_path(backbone: nn.Module) -> DropPathDraws:
    """Replace timm's drop path, which draws on the device, by ours; it has no parameters, so no name changes."""
    draws = DropPathDraws()
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, TimmDropPath):
                setattr(module, name, DropPath(child.drop_prob, draws))
    return draws
