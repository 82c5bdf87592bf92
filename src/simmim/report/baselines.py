"""What pretraining gives a fine-tuned model: the same training from random weights beside it (`simmim baseline`).

Shapes: `N` evaluation images.
"""

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from simmim.config.tasks import FinetuneConfig
from simmim.errors import UserError
from simmim.output import aligned
from simmim.report.evaluation import figure_name
from simmim.report.facts import Facts
from simmim.report.labels import RAW_PIXELS, UNTRAINED, Accuracy, Difference, Judged, difference
from simmim.training.whole_files import write_json

_JUDGED_BY = ("top1", "miou", "map")


@dataclass(frozen=True)
class Arm:
    """A training to compare: the fine-tuning itself, or a baseline."""

    facts: Facts
    flaw: str = ""
    """Why a baseline does not count; empty if it does."""

    @property
    def config(self) -> FinetuneConfig:
        assert isinstance(self.facts.config, FinetuneConfig)
        return self.facts.config

    @property
    def name(self) -> str:
        return f"from {self.config.init}"

    @property
    def lr(self) -> float:
        """Peak learning rate of a batch."""
        return self.config.batch_lr

    @property
    def steps(self) -> int:
        return self.facts.total_steps or self.facts.steps

    @property
    def figures(self) -> dict[str, float]:
        """Figures of the model that is kept, the best one on the evaluation images."""
        return {name: value for name, value in self.facts.kept.items() if name not in ("step", "val_loss")}

    @cached_property
    def accuracy(self) -> Accuracy | None:
        """Which evaluation images (N,) it tells right; `None` where that was not written down."""
        try:
            record = json.loads(self.facts.run.evaluation.read_text(encoding="utf-8"))
            found = _unpacked(record["right"], record["images"])
        except (OSError, ValueError, KeyError, TypeError):  # another task, an older version, or a damaged file
            return None
        return found if math.isclose(found.value, self.figures.get("top1", -1)) else None


FEATURES = "frozen features"


@dataclass(frozen=True)
class Frozen:
    """A classifier on frozen features, or on what they have to beat: the better of a k-NN vote and a linear one."""

    what: str
    """`FEATURES`, or one of their floors."""
    method: str
    accuracy: Accuracy
    balanced_accuracy: float
    flaw: str = ""
    """Why it does not count; empty if it does."""

    @property
    def name(self) -> str:
        return f"{self.what} ({self.method})"

    @property
    def figures(self) -> dict[str, float]:
        return {"top1": self.accuracy.value, "balanced_accuracy": self.balanced_accuracy}


@dataclass(frozen=True)
class Gain:
    """The run against the best baseline of the same number of steps."""

    times: float
    """Steps of the baseline, as a multiple of the run's."""
    judged_by: str
    mine: float
    other: float
    rates: int
    """Learning rates that the baseline is the best of."""
    edge: str
    """Whether the best of several is the "lowest" or "highest" tried; else empty."""
    difference: Difference | None
    """With its 95 % interval, where each image is right or wrong."""

    @property
    def other_name(self) -> str:
        return "training from scratch" + ("" if self.times == 1 else f" with {self.times:.3g} times the steps")

    @property
    def figure(self) -> str:
        best = f" at the best of {self.rates} learning rates" if self.rates > 1 else ""
        text = f"{figure_name(self.judged_by)} {self.mine:.3f}, from scratch {self.other:.3f}{best}"
        if self.difference is None:
            return f"{text}, of one seed and without an interval"
        return f"{text}: {self.difference.text}"

    @property
    def search(self) -> str:
        """What would make the baseline better, perhaps."""
        return f"try {self.edge.replace('est', 'er')} --rates of simmim baseline" if self.edge else ""


@dataclass(frozen=True)
class Row:
    """A line of the table: what was trained, why it does not count if so, and its cells: steps, rate, figures."""

    name: str
    cells: list[str]
    flaw: str = ""


@dataclass(frozen=True)
class Baselines:
    """A fine-tuning and its baselines, ordered by steps and learning rate; and what needs no training, if judged."""

    run: Arm
    arms: list[Arm]
    frozen: list[Frozen]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Return key and heading of the figures."""
        return [(name, figure_name(name)) for name in self.run.figures]

    @cached_property
    def gains(self) -> list[Gain]:
        """What pretraining gains over the best baseline of as many steps, and of each larger number of steps.

        The best is chosen on the evaluation images, in its favour. A task of your own has no verdict.
        """
        judged_by = next((name for name in _JUDGED_BY if name in self.run.figures), None)
        if judged_by is None:
            return []
        return [self._gain(steps, judged_by) for steps in sorted({arm.steps for arm in self._counted})]

    @property
    def _counted(self) -> list[Arm]:
        return [arm for arm in self.arms if not arm.flaw]

    def _gain(self, steps: int, judged_by: str) -> Gain:
        alike = [arm for arm in self._counted if arm.steps == steps]
        best = max(alike, key=lambda arm: arm.figures[judged_by])
        mine, other = self.run.accuracy, best.accuracy
        return Gain(
            times=steps / self.run.steps,
            judged_by=judged_by,
            mine=self.run.figures[judged_by],
            other=best.figures[judged_by],
            rates=len(alike),
            edge="" if len(alike) < 2 else {0: "lowest", len(alike) - 1: "highest"}.get(alike.index(best), ""),
            difference=difference(mine, other) if mine and other and mine.count == other.count else None,
        )

    @property
    def over_frozen(self) -> tuple[Accuracy, Frozen] | None:
        """The run and a classifier on the features that it began from, where the same images judge both."""
        mine = self.run.accuracy
        other = next((each for each in self.frozen if each.what == FEATURES and not each.flaw), None)
        return (mine, other) if mine and other and mine.count == other.accuracy.count else None

    def table(self) -> Iterator[Row]:
        for arm in (self.run, *self.arms):
            yield Row(arm.name, [f"{arm.steps:,}", f"{arm.lr:.2e}", *self._cells(arm.figures)], arm.flaw)
        mine = self.run.accuracy
        for each in self.frozen:
            count = each.accuracy.count
            flaw = each.flaw or ("" if mine is None or mine.count == count else f"judged by {count} images")
            yield Row(each.name, ["–", "–", *self._cells(each.figures)], flaw)

    def _cells(self, figures: dict[str, float]) -> list[str]:
        return [f"{figures[name]:.4f}" if name in figures else "–" for name, _ in self.columns]

    def describe(self) -> list[str]:
        """Return the lines of the table."""
        heads = ["training", "steps", "rate", *(heading for _, heading in self.columns)]
        return aligned([heads, *([row.name, *row.cells, row.flaw] for row in self.table())])


def read_baselines(facts: Facts) -> Baselines | None:
    """Read a fine-tuning and the baselines in its directory; `None` if it has none."""
    found: list[Facts] = []
    for path in sorted(facts.run.baselines.glob("*/config.toml")):
        try:
            found.append(Facts.read(path.parent))
        except UserError:  # damaged
            continue
    if not found or not facts.kept:
        return None
    arms = [Arm(each, _flaw(each, facts)) for each in found]
    arms.sort(key=lambda arm: (arm.steps, arm.lr))
    return Baselines(Arm(facts), arms, read_frozen(facts))


def write_frozen(facts: Facts, judged: list[Judged]) -> None:
    """Keep what classifiers on frozen features answer to each evaluation image, for `read_frozen`."""

    def kept(each: Judged, accuracy: Accuracy) -> dict[str, Any]:
        return {"right": _packed(accuracy), "balanced_accuracy": each.balanced(accuracy)}

    found = {FEATURES: {each.method: kept(each, each.features) for each in judged}}
    for what in (RAW_PIXELS, UNTRAINED):
        found[what] = {each.method: kept(each, each.floors[what]) for each in judged}
    write_json(facts.run.frozen, {"data": facts.images, "images": judged[0].features.count, "found": found})


def read_frozen(facts: Facts) -> list[Frozen]:
    """Return for each kind of features the better classifier; nothing where they were not judged."""
    try:
        record = json.loads(facts.run.frozen.read_text(encoding="utf-8"))
        flaw = "" if record["data"] == facts.images else "on other images"
        return [
            max(
                (
                    Frozen(what, name, _unpacked(found["right"], record["images"]), found["balanced_accuracy"], flaw)
                    for name, found in methods.items()
                ),
                key=lambda each: each.accuracy.value,
            )
            for what, methods in record["found"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a damaged file
        return []


def _packed(found: Accuracy) -> str:
    return base64.b64encode(np.packbits(found.right).tobytes()).decode()


def _unpacked(right: str, images: int) -> Accuracy:
    """Raise `ValueError` where there are fewer bits than images, or none."""
    found = np.unpackbits(np.frombuffer(base64.b64decode(right), np.uint8))[:images].astype(bool)
    if not 0 < len(found) == images:
        raise ValueError(f"{len(found)} answers for {images} images")
    return Accuracy(found)


def _flaw(baseline: Facts, facts: Facts) -> str:
    """Say why a baseline does not count against a fine-tuning; empty if it does."""
    total = baseline.total_steps or 0
    if baseline.ends_not_finite:
        return "diverged"
    if baseline.steps < total:
        return f"not finished, at step {baseline.steps}"
    if not baseline.kept:
        return "its metrics.json cannot be read"
    if total < (facts.total_steps or 0):
        return "has fewer steps; run simmim baseline again"
    if not baseline.images or not facts.images:
        return "its images are not known"
    return "" if baseline.images == facts.images else "on other images"
