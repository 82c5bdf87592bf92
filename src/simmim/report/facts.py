"""Read what a run directory says of a training."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simmim.config.pretraining import PretrainConfig
from simmim.config.tasks import find_task
from simmim.config.toml import OPERATIONAL
from simmim.config.training import TrainingConfig
from simmim.data.bad_images import count_listed
from simmim.errors import UserError
from simmim.method.strategy import Strategy
from simmim.training.run_directory import Run, find_task_of
from simmim.training.whole_files import read_json

Point = tuple[int, float]
"""A step and a value."""


@dataclass(frozen=True)
class Facts:
    """A run's configuration, and its figures by name: each a list of (step, value), finite values only."""

    run: Run
    config: TrainingConfig
    series: dict[str, list[Point]]
    not_finite: int
    """Steps whose loss or gradient was not finite, and which changed nothing."""
    ends_not_finite: int
    """How many of these were the last steps."""
    running: bool = False
    """Whether the training goes on while this is read."""

    @classmethod
    def read(cls, path: Path, *, running: bool = False) -> "Facts":
        """Raises `UserError` for a directory that is not a run."""
        run = Run(path)
        try:
            task = find_task_of(path) if run.config.is_file() else None
            config = run.read_config(find_task(task) if task else PretrainConfig)
        except UserError:
            raise
        except ValueError as error:  # a damaged TOML or JSON file
            raise UserError(f"{path} cannot be read as a run: {error}; look at its config.toml") from None
        series: dict[str, list[Point]] = {}
        not_finite, skipped = 0, 0
        for record in _records(run.metrics):
            step = record.pop("step")
            skipped = int(record.get("skipped_in_a_row") or 0)
            not_finite += skipped > 0
            for name, value in record.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    series.setdefault(name, []).append((step, float(value)))
        return cls(run, config, series, not_finite, skipped, running)

    @property
    def name(self) -> str:
        return self.run.path.name

    @property
    def task(self) -> str:
        return getattr(self.config, "task", None) or "pretraining"

    @property
    def steps(self) -> int:
        """Steps done, as far as they are logged."""
        return max((points[-1][0] for points in self.series.values()), default=0)

    @cached_property
    def total_steps(self) -> int | None:
        """Steps of the whole training; `None` where neither the configuration nor the metrics tell."""
        if self.config.steps is not None:
            return self.config.steps
        epochs = self.series.get("epoch")
        if not epochs or self.config.epochs is None:
            return None
        return math.ceil(self.config.epochs * round(epochs[-1][0] / epochs[-1][1]))

    @property
    def bad_images(self) -> int:
        return count_listed(self.run.bad_images)

    @property
    def images(self) -> dict[str, Any]:
        """Count and digest of the names of each part of the data."""
        try:
            return read_json(self.run.data)
        except ValueError:  # half written
            return {}

    @property
    def hardware(self) -> list[tuple[str, int]]:
        """Return what the run was trained on, each kind once: its name, and how many devices of it."""
        try:
            begun = self.run.machine_facts().get("begun", [])
            return list(dict.fromkeys((str(each["device"]), int(each["devices"])) for each in begun))
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged: not known
            return []

    def last(self, name: str) -> float | None:
        points = self.series.get(name)
        return points[-1][1] if points else None

    @cached_property
    def kept(self) -> dict[str, float]:
        """The step and the figures of the model that a fine-tuning keeps; `{}` before its first evaluation."""
        try:
            return read_json(self.run.path / "metrics.json").get("best", {})
        except ValueError:
            return {}

    def figure(self, name: str) -> float | None:
        """Return a figure of the model that is kept, or as it was logged last; of the loss its last tenth's mean."""
        if name == "loss" and self.series.get(name):
            return part_mean(self.series[name], 0.9, 1)
        return self.kept.get(name, self.last(name))

    def seconds(self) -> float | None:
        """Estimate the seconds of training: images over the logged speed; evaluations and saving are left out."""
        speeds = [value for _, value in self.series.get("images_per_second", []) if value > 0]
        return sum(self.config.batch_size / value for value in speeds) if speeds else None

    def settings(self) -> dict[str, str]:
        """Return the settings that shape the training, as text."""
        return {
            _LABELS.get(field.name, field.name): as_text(getattr(self.config, field.name))
            for field in dataclasses.fields(self.config)
            if field.name not in OPERATIONAL
        }


_LABELS = {name: f"{name} (for 512 images)" for name in ("lr", "warmup_lr", "min_lr")}


def as_text(value: Any) -> str:
    """Write a setting as a user reads it: a strategy by its kind and what it has other than usual."""
    if isinstance(value, Strategy):
        try:
            usual = type(value)().settings()
        except TypeError:  # one of the user's own, which has no defaults
            usual = {}
        return " ".join([value.kind, *(f"{k}={as_text(v)}" for k, v in value.settings().items() if usual.get(k) != v)])
    if isinstance(value, dict):
        return " ".join(f"{key}={as_text(each)}" for key, each in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(map(as_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; the last may be half written."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def part_mean(points: Sequence[Point], start: float, end: float) -> float:
    """Return the mean of the values between two shares of a curve's length: 0.9 and 1 are its last tenth."""
    first = min(int(len(points) * start), len(points) - 1)
    chosen = points[first : max(int(len(points) * end), first + 1)]
    return statistics.mean(value for _, value in chosen)


def thinned(points: list[Point], most: int = 400) -> list[Point]:
    """Return at most `most` points: means of neighbours, at the last of their steps."""
    width = math.ceil(len(points) / most)
    if width <= 1:
        return points
    parts = [points[first : first + width] for first in range(0, len(points), width)]
    return [(part[-1][0], statistics.mean(value for _, value in part)) for part in parts]


def best(points: Sequence[Point], choose: Callable[..., Point]) -> Point:
    """Return the point of the greatest (`max`) or the least (`min`) value, the first of equals."""
    return choose(points, key=lambda point: point[1])
