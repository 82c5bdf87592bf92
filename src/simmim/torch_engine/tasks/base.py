"""The parts of a task: its data, its training step, its evaluation and its predictor.

To add a task, write its configuration in `simmim.config.tasks` and a module of its name here that exports `TASK`, a
`TaskSpec`. A task of your own needs neither: see `register_task`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from simmim.config.tasks import TASK_CONFIGS, FinetuneConfig
from simmim.data.bad_images import BadImages
from simmim.data.decode import decode
from simmim.data.picture import Raw
from simmim.data.pipeline import Reading
from simmim.data.sources import ImageSource
from simmim.errors import UserError
from simmim.torch_engine.models.drop_path import DropPathDraws
from simmim.torch_engine.models.masked_image_model import PixelStep
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.storage import save_weights
from simmim.training.plan import Batch, TrainingPlan
from simmim.training.resume import recall
from simmim.training.run_directory import Run
from simmim.training.whole_files import write_json


class TaskStep(PixelStep):
    """Module that one step of a task trains.

    Its forward takes a batch's tensors by name and returns the losses by name, as `simmim.torch_engine.train.update`
    takes them: `loss`, and `loss/COMPONENT` for each of several components.
    """

    backbone: nn.Module
    draws: DropPathDraws

    def after_update(self, finite: Tensor) -> None:
        """Run after each optimiser step; `finite` is a boolean on the device, false where the step was skipped."""


@dataclass(frozen=True)
class TaskPlan(TrainingPlan):
    """Steps and learning rates of a task that trains on `count` images."""

    config: FinetuneConfig
    count: int

    @classmethod
    def complete(cls, config: FinetuneConfig, count: int) -> "TaskPlan":
        """Decide the warm-up if the configuration leaves it open. Raises `UserError` for too large a batch."""
        if count < config.batch_size:
            raise UserError(
                f"batch size {config.batch_size} is more than the {count} images to train on; use --batch-size {count}"
            )
        plan = cls(config, count)
        if config.warmup_epochs is None:
            begun = recall(config)
            old = begun and begun.warmup_epochs  # of a run whose images may have changed
            usual = min(20.0, plan.total_steps / plan.steps_per_epoch / 5)
            plan = cls(dataclasses.replace(config, warmup_epochs=usual if old is None else old), count)
        assert plan.schedule
        return plan

    @property
    def train_images(self) -> int:
        return self.count


class TaskData(Protocol):
    """Labelled images, opened."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes in the order of their numbers; empty for a task without classes."""
        ...

    @property
    def train(self) -> ImageSource:
        """The images to train on."""
        ...

    @property
    def val(self) -> ImageSource:
        """The images to evaluate on; they may be none."""
        ...


class Task(Protocol):
    """One fine-tuning task on opened data."""

    @property
    def data(self) -> TaskData: ...

    best_figure: str
    """The figure of `evaluate` that decides which model is kept."""

    @property
    def train_count(self) -> int: ...

    def describe(self) -> list[str]:
        """Return lines that describe the data."""
        ...

    def build(self) -> TaskStep:
        """Create the model with the encoder's weights in it."""
        ...

    def batches(self, reading: Reading, step: TaskStep) -> Iterator[Batch]:
        """Yield the training batches that `reading` asks for."""
        ...

    def judge(self, step: TaskStep, indices: Sequence[int], out: Path) -> Any:
        """Judge the evaluation images `indices`, this process's share; return what `conclude` needs, to be pickled.

        Pictures may go into the directory `out`. Computes nothing together with other processes.
        """
        ...

    def conclude(self, parts: Sequence[Any], out: Path) -> dict[str, float]:
        """Return figures from what `judge` returned in each process; write tables and pictures into `out`."""
        ...

    def save(self, step: TaskStep, directory: Path) -> None:
        """Write the model for `simmim predict` and other tools, each file whole or not at all."""
        ...


def evaluate(task: Task, step: TaskStep, out: Path, world: World) -> dict[str, float]:
    """Return figures on the evaluation images on rank 0, `{}` on others. Each rank judges every `world.size`-th image.

    All ranks judge by the statistics of rank 0's batch norms. Raises `UserError` for what is wrong with the images.
    """
    indices = range(world.rank, len(task.data.val), world.size)
    world.agree(step.buffers())
    parts = world.collect(lambda: task.judge(step, indices, out))
    return task.conclude(parts, out) if world.is_main else {}


def evaluation_bad_images(config: FinetuneConfig, val: ImageSource, out: Path) -> BadImages:
    """List the unreadable evaluation images beside the run's others."""
    return BadImages(Run(out).bad_images, total=len(val), max_fraction=config.max_bad_fraction, part="val")


def save_model(directory: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write model.safetensors and config.json, each whole or not at all."""
    save_weights(directory / "model.safetensors", model.state_dict())
    write_json(directory / "config.json", facts, indent=2)


class Predictor(Protocol):
    """A fine-tuned model that takes images of any size. A task's predictor inherits from this."""

    channels: int
    dtype: np.dtype[Any]
    """Type of the pixels that `predict` and `draw` take: uint8, or float32 scaled to 0..255."""
    rate: int | None = None
    """Samples a second of a model of sounds; `None` for one of images."""

    def read(self, raw: Raw) -> NDArray[Any]:
        """Decode what `predict` needs of an image: all its pixels (H, W, C), or fewer. Raises `BadImage`."""
        return decode(raw, channels=self.channels, dtype=self.dtype)

    def whole(self, raw: Raw) -> NDArray[Any]:
        """Decode the image that `draw` takes. Raises `BadImage`."""
        return decode(raw, channels=self.channels, dtype=self.dtype)

    def predict(self, images: Sequence[NDArray[Any]]) -> list[dict[str, Any]]:
        """Return what the model finds in each image of a batch, as dictionaries of JSON values.

        An optional "mask" (H, W) is an array of class numbers, uint8 or uint16. An optional "top" lists
        [label, probability] pairs, most likely first.
        """
        ...

    def draw(self, image: NDArray[Any], prediction: dict[str, Any]) -> NDArray[np.uint8]:
        """Draw what was found into a picture (H, W, 3) of the whole image (H, W, C)."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """All that `simmim finetune` and `simmim predict` need of a task."""

    config: type[FinetuneConfig]
    """Its configuration; the default of the field `task` is the task's name, the docstring its line of help."""
    open_data: Callable[[Any], Any]
    """Open the labelled images of a configuration, a `TaskData`. Raises `UserError`."""
    create: Callable[[Any, Any, dict[str, Tensor] | None], Any]
    """Create the `Task` of a complete configuration, the opened data, and the encoder's weights (`None`: scratch)."""
    load_predictor: Callable[[Path, str], Predictor]
    """Read what `Task.save` wrote into a directory, for a device."""
    summarize: Callable[[dict[str, Any]], str]
    """Return a prediction as one line of text."""


_REGISTERED: dict[str, TaskSpec] = {}


def register_task(spec: TaskSpec) -> None:
    """Add a task of your own, for `simmim.finetune(name, …)` and `simmim.predict` in this process.

    Raises `UserError` if the configuration has no name, or one that is taken by another task.
    """
    name = getattr(spec.config, "task", None)
    if not name:
        raise UserError(f"{spec.config.__name__} has no name; give its field task a default, such as 'regress'")
    if TASK_CONFIGS.get(name, spec.config) is not spec.config:
        raise UserError(f"task {name!r} exists already; choose another name")
    TASK_CONFIGS[name], _REGISTERED[name] = spec.config, spec


def find_spec(name: str) -> TaskSpec:
    """Return the spec of a task by its name. Raises `UserError` for a task that is not registered here."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in TASK_CONFIGS:
        raise UserError(f"task {name!r} is not known here; call simmim.register_task with its TaskSpec first")
    return importlib.import_module(f"simmim.torch_engine.tasks.{name}").TASK
