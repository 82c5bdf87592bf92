"""Pictures of features during training: they change nothing, and a resumed run draws the same ones."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.commands.reconstruct import reconstruct
from simmim.config.pretraining import PretrainConfig
from simmim.errors import UserError
from simmim.method.objectives import EmaTeacher
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.tasks.feature_maps import feature_maps
from simmim.torch_engine.train import pretrain as module
from simmim.torch_engine.train.pretrain import pretrain
from simmim.training.run_directory import Run

from . import tiny, worker


def settings(out: Path, **others: Any) -> PretrainConfig:
    usual = {"objectives": (EmaTeacher(),), "picture_every_steps": 2, "steps": 5}
    return worker.settings(out, **(usual | others))


def pictures(config: PretrainConfig) -> dict[str, bytes]:
    assert config.out
    return {file.name: file.read_bytes() for file in Run(Path(config.out)).feature_pictures.iterdir()}


def figures(config: PretrainConfig) -> list[tuple[float, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in worker.rows(config)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    config = settings(tmp_path_factory.mktemp("features") / "whole")
    pretrain(config)
    return config


def test_pictures_come_before_training_at_their_steps_and_at_the_end(whole: PretrainConfig) -> None:
    assert sorted(name for name in pictures(whole) if name.endswith("png")) == [
        f"step-{step:08d}.png" for step in (0, 2, 4, 5)
    ]
    assert sum(map(len, pictures(whole).values())) < 200_000
    assert whole.out
    assert not Run(Path(whole.out)).reconstructions.exists()


def test_drawing_changes_no_number_of_the_training(
    whole: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchanged(step: PretrainStep, *rest: Any) -> Any:
        state, modes = torch.get_rng_state(), [part.training for part in step.modules()]
        numpy = np.random.get_state()[2]  # noqa: NPY002
        found = feature_maps(step, *rest)
        assert torch.equal(state, torch.get_rng_state()) and numpy == np.random.get_state()[2]  # noqa: NPY002
        assert modes == [part.training for part in step.modules()]
        return found

    monkeypatch.setattr(module, "feature_maps", unchanged)
    often = dataclasses.replace(whole, out=str(tmp_path / "often"), picture_every_steps=1)
    pretrain(often)
    never = dataclasses.replace(whole, out=str(tmp_path / "never"))
    monkeypatch.setattr(module.TorchPretrainSession, "drawn", lambda self: [])
    pretrain(never)
    assert len(pictures(often)) == 12 and not Run(tmp_path / "never").feature_pictures.exists()
    for config in (often, never):
        tiny.assert_same(worker.weights(config), worker.weights(whole))
        assert figures(config) == figures(whole)


def test_a_resumed_run_draws_the_same_pictures(
    whole: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"))
    worker.break_off(parts, 5, monkeypatch)  # step 4 is drawn; the checkpoint holds step 3
    assert parts.out
    assert "step-00000004.npy" in pictures(parts)
    pretrain(parts)
    assert pictures(parts) == pictures(whole)
    tiny.assert_same(worker.weights(parts), worker.weights(whole))


def test_features_of_own_images_are_drawn_of_a_run_without_pixels(whole: PretrainConfig, tmp_path: Path) -> None:
    assert whole.out
    with pytest.raises(UserError, match="predicts no pixels; --features draws its features instead"):
        reconstruct(whole.out, ("demo",), out=tmp_path / "a.png")
    path = reconstruct(whole.out, ("demo",), out=tmp_path / "a.png", count=4, features=True)
    assert Image.open(path).size == (4 * 132 - 4, 16 + 2 * 132 - 4)


def test_a_run_of_pixels_has_both_kinds_of_pictures(tmp_path: Path) -> None:
    config = worker.settings(tmp_path / "run", steps=1)
    pretrain(config)
    run = Run(tmp_path / "run")
    assert [file.name for file in run.reconstructions.iterdir()] == ["step-00000001.png"]
    assert {"step-00000000.png", "step-00000001.png"} < pictures(config).keys()
