"""A detector's ONNX file: images prepared by its metadata, with Pillow, give the boxes of `simmim predict`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import simmim
from simmim.commands.export import export
from simmim.config.tasks import DetectConfig
from simmim.errors import UserError
from simmim.torch_engine.interop.export_detector import distance
from simmim.torch_engine.tasks.detect_step import DetectStep, save_detector
from simmim.training.run_directory import Run, mark_task

from . import tiny
from .pictures import picture

CLASSES = ("cat", "dog", "owl")


def save_run(path: Path, detector: Any, kind: str) -> Path:
    """Save a detector with random weights whose classes have scores around 0.5."""
    torch.manual_seed(0)
    config = DetectConfig(
        model=tiny.KINDS[kind].model,
        model_args=tiny.KINDS[kind].arguments,
        image_size=(64, 96),
        channels=3,
        mean=tiny.MEAN,
        std=tiny.STD,
        detector=detector,
        pyramid_channels=64,
    )
    step = DetectStep(config, len(CLASSES), None)
    if detector in ("fcos", "retinanet"):
        head = step.detector.head.classification_head
        for weight in head.conv.parameters():
            if weight.ndim == 4:
                torch.nn.init.kaiming_normal_(weight)
        torch.nn.init.normal_(head.cls_logits.weight, std=0.05)
        torch.nn.init.zeros_(head.cls_logits.bias)
    save_detector(step, config, CLASSES, Run(path).model)
    mark_task(Run(path).model, "detect")
    return path


def found_by(file: Path, photo: Path) -> tuple[torch.Tensor, ...]:
    """Return boxes in the photo's pixels, labels and scores, with the file and its metadata alone."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    facts: dict[str, Any] = {
        name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()
    }
    _, height, width = facts["input_size"]
    image = Image.open(photo).convert("RGB")
    factor = min(height / image.height, width / image.width)
    size = (round(image.width * factor), round(image.height * factor))
    mean, std = np.float32(facts["mean"]), np.float32(facts["std"])
    pixels = np.broadcast_to(np.round(mean * 255), (height, width, 3)).copy()
    pixels[: size[1], : size[0]] = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    normal = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    least = np.array(facts["score_threshold"], np.float32)
    boxes, labels, scores = session.run(None, {"images": normal, "score_threshold": least})
    boxes = (boxes / factor).clip(0, [image.width, image.height] * 2)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return tuple(torch.from_numpy(part[kept]) for part in (boxes, labels, scores))


def predicted(run: Path, photo: Path) -> tuple[torch.Tensor, ...]:
    """Return the same by `simmim.predict`."""
    found = simmim.predict(str(run), [str(photo)])["images"][0]["boxes"]
    boxes = [[*entry["box"][:2], *np.add(entry["box"][:2], entry["box"][2:])] for entry in found]
    return (
        torch.tensor(boxes),
        torch.tensor([CLASSES.index(entry["label"]) for entry in found]),
        torch.tensor([entry["score"] for entry in found]),
    )


def nearest(one: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return how far each object is from the nearest of the others: pixels / 144, score, or 1 for another class."""
    first, second = (
        torch.cat([boxes / 144, labels[:, None], scores[:, None]], 1) for boxes, labels, scores in (one, others)
    )
    return torch.cdist(first, second, p=torch.inf).min(1).values


@pytest.mark.slow
@pytest.mark.parametrize(("detector", "kind"), [("fcos", "vit"), ("fcos", "resnet18"), ("retinanet", "swin")])
def test_the_file_and_its_metadata_give_the_boxes_of_simmim_predict(detector: str, kind: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", detector, kind)
    lines = export(run, format="onnx", out=tmp_path / "out")
    assert lines[0] == "wrote model.onnx: images, score_threshold → boxes, labels, scores"
    file = tmp_path / "out" / "model.onnx"
    # Of the letterbox's size; and twice as large, where roundings of pixels may change which boxes are suppressed.
    for size, share in (((64, 96), 1.0), ((128, 144), 0.9)):
        photo = tmp_path / f"{size[0]}.png"
        picture(1, *size).save(photo)
        mine, theirs = found_by(file, photo), predicted(run, photo)
        assert len(theirs[0]) > 10
        assert (nearest(theirs, mine) < 5e-3).float().mean() >= share
        assert abs(len(mine[0]) - len(theirs[0])) <= (1 - share) * len(theirs[0])


def test_the_distance_of_findings_is_that_of_the_object_that_is_missed_most() -> None:
    boxes, labels, scores = (
        torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20]]),
        torch.tensor([0, 1]),
        torch.tensor([0.9, 0.5]),
    )
    whole = (boxes, labels, scores)
    assert distance(whole, tuple(part.flip(0) for part in whole), 20) == 0
    assert distance(whole, (boxes + torch.tensor([0, 0, 1, 0]), labels, scores), 20) == pytest.approx(0.05)
    assert distance(whole, (boxes, 1 - labels, scores), 20) == 0.5  # the other box has the class
    assert distance(whole, tuple(part[:1] for part in whole), 20) >= 0.4
    assert distance(whole, tuple(part[:0] for part in whole), 20) == float("inf")


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_detectors_of_two_stages_are_refused(detector: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", detector, "resnet18")
    with pytest.raises(UserError, match=f"is a {detector}, whose second stage cannot be exported; use it with simmim"):
        export(run, format="onnx", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
