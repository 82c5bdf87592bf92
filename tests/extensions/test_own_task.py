"""A task in one file outside the package: regress the mean colour of an image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import simmim
from simmim.config.tasks import TASK_CONFIGS, FinetuneConfig
from simmim.config.validation import from_settings
from simmim.data.augment import RandomResizedCrop
from simmim.data.pipeline import Reading, train_batches
from simmim.data.sources import ImageSource, Subset, open_source
from simmim.errors import UserError
from simmim.torch_engine.models.drop_path import route_drop_path
from simmim.torch_engine.tasks import base
from simmim.torch_engine.tasks.backbones import create_task_backbone
from simmim.torch_engine.tasks.base import Predictor, TaskSpec, TaskStep, save_model

TINY = {"patch_size": 16, "depth": 1, "embed_dim": 48, "num_heads": 2}


@dataclass(frozen=True, kw_only=True)
class ColourConfig(FinetuneConfig):
    """Regression of the mean colour."""

    task: str = "mean_colour"


@dataclass(frozen=True)
class Images:
    train: ImageSource
    val: ImageSource
    classes: Sequence[str] = ()


class ColourStep(TaskStep):
    def __init__(self, backbone: nn.Module, config: ColourConfig):
        assert isinstance(config.mean, tuple) and isinstance(config.std, tuple)
        super().__init__(config.mean, config.std)
        self.draws = route_drop_path(backbone)
        self.backbone = backbone

    def forward(self, image: Tensor, flip: Tensor) -> dict[str, Tensor]:
        images = self.prepare(image, flip)
        return {"loss": (self.backbone(images).float() - images.mean(dim=(2, 3))).square().mean()}


class ColourTask:
    best_figure = "closeness"

    def __init__(self, config: ColourConfig, data: Images, weights: dict[str, Tensor] | None):
        self.config, self.data, self.weights = config, data, weights

    @property
    def train_count(self) -> int:
        return len(self.data.train)

    def describe(self) -> list[str]:
        return [f"images     {len(self.data.train)}"]

    def build(self) -> ColourStep:
        backbone = create_task_backbone(self.config, self.weights, num_classes=3, global_pool="avg", fc_norm=True)
        return ColourStep(backbone, self.config)

    def batches(self, reading: Reading, step: TaskStep) -> Iterator[dict[str, Any]]:
        assert self.config.image_size is not None
        crop = RandomResizedCrop(size=self.config.image_size)
        for batch in train_batches(self.data.train, reading, crop=crop, channels=3, dtype=np.uint8):
            yield {"image": batch["image"], "flip": batch["flip"]}

    def judge(self, step: TaskStep, indices: Sequence[int], out: Path) -> int:
        return len(indices)

    def conclude(self, parts: Sequence[int], out: Path) -> dict[str, float]:
        return {"closeness": sum(parts) / len(self.data.val)}

    def save(self, step: TaskStep, directory: Path) -> None:
        save_model(directory, step.backbone, {"size": self.config.image_size})


class ColourPredictor(Predictor):
    channels = 3
    dtype = np.dtype(np.uint8)

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone.eval()

    @torch.no_grad()
    def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        small = [torch.from_numpy(image[:32, :32].copy()).permute(2, 0, 1)[None] / 255 for image in images]
        return [{"colour": self.backbone(image)[0].tolist()} for image in small]

    def draw(self, image: np.ndarray, prediction: dict[str, Any]) -> np.ndarray:
        return image


def load_colour(directory: Path, device: str) -> ColourPredictor:
    settings = {"model": "vit_tiny_patch16_224", "model_args": TINY, "channels": 3, "image_size": 32}
    config = from_settings(ColourConfig, settings)
    backbone = create_task_backbone(config, None, num_classes=3, global_pool="avg", fc_norm=True)
    backbone.load_state_dict(load_file(directory / "model.safetensors"))
    return ColourPredictor(backbone.to(device))


def open_colours(config: ColourConfig) -> Images:
    source = open_source(config.data or "demo")
    return Images(Subset(source, np.arange(64)), Subset(source, np.arange(64, 72)))


SPEC = TaskSpec(
    config=ColourConfig,
    open_data=open_colours,
    create=ColourTask,
    load_predictor=load_colour,
    summarize=lambda prediction: " ".join(f"{value:.2f}" for value in prediction["colour"]),
)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTERED", {})
    monkeypatch.delitem(TASK_CONFIGS, "mean_colour", raising=False)
    monkeypatch.setitem(TASK_CONFIGS, "mean_colour", ColourConfig)  # so that it is gone after the test
    simmim.register_task(SPEC)


def test_an_own_task_is_trained_and_predicts(registered: None, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": "vit_tiny_patch16_224", "model_args": TINY, "image_size": 32, "steps": 2}
    settings |= {"init": "scratch", "data": "demo", "batch_size": 8, "precision": "fp32", "device": "cpu"}
    run = simmim.finetune("mean_colour", out=str(tmp_path / "run"), **settings)
    weights = load_file(run.model / "model.safetensors")
    assert weights["head.weight"].shape == (3, 48)
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(tmp_path / "a.png")
    found = simmim.predict(run.path, tmp_path / "a.png", device="cpu")
    assert found["task"] == "mean_colour"
    assert all(np.isfinite(image["colour"]).all() for image in found["images"])


def test_an_own_task_cannot_take_the_name_of_another() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(FinetuneConfig):
        task: str = "classify"

    with pytest.raises(UserError, match="task 'classify' exists already; choose another name"):
        simmim.register_task(TaskSpec(**{**vars(SPEC), "config": Other}))


def test_a_model_of_a_task_that_is_not_registered_is_refused(registered: None, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text('{"task": "counting"}')
    with pytest.raises(UserError, match=r"task 'counting' is not known here; call simmim.register_task"):
        simmim.predict(tmp_path, "demo")
