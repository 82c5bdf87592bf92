"""The averaged teacher: moving averages against a loop, data2vec 2.0's target against its formula."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import simmim
from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.method.masks import RandomMask
from simmim.method.objectives import EmaTeacher, PixelReconstruction
from simmim.torch_engine.models.moving_average import MovingAverage
from simmim.torch_engine.models.objectives.ema import average_blocks
from simmim.torch_engine.train.optim import create_optimizer
from simmim.torch_engine.train.storage import build_step, load_run
from simmim.torch_engine.train.update import Update
from simmim.training.run_directory import Run

from . import objectives, tiny

SETTINGS: dict[str, Any] = {
    "data": "demo",
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 3, "embed_dim": 24, "num_heads": 2, "patch_size": 8},
    "image_size": 32,
    "mask": RandomMask(ratio=0.5, cell=8),
    "objectives": (PixelReconstruction(), EmaTeacher(momentum=0.5, momentum_end=0.9)),
    "batch_size": 8,
    "val_images": 0,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
    "lr": 0.1,
    "warmup_epochs": 0,
}


def train(out: Path, **settings: Any) -> Path:
    return simmim.pretrain(**{**SETTINGS, "out": str(out)} | settings).path


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_run(run, objectives=True)[0].state_dict()


def test_the_average_is_that_of_a_loop_and_a_skipped_step_changes_nothing() -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = MovingAverage(source, momentum=0.5, momentum_end=0.9, steps=4)
    tensors = lambda module: [tensor.detach().double().numpy().copy() for tensor in module.state_dict().values()]  # noqa: E731
    expected, done = tensors(source), 0
    for finite in (True, True, False, True, True, True, True):
        source(torch.randn(8, 3))
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(source, torch.tensor(finite))
        if finite:
            momentum = 0.5 + min(done / 4, 1) * 0.4
            now = tensors(source)
            counted = [name.endswith("num_batches_tracked") for name in source.state_dict()]
            expected = [
                new if whole else momentum * old + (1 - momentum) * new
                for old, new, whole in zip(expected, now, counted, strict=True)
            ]
            done += 1
    for found, wanted in zip(tensors(average.module), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert float(average.updates) == done


@pytest.mark.parametrize("kind", ["resnet18", "swin"])
def test_a_training_averages_the_encoder_and_a_skipped_step_changes_nothing(kind: str) -> None:
    """By a loop in fp64 over the encoder after each step, of which the third is not finite."""
    ema = EmaTeacher(momentum=0.5, momentum_end=0.9, momentum_steps=3)
    config = tiny.config(kind, objectives=(ema,))
    torch.manual_seed(0)
    step: Any = build_step(config)
    optimizer = create_optimizer(step, weight_decay=0.05, betas=(0.9, 0.95), device=tiny.CPU.device)
    update = Update(step, optimizer, tiny.constant(1e-2), config=config, world=tiny.CPU, after=step.after_update)
    teacher = step.objectives["ema"].teacher

    def values(module: nn.Module) -> dict[str, np.ndarray]:
        return {name: tensor.double().numpy().copy() for name, tensor in module.state_dict().items()}

    expected, done = values(step.model.encoder), 0
    for number, broken in enumerate((False, False, True, False, False, False)):
        figures = update(number, tiny.batch(config, seed=number, broken=broken))[1]
        assert bool(figures[2]) is broken
        if not broken:
            momentum = 0.5 + 0.4 * min(done / 3, 1)
            done += 1
            for name, now in values(step.model.encoder).items():
                counted = name.endswith("num_batches_tracked")
                expected[name] = now if counted else momentum * expected[name] + (1 - momentum) * now
    found = values(teacher.module)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert float(teacher.updates) == done == 5
    moved = [name for name in expected if not np.array_equal(found[name], values(step.model.encoder)[name])]
    assert "backbone.layer4.0.bn1.running_var" in moved if kind == "resnet18" else len(moved) > 20


def test_a_buffer_that_no_checkpoint_holds_stays_as_it_is() -> None:
    source = nn.Linear(2, 2)
    source.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)
    average = MovingAverage(source, momentum=0.5, momentum_end=0.5, steps=1)
    average.update(source, torch.tensor(True))
    assert torch.equal(dict(average.module.named_buffers())["mask"], torch.tensor([0.0, -torch.inf]))


def test_the_copy_shares_nothing_with_the_encoder() -> None:
    """A mask that the encoder is at work on, drop path and shortened blocks stay out of the teacher."""
    config = tiny.config(objectives=(EmaTeacher(),), drop_path=0.5)
    step: Any = build_step(config).train()
    images, mask = torch.rand(2, 3, 64, 64), torch.ones(2, 4, 4, dtype=torch.bool)
    teacher = step.objectives["ema"].teacher
    before = teacher(images)
    step.model.encoder(images, mask)  # its state keeps the mask until the next call
    assert torch.equal(teacher(images), before)
    assert torch.equal(before, step.model.encoder.eval()(images))


def test_the_average_stays_in_evaluation_mode_and_has_no_gradient() -> None:
    average = MovingAverage(
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), momentum=1, momentum_end=1, steps=1
    ).train()
    assert not average.module.training
    x = torch.ones(2, 3, requires_grad=True)
    assert not average(x).requires_grad
    torch.testing.assert_close(average(x), average(x))


def test_the_target_is_data2vecs_formula() -> None:
    maps = [np.random.default_rng(k).normal(size=(2, 5, 3, 4)) * (k + 1) + k for k in range(3)]
    normal = [
        (each - each.mean((2, 3), keepdims=True)) / np.sqrt(each.var((2, 3), keepdims=True) + 1e-5) for each in maps
    ]
    mean = np.mean(normal, axis=0).transpose(0, 2, 3, 1)
    expected = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-5)
    found = average_blocks([torch.from_numpy(each) for each in maps])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "top", "blocks"), [("vit", None, [0]), ("vit", 2, [0, 1]), ("swin", None, [-1])])
def test_the_target_is_of_the_outputs_of_the_teachers_top_blocks(kind: str, top: int | None, blocks: list[int]) -> None:
    """Of a ViT of two blocks all but the first two, yet one at least; of Swin the last stage."""
    step: Any = build_step(tiny.config(kind, objectives=(EmaTeacher(top=top),)))
    objective, images = step.objectives["ema"], torch.rand(2, 3, 64, 64)
    backbone = objective.teacher.module.backbone
    found = []
    parts = backbone.layers if kind == "swin" else backbone.blocks
    for part in parts:
        part.register_forward_hook(lambda _, inputs, output: found.append(output))
    target = objective.target(images)
    assert target.shape == (2, *([2, 2] if kind == "swin" else [4, 4]), backbone.num_features)
    outputs = found if kind == "swin" else [each[:, 1:].unflatten(1, (4, 4)) for each in found]
    chosen = outputs[-1:] if kind == "swin" else outputs[-len(blocks) :]
    torch.testing.assert_close(target, average_blocks([each.permute(0, 3, 1, 2) for each in chosen]))


def test_a_plain_step_judges_the_same_cells() -> None:
    config = tiny.config(objectives=(EmaTeacher(),))
    batch = {name: torch.from_numpy(value) for name, value in tiny.batch(config).items()}
    figures = []
    for plain in (False, True):
        torch.manual_seed(0)
        figures.append(build_step(dataclasses.replace(config, plain_step=plain))(**batch))
    for name in ("loss", "ema_agreement"):
        torch.testing.assert_close(figures[1][name], figures[0][name])


def test_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    colours: dict[str, Any] = {"image_size": (32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    only: dict[str, Any] = {"objectives": (EmaTeacher(),), "data": None}
    objectives.check_gradients(
        build_step(PretrainConfig(**SETTINGS | colours | only)), "objectives.ema.head", monkeypatch
    )


@pytest.mark.slow
@pytest.mark.parametrize("shard", [True, False])
def test_two_processes_give_the_losses_and_the_average_of_one(tmp_path: Path, shard: bool) -> None:
    ema = EmaTeacher(momentum=0.5, momentum_end=0.9)
    objectives.check_two_process_runs(tmp_path, shard=shard, objectives=(PixelReconstruction(), ema))
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name in one:
        # A bias of keys has no gradient but rounding, of which AdamW makes steps.
        if name.startswith("objectives.ema.teacher.") and not name.endswith("qkv.bias"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_teacher_follows_the_encoder_in_a_training(tmp_path: Path) -> None:
    """Of three steps, by the encoders that checkpoints after one, two and three steps hold."""
    runs = [
        weights(
            train(
                tmp_path / str(n),
                steps=n,
                objectives=(EmaTeacher(momentum=0.5, momentum_end=0.9, momentum_steps=4),),
                schedule="multistep",
                milestones=(99.0,),
            )
        )
        for n in (1, 2, 3)
    ]
    name = "backbone.blocks.0.mlp.fc1.weight"
    own = [run[f"model.encoder.{name}"] for run in runs]
    averages = [run[f"objectives.ema.teacher.module.{name}"] for run in runs]
    for done, momentum in ((1, 0.6), (2, 0.7)):
        torch.testing.assert_close(averages[done], momentum * averages[done - 1] + (1 - momentum) * own[done])


def test_agreement_is_logged_and_the_length_of_the_schedule_is_written_down(tmp_path: Path) -> None:
    run = train(tmp_path / "run", steps=3)
    assert all(-1 <= row["ema_agreement"] <= 1 for row in rows(run))
    assert "effective_rank" in rows(run)[-1] and "feature_std" in rows(run)[-1]
    ema: Any = Run(run).read_config(PretrainConfig).objectives[1]
    assert ema.momentum_steps == 3


def test_a_run_that_was_broken_off_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = SETTINGS["objectives"]
    found = objectives.check_resume(tmp_path, monkeypatch, objectives=terms, masks_per_image=2)
    assert float(found["objectives.ema.teacher.updates"]) == 4


def test_accumulation_gives_the_losses_of_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = (rows(train(tmp_path / str(n), steps=3, accumulate_steps=n)) for n in (1, 2))
    np.testing.assert_allclose([row["loss/ema"] for row in parts], [row["loss/ema"] for row in whole], rtol=1e-4)


@pytest.mark.parametrize(
    "student",
    [
        {"model": "resnet10t", "model_args": {}, "image_size": 64, "mask": RandomMask(ratio=0.5, cell=32)},
        {"encode": "visible", "head": "transformer"},
    ],
)
def test_other_encoders_and_heads_train_on_it(tmp_path: Path, student: dict[str, Any]) -> None:
    run = train(tmp_path / "run", steps=2, **student)
    assert all(np.isfinite(row["loss"]) for row in rows(run))


def test_more_blocks_than_there_are_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="top 4 of objective ema is more than the 3 blocks of vit_tiny_patch16_224"):
        train(tmp_path / "run", objectives=(EmaTeacher(top=4),))
