"""The frozen teacher: its target against timm, any teacher for any student, and resumes without the source."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

import simmim
from simmim.cli import main
from simmim.config.pretraining import PretrainConfig
from simmim.data.evaluation import eval_images
from simmim.data.sources import open_source
from simmim.errors import UserError
from simmim.method.masks import RandomMask
from simmim.method.objectives import FrozenTeacher, PixelReconstruction
from simmim.torch_engine.models.objectives.teacher import Teacher, load_teacher, resample
from simmim.torch_engine.perf.cost import measure_work
from simmim.torch_engine.train.storage import build_step, load_run
from simmim.training.loop import Loop

VIT: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8},
    "image_size": 32,
    "mask": RandomMask(ratio=0.5, cell=8),
}
RESNET: dict[str, Any] = {
    "model": "resnet10t",
    "model_args": {},
    "image_size": 64,
    "mask": RandomMask(ratio=0.5, cell=32),
}
SWIN: dict[str, Any] = {
    "model": "swin_tiny_patch4_window7_224",
    "model_args": {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 2},
    "image_size": 64,
    "mask": RandomMask(ratio=0.5, cell=32),
}
SETTINGS: dict[str, Any] = {
    "data": "demo",
    "batch_size": 8,
    "val_images": 0,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
    "lr": 0.1,
    "warmup_epochs": 0,
}


def train(out: Path, **settings: Any) -> Path:
    return simmim.pretrain(**{**SETTINGS, **VIT, "out": str(out)} | settings).path


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    kinds = {"vit": VIT, "resnet": RESNET, "swin": SWIN}
    return {name: train(folder / name, steps=1, **kind) for name, kind in kinds.items()}


def demo_images(count: int, side: int) -> torch.Tensor:
    pixels = eval_images(open_source("demo"), range(count), size=(side, side), channels=3, dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_the_target_is_the_layer_norm_of_timms_features(teachers: dict[str, Path]) -> None:
    images = demo_images(2, 48)
    backbone: Any = timm.create_model(f"local-dir:{teachers['vit'] / 'encoder'}", pretrained=True, num_classes=0).eval()
    small = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(backbone.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        tokens = backbone.forward_features((small - mean) / std)[:, 1:]
        first = backbone.norm(
            backbone.blocks[0](backbone.norm_pre(backbone._pos_embed(backbone.patch_embed((small - mean) / std))))
        )
    for layer, found in ((-1, tokens), (0, first[:, 1:])):
        expected = (found - found.mean(-1, keepdim=True)) / (found.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        target = Teacher(load_teacher(str(teachers["vit"])), layer)(images)
        torch.testing.assert_close(target.flatten(1, 2), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("teacher", "student"), [("vit", RESNET), ("swin", VIT), ("resnet", VIT), ("vit", SWIN)])
def test_any_encoder_teaches_any_other(
    tmp_path: Path, teachers: dict[str, Path], teacher: str, student: dict[str, Any]
) -> None:
    objectives = (FrozenTeacher(source=str(teachers[teacher])), PixelReconstruction(weight=0.1))
    run = train(tmp_path / "run", steps=2, objectives=objectives, **student)
    assert all(np.isfinite(row["loss/teacher"]) and -1 <= row["teacher_agreement"] <= 1 for row in rows(run))


@pytest.mark.parametrize("by", ["smooth-l1", "cosine"])
@pytest.mark.parametrize("on", ["masked", "all"])
def test_the_first_loss_is_that_of_the_formula(tmp_path: Path, teachers: dict[str, Path], on: Any, by: Any) -> None:
    """With one mask for all images, by hand from the pieces: teacher, masked features, head."""
    config = PretrainConfig(
        **{**VIT, "image_size": (32, 32)},
        objectives=(FrozenTeacher(source=str(teachers["vit"]), on=on, by=by),),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        precision="fp32",
        device="cpu",
    )
    torch.manual_seed(0)
    step = build_step(config).eval()
    image = (demo_images(3, 32) * 255).permute(0, 2, 3, 1)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask.flatten(1)[:, ::2] = True
    found = float(step(image, torch.zeros(3, 1, dtype=torch.bool), mask)["loss"].detach())
    module: Any = step.objectives["teacher"]
    with torch.no_grad():
        prediction = module.head(step.model.encoder(step.normalize(image), mask)).double()
        target = module.teacher(image.permute(0, 3, 1, 2) / 255).double()
    if by == "cosine":
        error = 1 - (prediction * target).sum(-1) / (prediction.norm(dim=-1) * target.norm(dim=-1))
    else:
        distance = (prediction - target).abs()
        error = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean(-1)
    expected = error.mean() if on == "all" else error[mask].mean()
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_features_are_resampled_to_the_students_grid() -> None:
    ramp = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 8, 8, 1)
    torch.testing.assert_close(resample(ramp, (8, 8)), ramp)
    assert torch.all(resample(ramp, (4, 4))[0, :, 1:, 0] > resample(ramp, (4, 4))[0, :, :-1, 0])
    assert resample(ramp, (16, 4)).shape == (1, 16, 4, 1)


def test_the_teacher_stays_as_it_is_and_a_resume_needs_no_source(
    tmp_path: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "teacher"
    shutil.copytree(teachers["vit"], source)
    settings = {"objectives": (FrozenTeacher(source=str(source)),), "steps": 4, "save_every_steps": 2}
    whole = load_run(train(tmp_path / "whole", **settings))[0].state_dict()
    update = Loop._log

    def break_off(self: Loop, done: int, *rest: Any) -> None:
        if done == 4:
            raise KeyboardInterrupt
        update(self, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", break_off)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", **settings)
    shutil.rmtree(source)
    parts = load_run(train(tmp_path / "parts", **settings))[0].state_dict()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    kept, theirs = (load_teacher(str(path)).state_dict() for path in (tmp_path / "parts" / "teacher", teachers["vit"]))
    assert all(torch.equal(kept[name], theirs[name]) for name in theirs)


def test_the_cost_of_a_step_counts_the_teacher(teachers: dict[str, Path]) -> None:

    plain = PretrainConfig(
        **{**VIT, "image_size": (32, 32)}, mean=(0.5,) * 3, std=(0.5,) * 3, precision="fp32", device="cpu"
    )
    taught = dataclasses.replace(
        plain, objectives=(PixelReconstruction(), FrozenTeacher(source=str(teachers["resnet"])))
    )
    assert measure_work(taught).flops.sum() > 2 * measure_work(plain).flops.sum()


def test_teacher_on_the_command_line_is_the_objective(tmp_path: Path, teachers: dict[str, Path]) -> None:
    words = (
        f"pretrain --data demo --out {tmp_path / 'run'} --model vit_tiny_patch16_224 --model-args depth=1 embed_dim=24 "
        "num_heads=1 patch_size=8 --image-size 32 --batch-size 8 --steps 1 --warmup-epochs 0 --device cpu "
        f"--precision fp32 --workers 1 --val-images 0 --teacher {teachers['swin']} --teacher.by cosine"
    )
    assert main(words.split()) == 0
    assert load_run(tmp_path / "run")[1].objectives == (FrozenTeacher(source=str(teachers["swin"]), by="cosine"),)


def test_what_cannot_teach_is_refused_in_one_line(tmp_path: Path, teachers: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="objective teacher has no teacher; add --teacher RUN"):
        train(tmp_path / "run", objectives=(FrozenTeacher(),))
    with pytest.raises(UserError, match="--teacher nowhere is not there; give a run, timm:NAME or a checkpoint file"):
        train(tmp_path / "run", objectives=(FrozenTeacher(source="nowhere"),))
    with pytest.raises(UserError, match=r"layer 5 is not among the teacher's 2; use --teacher\.layer -2 to 1"):
        train(tmp_path / "run", objectives=(FrozenTeacher(source=str(teachers["vit"]), layer=5),))
    with pytest.raises(UserError, match="the teacher takes 3 channels, and the images have 1; use --channels 3"):
        train(tmp_path / "run", channels=1, objectives=(FrozenTeacher(source=str(teachers["vit"])),))
    assert not (tmp_path / "run").exists()


def test_a_run_without_pixels_reconstructs_nothing(tmp_path: Path, teachers: dict[str, Path]) -> None:
    run = train(tmp_path / "run", steps=1, objectives=(FrozenTeacher(source=str(teachers["vit"])),))
    assert main(["reconstruct", str(run), "demo", "--out", str(tmp_path / "a.png")]) == 2
    assert not (tmp_path / "a.png").exists()
