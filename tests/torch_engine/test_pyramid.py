"""Feature pyramids of every encoder family.

Shapes: `B` images, `C` channels, `H W` pixels.
"""

import re
from typing import Any

import pytest
import torch

from simmim.config.tasks import ClassifyConfig
from simmim.torch_engine.models.encoders import create_backbone
from simmim.torch_engine.tasks.pyramid import Pyramid, create_pyramid

from . import tiny

PLAIN = ("vit", "vit with registers", "deit", "deit3", "beit")
STAGED = ("swin", "swinv2", "resnet18", "convnext", "regnet")
SIZE = (96, 64)


def config(kind: str, **settings: Any) -> ClassifyConfig:
    made = {"model": tiny.KINDS[kind].model, "model_args": tiny.KINDS[kind].arguments, "image_size": SIZE}
    return ClassifyConfig(**(made | {"drop_path": 0.0, "channels": 3} | settings))


def encoder_weights(kind: str) -> dict[str, torch.Tensor]:
    """Those of a pretraining, at another size."""
    torch.manual_seed(1)
    return create_backbone(
        tiny.KINDS[kind].model, image_size=(64, 64), model_args=tiny.KINDS[kind].arguments
    ).state_dict()


def levels(pyramid: Pyramid, size: tuple[int, int] = SIZE, channels: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return pyramid(torch.randn(2, channels, *size))


@pytest.mark.parametrize("kind", PLAIN + STAGED)
def test_levels_have_the_shapes_that_channels_and_strides_say(kind: str) -> None:
    pyramid = create_pyramid(config(kind), None, channels=40)
    assert pyramid.strides == (4, 8, 16, 32)
    found = [tuple(level.shape) for level in levels(pyramid)]
    assert found == [(2, width, 96 // s, 64 // s) for width, s in zip(pyramid.channels, pyramid.strides, strict=True)]
    assert kind in STAGED or pyramid.channels == (40,) * 4


def test_a_patch_of_four_pixels_gives_strides_from_one_pixel_on() -> None:
    small = config("vit", image_size=(12, 20), channels=2, model_args={**tiny.KINDS["vit"].arguments, "patch_size": 4})
    pyramid = create_pyramid(small, None, channels=16)
    assert pyramid.strides == (1, 2, 4, 8)
    sides = [tuple(level.shape[2:]) for level in levels(pyramid, (12, 20), channels=2)]
    assert sides == [(12, 20), (6, 10), (3, 5), (2, 3)]  # an odd number of patches is rounded up


@pytest.mark.parametrize("kind", PLAIN + STAGED)
def test_the_encoders_weights_arrive_under_timms_names(kind: str) -> None:
    weights = encoder_weights(kind)
    found = create_pyramid(config(kind), weights).backbone.state_dict()
    moved = {name for name in weights if found[name].shape == weights[name].shape}
    assert len(moved) > len(weights) - 12  # position and relative-bias tables are resized
    assert [name for name in moved if not torch.equal(found[name], weights[name])] == []


@pytest.mark.parametrize("kind", [*PLAIN, *STAGED, "beit with a shared bias"])
def test_the_gradient_of_the_levels_reaches_every_parameter_that_is_trained(kind: str) -> None:
    pyramid = create_pyramid(config(kind), encoder_weights(kind))
    trained = {name: parameter for name, parameter in pyramid.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():  # branches that begin as zero would hide what is behind them
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.cat([(level * torch.randn_like(level)).flatten() for level in levels(pyramid)]).sum().backward()
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_the_last_level_of_a_swin_is_timms_feature_map(kind: str) -> None:
    pyramid = create_pyramid(config(kind), encoder_weights(kind)).eval()
    torch.manual_seed(2)
    features = pyramid.backbone.forward_features(torch.randn(2, 3, *SIZE))  # (B, h, w, D)
    torch.testing.assert_close(levels(pyramid)[-1], features.permute(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["swin", "swinv2", "convnext"])
def test_no_level_has_values_that_grow_from_stage_to_stage(kind: str) -> None:
    for level in levels(create_pyramid(config(kind), encoder_weights(kind))):
        torch.testing.assert_close(level.var(dim=1, correction=0), torch.ones_like(level[:, 0]), rtol=0.05, atol=0.02)


def test_a_classifiers_last_norm_becomes_the_pyramids() -> None:
    weights = encoder_weights("vit")
    weights["norm.weight"] = torch.full_like(weights["norm.weight"], 2.0)
    fine_tuned = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: w for name, w in weights.items()
    }
    assert create_pyramid(config("vit"), fine_tuned).backbone.norm.weight.eq(2).all()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "swin",
            {"image_size": (96, 80)},
            "image size 80 is not a multiple of the stride 32 of swin_tiny_patch4_window7_224; use 64 or 96",
        ),
        (
            "vit",
            {"image_size": (100, 96)},
            "image size 100 is not a multiple of the stride 16 of vit_tiny_patch16_224; use 96 or 112",
        ),
        (
            "vit with class and register tokens",
            {"image_size": (98, 98), "model_args": {}},
            "patch 14 of vit_small_patch14_reg4_dinov2 cannot be divided into the four cells a side of the finest "
            "feature map; use a model with a patch of 4, 8, 16 or 32",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        create_pyramid(config(kind, **settings), None)
