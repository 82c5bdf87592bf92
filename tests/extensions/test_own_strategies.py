"""A mask, a target, a loss and a head of a user's own, each defined here, train, resume and reconstruct."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import simmim
from simmim.commands.reconstruct import reconstruct
from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import read_toml
from simmim.method.heads import Head
from simmim.method.losses import Loss
from simmim.method.masks import Keys, Mask, MaskStrategy, RandomMask
from simmim.method.strategy import Strategy
from simmim.method.targets import Target
from simmim.torch_engine.models.heads import create_head


@dataclass(frozen=True, kw_only=True)
class TopMask(MaskStrategy):
    """Hide the first cells, row by row, from row `first` on."""

    kind: ClassVar[str] = "top"
    first: int = 0

    def draw(self, keys: Keys, rows: int, columns: int, count: int) -> Mask:
        order = np.roll(np.arange(rows * columns), self.first * columns)
        return np.tile((order < count).reshape(1, rows, columns), (len(keys), 1, 1))


@dataclass(frozen=True, kw_only=True)
class BrightnessTarget(Target):
    """Predict the mean of a pixel's channels."""

    kind: ClassVar[str] = "brightness"
    gain: float = 1.0

    def values(self, image_channels: int) -> int:
        return 1

    def encode(self, xp: Any, images: Any, stride: int) -> Any:
        return xp.mean(images, axis=3, keepdims=True) * self.gain

    def decode(self, xp: Any, values: Any, images: Any, stride: int) -> Any:
        return values / self.gain + xp.zeros_like(images)


@dataclass(frozen=True, kw_only=True)
class QuarticLoss(Loss):
    """Fourth power of the error."""

    kind: ClassVar[str] = "quartic"
    scale: float = 1.0

    def error(self, xp: Any, prediction: Any, target: Any) -> Any:
        return xp.mean(self.scale * (prediction - target) ** 4, axis=3)


@dataclass(frozen=True, kw_only=True)
class NarrowHead(Head):
    """Two linear layers with a bottleneck between."""

    kind: ClassVar[str] = "narrow"
    width: int = 8


@create_head.register
def _(head: NarrowHead, features: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, head.width), nn.Linear(head.width, outputs))


SETTINGS: dict[str, Any] = {
    "data": "demo",
    "objectives": ["pixels"],
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 1},
    "image_size": 32,
    "mask": RandomMask(cell=16),
    "batch_size": 4,
    "val_images": 2,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
}
OWN: dict[str, Strategy] = {
    "mask": TopMask(ratio=0.5, cell=16, first=1),
    "target": BrightnessTarget(gain=2.0),
    "loss": QuarticLoss(scale=0.5),
    "head": NarrowHead(width=4),
}
for strategy in OWN.values():  # other tests see what the package defines
    del strategy.kinds[strategy.kind]


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in OWN.values():
        monkeypatch.setitem(strategy.kinds, strategy.kind, type(strategy))


@pytest.mark.parametrize("names", [("mask",), ("target",), ("loss",), ("head",), tuple(OWN)], ids="+".join)
def test_own_strategies_train_and_are_in_the_configuration(names: tuple[str, ...], tmp_path: Path) -> None:
    own = {name: OWN[name] for name in names}
    run = simmim.pretrain(out=str(tmp_path / "run"), steps=2, **SETTINGS | own)
    config = read_toml(run.config, PretrainConfig)
    assert {name: getattr(config, name) for name in names} == own
    model = simmim.load_model(run.path)
    assert np.isfinite([float(value.sum()) for value in model.state_dict().values()]).all()
    reconstruct(run.path, ("demo",), out=tmp_path / "picture.png", count=2)
    assert (tmp_path / "picture.png").exists()


def test_an_own_loss_of_values_is_refused_for_classes() -> None:
    with pytest.raises(simmim.UserError, match=r"^loss quartic is undefined for target clusters; use cross_entropy$"):
        simmim.pretrain(out="run", target="clusters", loss=QuarticLoss(), **SETTINGS)


def test_own_strategies_resume_to_the_same_weights(tmp_path: Path) -> None:
    whole = simmim.pretrain(out=str(tmp_path / "whole"), steps=4, save_every_steps=2, keep=2, **SETTINGS | OWN)
    checkpoints = sorted((whole.path / "checkpoints").iterdir())
    expected = simmim.load_model(whole.path).state_dict()
    for file in checkpoints[-1].iterdir():
        file.unlink()
    checkpoints[-1].rmdir()
    again = simmim.pretrain(out=str(tmp_path / "whole"), steps=4, save_every_steps=2, keep=2, **SETTINGS | OWN)
    for name, values in simmim.load_model(again.path).state_dict().items():
        assert torch.equal(values, expected[name]), name


def test_own_settings_come_from_a_kind_or_a_table_too(tmp_path: Path) -> None:
    given = {"mask": {"kind": "top", "cell": 16, "first": 1}, "head": "narrow"}
    run = simmim.pretrain(out=str(tmp_path / "run"), steps=1, **SETTINGS | given)
    config = read_toml(run.config, PretrainConfig)
    assert config.mask == TopMask(cell=16, first=1)
    assert config.head == NarrowHead()


def test_a_configuration_of_an_unknown_kind_says_to_import_its_module(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('format = 2\n[mask]\nkind = "spiral"\n')
    with pytest.raises(simmim.UserError, match=r"'spiral' is not known; .* import the module that defines it first$"):
        read_toml(file, PretrainConfig)


def test_two_strategies_of_one_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^mask kind 'top' is TopMask already; choose another kind$"):

        class Other(MaskStrategy):
            kind: ClassVar[str] = "top"
