"""Average precision against pycocotools, the reference implementation."""

import contextlib
import copy
import io
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as reference_rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simmim.metrics.coco import average_precision

IMAGES, CLASSES, SIDE = 30, 3, 200
NAMES = ("map", "map50", "map75", "map_small", "map_medium", "map_large")


def rle(box: list[float], draw: np.random.Generator) -> dict[str, Any]:
    """An ellipse in a box, cut by a random line."""
    y, x = np.mgrid[:SIDE, :SIDE]
    left, top, width, height = box
    inside = ((x - left - width / 2) / (width / 2)) ** 2 + ((y - top - height / 2) / (height / 2)) ** 2 < 1
    found = reference_rle.encode(np.asfortranarray(inside & (x + y > left + top + draw.uniform(0, width)), np.uint8))
    return {"size": found["size"], "counts": found["counts"].decode()}


@pytest.fixture(scope="module")
def known() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects of all sizes, among them crowds; images without objects; and detections of them, good, bad and none."""
    draw = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(1, IMAGES + 1):
        for _ in range(0 if image % 5 == 0 else draw.integers(1, 6)):
            width, height = draw.uniform(8, 150, 2)
            box = [*(draw.uniform(0, SIDE - side) for side in (width, height)), width, height]
            category = int(draw.integers(1, CLASSES + 1))
            shape = rle(box, draw)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [float(side) for side in box],
                    "area": float(reference_rle.area(shape)),
                    "iscrowd": int(draw.random() < 0.15),
                    "segmentation": shape,
                }
            )
            for _ in range(draw.integers(0, 4)):
                near = [float(side * draw.normal(1, 0.1)) for side in box]
                wrong = draw.random() < 0.2
                label = int(draw.integers(1, CLASSES + 1)) if wrong else category
                detections.append((image, label, near))
        for _ in range(draw.integers(0, 3)):  # where nothing is
            detections.append((image, int(draw.integers(1, CLASSES + 1)), [5.0, 5.0, 40.0, 30.0]))
    results = [
        {
            "image_id": image,
            "category_id": label,
            "bbox": box,
            "score": float(draw.random()),
            "segmentation": rle(box, draw),
        }
        for image, label, box in detections
    ]
    truth = {
        "images": [{"id": image, "height": SIDE, "width": SIDE} for image in range(1, IMAGES + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in range(1, CLASSES + 1)],
    }
    return truth, results


def reference(truth: dict[str, Any], results: list[dict[str, Any]], kind: str, **params: Any) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        keep = [{name: d[name] for name in d if name != "bbox" or kind == "bbox"} for d in copy.deepcopy(results)]
        judge = COCOeval(coco, coco.loadRes(keep), kind)
        for name, value in params.items():
            setattr(judge.params, name, value)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_those_of_pycocotools(known: Any, kind: Any) -> None:
    truth, results = known
    figures, *_ = average_precision(truth, results, kind=kind)
    assert list(figures) == list(NAMES)
    np.testing.assert_allclose(list(figures.values()), reference(truth, results, kind)[:6], rtol=0, atol=1e-6)
    assert 0.05 < figures["map"] < figures["map50"] < 0.95


def test_a_classs_figures_are_those_of_pycocotools_on_it_alone(known: Any) -> None:
    truth, results = known
    _, classes, _ = average_precision(truth, results)
    for number in range(1, CLASSES + 1):
        expected = reference(truth, results, "bbox", catIds=[number])
        np.testing.assert_allclose(list(classes[number].values()), expected[:2], rtol=0, atol=1e-6)


def test_only_the_given_images_count(known: Any) -> None:
    truth, results = known
    figures, *_ = average_precision(truth, results, images=[1, 2, 3, 5, 8])
    expected = reference(truth, results, "bbox", imgIds=[1, 2, 3, 5, 8])[:6]
    np.testing.assert_allclose([figures.get(name, -1) for name in NAMES], expected, rtol=0, atol=1e-6)


def test_no_detection_at_all_is_a_precision_of_nought(known: Any) -> None:
    figures, *_ = average_precision(known[0], [])
    assert set(figures.values()) == {0.0}


def test_a_size_of_which_there_is_no_object_has_no_figure(known: Any) -> None:
    truth, results = known
    large = [item for item in truth["annotations"] if item["area"] > 96**2]
    figures, *_ = average_precision({**truth, "annotations": large}, results)
    assert list(figures) == ["map", "map50", "map75", "map_large"]
