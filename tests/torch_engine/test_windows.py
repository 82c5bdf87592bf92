"""What a run on windows leaves: an encoder that sees windows, wherever it looks at images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import simmim
from simmim.cli import main
from simmim.training.run_directory import Run

from . import tiny

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `run` on windows of 64 pixels, the `scenes` that it saw, and the `middles` of these."""
    folder = tmp_path_factory.mktemp("windows")
    for name in ("scenes", "middles"):
        (folder / name).mkdir()
    for number in range(4):
        pixels = RNG.integers(0, 256, (164, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"scenes/{number}.png")
        Image.fromarray(pixels[50:114, 68:132]).save(folder / f"middles/{number}.png")
    settings: dict[str, Any] = {"data": str(folder / "scenes"), "steps": 2, "batch_size": 4, "crop": "pixels"}
    simmim.pretrain(**vars(tiny.config("vit", out=str(folder / "run"), **settings | {"val_images": 3})))
    return folder


def test_config_toml_repeats_the_run_on_windows(here: Path):
    assert main(["pretrain", "--config", str(here / "run/config.toml"), "--out", str(here / "again")]) == 0
    weights = [(here / run / "encoder/model.safetensors").read_bytes() for run in ("run", "again")]
    assert weights[0] == weights[1]


def test_a_run_records_windows_by_name(here: Path):
    record = json.loads(Run(here / "run").data.read_text())
    assert {part: record[part]["images"] for part in record} == {"train": 4 * 8 - 3, "val": 3}


def test_features_are_those_of_the_window_in_the_middle(here: Path):
    assert json.loads((here / "run/encoder/config.json").read_text())["crop"] == "pixels"
    how: dict[str, Any] = {"device": "cpu", "precision": "fp32", "workers": 1, "batch_size": 4}
    _, scenes = simmim.embed(here / "run", here / "scenes", **how)
    _, middles = simmim.embed(here / "run", here / "middles", **how)
    np.testing.assert_array_equal(scenes, middles)


def test_reconstructions_are_those_of_the_window_in_the_middle(here: Path):
    for name in ("scenes", "middles"):
        assert main(["reconstruct", str(here / "run"), str(here / name), "--out", str(here / f"{name}.png")]) == 0
    assert (here / "scenes.png").read_bytes() == (here / "middles.png").read_bytes()
