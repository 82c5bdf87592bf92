"""Encoders by their timm names. Adding a family of models touches `FAMILIES` only."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from simmim.errors import UserError
from simmim.torch_engine.models.compact import CompactEncoder
from simmim.torch_engine.models.masked import ConvEncoder, Encoder, SwinEncoder, TokenEncoder, VisibleEncoder


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the models of one timm file have in common."""

    name: str
    wrap: Callable[[nn.Module], Encoder]
    sized: bool = True  # takes img_size
    arguments: tuple[tuple[str, Any], ...] = ()
    wrap_visible: Callable[[nn.Module], Encoder] | None = None
    needs_all: str = ""  # why there is none for visible patches only


# The final norm must act on every token and not on a pooled vector, since every token is predicted from; pooling is
# the mean, since the class token is never trained. Both keep the parameters' names.
_NORM_ON_TOKENS = (("global_pool", "avg"), ("fc_norm", False))
_BIAS = "has its positions in a bias between all patches, and none in the tokens"
_CONVOLUTION = "needs whole maps for its convolutions"
FAMILIES = {
    "vision_transformer": Family(
        name="vit_*", wrap=TokenEncoder, arguments=_NORM_ON_TOKENS, wrap_visible=VisibleEncoder
    ),
    "deit": Family(name="deit*", wrap=TokenEncoder, arguments=_NORM_ON_TOKENS, wrap_visible=VisibleEncoder),
    "beit": Family(name="beit*", wrap=TokenEncoder, arguments=(("use_fc_norm", False),), needs_all=_BIAS),
    "swin_transformer": Family(name="swin_*", wrap=SwinEncoder, wrap_visible=CompactEncoder),
    "swin_transformer_v2": Family(name="swinv2_*", wrap=SwinEncoder, wrap_visible=CompactEncoder),
    "resnet": Family(name="resnet*", wrap=lambda net: ConvEncoder(net, "layer3"), sized=False, needs_all=_CONVOLUTION),
    "convnext": Family(
        name="convnext*", wrap=lambda net: ConvEncoder(net, "stages.2"), sized=False, needs_all=_CONVOLUTION
    ),
    "regnet": Family(name="regnet*", wrap=lambda net: ConvEncoder(net, "s3"), sized=False, needs_all=_CONVOLUTION),
}


def find_family(model: str) -> Family:
    """The family of a timm model name; one-line `ValueError` for an unknown name or a model that takes no mask."""
    architecture = model.split(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"model {model!r} is not known to timm {timm.__version__}; {remedy}")
    file = timm.models.model_entrypoint(architecture).__module__.rsplit(".", 1)[-1]
    if file not in FAMILIES or "distilled" in architecture:
        names = ", ".join(family.name for family in FAMILIES.values())
        raise UserError(f"model {model!r} cannot take a mask; use one of the families {names}")
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
        raise UserError(
            f"model {model!r} cannot be built with {settings}: {reason}; change --model-args or --image-size"
        ) from error


def create_encoder(model: str, *, encode: str = "all", **settings: Any) -> Encoder:
    """An `Encoder` of a timm model that sees `all` patches or the `visible` ones; settings as for `create_backbone`.

    One-line `ValueError` for a model that needs them all.
    """
    family = find_family(model)
    if encode == "all":
        return family.wrap(create_backbone(model, **settings))
    if family.wrap_visible is None:
        raise UserError(
            f"--encode visible is not for {model}, which {family.needs_all}; "
            "use --encode all, or a ViT, DeiT, Swin or SwinV2"
        )
    return family.wrap_visible(create_backbone(model, **settings))


def sketch_encoder(model: str, image_size: tuple[int, int], model_args: Mapping[str, Any]) -> Encoder:
    """The encoder without memory for its weights, for what its sizes tell."""
    with torch.device("meta"):
        return create_encoder(model, image_size=image_size, model_args=dict(model_args))
