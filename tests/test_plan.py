"""Completing a configuration: numbers that are measured once, for all ranks and resumes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.data.sources import ArrayImages
from simmim.method.losses import CrossEntropyLoss
from simmim.method.targets import ClusterTarget
from simmim.training import pretrain_plan
from simmim.training.pretrain_images import Images
from simmim.training.pretrain_plan import Plan
from simmim.training.resume import open_run


class Rank:
    """A rank of two, which hears what rank 0 said before."""

    size = 2

    def __init__(self, rank: int, said: list[NDArray[np.float64]]):
        self.rank = rank
        self._said = said

    def share(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.rank == 0:
            self._said.append(numbers)
            return numbers
        told = self._said.pop(0)
        assert told.shape == numbers.shape
        return told


def _off(numbers: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    return tuple((number + 1e-9,) for (number,) in numbers)


def complete(config: PretrainConfig, world: Any = None) -> PretrainConfig:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 40, 1), np.uint8)
    images = Images(ArrayImages(pixels[:12], "a"), ArrayImages(pixels[12:], "a"), np.dtype(np.uint8), channels=1)
    machine = {"image_size": (32, 32), "device": "cpu", "precision": "fp32", "compile": False}
    return Plan.complete(config, images, patch=16, world=world, **machine).config


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        data="x",
        out=str(tmp_path / "run"),
        channels=1,
        target=ClusterTarget(clusters=4),
        loss=CrossEntropyLoss(),
        batch_size=4,
    )


@pytest.fixture(params=["mean and deviation", "clusters"])
def slightly_off(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """From now on the measurement gives other last bits, as another processor's might."""

    def change() -> None:
        if request.param == "clusters":
            fit = pretrain_plan.k_means
            monkeypatch.setattr(pretrain_plan, "k_means", lambda *a, **k: fit(*a, **k).astype(float) + 1e-9)
        else:
            measure = pretrain_plan.measure_mean_std
            monkeypatch.setattr(pretrain_plan, "measure_mean_std", lambda *a, **k: _off(measure(*a, **k)))

    return change


def test_a_resume_takes_measured_numbers_from_the_run(config: PretrainConfig, slightly_off: Any) -> None:
    begun = complete(config)
    (open_run(begun).checkpoints / "step-00000001").mkdir(parents=True)
    slightly_off()
    resumed = complete(config)
    assert resumed == begun
    open_run(resumed)
    assert complete(dataclasses.replace(config, fresh=True)) != dataclasses.replace(begun, fresh=True)


def test_every_rank_has_the_numbers_of_rank_0(config: PretrainConfig, slightly_off: Any) -> None:
    said: list[NDArray[np.float64]] = []
    first = complete(config, Rank(0, said))
    slightly_off()
    assert complete(config, Rank(1, said)) == first


def test_a_run_that_did_not_measure_is_not_resumed_by_one_that_asks_for_it(tmp_path: Path) -> None:
    config = PretrainConfig(data="x", out=str(tmp_path / "run"), batch_size=4)
    pixels = ArrayImages(np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8), "a")
    machine: Any = {"image_size": (32, 32), "device": "cpu", "precision": "fp32", "compile": False}
    images = Images(pixels, pixels, np.dtype(np.uint8))
    run = open_run(Plan.complete(config, images, patch=16, **machine).config)
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    asked = dataclasses.replace(config, mean="measure", std="measure")
    with pytest.raises(ValueError, match="another configuration"):
        open_run(Plan.complete(asked, images, patch=16, **machine).config)
