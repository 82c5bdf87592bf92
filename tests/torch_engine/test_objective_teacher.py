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
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import simmim
from simmim.arguments import parse_with_defaults
from simmim.cli import main
from simmim.config.pretrain_recipes import find_recipe
from simmim.config.pretraining import PretrainConfig
from simmim.data.evaluation import eval_images
from simmim.data.sources import open_source
from simmim.errors import UserError
from simmim.method.masks import RandomMask
from simmim.method.objectives import FrozenTeacher, PixelReconstruction
from simmim.torch_engine.models.objectives.teacher import Teacher, load_teacher
from simmim.torch_engine.perf.cost import count_flops, measure_work
from simmim.torch_engine.train.storage import build_step, load_run

from . import objectives

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


def complete(source: Path, **settings: Any) -> PretrainConfig:
    """A complete configuration for `build_step`: the small ViT, taught by `source`."""
    usual: dict[str, Any] = {"objectives": (FrozenTeacher(source=str(source)),), "precision": "fp32", "device": "cpu"}
    usual |= {**VIT, "image_size": (32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return PretrainConfig(**usual | settings)


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
@pytest.mark.parametrize("plain_step", [False, True])
def test_the_first_loss_is_that_of_the_formula(teachers: dict[str, Path], plain_step: bool, on: Any, by: Any) -> None:
    """With one mask for all images, by hand from the pieces: teacher, masked features, head."""
    config = complete(teachers["vit"], objectives=(FrozenTeacher(source=str(teachers["vit"]), on=on, by=by),))
    torch.manual_seed(0)
    step = build_step(dataclasses.replace(config, plain_step=plain_step)).eval()
    image = (demo_images(3, 32) * 255).permute(0, 2, 3, 1)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask.flatten(1)[:, ::2] = True
    figures = step(image, torch.zeros(3, 1, dtype=torch.bool), mask)
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
    assert float(figures["loss"].detach()) == pytest.approx(float(expected), rel=1e-5)
    cosine = F.cosine_similarity(prediction, target, dim=-1)
    agreement = cosine.mean() if on == "all" else cosine[mask].mean()
    assert float(figures["teacher_agreement"]) == pytest.approx(float(agreement), abs=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (3, 6), (2, 4)])
def test_features_are_resampled_to_the_students_grid(teachers: dict[str, Path], grid: tuple[int, int]) -> None:
    images = demo_images(2, 64)
    teacher = Teacher(load_teacher(str(teachers["vit"])), -1)  # of 32 pixels: 4 × 4 cells
    maps = teacher(images).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, grid, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(teacher.on_grid(images, grid), expected)


@pytest.mark.parametrize("by", ["smooth-l1", "cosine"])
def test_gradients_are_those_of_finite_differences(
    teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch, by: Any
) -> None:
    torch.manual_seed(0)
    step = build_step(complete(teachers["vit"], objectives=(FrozenTeacher(source=str(teachers["vit"]), by=by),)))
    objectives.check_gradients(step, "objectives.teacher.head", monkeypatch)


def test_accumulation_and_several_masks_give_the_losses_of_the_whole_batch(
    tmp_path: Path, teachers: dict[str, Path]
) -> None:
    settings = {"objectives": (FrozenTeacher(source=str(teachers["vit"])),), "steps": 3, "masks_per_image": 2}
    whole, parts = (rows(train(tmp_path / str(n), accumulate_steps=n, **settings)) for n in (1, 2))
    for name in ("loss", "teacher_agreement"):
        np.testing.assert_allclose([row[name] for row in parts], [row[name] for row in whole], rtol=1e-4)


def test_the_teacher_sees_each_image_once_whatever_the_masks(teachers: dict[str, Path]) -> None:
    step: Any = build_step(complete(teachers["vit"], masks_per_image=3))
    seen = []
    step.objectives["teacher"].teacher.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    masks = torch.stack([torch.arange(16).view(4, 4) % 2 == 0] * 3).expand(2, 3, 4, 4)
    assert torch.isfinite(step(torch.rand(2, 32, 32, 3) * 255, torch.zeros(2, 1, dtype=torch.bool), masks)["loss"])
    assert seen == [2]


def test_the_teacher_computes_in_the_precision_of_the_training(teachers: dict[str, Path]) -> None:
    teacher = Teacher(load_teacher(str(teachers["vit"])), -1).train()
    found = []
    teacher.backbone.blocks[0].attn.qkv.register_forward_hook(lambda _, inputs, output: found.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        target = teacher(demo_images(1, 32).requires_grad_())
    assert found == [torch.bfloat16] and target.dtype == torch.float32 and not target.requires_grad
    assert not any(part.training for part in teacher.modules())


def test_the_teacher_stays_as_it_is_and_a_resume_needs_no_source(
    tmp_path: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "teacher"
    shutil.copytree(teachers["vit"], source)
    terms = (FrozenTeacher(source=str(source)),)
    found = objectives.check_resume(tmp_path, monkeypatch, objectives=terms, meanwhile=lambda: shutil.rmtree(source))
    assert "objectives.teacher.teacher.backbone.pos_embed" in found
    kept, theirs = (load_teacher(str(path)).state_dict() for path in (tmp_path / "parts" / "teacher", teachers["vit"]))
    assert all(torch.equal(kept[name], theirs[name]) for name in theirs)


def test_a_fresh_run_takes_the_teacher_named_now(tmp_path: Path, teachers: dict[str, Path]) -> None:
    for name, fresh in (("vit", False), ("swin", True)):
        objectives = (FrozenTeacher(source=str(teachers[name])),)
        run = train(tmp_path / "run", steps=1, objectives=objectives, fresh=fresh)
    assert json.loads((run / "teacher" / "config.json").read_text())["architecture"] == SWIN["model"]


def test_the_cost_of_a_step_counts_the_teacher_and_needs_no_weights(tmp_path: Path, teachers: dict[str, Path]) -> None:
    """One forward pass of it, and a head whose product for the hidden cells is done three times."""
    teacher = tmp_path / "teacher"
    shutil.copytree(teachers["vit"] / "encoder", teacher)
    (teacher / "model.safetensors").unlink()
    taught = complete(teacher)
    taught = dataclasses.replace(taught, objectives=(PixelReconstruction(), *taught.objectives))
    plain = dataclasses.replace(taught, objectives=(PixelReconstruction(),))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Teacher(load_teacher(str(teachers["vit"])), -1)(demo_images(1, 32))
    features, hidden = VIT["model_args"]["embed_dim"], 8
    expected = counter.get_total_flops() + 3 * 2 * hidden * features**2
    assert count_flops(taught) - count_flops(plain) == expected
    assert measure_work(taught).parameters > measure_work(plain).parameters


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_of_weights_teaches(tmp_path: Path, teachers: dict[str, Path], name: str) -> None:
    weights = load_file(teachers["swin"] / "encoder" / "model.safetensors")
    save: Any = save_file if name.endswith("safetensors") else torch.save
    save(weights, tmp_path / name)
    teacher = load_teacher(str(tmp_path / name))
    assert all(torch.equal(tensor, weights[key]) for key, tensor in teacher.state_dict().items())
    images = demo_images(1, 64)
    torch.testing.assert_close(Teacher(teacher, -1)(images), Teacher(load_teacher(str(teachers["swin"])), -1)(images))


@pytest.mark.slow  # it imports Transformers
def test_a_checkpoint_directory_of_another_package_teaches(tmp_path: Path, teachers: dict[str, Path]) -> None:
    words = ["export", str(teachers["swin"]), "--format", "transformers", "--out", str(tmp_path / "exported")]
    assert main(words) == 0
    images = demo_images(1, 64)
    found, expected = (
        Teacher(load_teacher(str(path)), -1)(images) for path in (tmp_path / "exported", teachers["swin"])
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_give_the_losses_of_one(tmp_path: Path, teachers: dict[str, Path], shard: bool) -> None:
    teacher = FrozenTeacher(source=str(teachers["swin"]))
    objectives.check_two_process_runs(tmp_path, shard=shard, objectives=(teacher,))


def test_teacher_on_the_command_line_is_the_objective(tmp_path: Path, teachers: dict[str, Path]) -> None:
    words = (
        f"pretrain --data demo --out {tmp_path / 'run'} --model vit_tiny_patch16_224 --model-args depth=1 embed_dim=24 "
        "num_heads=1 patch_size=8 --image-size 32 --batch-size 8 --steps 1 --warmup-epochs 0 --device cpu "
        f"--precision fp32 --workers 1 --val-images 0 --teacher {teachers['swin']} --teacher.by cosine"
    )
    assert main(words.split()) == 0
    assert load_run(tmp_path / "run")[1].objectives == (FrozenTeacher(source=str(teachers["swin"]), by="cosine"),)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--teacher a", (FrozenTeacher(source="a"),)),
        ("--teacher=a", (FrozenTeacher(source="a"),)),
        ("--teacher.source a", (FrozenTeacher(source="a"),)),
        ("--objective pixels=2 --teacher a", (PixelReconstruction(weight=2), FrozenTeacher(source="a"))),
        ("--teacher a --objective teacher=0.5 pixels", (FrozenTeacher(source="a", weight=0.5), PixelReconstruction())),
        ("--objective pixels", (PixelReconstruction(),)),
    ],
)
def test_teacher_is_short_for_its_source_and_adds_the_objective(words: str, expected: tuple[Any, ...]) -> None:
    assert parse_with_defaults(PretrainConfig, None, words.split(), find_recipe).objectives == expected


def test_what_cannot_teach_is_refused_in_one_line(tmp_path: Path, teachers: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="objective teacher needs a teacher; add --teacher RUN"):
        train(tmp_path / "run", objectives=(FrozenTeacher(),))
    with pytest.raises(UserError, match="--teacher nowhere is not there; give a run, timm:NAME or a checkpoint file"):
        train(tmp_path / "run", objectives=(FrozenTeacher(source="nowhere"),))
    with pytest.raises(UserError, match=r"layer 5 is not among the teacher's 2; use --teacher\.layer -2 to 1"):
        train(tmp_path / "run", objectives=(FrozenTeacher(source=str(teachers["vit"]), layer=5),))
    with pytest.raises(UserError, match="the teacher takes 3 channels, and the images have 1; use --channels 3"):
        train(tmp_path / "run", channels=1, objectives=(FrozenTeacher(source=str(teachers["vit"])),))
    assert not (tmp_path / "run").exists()


def test_a_model_whose_weights_are_not_here_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub\nand more")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        UserError, match=r"--teacher timm:resnet18 has no weights here: We couldn't connect to the hub$"
    ):
        load_teacher("timm:resnet18")


def test_files_that_cannot_teach_are_refused_in_one_line(tmp_path: Path, teachers: dict[str, Path]) -> None:
    weights = load_file(teachers["swin"] / "encoder" / "model.safetensors")
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :1].contiguous()
    save_file(weights, tmp_path / "grey.safetensors")
    with pytest.raises(UserError, match=r"--teacher .*grey.safetensors does not tell the mean of its 1 channels"):
        load_teacher(str(tmp_path / "grey.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=r"--teacher .*broken.safetensors.* is damaged or not a safetensors file"):
        load_teacher(str(tmp_path / "broken.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--teacher .*empty has neither model.safetensors nor"):
        load_teacher(str(tmp_path / "empty"))


def test_a_run_without_pixels_reconstructs_nothing(tmp_path: Path, teachers: dict[str, Path]) -> None:
    run = train(tmp_path / "run", steps=1, objectives=(FrozenTeacher(source=str(teachers["vit"])),))
    assert main(["reconstruct", str(run), "demo", "--out", str(tmp_path / "a.png")]) == 2
    assert not (tmp_path / "a.png").exists()
