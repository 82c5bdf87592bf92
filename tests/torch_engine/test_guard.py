"""The guard against a collapse of features."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import simmim
from simmim.method.objectives import Objective
from simmim.torch_engine.models.objective import ObjectiveBatch, ObjectiveModule, create_objective
from simmim.torch_engine.tasks.guard import CollapseGuard, effective_rank, feature_std
from simmim.torch_engine.train.storage import load_run


def test_the_effective_rank_counts_the_directions_that_features_fill() -> None:
    rng = np.random.default_rng(0)
    for rank in (1, 3, 8):
        basis = np.linalg.qr(rng.normal(size=(20, rank)))[0]
        spread = np.linalg.qr(rng.normal(size=(500, rank + 1)) * [1, *[0.01] * rank])[0][:, 1:]
        features = (spread - spread.mean(0)) @ basis.T + 5
        assert effective_rank(features) == pytest.approx(rank, rel=0.01)


def test_the_deviation_is_0_for_one_vector_and_1_for_all_directions() -> None:
    assert feature_std(np.ones((10, 4))) == 0
    assert feature_std(np.random.default_rng(0).normal(size=(4000, 64))) == pytest.approx(1, rel=0.01)


@dataclass(frozen=True, kw_only=True)
class Constant(Objective):
    """Pull all features to one vector."""

    kind: ClassVar[str] = "constant"
    needs_masked: ClassVar[bool] = False


class ConstantModule(ObjectiveModule):
    passes = ((),)

    def forward(self, step: Any, batch: ObjectiveBatch) -> dict[str, Tensor]:
        return {"constant": (batch.whole().float().mean(dim=(1, 2)) - 1).square().mean()}


@create_objective.register(Constant)
def _(objective: Constant, model: Any, config: Any) -> ObjectiveModule:
    return ConstantModule()


del Objective.kinds["constant"]


def test_a_collapse_is_said_in_one_line_while_it_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(Objective.kinds, "constant", Constant)
    run = simmim.pretrain(
        data="demo",
        out=str(tmp_path / "run"),
        model="vit_tiny_patch16_224",
        model_args={"depth": 1, "embed_dim": 24, "num_heads": 1},
        image_size=32,
        objectives=(Constant(),),
        batch_size=16,
        steps=120,
        warmup_epochs=0,
        lr=1.0,
        val_images=0,
        device="cpu",
        precision="fp32",
        workers=1,
    )
    said = [line for line in capsys.readouterr().err.splitlines() if "features collapse at step" in line]
    assert len(said) == 1 and "start again (--fresh) with a lower --lr" in said[0]
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    watched = [row for row in rows if "feature_std" in row]
    assert [row["step"] for row in watched] == list(range(10, 121, 10))
    assert watched[-1]["feature_std"] < 0.05 and watched[-1]["effective_rank"] >= 1


def test_features_that_are_not_finite_end_nothing(tmp_path: Path) -> None:
    run = simmim.pretrain(
        data="demo", out=str(tmp_path / "run"), model="vit_tiny_patch16_224", image_size=64, batch_size=8, steps=1,
        model_args={"depth": 1, "embed_dim": 24, "num_heads": 1}, device="cpu", precision="fp32", workers=1,
    )  # fmt: skip
    step, _ = load_run(run.path)
    with torch.no_grad():
        step.model.encoder.backbone.norm.bias.fill_(float("inf"))
    said: list[str] = []
    figures = CollapseGuard(np.zeros((4, 64, 64, 3), np.uint8), said.append)(7, step, "fp32")
    assert np.isnan(list(figures.values())).all()
    assert said == ["warning    features of step 7 are not finite; watch the loss, or use --precision bf16"]
