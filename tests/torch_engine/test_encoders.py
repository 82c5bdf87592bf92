"""The contract of an encoder, over every family.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` feature-map cells, `D` features.
"""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from simmim.torch_engine.models.drop_path import route_drop_path
from simmim.torch_engine.models.encoders import create_encoder
from simmim.torch_engine.models.family import all_families, find_family
from simmim.torch_engine.models.masked import ConvEncoder, Encoder
from simmim.torch_engine.train.storage import save_hub

from . import tiny

SIZE, CHANNELS = (96, 160), 5
every_kind = pytest.mark.parametrize("kind", tiny.KINDS)


@pytest.fixture(scope="module")
def built() -> dict[str, Encoder]:
    return {kind: tiny.encoder(kind, size=SIZE, channels=CHANNELS).eval() for kind in tiny.KINDS}


def images(B: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(B, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(seed))


def of_pixels(mask: Tensor, patch: int) -> Tensor:
    """(B, H/p, W/p) → (B, 1, H, W)."""
    return mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1)


@every_kind
@torch.no_grad()
def test_features_are_a_map_of_stride_cells(built: dict[str, Encoder], kind: str) -> None:
    encoder = built[kind]
    features = encoder(images(), tiny.masks(2, SIZE, encoder.patch_size))
    assert features.shape == (2, SIZE[0] // encoder.stride, SIZE[1] // encoder.stride, encoder.num_features)


@every_kind
@torch.no_grad()
def test_hidden_pixels_do_not_reach_the_features(built: dict[str, Encoder], kind: str) -> None:
    encoder = built[kind]
    mask = tiny.masks(2, SIZE, encoder.patch_size)
    other = torch.where(of_pixels(mask, encoder.patch_size), 3 * images(seed=1), images())
    assert torch.equal(encoder(images(), mask), encoder(other, mask))


@every_kind
@torch.no_grad()
def test_visible_pixels_reach_the_features(built: dict[str, Encoder], kind: str) -> None:
    encoder = built[kind]
    mask = tiny.masks(2, SIZE, encoder.patch_size)
    other = torch.where(of_pixels(mask, encoder.patch_size), images(), 3 * images(seed=1))
    assert not torch.allclose(encoder(images(), mask), encoder(other, mask))


@every_kind
@torch.no_grad()
def test_the_mask_token_is_what_the_features_of_a_hidden_image_depend_on(built: dict[str, Encoder], kind: str) -> None:
    encoder = built[kind]
    mask = torch.ones(1, SIZE[0] // encoder.patch_size, SIZE[1] // encoder.patch_size, dtype=torch.bool)
    before = encoder(images(1), mask)
    token = encoder.mask_token.clone()
    encoder.mask_token.normal_()
    after = encoder(images(1), mask)
    encoder.mask_token.copy_(token)
    assert not torch.allclose(before, after)


@every_kind
@torch.no_grad()
def test_nothing_hidden_gives_the_features_of_the_plain_backbone(built: dict[str, Encoder], kind: str) -> None:
    encoder = built[kind]
    name = tiny.KINDS[kind].model
    arguments = dict(find_family(name).arguments) | tiny.KINDS[kind].arguments
    if find_family(name).takes_image_size:
        arguments["img_size"] = SIZE
    plain = timm.create_model(name, num_classes=0, in_chans=CHANNELS, **arguments).eval()
    plain.load_state_dict(encoder.backbone.state_dict())
    expected = plain.forward_features(images())  # type: ignore[operator]
    if expected.ndim == 3:  # tokens, after those of class and registers
        expected = expected[:, plain.num_prefix_tokens :].unflatten(1, (SIZE[0] // 16, SIZE[1] // 16))
    elif isinstance(encoder, ConvEncoder):
        expected = expected.permute(0, 2, 3, 1)
    mask = torch.zeros(2, SIZE[0] // encoder.patch_size, SIZE[1] // encoder.patch_size, dtype=torch.bool)
    assert torch.equal(encoder(images(), mask), expected)
    assert torch.equal(encoder(images()), expected)


@every_kind
def test_every_trained_parameter_and_the_mask_token_get_a_gradient(built: dict[str, Encoder], kind: str) -> None:
    encoder = built[kind]
    features = encoder(images(), tiny.masks(2, SIZE, encoder.patch_size))
    (features * torch.randn(features.shape[1:])).sum().backward()
    trained = {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    encoder.zero_grad()
    assert [name for name, gradient in trained.items() if gradient is None] == []
    token = trained["mask_token"]
    assert token is not None
    assert token.abs().sum() > 0


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224",
                                  "swinv2_tiny_window8_256", "resnet18", "convnext_atto", "regnety_002"])  # fmt: skip
def test_parameters_have_timms_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        mine = create_encoder(name, image_size=timm.get_pretrained_cfg(name).input_size[1:]).backbone.state_dict()  # type: ignore[union-attr]
        plain = timm.create_model(name, num_classes=0).state_dict()
    names = {entry: tuple(tensor.shape) for entry, tensor in plain.items() if not entry.startswith("fc_norm")}
    if "fc_norm.weight" in plain:  # the norm on the tokens, in place of the one after pooling
        names |= {"norm.weight": plain["fc_norm.weight"].shape, "norm.bias": plain["fc_norm.bias"].shape}
    assert {entry: tuple(tensor.shape) for entry, tensor in mine.items()} == names


@every_kind
@torch.no_grad()
def test_saved_encoder_loads_in_timm_with_its_weights_and_features(
    built: dict[str, Encoder], kind: str, tmp_path: Path
) -> None:
    loaded, weights = loaded_by_timm(save(built[kind], tmp_path)), built[kind].backbone.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in loaded.state_dict().items())
    # torch 2.11 rounds pooling by attention by where the weights lie in memory.
    torch.testing.assert_close(loaded(images()), built[kind].backbone(images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "beit with a shared bias", "swin", "resnet18"])
@torch.no_grad()
def test_saved_encoder_loads_in_transformers_with_identical_features(
    built: dict[str, Encoder], kind: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(save(built[kind], tmp_path)).eval()
    assert torch.equal(model(images()).pooler_output, built[kind].backbone(images()))


def save(encoder: Encoder, directory: Path) -> Path:
    settings = tiny.config(image_size=SIZE, channels=CHANNELS, mean=(0.5,) * CHANNELS, std=(0.2,) * CHANNELS)
    save_hub(directory / "encoder", encoder.backbone, encoder.backbone.state_dict(), settings)
    return directory / "encoder"


def loaded_by_timm(directory: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{directory}", pretrained=True, num_classes=0).eval()


@every_kind
def test_activation_checkpointing_changes_neither_loss_nor_gradients(kind: str) -> None:
    outcomes = []
    for again in (False, True):
        encoder = tiny.encoder(kind).train()
        encoder.backbone.set_grad_checkpointing(again)
        x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        features = encoder(x, tiny.masks(2, (96, 96), encoder.patch_size))
        (features * torch.linspace(-1, 1, features.shape[-1])).square().mean().backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
        outcomes.append({"features": features.detach()} | gradients)
    assert outcomes[0].keys() == outcomes[1].keys()
    for name in outcomes[0]:
        torch.testing.assert_close(outcomes[0][name], outcomes[1][name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["vit", "beit", "swin", "swinv2", "convnext", "resnet18", "regnet"])
def test_drop_path_draws_come_in_from_outside(kind: str) -> None:
    encoder = tiny.encoder(kind, drop_path=0.5).train()
    draws = encoder.drop_path_draws
    assert draws.layers > 0
    encoder.eval()  # so that batch norms do not mix the images; drop path alone is to train
    for module in encoder.modules():
        module.training = type(module).__name__ == "DropPath"
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # some branches begin at zero
    x = torch.randn(2, 3, 96, 96)
    kept = torch.zeros(2, draws.layers)
    dropped = kept.clone()
    dropped[1] = 1.0
    draws.uniform = kept
    with torch.no_grad():
        all_kept = encoder(x)
        draws.uniform = dropped
        one_dropped = encoder(x)
    assert torch.equal(all_kept[0], one_dropped[0])
    assert not torch.allclose(all_kept[1], one_dropped[1])


def test_drop_path_keeps_the_expected_value() -> None:
    backbone = torch.nn.Sequential(timm.layers.drop.DropPath(0.25))
    draws = route_drop_path(backbone)
    draws.uniform = (torch.arange(1000) / 1000).unsqueeze(1)
    passed = backbone.train()(torch.ones(1000, 3))
    assert torch.equal((passed == 0).all(dim=1).nonzero().flatten(), torch.arange(750, 1000))
    torch.testing.assert_close(passed.mean(), torch.tensor(1.0))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_drop_path_that_is_off_draws_nothing(name: str) -> None:
    with torch.device("meta"):
        encoder = create_encoder(name, image_size=(224, 224))
    assert encoder.drop_path_draws.layers == 0


@pytest.mark.parametrize("name", ["mixer_b16_224", "efficientnet_b0", "deit_tiny_distilled_patch16_224"])
def test_a_model_that_takes_no_mask_is_refused_by_name_with_the_families_that_do(name: str) -> None:
    families = ", ".join(family.name for family in all_families())
    with pytest.raises(ValueError, match="cannot take a mask") as error:
        find_family(name)
    assert str(error.value) == f"model {name!r} cannot take a mask; use one of the families {families}"


def test_an_unknown_model_is_refused_with_names_that_are_close() -> None:
    with pytest.raises(
        ValueError, match=r"^model 'vit_tiny_patch16_223' is not known to timm .*; did you mean vit_tiny"
    ):
        find_family("vit_tiny_patch16_223")


def test_arguments_that_the_model_does_not_take_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^model 'resnet18' cannot be built with .*: [^\n]+$"):
        create_encoder("resnet18", image_size=(64, 64), model_args={"depth": 4})


@pytest.mark.parametrize("kind", ["resnet18", "regnet"])
def test_convolutions_work_with_channels_last(kind: str) -> None:
    settings = tiny.config(kind, precision="bf16")
    assert tiny.convolutions_not_channels_last(tiny.update(settings), tiny.batch(settings)) == []
