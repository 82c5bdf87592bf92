"""Verdicts on real short trainings that were made to converge, diverge, collapse and overfit."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import simmim
from simmim.data.sources import DemoImages
from simmim.errors import TrainingDivergedError
from simmim.method.objectives import EmaTeacher, LatentClusters
from simmim.report.facts import Facts
from simmim.report.verdict import judge

from .test_report import TINY

RATE = 0.2  # for a batch of 512; more than these small nets need
WHOLE: dict[str, Any] = {"flip": "none", "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}


def verdict(out: Path, **settings: Any) -> list[str]:
    """Train, and return the titles of the findings, the gravest first; but for that on how busy this machine is."""
    simmim.pretrain(**TINY | WHOLE | {"batch_size": 16, "val_images": 0, "out": str(out)} | settings)
    titles = [finding.title for finding in judge(Facts.read(out))]
    return [title for title in titles if title != "Slowed down by reading images"]


def test_a_run_that_converges(tmp_path: Path) -> None:
    """After 25 passes over 96 emoji."""
    files = DemoImages()
    pictures = [Image.open(io.BytesIO(files.read(number))).convert("RGB") for number in range(0, 1008, 9)]
    np.savez(tmp_path / "some.npz", images=np.stack([np.asarray(picture) for picture in pictures]))
    found = verdict(tmp_path / "run", data=str(tmp_path / "some.npz"), steps=150, lr=RATE, val_images=16)
    assert found == ["Converged", "Features not judged"]


def test_a_run_of_two_passes_has_only_levelled_off_with_its_rate(tmp_path: Path) -> None:
    assert verdict(tmp_path / "run", steps=150, lr=RATE)[0] == "Levelled off early"


def test_a_run_that_is_too_short_still_falls(tmp_path: Path) -> None:
    assert verdict(tmp_path / "run", steps=60, lr=RATE / 10)[0] == "Still falling"


def test_a_run_whose_gradients_overflow(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError):
        verdict(tmp_path / "run", steps=60, lr=1e6, clip_grad=None)
    assert judge(Facts.read(tmp_path / "run"))[0].title == "Diverged"


@pytest.mark.parametrize(("rate", "title"), [(1000, "Diverged"), (100, "Unstable")])
def test_clipped_gradients_hide_no_rate_that_is_too_high(tmp_path: Path, rate: float, title: str) -> None:
    """Steps stay finite, on some CPUs for longer, and at the end, as the rate falls, the loss does too."""
    with contextlib.suppress(TrainingDivergedError):
        verdict(tmp_path / "run", steps=60, lr=rate)
    assert judge(Facts.read(tmp_path / "run"))[0].title == title


@pytest.mark.parametrize("objective", [EmaTeacher(momentum=0.5, momentum_end=0.5), LatentClusters()])
def test_a_run_whose_features_collapse(tmp_path: Path, objective: Any) -> None:
    assert verdict(tmp_path / "run", steps=60, lr=100, objectives=(objective,))[0] == "Features collapsed"


@pytest.mark.slow
def test_a_run_on_eight_images_is_over_trained(tmp_path: Path) -> None:
    """Of pictures that have nothing in common, so that what is learnt of the eight does not help with others."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)) for _ in range(24)]
    images = [np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) for picture in noise]
    np.savez(tmp_path / "few.npz", images=np.stack(images))
    wide = {"depth": 2, "embed_dim": 96, "num_heads": 3, "patch_size": 8}
    found = verdict(
        tmp_path / "run", data=str(tmp_path / "few.npz"), model_args=wide, steps=400, batch_size=8, lr=RATE / 2,
        weight_decay=0.0, val_images=16, save_every_steps=40,
    )  # fmt: skip
    assert "Over-trained" in found
