"""`--encode visible`: the encoder sees visible patches only."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from simmim.cli import main
from simmim.config.pretraining import PretrainConfig
from simmim.torch_engine.models.encoders import create_encoder
from simmim.torch_engine.models.masked_image_model import build_model
from simmim.torch_engine.models.savings import PLAIN, Savings
from simmim.torch_engine.train.pretrain import pretrain
from simmim.training.masks import draw_masks

from . import tiny, worker
from .test_savings import assert_equal_but_for_rounding, outcome

KINDS = ["vit", "vit with class and register tokens", "deit3", "swin", "swinv2"]
VISIBLE = {"encode": "visible", "head": "transformer", "decoder_width": 32, "mask_cell": 16}
UNIFORM = {"mask": "uniform", "mask_ratio": 0.8125, "image_size": (128, 128)}


def config(kind: str = "vit", **settings: Any) -> PretrainConfig:
    """4 × 4 cells, of which 6 are visible; for Swin 8 × 8 and 12, and four 2 × 2 that are hidden whole."""
    return tiny.config(kind, **(VISIBLE | (UNIFORM if "swin" in kind else {}) | settings))


def images(settings: PretrainConfig) -> torch.Tensor:
    assert settings.image_size is not None
    return torch.randn(2, 3, *settings.image_size)


def masks(settings: PretrainConfig, patch: int) -> torch.Tensor:
    """(2, H / patch, W / patch)."""
    return torch.from_numpy(draw_masks(settings, 0, [0, 1], patch))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_reaches_every_weight(kind: str) -> None:
    gradients = outcome(config(kind), Savings())
    model = build_model(config(kind))
    trained = {f"model.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() - {"loss"} == trained
    assert [name for name in trained if not gradients[name].any()] == []


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hidden_pixels_change_no_prediction_and_visible_ones_do(kind: str) -> None:
    model, settings = build_model(config(kind)).eval(), config(kind)
    one, other, mask = images(settings), images(settings), masks(settings, model.encoder.patch_size)
    hidden, cells = masks(settings, 1).unsqueeze(1), masks(settings, 16)
    expected = model.predict(one, mask)
    assert torch.equal(model.predict(torch.where(hidden, other, one), mask), expected)
    changed = model.predict(torch.where(hidden, one, other), mask)
    assert not torch.isclose(changed[cells], expected[cells]).all(dim=-1).any()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_is_of_hidden_pixels(kind: str) -> None:
    model, settings = build_model(config(kind)).eval(), config(kind)
    pixels = images(settings)
    loss, prediction = model(pixels, masks(settings, model.encoder.patch_size))
    hidden = masks(settings, 1).unsqueeze(1).expand_as(pixels)
    torch.testing.assert_close(loss, (prediction - pixels)[hidden].abs().mean())


@torch.no_grad()
def test_features_are_those_of_timm_for_the_visible_tokens_alone() -> None:
    encoder = create_encoder(
        "vit_tiny_patch16_224", encode="visible", image_size=(64, 64), model_args={"depth": 2}
    ).eval()
    images, mask = torch.randn(2, 3, 64, 64), tiny.masks(2, (64, 64), 16, cell=16)
    features = encoder(images, mask)
    vit = encoder.backbone
    for image in range(2):
        tokens = vit._pos_embed(vit.patch_embed(images[image : image + 1]))
        kept = torch.cat((torch.tensor([True]), ~mask[image].flatten()))
        expected = vit.norm(vit.blocks(tokens[:, kept]))[0, 1:]
        torch.testing.assert_close(features[image][~mask[image]], expected)
    assert (features[mask] == encoder.mask_token.flatten()).all()


@pytest.mark.parametrize("kind", ["vit", "swin", "swinv2"])
@torch.no_grad()
def test_without_a_mask_the_encoder_gives_the_features_of_the_plain_model(kind: str) -> None:
    mine = tiny.encoder(kind, size=(64, 64), encode="visible").eval()
    plain = tiny.encoder(kind, size=(64, 64)).eval()
    plain.backbone.load_state_dict(mine.backbone.state_dict())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(mine(images), plain(images))


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("vit", {}),
        ("vit", {"drop_path": 0.2}),
        ("vit", {"checkpoint_activations": True}),
        ("vit", {"mask_cell": 32}),
        ("swin", {"drop_path": 0.2}),
        ("swinv2", {"checkpoint_activations": True}),
    ],
    ids=str,
)
def test_savings_leave_loss_and_gradients(kind: str, others: dict[str, Any]) -> None:
    settings = config(kind, **others)
    assert_equal_but_for_rounding(outcome(settings, Savings()), outcome(settings, PLAIN))


@pytest.mark.parametrize("kind", ["vit", "swin", "swinv2"])
def test_the_loss_falls(kind: str) -> None:
    settings = config(kind, image_size=(64, 64))
    update, batch = tiny.update(settings, lr=3e-3), tiny.batch(settings)
    losses = [float(update(step, batch)[1][0]) for step in range(60)]
    assert losses[-1] < 0.6 * losses[0]


def test_masks_that_hide_different_numbers_are_refused() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(
        ValueError, match=r"masks leave 12 to 16 patches visible, .*; give masks that hide the same number"
    ):
        build_model(config()).predict(torch.randn(2, 3, 64, 64), mask)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_an_interrupted_training_resumes_to_the_same_weights_and_an_encoder_that_timm_loads(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cadence = {"steps": 6, "save_every_steps": 2, "log_every_steps": 1}
    whole = worker.settings(tmp_path / "whole", kind, **(VISIBLE | (UNIFORM if kind == "swin" else {}) | cadence))
    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"))
    pretrain(whole)
    worker.break_off(broken, 5, monkeypatch)
    _, outcome = pretrain(broken)
    assert outcome.start == 4
    tiny.assert_same(worker.weights(broken), worker.weights(whole))
    encoder = timm.create_model(f"local-dir:{broken.out}/encoder", pretrained=True, num_classes=0)
    assert torch.equal(encoder.norm.weight, worker.weights(broken)["encoder.backbone.norm.weight"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--model swin_tiny_patch4_window7_224 --image-size 256 --head transformer",
            "--encode visible of swin_tiny_patch4_window7_224 takes masks that show at most one 16-pixel cell of each "
            "2x2, which random masks of 32 pixels at ratio 0.6 do not; use --mask uniform --mask.cell 16 "
            "--mask.ratio 0.8125 (or 0.75)",
        ),
        (
            "--model swin_tiny_patch4_window7_224 --image-size 256 --head transformer --mask uniform --mask.cell 16 "
            "--mask-ratio 0.7",
            "--encode visible of swin_tiny_patch4_window7_224 takes masks that show at most one 16-pixel cell of each "
            "2x2, which uniform masks of 16 pixels at ratio 0.7 do not; use --mask uniform --mask.cell 16 "
            "--mask.ratio 0.8125 (or 0.75)",
        ),
        (
            "--model swin_tiny_patch4_window7_224 --head transformer --mask uniform --mask-cell 16 --mask-ratio 0.75",
            "image size 224 is not a multiple of 64, so that --encode visible cannot halve it for a stride of 32; "
            "use 192 or 256",
        ),
        (
            "--model swin_tiny_patch4_window7_224 --model-args depths=[1,1] num_heads=[1,2] --image-size 256 "
            "--head transformer",
            "--encode visible moves cells of 16 pixels, and patches of 4 or the last stage's of 8 do not fit them; "
            "use a Swin of 4 stages with patches of 4, or --encode all",
        ),
        (
            "--model beit_base_patch16_224 --head transformer",
            "--encode visible is not for beit_base_patch16_224, which has its positions in a bias between all patches, "
            "and none in the tokens; use --encode all, or a ViT, DeiT, Swin or SwinV2",
        ),
        (
            "--model resnet18 --head transformer",
            "--encode visible is not for resnet18, which needs whole maps for its convolutions; "
            "use --encode all, or a ViT, DeiT, Swin or SwinV2",
        ),
        (
            "--head linear",
            "--encode visible leaves masked cells to the head, but head linear sees one cell at a time; "
            "add --head transformer",
        ),
        (
            "--head transformer --decoder-width 100",
            "decoder width 100 is not a multiple of 32; use 96 or 128",
        ),
        (
            "--encode all --decoder-depth 4",
            "--head.depth is not a setting of the head in use; name the kind that has it by --head, or leave it out",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(
    words: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        f"pretrain --data demo --out {tmp_path}/run --batch-size 2 --steps 1 --device cpu --encode visible {words}"
    )
    assert main(command.split()) == 2
    assert capsys.readouterr().err == f"simmim: {line}\n"
    assert not (tmp_path / "run").exists()
