"""What a report shows of an evaluation: figures, classes, what is confused and the worst images, as one small file.

Its size does not grow with the images, nor with the classes beyond `CLASSES`.

Shapes: `K` classes, `H W` pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.metrics.classification import most_confused
from simmim.training.pictures import data_uri, enlarged
from simmim.training.run_directory import Run
from simmim.training.whole_files import write_json

CLASSES = 1000
"""Rows of a table of classes at most: the worst."""
MATRIX = 100
"""Classes of a confusion matrix at most: those with the most mistakes."""
_PAIRS = 20
_NAME = 120  # characters
_LEAST_SIDE = 96  # pixels, to which small images are enlarged


@dataclass
class Worst:
    """The worst images of an evaluation, the worst first; of equals, those of lower indices."""

    most: int
    held: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)

    def offer(self, badness: float, index: int, describe: Callable[[], dict[str, Any]]) -> None:
        """Keep what `describe` returns if the image `index` is among the worst so far."""
        if len(self.held) < self.most or (-badness, index) < (-self.held[-1][0], self.held[-1][1]):
            self._keep([(badness, index, describe())])

    def add(self, other: "Worst") -> None:
        """Keep the worst of both."""
        self._keep(other.held)

    def _keep(self, more: Sequence[tuple[float, int, dict[str, Any]]]) -> None:
        self.held = sorted([*self.held, *more], key=lambda each: (-each[0], each[1]))[: self.most]

    @property
    def images(self) -> list[dict[str, Any]]:
        return [image for _, _, image in self.held]


def write_record(
    out: Path,
    *,
    figures: dict[str, float],
    images: int,
    names: Sequence[str],
    rows: Sequence[dict[str, Any]],
    judged_by: str,
    worst: Worst,
    wrong: int | None = None,
    **more: Any,
) -> None:
    """Write the record of an evaluation of `images` images, whole or not at all.

    `rows` (K,) of the classes `names` (K,) become a table, sorted by the figure `judged_by`, the worst first and those
    without it last. `wrong` counts the images with a mistake. The record is of the latest evaluation until its model is
    kept.
    """
    table = [{"name": short(name), **row} for name, row in zip(names, rows, strict=True)]
    table.sort(key=lambda row: math.inf if row[judged_by] is None else row[judged_by])
    record = {
        "figures": figures,
        "images": images,
        "wrong": wrong,
        "class_count": len(table),
        "judged_by": judged_by,
        "classes": table[:CLASSES],
        "worst": worst.images,
        **more,
    }
    write_json(Run(out).latest_evaluation, record, indent=None)


def confusion_part(confusion: NDArray[np.integer], names: Sequence[str], *, by_share: bool = False) -> dict[str, Any]:
    """Return what a record holds of a confusion matrix (K, K), rows the true classes: `MATRIX` classes, some pairs."""
    mistakes = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()
    kept = np.sort(np.argsort(-mistakes, kind="stable")[:MATRIX])
    totals = confusion.sum(axis=1)
    pairs = [
        {"true": short(names[true]), "answer": short(names[answer]), "count": int(confusion[true, answer])}
        | {"of": int(totals[true])}
        for true, answer in most_confused(confusion, _PAIRS, by_share=by_share)
    ]
    return {
        "confusion": {
            "names": [short(names[int(number)]) for number in kept],
            "counts": confusion[np.ix_(kept, kept)].tolist(),
            "totals": totals[kept].tolist(),
        },
        "confused": pairs,
    }


def thumbnail(picture: NDArray[np.uint8], side: int) -> dict[str, Any]:
    """Return a picture (H, W, 3) of at most `side` pixels a side as a data URI, with its width and height."""
    from PIL import Image

    small = Image.fromarray(enlarged(picture[None], _LEAST_SIDE)[0] if max(picture.shape) < _LEAST_SIDE else picture)
    small.thumbnail((side, side))
    return {"picture": data_uri(small), "width": small.width, "height": small.height}


def short(name: str) -> str:
    """Return the end of a name, of a length that a record can hold a thousand times."""
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]
