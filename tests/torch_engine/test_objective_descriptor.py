"""Descriptor regression: the descriptor against a loop in NumPy, and trainings on it."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import simmim
from simmim.cli import main
from simmim.config.pretraining import PretrainConfig
from simmim.data.sources import DemoImages
from simmim.errors import UserError
from simmim.method.masks import RandomMask
from simmim.method.objectives import DescriptorRegression, PixelReconstruction
from simmim.method.random_keys import sample_keys
from simmim.torch_engine.models.heads import sine_positions
from simmim.torch_engine.train.storage import build_step, load_run
from simmim.training.pretrain_images import open_images
from simmim.training.pretrain_plan import Plan

from . import objectives

SETTINGS: dict[str, Any] = {
    "data": "demo",
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 1, "patch_size": 8},
    "image_size": 32,
    "mask": RandomMask(ratio=0.5, cell=8),
    "objectives": (DescriptorRegression(words=16),),
    "encode": "visible",
    "positions": "sincos",
    "batch_size": 8,
    "val_images": 0,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
    "lr": 0.1,
    "warmup_epochs": 0,
}


@pytest.fixture(scope="module", autouse=True)
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An eighth of the demo's, since the objective looks at a sample of all before the first step."""
    files, path = DemoImages(), tmp_path_factory.mktemp("few") / "images.npz"
    pictures = [Image.open(io.BytesIO(files.read(number))).convert("RGB") for number in range(0, 1008, 8)]
    np.savez(path, images=np.stack([np.asarray(picture) for picture in pictures]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "data", str(path))
        yield


def train(out: Path, **settings: Any) -> Path:
    return simmim.pretrain(**{**SETTINGS, "out": str(out)} | settings).path


def losses(run: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls(tmp_path: Path) -> None:
    found = losses(train(tmp_path / "run", steps=40, lr=0.3))
    assert np.mean(found[-5:]) < 0.9 * found[0]


@pytest.mark.parametrize("see", ["visible", "whole"])
def test_a_convolutional_encoder_trains_on_it_beside_pixels(tmp_path: Path, see: Any) -> None:
    small: dict[str, Any] = {"model": "resnet10t", "model_args": {}, "encode": "all", "positions": "model"}
    both = (DescriptorRegression(see=see, words=16), PixelReconstruction(weight=0.5))
    run = train(tmp_path / "run", steps=2, objectives=both, mask=RandomMask(ratio=0.5, cell=32), image_size=64, **small)
    total = [a + 0.5 * b for a, b in zip(losses(run, "loss/descriptor"), losses(run, "loss/pixels"), strict=True)]
    assert losses(run) == pytest.approx(total, rel=1e-5)


def test_whole_images_alone_leave_the_mask_out(tmp_path: Path) -> None:
    whole = {"objectives": (DescriptorRegression(see="whole", words=16),), "steps": 2, "encode": "all"}
    one = train(tmp_path / "one", **whole)
    other = train(tmp_path / "other", mask=RandomMask(ratio=0.25, cell=8), **whole)
    assert losses(one) == losses(other)


def test_a_run_that_was_broken_off_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {name: SETTINGS[name] for name in ("data", "objectives", "encode", "positions")}
    found = objectives.check_resume(tmp_path, monkeypatch, **settings)
    assert found["objectives.descriptor.shape.axes"].abs().sum() > 0


def test_several_masks_of_an_image_give_the_mean_of_their_losses() -> None:
    config = PretrainConfig(
        **{name: SETTINGS[name] for name in ("model", "model_args", "objectives", "positions")},
        image_size=(32, 32),
        mask=RandomMask(ratio=0.5, cell=8),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        device="cpu",
        precision="fp32",
    )
    step = build_step(config)
    torch.nn.init.normal_(step.objectives["descriptor"].shape.axes)  # type: ignore[union-attr, arg-type]
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    flip = torch.zeros(3, 1, dtype=torch.bool)
    masks = torch.from_numpy(config.mask(sample_keys(0, 0, np.arange(6), stream="mask"), (32, 32))).unflatten(0, (3, 2))
    both = step(image, flip, masks)["loss"]
    each = [step(image, flip, masks[:, number])["loss"] for number in range(2)]
    assert each[0] != each[1]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_positions_start_as_sines(tmp_path: Path) -> None:
    table = load_run(train(tmp_path / "run", steps=1, lr=1e-9))[0].model.encoder.backbone.pos_embed
    torch.testing.assert_close(table[0, 1:].unflatten(0, (4, 4)), sine_positions(4, 4, 24, table.device))


def test_the_command_line_chooses_objectives_with_weights_and_settings(tmp_path: Path) -> None:
    words = (
        f"pretrain --data demo --out {tmp_path / 'run'} --model vit_tiny_patch16_224 --model-args depth=1 embed_dim=24 "
        "num_heads=1 --image-size 32 --mask.cell 16 --batch-size 8 --steps 1 --warmup-epochs 0 --device cpu "
        "--precision fp32 --workers 1 --val-images 2 --objective pixels=0.5 descriptor "
        "--descriptor.shape-values 16 --descriptor.words 16"
    )
    assert main(words.split()) == 0
    config = load_run(tmp_path / "run")[1]
    assert config.objectives == (PixelReconstruction(weight=0.5), DescriptorRegression(shape_values=16, words=16))
    again = f"pretrain --config {tmp_path / 'run'}/config.toml --out {tmp_path / 'again'} --objective descriptor=2"
    assert main(again.split()) == 0
    assert load_run(tmp_path / "again")[1].objectives == (DescriptorRegression(shape_values=16, words=16, weight=2.0),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("descriptr", "objective 'descriptr' is not known; choose from pixels, descriptor"),
        ("descriptor=much", "weight 'much' of objective descriptor is not a number; write descriptor=1"),
        ("descriptor=0", "weight 0.0 of objective descriptor is not above 0"),
        ("", "--objective names none; give one or more of pixels"),
    ],
)
def test_the_command_line_refuses_in_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--data", "demo", "--out", "nowhere", "--objective", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shape_values 0 of objective descriptor is below 1; use 1 or more"):
        DescriptorRegression(shape_values=0)
    with pytest.raises(UserError, match="--positions sincos needs a table of positions, and ResNet has none"):
        train(tmp_path / "run", model="resnet10t", model_args={}, encode="all", image_size=64)
    with pytest.raises(UserError, match="leaves masked cells to the head, but head linear sees one cell at a time"):
        train(tmp_path / "run", objectives=(DescriptorRegression(words=16), PixelReconstruction()))
    with pytest.raises(UserError, match="--encode visible has no effect, since objective descriptor masks nothing"):
        train(tmp_path / "run", objectives=(DescriptorRegression(see="whole", words=16),))
    both = (PixelReconstruction(), DescriptorRegression(see="whole", words=16))
    with pytest.raises(UserError, match="--checkpoint-activations is not for objective descriptor here"):
        train(tmp_path / "run", objectives=both, encode="all", checkpoint_activations=True)


def test_a_run_without_masks_loads_where_a_mask_would_not_fit(tmp_path: Path) -> None:
    whole = {"objectives": (DescriptorRegression(see="whole", words=16),), "encode": "all", "mask": RandomMask(cell=64)}
    model = simmim.load_model(train(tmp_path / "run", steps=1, **whole))
    assert model.encoder.backbone.pos_embed.shape == (1, 17, 24)


def test_images_that_cannot_be_read_are_left_out_of_the_sample(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number:02}.png")
    config = PretrainConfig(data=str(folder), out="x", batch_size=4, val_images=0, image_size=(32, 32))
    plan = Plan(config, open_images(config))
    order = np.argsort(sample_keys(0, 0, np.arange(12), stream="sample"))
    for index in order[8:]:  # a whole part
        (folder / f"{index:02}.png").write_bytes(b"broken")
    assert [len(part) for part in plan.sample(12, part=4)] == [4, 4]
    for index in order[:8]:
        (folder / f"{index:02}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="none of 4 images can be read"):
        list(plan.sample(12, part=4))
