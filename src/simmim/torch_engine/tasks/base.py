"""What `simmim.torch_engine.train.finetune` asks of a task. Adding one: a file here and a row in `finetune.TASKS`."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from simmim.config.tasks import FinetuneConfig
from simmim.data.decode import Raw, decode
from simmim.data.pipeline import Reading
from simmim.errors import UserError
from simmim.torch_engine.models.drop_path import DropPathDraws
from simmim.torch_engine.models.masked_image_model import PixelStep
from simmim.torch_engine.train.storage import save_weights
from simmim.training.plan import Batch, TrainingPlan
from simmim.training.run_directory import write_json


class TaskStep(PixelStep):
    """Module that one step of a task trains.

    Its forward takes a batch's tensors by name and returns the losses by name, as `simmim.torch_engine.train.update`
    takes them: `loss`, and `loss/COMPONENT` for each of several components.
    """

    backbone: nn.Module
    draws: DropPathDraws

    def after_update(self, finite: Tensor) -> None:
        """Called after each optimiser step; `finite` is a boolean on the device, false where the step was skipped."""


@dataclass(frozen=True)
class TaskPlan(TrainingPlan):
    """Steps and learning rates of a task that trains on `count` images."""

    config: FinetuneConfig
    count: int

    @classmethod
    def complete(cls, config: FinetuneConfig, count: int) -> "TaskPlan":
        """Decide the warm-up that the configuration leaves open; a `ValueError` says what cannot be."""
        if count < config.batch_size:
            raise UserError(
                f"batch size {config.batch_size} is more than the {count} images to train on; use --batch-size {count}"
            )
        plan = cls(config, count)
        if config.warmup_epochs is None:
            warmup_epochs = min(20.0, plan.total_steps / plan.steps_per_epoch / 5)
            plan = cls(dataclasses.replace(config, warmup_epochs=warmup_epochs), count)
        assert plan.schedule
        return plan

    @property
    def train_images(self) -> int:
        return self.count


class Task(Protocol):
    """One fine-tuning task on opened data."""

    best_figure: str
    """The figure of `evaluate` that decides which model is kept."""

    @property
    def train_count(self) -> int: ...

    def describe(self) -> list[str]:
        """What the data holds, for a person."""
        ...

    def build(self) -> TaskStep:
        """The model with the encoder's weights in it."""
        ...

    def batches(self, reading: Reading, step: TaskStep) -> Iterator[Batch]: ...

    def evaluate(self, step: TaskStep, out: Path) -> dict[str, float]:
        """Figures on the evaluation images; tables and pictures go to the directory `out`."""
        ...

    def save(self, step: TaskStep, directory: Path) -> None:
        """Write the model for `simmim predict` and other tools, each file whole or not at all."""
        ...


def save_model(directory: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write model.safetensors and config.json, each whole or not at all."""
    save_weights(directory / "model.safetensors", model.state_dict())
    write_json(directory / "config.json", facts, indent=2)


class Predictor(Protocol):
    """A fine-tuned model on images of any size. A task's predictor inherits from this; its file's
    `load_predictor(directory, device)` reads it from what `Task.save` wrote.
    """

    channels: int
    dtype: np.dtype[Any]
    """Of the pixels that `predict` and `draw` take: uint8, or float32 in 0..255."""

    def read(self, raw: Raw) -> NDArray[Any]:
        """What `predict` takes of an image as stored: all its pixels (H, W, C), or less. Raises `BadImage`."""
        return decode(raw, channels=self.channels, dtype=self.dtype)

    def predict(self, images: Sequence[NDArray[Any]]) -> list[dict[str, Any]]:
        """What the model finds in each image of a batch.

        "mask" (H, W), if it is there, is an array of class numbers, uint8 or uint16; all else goes into JSON as it is.
        """
        ...

    def draw(self, image: NDArray[Any], prediction: dict[str, Any]) -> NDArray[np.uint8]:
        """A picture (H, W, 3) of a whole image (H, W, C) and what was found in it."""
        ...
