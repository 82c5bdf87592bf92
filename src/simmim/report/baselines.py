"""What pretraining gives a fine-tuned model: the same training from random weights beside it (`simmim baseline`).

Shapes: `N` evaluation images.
"""

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from simmim.config.tasks import FinetuneConfig
from simmim.errors import UserError
from simmim.output import aligned
from simmim.report.evaluation import figure_name
from simmim.report.facts import Facts
from simmim.report.labels import Accuracy, Difference, difference

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
        return self.config.lr * self.config.batch_size / 512

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
            bits = np.frombuffer(base64.b64decode(record["right"]), np.uint8)
            found = Accuracy(np.unpackbits(bits)[: record["images"]].astype(bool))
        except (OSError, ValueError, KeyError, TypeError):  # another task, an older version, or a damaged file
            return None
        whole = 0 < found.count == record["images"]
        return found if whole and math.isclose(found.value, self.figures.get("top1", -1)) else None


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
        value, low, high = self.difference
        return f"{text}: {value:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"

    @property
    def search(self) -> str:
        """What would make the baseline better, perhaps."""
        return f"try {self.edge.replace('est', 'er')} --rates of simmim baseline" if self.edge else ""


@dataclass(frozen=True)
class Baselines:
    """A fine-tuning and its baselines, ordered by steps and learning rate."""

    run: Arm
    arms: list[Arm]

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

    def table(self) -> Iterator[tuple[Arm, list[str]]]:
        """Yield each training with its cells: steps, rate, figures."""
        for arm in (self.run, *self.arms):
            figures = [f"{arm.figures[name]:.4f}" if name in arm.figures else "–" for name, _ in self.columns]
            yield arm, [f"{arm.steps:,}", f"{arm.lr:.2e}", *figures]

    def describe(self) -> list[str]:
        """Return the lines of the table."""
        heads = ["training", "steps", "rate", *(heading for _, heading in self.columns)]
        return aligned([heads, *([arm.name, *cells, arm.flaw] for arm, cells in self.table())])


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
    return Baselines(Arm(facts), arms)


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
