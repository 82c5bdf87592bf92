"""`--encode visible`: the encoder sees visible patches only."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from simmim.cli import main
from simmim.config import PretrainConfig
from simmim.torch_engine.encoders import create_encoder
from simmim.torch_engine.model import build_model
from simmim.torch_engine.pretrain import pretrain
from simmim.torch_engine.savings import PLAIN, Savings

from . import tiny, worker
from .test_savings import assert_equal_but_for_rounding, outcome

KINDS = ["vit", "vit with class and register tokens", "deit3"]


def config(kind: str = "vit", **settings: Any) -> PretrainConfig:
    """4 × 4 patches, of which 6 are visible."""
    return tiny.config(
        kind, **({"encode": "visible", "head": "transformer", "decoder_width": 32, "mask_cell": 16} | settings)
    )


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
    model = build_model(config(kind)).eval()
    images, mask = torch.randn(2, 3, 64, 64), tiny.masks(2, (64, 64), 16, cell=16)
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    expected = model.predict(images, mask)
    assert torch.equal(model.predict(torch.where(hidden, torch.randn_like(images), images), mask), expected)
    changed = model.predict(torch.where(hidden, images, torch.randn_like(images)), mask)
    assert not torch.isclose(changed[mask], expected[mask]).all(dim=-1).any()


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


@torch.no_grad()
def test_without_a_mask_the_encoder_gives_the_features_of_the_plain_model() -> None:
    torch.manual_seed(0)
    plain = tiny.encoder("vit", size=(64, 64)).eval()
    torch.manual_seed(0)
    arguments = tiny.KINDS["vit"].arguments
    mine = create_encoder("vit_tiny_patch16_224", encode="visible", image_size=(64, 64), model_args=arguments).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(mine(images), plain(images))


@pytest.mark.parametrize(
    "others", [{}, {"drop_path": 0.2}, {"checkpoint_activations": True}, {"mask_cell": 32}], ids=str
)
def test_savings_leave_loss_and_gradients(others: dict[str, Any]) -> None:
    settings = config(**others)
    assert_equal_but_for_rounding(outcome(settings, Savings()), outcome(settings, PLAIN))


def test_the_loss_falls() -> None:
    settings = config()
    update, batch = tiny.update(settings, lr=3e-3), tiny.batch(settings)
    losses = [float(update(step, batch)[1][0]) for step in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_masks_that_hide_different_numbers_are_refused() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(
        ValueError, match=r"masks leave 12 to 16 patches visible, .*; give masks that hide the same number"
    ):
        build_model(config()).predict(torch.randn(2, 3, 64, 64), mask)


def test_an_interrupted_training_resumes_to_the_same_weights_and_an_encoder_that_timm_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(worker.settings(tmp_path / "whole"), steps=6, save_every_steps=2, log_every_steps=1)
    whole = dataclasses.replace(settings, encode="visible", head="transformer", decoder_width=32, mask_cell=16)
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
            "--model swin_tiny_patch4_window7_224 --head transformer",
            "--encode visible is not for swin_tiny_patch4_window7_224, which attends within windows of whole maps "
            "(GreenMIM, arXiv 2205.13515, and UM-MAE, arXiv 2205.10063, which do it for Swin, are not built); "
            "use --encode all, or a ViT or DeiT",
        ),
        (
            "--model beit_base_patch16_224 --head transformer",
            "--encode visible is not for beit_base_patch16_224, which has its positions in a bias between all patches, "
            "and none in the tokens; use --encode all, or a ViT or DeiT",
        ),
        (
            "--model resnet18 --head transformer",
            "--encode visible is not for resnet18, which needs whole maps for its convolutions; "
            "use --encode all, or a ViT or DeiT",
        ),
        (
            "--head linear",
            "--encode visible leaves hidden cells to the head, and head linear sees one cell at a time; "
            "add --head transformer",
        ),
        (
            "--head transformer --decoder-width 100",
            "decoder width 100 is not a multiple of 32; use 96 or 128",
        ),
        (
            "--encode all --decoder-depth 4",
            "--decoder-depth 4 is for head transformer; add --head transformer, or leave it out",
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
