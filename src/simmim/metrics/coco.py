"""COCO's average precision by faster-coco-eval."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError

_AREAS = ("all", "small", "medium", "large")


def average_precision(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    kind: Literal["bbox", "segm"] = "bbox",
    images: Sequence[int] | None = None,
) -> tuple[dict[str, float], dict[int, dict[str, float]], dict[int, NDArray[np.float64]]]:
    """Compute average precision over all classes and for each class by its number; figures are in [0, 1].

    `truth` and `detections` have the form of COCO's ground-truth and result JSON; for `segm`, segmentations are run
    lengths. The 100 best detections of an image count. `images` restricts the evaluation to these image numbers.
    Figures: map (IoU 0.5 to 0.95), map50, map75, and map_small, map_medium and map_large (areas below 32² pixels, up to
    96², above); for a class map and map50. A figure without any object is left out.

    The third is the precision of each class that has objects, at recalls of 0, 0.01 … 1 (101,) and IoU 0.5: its mean is
    the class's map50. Raises `UserError` if faster-coco-eval is missing.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise UserError("average precision needs faster-coco-eval; pip install 'simmim[tasks]'") from error
    # Set the area of each mask: loadRes would use the area of its box.
    found = [{name: d[name] for name in d if name != "bbox" or kind == "bbox"} for d in detections]
    known = COCO(dict(truth), use_deepcopy=True)
    judge = COCOeval_faster(known, known.loadRes(found), kind)
    if images is not None:
        judge.params.imgIds = list(images)
    judge.evaluate()
    judge.accumulate()
    # (IoU threshold, recall, class, area, detection limit); -1 where there is no object.
    precision = np.asarray(judge.eval["precision"])[..., -1]
    parts = {"map": precision[..., 0], "map50": precision[0, ..., 0], "map75": precision[5, ..., 0]}
    parts |= {f"map_{area}": precision[..., number] for number, area in enumerate(_AREAS) if number}
    figures = {name: _mean(part) for name, part in parts.items()}
    classes = {
        int(number): _present({"map": _mean(precision[:, :, k, 0]), "map50": _mean(precision[0, :, k, 0])})
        for k, number in enumerate(judge.params.catIds)
    }
    curves = {int(number): precision[0, :, k, 0] for k, number in enumerate(judge.params.catIds)}
    return _present(figures), classes, {number: curve for number, curve in curves.items() if curve.min() > -1}


def _mean(precision: np.ndarray) -> float | None:
    there = precision[precision > -1]
    return float(there.mean()) if there.size else None


def _present(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}
