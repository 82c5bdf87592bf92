"""Judge a run's features by labelled images, beside raw pixels, the untrained encoder and the starting weights."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError

RAW_PIXELS, UNTRAINED = "raw pixels", "the untrained encoder"
"""Floors of any features."""


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers, with its 95 % interval."""

    right: NDArray[np.bool_]
    """Whether each image (N,) was told right."""

    @property
    def value(self) -> float:
        return float(self.right.mean())

    @property
    def count(self) -> int:
        return len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (1927)."""
        z, n, p = 1.96, self.count, self.value
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - reach, middle + reach


class Difference(NamedTuple):
    """Difference of two accuracies on the same images, and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return f"{self.value:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}"


def difference(mine: Accuracy, other: Accuracy) -> Difference:
    """Compare accuracies on the same images by Newcombe's interval for paired proportions.

    Statistics in Medicine 17 (1998) 2635, method 10: Wilson's intervals of both, less what the two have in common, by
    their correlation with a correction for continuity.
    """
    assert len(mine.right) == len(other.right)
    both, neither = int((mine.right & other.right).sum()), int((~mine.right & ~other.right).sum())
    only, only_other = int((mine.right & ~other.right).sum()), int((~mine.right & other.right).sum())
    margins = (both + only) * (only_other + neither) * (both + only_other) * (only + neither)
    common = both * neither - only * only_other
    if common > 0:
        common = max(common - mine.count / 2, 0)
    phi = common / math.sqrt(margins) if margins else 0.0
    (low, high), (other_low, other_high) = mine.interval, other.interval
    apart = mine.value - other.value

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0))

    return Difference(
        apart,
        apart - reach(mine.value - low, other_high - other.value),
        apart + reach(high - mine.value, other.value - other_low),
    )


@dataclass(frozen=True)
class Judged:
    """Accuracy of one method on a run's features and on each floor, all on the same images."""

    method: Literal["k-NN", "linear"]
    features: Accuracy
    floors: dict[str, Accuracy]
    classes: int
    train_images: int
    images: NDArray[np.int64]
    """Numbers of the images (N,) among those of the labelled set to judge by."""
    labels: NDArray[np.int64]
    """Their classes (N,)."""
    missing: str = ""
    """Why the starting weights are not among the floors, where the run had such."""

    def balanced(self, accuracy: Accuracy) -> float:
        """Return the mean of the accuracies of each class."""
        return float(np.mean([accuracy.right[self.labels == label].mean() for label in np.unique(self.labels)]))

    def against(self, other: "Judged") -> Difference | None:
        """Compare with another run; `None` where its encoder could not read the same images."""
        return difference(self.features, other.features) if np.array_equal(self.images, other.images) else None


def judge_by_labels(run: str, data: str, **settings: Any) -> list[Judged]:
    """Probe a run by both methods; settings are fields of `ProbeConfig`. Raises what `simmim.probe` does."""
    from simmim.torch_engine.tasks.probe import NEIGHBOURS, Probe, ProbeConfig, raw_pixels
    from simmim.torch_engine.train.storage import starting_encoder

    opened = Probe(ProbeConfig(run=run, data=data, **settings))
    models: dict[str, Any] = {RAW_PIXELS: raw_pixels, UNTRAINED: opened.untrained()}
    missing = ""
    try:
        if (start := starting_encoder(run)) is not None:
            models["the starting weights"] = opened.pooled(start)
    except UserError as error:
        missing = str(error)
    mine = opened.features()
    neighbours = min(NEIGHBOURS, len(mine.train))
    floors = {name: opened.features(model) for name, model in models.items()}

    def judged(name: Literal["k-NN", "linear"], method: Literal["knn", "linear"]) -> Judged:
        accuracies = {
            each: Accuracy(opened.classify(features, method, k=neighbours).classes == features.val_labels)
            for each, features in {"": mine, **floors}.items()
        }
        own = accuracies.pop("")
        kept = mine.val_images, mine.val_labels
        return Judged(name, own, accuracies, mine.num_classes, len(mine.train), *kept, missing)

    return [judged("k-NN", "knn"), judged("linear", "linear")]
