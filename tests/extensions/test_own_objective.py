"""An objective from outside the package: a parameter, a view and a state of its own."""

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import simmim
from simmim.errors import UserError
from simmim.method.objectives import Objective, PixelReconstruction
from simmim.method.views import View
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective
from simmim.torch_engine.train.storage import load_run
from simmim.training.loop import Loop

SETTINGS: dict[str, Any] = {
    "data": "demo",
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 1},
    "image_size": 64,
    "batch_size": 8,
    "val_images": 2,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
    "lr": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class Agreement(Objective):
    """Predict the mean features of a small crop from those of the masked image."""

    kind: ClassVar[str] = "agreement"


class AgreementModule(ObjectiveModule):
    views = (View(name="small", size=(32, 32), scale=(0.1, 0.4)),)
    all_cells = True

    def __init__(self, features: int):
        super().__init__()
        self.predictor = nn.Linear(features, features)
        self.register_buffer("average", torch.zeros(features))
        self.average: Tensor
        self.register_buffer("updates", torch.zeros(()))
        self.updates: Tensor

    def forward(self, step: Any, batch: ObjectiveBatch) -> dict[str, Tensor]:
        assert batch.features.ndim == 4 and batch.views["small"].shape[2:] == (32, 32)
        predicted = self.predictor(batch.features.mean(dim=(1, 2)))
        seen = nn.functional.interpolate(batch.views["small"], batch.images.shape[2:])
        wanted = step.model.encoder(seen).mean(dim=(1, 2)).detach()
        return {"agreement": (predicted - wanted - self.average).square().mean()}

    def after_update(self, step: Any, finite: Tensor) -> None:
        self.average.lerp_(self.predictor.bias, 0.5 * finite.float())
        self.updates.add_(finite.float())


@create_objective.register(Agreement)
def _(objective: Agreement, model: Any, config: Any) -> ObjectiveModule:
    return AgreementModule(model.encoder.num_features)


OBJECTIVES = (PixelReconstruction(), Agreement(weight=0.5))


def train(out: Path, **settings: Any) -> Path:
    return simmim.pretrain(**{**SETTINGS, "objectives": OBJECTIVES, "out": str(out)} | settings).path


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_its_component_is_logged_and_the_loss_is_the_weighted_sum(tmp_path: Path) -> None:
    run = train(tmp_path / "run", steps=2)
    for row in rows(run):
        assert row["loss"] == pytest.approx(row["loss/pixels"] + 0.5 * row["loss/agreement"], rel=1e-6)
    assert 'kind = "agreement"' in (run / "config.toml").read_text(encoding="utf-8")


def test_its_parameters_and_its_state_are_trained_and_saved(tmp_path: Path) -> None:
    runs = (train(tmp_path / str(steps), steps=steps, warmup_epochs=0) for steps in (1, 2))
    first, last = (load_run(run, objectives=True)[0] for run in runs)
    modules: list[Any] = [step.objectives["agreement"] for step in (first, last)]
    assert [float(module.updates) for module in modules] == [1, 2]
    assert not torch.equal(modules[0].predictor.weight, modules[1].predictor.weight)
    assert modules[1].average.abs().sum() > 0


def test_a_run_that_was_broken_off_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 4, "save_every_steps": 2, "warmup_epochs": 0}
    whole = load_run(train(tmp_path / "whole", **settings), objectives=True)[0].state_dict()
    update = Loop._log

    def break_off(self: Loop, done: int, *rest: Any) -> None:
        if done == 3 or (done == 4 and not (tmp_path / "parts" / "resumed").exists()):
            raise KeyboardInterrupt
        update(self, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", break_off)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", **settings)
    parts = load_run(train(tmp_path / "parts", **settings), objectives=True)[0].state_dict()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert [row["step"] for row in rows(tmp_path / "parts")] == [1, 2, 3, 4]


def test_accumulation_gives_the_losses_of_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = (train(tmp_path / str(n), steps=3, accumulate_steps=n, warmup_epochs=0) for n in (1, 2))
    for name in ("loss", "loss/agreement"):
        np.testing.assert_allclose([row[name] for row in rows(parts)], [row[name] for row in rows(whole)], rtol=1e-5)


def test_it_trains_without_pixels_too(tmp_path: Path) -> None:
    run = train(tmp_path / "run", steps=2, objectives=(Agreement(),))
    assert "loss/agreement" not in rows(run)[-1] and "val_loss" not in rows(run)[-1]
    assert not (run / "reconstructions").exists()


def test_what_reads_the_model_needs_no_module_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path / "run", steps=1)

    def refuse(*_: Any) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(AgreementModule, "__init__", refuse)
    assert "agreement" not in load_run(run)[0].objectives
    assert simmim.load_model(run)


@dataclass(frozen=True, kw_only=True)
class Copied(Objective):
    """Keep a copy of the encoder, as a teacher would."""

    kind: ClassVar[str] = "copied"


class CopiedModule(ObjectiveModule):
    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, step: Any, batch: Any) -> dict[str, Tensor]:
        theirs, ours = (module.backbone.patch_embed.proj.weight for module in (self.teacher, step.model.encoder))
        return {"distance": (theirs - ours).abs().sum()}


@create_objective.register(Copied)
def _(objective: Copied, model: Any, config: Any) -> ObjectiveModule:
    return CopiedModule(model.encoder)


del Objective.kinds["copied"]


def test_a_copy_of_the_encoder_starts_from_the_weights_of_init_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Objective.kinds, "copied", Copied)
    first = train(tmp_path / "first", objectives=(PixelReconstruction(),), steps=1)
    both = (PixelReconstruction(), Copied())
    second = train(tmp_path / "second", init_from=str(first), objectives=both, seed=1, steps=1)
    assert rows(second)[0]["loss/distance"] == 0


def test_objectives_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="objective pixels is given 2 times; give it once"):
        train(tmp_path / "run", objectives=(PixelReconstruction(), PixelReconstruction()))
    with pytest.raises(UserError, match="objectives is empty"):
        train(tmp_path / "run", objectives=())
    with pytest.raises(UserError, match="objective 'pixel' is not known; choose from pixels"):
        train(tmp_path / "run", objectives=["pixel"])
    with pytest.raises(UserError, match="weight 0 of objective pixels is not above 0"):
        dataclasses.replace(PixelReconstruction(), weight=0)
