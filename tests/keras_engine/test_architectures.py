"""What needs no Keras: the table of models, against timm."""

import pytest
import timm
import torch

from simmim.keras_engine.architectures import NAMES, find_architecture
from simmim.keras_engine.first_values import first_values


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_timm_model_of_that_size(name: str) -> None:
    _, height, width = timm.get_pretrained_cfg(name).input_size
    assert find_architecture(name).image_size == (height, width)


@pytest.mark.parametrize("name", [name for name in NAMES if "large" not in name and "huge" not in name])
def test_the_arguments_are_those_that_timm_builds_it_from(name: str) -> None:
    architecture = find_architecture(name)
    with torch.device("meta"):
        expected = timm.create_model(name, num_classes=0)
        found = timm.create_model(name, num_classes=0, **architecture.arguments)
    shapes = {key: tensor.shape for key, tensor in expected.state_dict().items()}
    assert {key: tensor.shape for key, tensor in found.state_dict().items()} == shapes


def test_a_name_with_a_tag_is_found() -> None:
    assert find_architecture("vit_base_patch16_224.mae").name == "vit_base_patch16_224"


def test_an_unknown_model_names_those_near_it() -> None:
    with pytest.raises(ValueError, match=r"use vit_tiny_patch16_224 or .*, or --engine torch"):
        find_architecture("vit_tinny_patch16_224")


def test_a_model_argument_that_is_not_built_names_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"'qk_norm' of resnet18 is not known to the keras engine; use channels, layers"
    ):
        find_architecture("resnet18").with_arguments({"qk_norm": True})


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"]
)
def test_first_values_are_spread_as_timms(name: str) -> None:
    torch.manual_seed(0)
    small = {"depth": 2} if name.startswith(("vit", "beit")) else {}
    module = timm.create_model(name, num_classes=0, **small)
    expected = {f"encoder.backbone.{key}": value.numpy() for key, value in module.state_dict().items()}
    shapes = {key: value.shape for key, value in expected.items() if not key.endswith("tracked")}
    found = first_values(shapes, find_architecture(name).with_arguments(small), seed=0)
    for key, values in found.items():
        mean, spread = float(expected[key].mean()), float(expected[key].std())
        assert values.std() == pytest.approx(spread, rel=0.2, abs=1e-7), key
        assert values.mean() == pytest.approx(mean, rel=0.01, abs=0.3 * spread + 1e-7), key
