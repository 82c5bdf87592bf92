"""COCO's average precision, by faster-coco-eval. NumPy."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from simmim.errors import UserError

_AREAS = ("all", "small", "medium", "large")


def average_precision(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    kind: Literal["bbox", "segm"] = "bbox",
    images: Sequence[int] | None = None,
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Figures over all classes, and for each class by its number; shares in [0, 1].

    `truth` and `detections` are as COCO's ground truth and results in JSON; those with `segm` have run lengths as
    segmentation. Of each image the 100 best count; of all images, or those whose numbers are in `images`. The figures
    are map (over overlaps of 0.5 to 0.95), map50, map75, and map_small, map_medium and map_large (areas below 32²
    pixels, to 96², above); for a class map and map50. A figure of which there is no object is left out. `ValueError`
    where faster-coco-eval is missing.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise UserError("average precision needs faster-coco-eval; pip install 'simmim[tasks]'") from error
    # The area of a detected mask is its own and not its box's, for which loadRes would take it.
    found = [{name: d[name] for name in d if name != "bbox" or kind == "bbox"} for d in detections]
    known = COCO(dict(truth), use_deepcopy=True)
    judge = COCOeval_faster(known, known.loadRes(found), kind)
    if images is not None:
        judge.params.imgIds = list(images)
    judge.evaluate()
    judge.accumulate()
    # Overlap thresholds, recalls, classes, areas, limits of detections; -1 where there is no object.
    precision = np.asarray(judge.eval["precision"])[..., -1]
    parts = {"map": precision[..., 0], "map50": precision[0, ..., 0], "map75": precision[5, ..., 0]}
    parts |= {f"map_{area}": precision[..., number] for number, area in enumerate(_AREAS) if number}
    figures = {name: _mean(part) for name, part in parts.items()}
    classes = {
        int(number): _present({"map": _mean(precision[:, :, k, 0]), "map50": _mean(precision[0, :, k, 0])})
        for k, number in enumerate(judge.params.catIds)
    }
    return _present(figures), classes


def _mean(precision: np.ndarray) -> float | None:
    there = precision[precision > -1]
    return float(there.mean()) if there.size else None


def _present(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}
