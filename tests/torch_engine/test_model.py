"""Encoder, head, target and loss together.

Shapes: `B` images, `C` channels, `H W` pixels, `P` predicted values a cell.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import pixel_shuffle

import simmim
from simmim.config.pretraining import PretrainConfig
from simmim.method.losses import Loss
from simmim.method.targets import Target
from simmim.torch_engine.models.heads import sine_positions
from simmim.torch_engine.models.masked_image_model import build_model, check_sizes
from simmim.torch_engine.train.pretrain import judge_and_draw
from simmim.torch_engine.train.storage import build_step
from simmim.training.pictures import PICTURED

from . import tiny

LOSSES = {
    target: [name for name, loss in Loss.kinds.items() if loss.classes == kind.classes]
    for target, kind in Target.kinds.items()
}
PAIRS = [(target, loss) for target, losses in LOSSES.items() for loss in losses]
CENTRES = tuple(map(tuple, np.random.default_rng(0).normal(size=(8, 3)).tolist()))


def settings(target: str, loss: str, **others: Any) -> PretrainConfig:
    centres = CENTRES if target == "clusters" else None
    return tiny.config(target=target, loss=loss, cluster_centres=centres, **others)


@pytest.mark.parametrize("head", ["linear", "mlp", "transformer"])
@pytest.mark.parametrize(("target", "loss"), PAIRS)
def test_every_head_learns_every_target_by_every_loss(head: str, target: str, loss: str) -> None:
    config = settings(target, loss, head=head)
    update, batch = tiny.update(config, lr=3e-3), tiny.batch(config)
    losses = [float(update(step, batch)[1][0]) for step in range(12)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_encoder_learns(kind: str) -> None:
    config = tiny.config(kind)
    update, batch = tiny.update(config, lr=3e-3), tiny.batch(config)
    losses = [float(update(step, batch)[1][0]) for step in range(8)]
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(("kind", "cell"), [("swin", 16), ("swin", 4), ("vit", 16), ("resnet18", 16), ("convnext", 32)])
@torch.no_grad()
def test_only_hidden_pixels_are_judged_whatever_the_stride(kind: str, cell: int) -> None:
    """A cell may be smaller than a cell of the feature map: Swin's is 32 pixels wide."""
    model = build_model(tiny.config(kind, mask_cell=cell)).eval()
    images = torch.randn(2, 3, 64, 64)
    mask = tiny.masks(2, (64, 64), model.encoder.patch_size, cell=cell)
    loss, prediction = model(images, mask)
    hidden = mask.repeat_interleave(model.encoder.patch_size, 1).repeat_interleave(model.encoder.patch_size, 2)
    error = (prediction - images).abs().mean(dim=1)  # (B, H, W)
    torch.testing.assert_close(loss, error[hidden].mean())


@torch.no_grad()
def test_the_prediction_is_the_pixel_shuffle_of_the_heads_output() -> None:
    model = build_model(tiny.config("swin")).eval()
    images, mask = torch.randn(2, 3, 64, 64), tiny.masks(2, (64, 64), 4)
    raw = model.predict(images, mask)
    assert torch.equal(model(images, mask)[1], pixel_shuffle(raw.permute(0, 3, 1, 2), model.encoder.stride))


@pytest.mark.parametrize("target", ["clusters", "hog"])
@torch.no_grad()
def test_targets_that_are_no_pixels_return_the_raw_prediction(target: str) -> None:
    model = build_model(settings(target, LOSSES[target][0])).eval()
    _, prediction = model(torch.randn(2, 3, 64, 64), tiny.masks(2, (64, 64), 16))
    assert prediction.shape == (2, 4, 4, model.target.channels(3, 16))


@torch.no_grad()
def test_the_loss_is_in_fp32_whatever_autocast_says() -> None:
    model = build_model(tiny.config()).eval()
    images, mask = torch.randn(2, 3, 64, 64), tiny.masks(2, (64, 64), 16)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model.predict(images, mask)
        loss = model.judge(prediction, images, mask)
    assert prediction.dtype == torch.bfloat16
    assert torch.equal(loss, model.judge(prediction.float(), images, mask))


def test_a_batch_is_normalised_and_mirrored_as_asked() -> None:
    step = build_step(tiny.config())
    image = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    images = step.prepare(image, torch.tensor([[False, False], [True, False], [False, True], [True, True]]))
    normal = (image.permute(0, 3, 1, 2) / 255 - torch.tensor(tiny.MEAN).view(3, 1, 1)) / torch.tensor(tiny.STD).view(
        3, 1, 1
    )
    torch.testing.assert_close(images[0], normal[0])
    torch.testing.assert_close(images[1], normal[1].flip(2))
    torch.testing.assert_close(images[2], normal[2].flip(1))
    torch.testing.assert_close(images[3], normal[3].flip(1, 2))


@pytest.mark.parametrize("target", [name for name in Target.kinds if name != "hog"])
def test_pictures_show_the_prediction_in_true_colours(target: str) -> None:
    config = settings(target, LOSSES[target][0])
    step = build_step(config)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    loss, panel = judge_and_draw(step, config, pixels)
    assert loss > 0
    assert panel is not None
    assert panel.dtype == np.uint8
    assert step.training


def test_many_images_are_judged_in_parts_and_some_of_them_pictured() -> None:
    config = tiny.config(batch_size=8)
    step = build_step(config)
    pixels = np.random.default_rng(0).integers(0, 256, (21, 64, 64, 3), dtype=np.uint8)
    at_once = []
    step.model.encoder.register_forward_pre_hook(lambda _, inputs: at_once.append(len(inputs[0])))
    loss, panel = judge_and_draw(step, config, pixels)
    whole, _ = judge_and_draw(step, dataclasses.replace(config, batch_size=64), pixels)
    assert at_once == [8, 8, 5, 21]
    assert loss == pytest.approx(whole, rel=1e-6)
    _, expected = judge_and_draw(step, config, pixels[:PICTURED])
    assert panel is not None and expected is not None
    np.testing.assert_array_equal(panel, expected)


def test_sine_positions_tell_all_cells_apart() -> None:
    positions = sine_positions(6, 10, 64, torch.device("cpu")).flatten(0, 1)
    distances = torch.cdist(positions, positions) + torch.eye(60) * 9
    assert distances.min() > 0.1


@pytest.mark.parametrize(("patch", "cell"), [(4, 32), (14, 28), (16, 32), (20, 40), (48, 48)])
def test_the_cell_is_whole_patches_next_to_the_paper_s_32_pixels(patch: int, cell: int) -> None:
    assert tiny.config().mask.for_patch(patch).cell == cell


def test_a_model_of_patch_14_is_trained_with_cells_of_28_pixels(tmp_path: Path) -> None:
    settings = {"depth": 1, "embed_dim": 24, "num_heads": 1, "patch_size": 14}
    run = simmim.pretrain(
        data="demo", out=str(tmp_path / "run"), model_args=settings, image_size=168, batch_size=4, steps=1
    )
    assert "cell = 28\n" in run.config.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "others", "message"),
    [
        ("vit", {"mask_cell": 24, "image_size": (96, 96)},
         "mask cell 24 is not a multiple of the patch 16 of vit_tiny_patch16_224; use --mask.cell 16 or 32"),
        ("swin", {"mask_cell": 16, "image_size": (64, 80)},
         "image size 80 is not a multiple of the stride 32 of swin_tiny_patch4_window7_224; use 64 or 96"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(kind: str, others: dict[str, Any], message: str) -> None:
    inside = tiny.encoder(kind, size=(96, 96) if kind == "vit" else (64, 64))
    with pytest.raises(ValueError, match="is not a multiple") as error:
        check_sizes(tiny.config(kind, **others), inside)
    assert str(error.value) == message
