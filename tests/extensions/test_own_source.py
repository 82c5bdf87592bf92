"""A source of images that is registered from outside the package: float32, two channels, never mirrored."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import simmim
from simmim.config.pretraining import PretrainConfig
from simmim.data.sources import SourceDefaults


class Spectra:
    """Random spectra (H, W, 2)."""

    defaults = SourceDefaults(channels=2, dtype="float32", crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip="none")

    def __init__(self, rest: str):
        self.pixels = np.random.default_rng(0).normal(size=(int(rest), 64, 64, 2)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"spectrum {index}"

    def read(self, index: int) -> NDArray[np.float32]:
        return self.pixels[index]


simmim.register_source("spectra", Spectra)


def pretrain(out: Path, **settings: object) -> PretrainConfig:
    tiny = {"model": "vit_tiny_patch16_224", "model_args": {"depth": 1, "embed_dim": 48}, "image_size": 64}
    length = {"steps": 2, "batch_size": 4, "val_images": 2, "workers": 1, "device": "cpu", "precision": "fp32"}
    run = simmim.pretrain(data="spectra:12", out=str(out), **tiny | length | settings)
    steps = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    return run.read_config(PretrainConfig)


def test_a_source_of_ones_own_decides_how_its_images_are_read(tmp_path: Path) -> None:
    config = pretrain(tmp_path / "run")
    assert (config.channels, config.flip, config.crop_scale, config.crop_ratio) == (2, "none", (1, 1), (1, 1))
    assert isinstance(config.mean, tuple)
    assert len(config.mean) == 2


def test_options_override_what_a_source_declares(tmp_path: Path) -> None:
    config = pretrain(tmp_path / "run", flip="both", crop_scale=(0.5, 0.9))
    assert (config.flip, config.crop_scale, config.crop_ratio) == ("both", (0.5, 0.9), (1, 1))
