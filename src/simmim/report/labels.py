"""Judge a run's features by labelled images, beside raw pixels and the untrained encoder."""

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers among `count`, with its 95 % interval."""

    value: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (1927)."""
        z, n, p = 1.96, self.count, self.value
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - reach, middle + reach


@dataclass(frozen=True)
class Judged:
    """Accuracy of one method on a run's features and on each floor, all on the same images."""

    method: Literal["k-NN", "linear"]
    features: Accuracy
    floors: dict[str, Accuracy]
    classes: int
    train_images: int

    def difference(self, floor: Accuracy) -> tuple[float, float]:
        """Return the 95 % interval of the difference to a floor (Newcombe, 1998, method 10).

        The images are the same, so that this is on the safe side.
        """
        mine, other = self.features, floor
        (low, high), (other_low, other_high) = mine.interval, other.interval
        apart = mine.value - other.value
        return (
            apart - math.hypot(mine.value - low, other_high - other.value),
            apart + math.hypot(high - mine.value, other.value - other_low),
        )


def judge_by_labels(run: str, data: str, **settings: Any) -> list[Judged]:
    """Probe a run by both methods; settings are fields of `ProbeConfig`. Raises what `simmim.probe` does."""
    from simmim.data.labelled.classes import open_labelled
    from simmim.torch_engine.tasks.probe import NEIGHBOURS, ProbeConfig, probe

    neighbours = min(NEIGHBOURS, len(open_labelled(data).train))
    found = []
    methods: tuple[tuple[Literal["k-NN", "linear"], Literal["knn", "linear"]], ...] = (
        ("k-NN", "knn"),
        ("linear", "linear"),
    )
    for name, method in methods:
        figures = probe(ProbeConfig(run=run, data=data, method=method, k=neighbours, **settings))
        count = figures["val_images"]
        floors = {
            label: Accuracy(figures[key]["top1"], count)
            for label, key in (("raw pixels", "raw_pixels"), ("the untrained encoder", "untrained"))
        }
        judged = Judged(name, Accuracy(figures["top1"], count), floors, figures["classes"], figures["train_images"])
        found.append(judged)
    return found
