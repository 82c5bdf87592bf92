"""Encoders by their timm names. The facts of each family are in `families/`."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from simmim.errors import UserError
from simmim.torch_engine.models.family import find_family
from simmim.torch_engine.models.masked import Encoder
from simmim.training.origins import check_encoder


def default_image_size(model: str) -> tuple[int, int]:
    """Return the size (H, W) in pixels for which timm defines the model."""
    find_family(model)
    _, height, width = timm.get_pretrained_cfg(model).input_size  # type: ignore[union-attr]
    return height, width


def load_timm(source: str, *, option: str = "", weights: bool = True) -> nn.Module:
    """Create the timm module without classifier that `timm:NAME` or `local-dir:PATH` names, in evaluation mode.

    Weights are those that timm has for it, on this machine or to download; without `weights` they are random. Raises
    `UserError`, which begins with `option`, where there are none.
    """
    check_encoder(source, option)
    try:
        return timm.create_model(source.removeprefix("timm:"), pretrained=weights, num_classes=0).eval()
    except Exception as error:  # the hub passes on the errors of its back ends
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{f'{option} {source}'.strip()} has no weights here: {reason}") from error


def create_backbone(
    model: str,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    drop_path: float = 0.0,
    model_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Create a timm module without classifier, for any size and number of channels, with random weights.

    Raises:
        UserError: timm cannot build the model with these settings.
    """
    family = find_family(model)
    arguments: dict[str, Any] = dict(family.arguments) | ({"img_size": image_size} if family.takes_image_size else {})
    arguments |= {"drop_path_rate": drop_path} | (model_args or {})  # always, since timm's Swin defaults to 0.1
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
    """Create the `Encoder` of a timm model, of `all` patches or the `visible` ones.

    `settings` are those of `create_backbone`.

    Raises:
        UserError: the model needs all patches, or cannot be built.
    """
    family = find_family(model)
    wrap = family.encoder if encode == "all" else family.visible_encoder
    if wrap is None:
        raise UserError(
            f"--encode visible is not for {model}, which {family.needs_all_patches}; "
            "use --encode all, or a ViT, DeiT, Swin or SwinV2"
        )
    encoder = wrap(create_backbone(model, **settings))
    encoder.last_blocks = family.last_blocks
    return encoder


def sketch_encoder(model: str, image_size: tuple[int, int], model_args: Mapping[str, Any]) -> Encoder:
    """Create the encoder without memory for its weights, to read its sizes."""
    with torch.device("meta"):
        return create_encoder(model, image_size=image_size, model_args=dict(model_args))
