"""Frozen features against what timm's own modules give, and which images they are of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from simmim.data.augment import CentreCrop, crop_resize
from simmim.data.files import PathList
from simmim.data.sources import ArrayImages, ImageSource
from simmim.torch_engine.models.masked_image_model import PixelStep
from simmim.torch_engine.tasks.features import FeatureReader, PooledFeatures

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 48, "fc_norm": False}),
    "registers": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 48, "reg_tokens": 2}),
    "beit": ("beit_base_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 48, "use_fc_norm": False}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)}),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)}),
    "resnet": ("resnet18", {}),
    "regnet": ("regnety_002", {}),
    "convnext": ("convnext_atto", {}),
}


def build(family: str) -> tuple[Any, torch.Tensor]:
    """A module with random weights, and images (3, 3, H, W) for it."""
    model, arguments = TINY[family]
    torch.manual_seed(0)
    pooling = {"global_pool": "avg"} if family in ("vit", "registers", "beit") else {}
    if family in ("registers",):
        pooling["fc_norm"] = False
    backbone = timm.create_model(model, num_classes=0, **arguments, **pooling).eval()
    side = arguments.get("img_size", 64)
    return backbone, torch.randn(3, 3, side, side)


@pytest.mark.parametrize("family", TINY)
def test_features_are_the_mean_over_the_map_as_timm_pools_it(family: str):
    backbone, images = build(family)
    if family == "convnext":  # timm has a norm between its pooling and the classifier
        backbone.head.norm = torch.nn.Identity()
    expected = backbone(images)
    torch.testing.assert_close(PooledFeatures(backbone)(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "registers", "beit"])
def test_features_of_a_middle_block_are_its_tokens_after_the_final_norm(family: str):
    backbone, images = build(family)
    seen = []
    backbone.blocks[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    backbone(images)
    expected = backbone.norm(seen[0])[:, backbone.num_prefix_tokens :].mean(dim=1)
    torch.testing.assert_close(PooledFeatures(backbone, layer=1)(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "module"), [("swin", "layers.2"), ("resnet", "layer3"), ("convnext", "stages.2")])
def test_features_of_an_earlier_stage_are_the_mean_of_its_map(family: str, module: str):
    backbone, images = build(family)
    seen = []
    backbone.get_submodule(module).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    backbone(images)
    over = (1, 2) if family == "swin" else (2, 3)
    expected = seen[0].mean(dim=over)
    torch.testing.assert_close(PooledFeatures(backbone, layer=-2)(images), expected, rtol=1e-5, atol=1e-5)


def test_pool_token_takes_the_class_token():
    backbone, images = build("registers")
    expected = backbone.forward_features(images)[:, 0]
    torch.testing.assert_close(PooledFeatures(backbone, pool="token")(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("vit", {"layer": 3}, "^layer 3 is not among the encoder's 3 layers; use -3 to 2$"),
        ("swin", {"layer": -5}, "^layer -5 is not among the encoder's 4 layers; use -4 to 3$"),
        ("swin", {"pool": "token"}, "^pool token needs a class token, and SwinTransformer has none; use avg$"),
    ],
)
def test_what_an_encoder_has_not_is_refused(family: str, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        PooledFeatures(build(family)[0], **settings)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 20, 24, 3), np.uint8)


def colours(images: torch.Tensor) -> torch.Tensor:
    """The colour of each quarter of the images: (B, 4 C)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def reader(**changes: Any) -> FeatureReader:
    settings: dict[str, Any] = {
        "model": colours,
        "pixels": PixelStep(MEAN, STD),
        "size": (16, 16),
        "channels": 3,
        "dtype": np.dtype(np.uint8),
        "precision": "fp32",
        "batch_size": 3,
        "workers": 2,
        "max_bad_fraction": 0.01,
    }
    return FeatureReader(**(settings | changes))


def test_features_are_of_the_normalised_middles_of_the_images():
    index, features = reader()(ArrayImages(PIXELS, "pixels"))
    crop = CentreCrop(size=(16, 16))
    middles = np.stack([crop_resize(image, crop.box(20, 24), (16, 16)) for image in PIXELS])
    normal = (middles / 255 - np.array(MEAN)) / np.array(STD)
    expected = normal.reshape(7, 2, 8, 2, 8, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(7, 12)
    assert index.tolist() == list(range(7))
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_features_do_not_depend_on_the_batch():
    images = ArrayImages(PIXELS, "pixels")
    np.testing.assert_allclose(reader(batch_size=1)(images)[1], reader(batch_size=7)(images)[1], atol=1e-6)


def test_bf16_gives_the_features_in_fp32_to_its_precision():
    backbone, _ = build("vit")
    settings = {"model": PooledFeatures(backbone), "size": (32, 32)}
    exact, rough = (
        reader(precision=precision, **settings)(ArrayImages(PIXELS, "pixels"))[1] for precision in ("fp32", "bf16")
    )
    assert rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).max() < 0.1


def files(folder: Path, *, good: int, bad: int) -> ImageSource:
    names = [f"{number}.npy" for number in range(good + bad)]
    for number, name in enumerate(names):
        np.save(folder / name, PIXELS[number % len(PIXELS)])
    for name in names[1 : 1 + bad]:
        (folder / name).write_bytes(b"no image")
    return PathList(names, root=folder)


def test_an_image_that_cannot_be_read_is_left_out(tmp_path: Path):
    index, features = reader(max_bad_fraction=0.5)(files(tmp_path, good=4, bad=1), "val")
    assert index.tolist() == [0, 2, 3, 4]
    assert len(features) == 4


def test_too_many_images_that_cannot_be_read_are_refused(tmp_path: Path):
    message = r"^2 of 5 images of val \(40.0%\) cannot be read, such as .*\.npy, more than --max-bad-fraction 0\.3$"
    with pytest.raises(ValueError, match=message):
        reader(max_bad_fraction=0.3)(files(tmp_path, good=3, bad=2), "val")
