"""What a fine-tuned model gets right and wrong, as its training wrote it down: no image is read and no model runs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simmim.report.charts import Chart, chart
from simmim.report.facts import Facts

FIGURE_NAMES: dict[str, str] = {
    "top1": "top-1",
    "balanced_accuracy": "balanced accuracy",
    "val_loss": "evaluation loss",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "map": "AP",
    "map50": "AP50",
    "map75": "AP75",
    "map_small": "AP of small objects",
    "map_medium": "AP of medium objects",
    "map_large": "AP of large objects",
    "f1": "F1",
    "iou": "IoU",
}
FIGURE_NAMES |= {f"segm_{key}": f"{name} by masks" for key, name in FIGURE_NAMES.items() if key.startswith("map")}
_TASKS = ("classify", "segment", "detect")
_PARTS = ("figures", "images", "wrong", "class_count", "judged_by", "classes", "worst")
_LEVELS = 20
_LABEL = 18  # characters of a class beside a matrix
_CURVES = 7
_COMPARED = 100  # classes


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix as a drawing: a path of squares for each share of a true class, and labels."""

    names: list[str]
    counts: list[list[int]]
    totals: list[int]
    counted: str

    @cached_property
    def cell(self) -> int:
        """Pixels of a side of a square, which fit numbers of few classes, and a page of 100."""
        return min(max(900 // len(self.names), 9), 40)

    @property
    def font(self) -> int:
        return min(self.cell, 12)

    @property
    def labels(self) -> list[str]:
        return [name if len(name) <= _LABEL else name[: _LABEL - 1] + "…" for name in self.names]

    @cached_property
    def margin(self) -> int:
        """Pixels of the labels, to the left and above."""
        return 14 + math.ceil(0.62 * self.font * max(map(len, self.labels)))

    @property
    def side(self) -> int:
        return self.margin + self.cell * len(self.names) + 1

    def share(self, row: int, column: int) -> float:
        return self.counts[row][column] / max(self.totals[row], 1)

    @property
    def paths(self) -> list[tuple[str, float, str]]:
        """Return (kind, share, path) of the squares that are not empty, which differ by `_LEVELS` shades."""
        found: dict[tuple[str, int], list[str]] = {}
        for row, counts in enumerate(self.counts):
            for column, count in enumerate(counts):
                if count:
                    kind = "right" if row == column else "mistake"
                    place = f"M{self.margin + column * self.cell} {self.margin + row * self.cell}"
                    level = math.ceil(self.share(row, column) * _LEVELS)
                    found.setdefault((kind, level), []).append(f"{place}h{self.cell}v{self.cell}h-{self.cell}z")
        return [(kind, level / _LEVELS, "".join(parts)) for (kind, level), parts in sorted(found.items())]

    @property
    def texts(self) -> list[tuple[float, float, str]]:
        """Return (x, y, text) of the squares that are not empty, if these hold a text: counts, of pixels percents."""
        if self.cell < 28:
            return []
        middle = self.margin + self.cell / 2
        return [
            (middle + column * self.cell, middle + row * self.cell + 4, self._text(row, column))
            for row, counts in enumerate(self.counts)
            for column, count in enumerate(counts)
            if count
        ]

    def _text(self, row: int, column: int) -> str:
        if self.counted == "pixels":
            share = self.share(row, column)
            return f"{share:.0%}".removesuffix("%") if share >= 0.005 else "<1"
        count = self.counts[row][column]
        return str(count) if count < 10_000 else f"{count // 1000}k"

    def data(self) -> dict[str, Any]:
        """Return what the script needs."""
        geometry = {"margin": self.margin, "cell": self.cell}
        return geometry | {name: getattr(self, name) for name in ("names", "counts", "totals", "counted")}


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a run's model."""

    record: dict[str, Any]
    step: int | None
    """The step of the model that is kept; `None` where it is not of this record."""
    figures: list[tuple[str, float, float | None]]
    """Name, value, and value at the last step."""
    matrix: Matrix | None
    curves: Chart | None

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Return key and heading of the columns of the table of classes."""
        row = self.record["classes"][0]
        return [(key, figure_name(key)) for key in row if key not in ("name", "curve")]

    @property
    def judged_by(self) -> str:
        return FIGURE_NAMES[self.record["judged_by"]]


def figure_name(key: str) -> str:
    return FIGURE_NAMES.get(key, key)


def read_evaluation(facts: Facts) -> Evaluation | str | None:
    """Read the evaluation of a run's model; or why there is none in a line. `None` for a training without classes."""
    if facts.task not in _TASKS:
        return None
    file = facts.run.evaluation
    if not facts.kept:
        return "Not evaluated yet: this part comes with the first evaluation (--eval-every-epochs)."
    if not file.is_file():
        return (
            f"{file.name} is missing, which older versions of simmim did not write. To see classes and mistakes here, "
            "train again by the command below (Repeat it)."
        )
    record = _read(file)
    if record is None:
        return f"{file.name} is damaged; train again by the command below (Repeat it)."
    kept = {name: value for name, value in facts.kept.items() if name != "step"}
    step = int(facts.kept["step"]) if kept == record["figures"] else None
    confusion = record.get("confusion")
    counted = "pixels" if facts.task == "segment" else "images"
    return Evaluation(
        record=record,
        step=step,
        figures=[(figure_name(name), value, facts.last(name)) for name, value in record["figures"].items()],
        matrix=Matrix(**confusion, counted=counted) if confusion else None,
        curves=_curves(record),
    )


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.keys() >= set(_PARTS) else None


def _curves(record: dict[str, Any]) -> Chart | None:
    """Draw precision over recall: over all classes, and of those with the most objects."""
    if not record.get("curve"):
        return None
    drawn = sorted((row for row in record["classes"] if row["curve"]), key=lambda row: -row["objects"])[:_CURVES]
    lines = [("all classes", record["curve"]), *((row["name"], row["curve"]) for row in drawn)]
    named = [(name, list(enumerate(map(float, curve)))) for name, curve in lines]
    return chart("Precision over recall (%) at an overlap of 0.5, and AP50", named, place="recall # %")


def compare_classes(evaluations: Sequence[Evaluation | str | None]) -> dict[str, Any] | None:
    """Return each class's figure in each run, the worst first; `None` if the runs do not have the same classes."""
    found = [each for each in evaluations if isinstance(each, Evaluation)]
    if len(found) < max(len(evaluations), 2) or len({each.judged_by for each in found}) > 1:
        return None
    key = found[0].record["judged_by"]
    values = [{row["name"]: row[key] for row in each.record["classes"]} for each in found]
    if any(each.keys() != values[0].keys() for each in values):
        return None
    rows = [(name, [each[name] for each in values]) for name in values[0]]
    rows.sort(key=lambda row: sum(1.0 if value is None else value for value in row[1]))
    return {"figure": found[0].judged_by, "rows": rows[:_COMPARED], "count": len(rows)}
