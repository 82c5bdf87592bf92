"""Object detection, and masks of the objects: torchvision's detectors on a pretrained encoder.

Shapes: `B` images, `C` channels, `H W` pixels, `n` objects of an image, `K` classes.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simmim.config.tasks import DetectConfig
from simmim.data.augment import Letterbox, ScaleJitter, crop_resize
from simmim.data.decode import decode
from simmim.data.evaluation import eval_batches
from simmim.data.labelled.detection import (
    DetectionData,
    DetectionReader,
    decode_masks,
    import_rle,
    open_detection,
)
from simmim.data.pipeline import Reading, sample_batches
from simmim.data.sources import read_raw, sniff
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.method.random_keys import sample_keys
from simmim.metrics.boxes import match_boxes
from simmim.metrics.coco import average_precision
from simmim.torch_engine.models.evaluating import evaluating
from simmim.torch_engine.tasks.augment import ColourJitter
from simmim.torch_engine.tasks.backbones import encoder_alone, take_head
from simmim.torch_engine.tasks.base import Predictor, TaskSpec, TaskStep, evaluation_bad_images
from simmim.torch_engine.tasks.detect_step import DetectStep, Found, load_detector, save_detector
from simmim.torch_engine.tasks.draw_boxes import draw_objects, side_by_side
from simmim.training.evaluation_record import Worst, short, thumbnail, write_record
from simmim.training.pictures import save_png, to_rgb
from simmim.training.plan import Batch, drop_path_numbers
from simmim.training.whole_files import write_json

_PICTURED = 8  # evaluation images in detections.png, and in a record
_THUMBNAIL, _BOXES = 320, 6  # pixels of a side, and boxes of a kind, of an image in a record
_OF_CLASSES = ("head.classification_head.cls_logits", "roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn")
DRAWN_SCORE = 0.3  # what is found with less is not drawn


class DetectTask:
    """Detection of the objects of COCO's JSON, a `simmim.torch_engine.tasks.base.Task`."""

    best_figure = "map"

    def __init__(self, config: DetectConfig, data: DetectionData, weights: dict[str, Tensor] | None):
        self.config, self.data, self._weights = config, data, weights
        if config.device == "tpu":
            raise UserError(
                "detection does not run on tpu, where torchvision has no nms and roi_align; use cuda or cpu"
            )
        if config.jitter and config.channels not in (1, 3):
            raise UserError(f"--jitter needs images of 1 or 3 channels, not of {config.channels}; leave it out")
        if sniff(data.train, channels=config.channels) != np.uint8:
            raise UserError("detection needs 8-bit images, and these have more bits; convert them first")
        assert config.image_size is not None
        self.letterbox = Letterbox(size=config.image_size)
        self.jitter = ScaleJitter(size=config.image_size, scale=config.scale_jitter)
        import_rle()  # before the first step and not at the first evaluation

    @property
    def train_count(self) -> int:
        return len(self.data.train)

    def describe(self) -> list[str]:
        counts = np.bincount(np.concatenate([found.labels for found in self.data.train.objects]))
        counts = np.pad(counts, (0, len(self.data.classes) - len(counts)))
        return [
            f"images     {len(self.data.train)} to train on, {len(self.data.val)} to evaluate on",
            f"objects    {counts.sum()} of {len(self.data.classes)} classes, {counts.min()} to {counts.max()} of each",
            *([f"left out   {self.data.left_out} boxes without area"] if self.data.left_out else []),
            f"detector   {self.config.detector}",
        ]

    def build(self) -> DetectStep:
        step = DetectStep(self.config, len(self.data.classes), encoder_alone(self._weights))
        take_head(step.detector, self.config, self._weights, of_classes=_OF_CLASSES)
        return step

    def batches(self, reading: Reading, step: TaskStep) -> Iterator[Batch]:
        config = self.config
        reader = DetectionReader(
            images=self.data.train,
            jitter=self.jitter,
            channels=config.channels,
            fill=ground(config),
            seed=config.seed,
            masks=config.detector == "mask_rcnn",
            recolour=ColourJitter(strength=config.jitter) if config.jitter else None,
        )
        for batch in sample_batches(self.data.train, reading, reader):
            epoch, index = batch.pop("epoch"), batch.pop("index")
            keys = sample_keys(config.seed, epoch, index, stream="proposals")
            batch["key"] = (keys >> np.uint64(2)).astype(np.int64)
            if step.draws.layers:
                batch["drop_path"] = drop_path_numbers(config, epoch, index, step.draws.layers)
            yield batch

    def conclude(self, parts: Sequence[dict[int, Found]], out: Path) -> dict[str, float]:
        found = dict(sorted(pair for part in parts for pair in part.items()))
        if not found:
            raise evaluation_bad_images(self.config, self.data.val, out).none_readable()
        results = [result for index, things in found.items() for result in coco_results(things, index + 1)]
        images = [index + 1 for index in found]
        figures, classes, curves = average_precision(self.data.truth, results, images=images)
        if self.config.detector == "mask_rcnn":
            more, more_classes, _ = average_precision(self.data.truth, results, kind="segm", images=images)
            figures |= {f"segm_{name}": value for name, value in more.items()}
            for number, values in more_classes.items():
                classes[number] |= {f"segm_{name}": value for name, value in values.items()}
        table = {name: classes[number] for number, name in enumerate(self.data.classes, 1)}
        write_json(out / "per_class.json", table)
        chosen = np.linspace(0, len(found) - 1, _PICTURED).astype(int)
        pairs = [self._pair(index, found[index]) for index in (list(found)[place] for place in np.unique(chosen))]
        save_png(side_by_side(pairs, ("truth", "found")), out / "detections.png")
        self._record(out, figures, classes, curves, found)
        return figures

    def _record(
        self,
        out: Path,
        figures: dict[str, float],
        classes: dict[int, dict[str, float]],
        curves: dict[int, NDArray[np.float64]],
        found: dict[int, Found],
    ) -> None:
        """Write the record of an evaluation: of each class its curve, and the images with the most mistakes."""
        names, every = self.data.classes, self.data.val.objects
        objects = np.bincount(np.concatenate([every[index].labels for index in found]), minlength=len(names))
        worst, wrong = Worst(_PICTURED), 0
        for index, things in found.items():
            shown = things.scores >= DRAWN_SCORE
            boxes, labels = things.boxes[shown], things.labels[shown]
            right, seen = match_boxes(boxes, labels, every[index].boxes, every[index].labels)
            if mistakes := int((~right).sum() + (~seen).sum()):
                wrong += 1
                kinds = np.where(right, "right", "wrong").tolist()
                marks = [
                    *zip(repeat("missed"), every[index].boxes[~seen], every[index].labels[~seen], repeat(None)),
                    *zip(kinds, boxes, labels, things.scores[shown], strict=True),
                ]
                worst.offer(mistakes, index, partial(self._describe, index, marks))
        numbered = [(curves.get(number), classes[number]) for number in range(1, len(names) + 1)]
        precisions = [name for name in ("map", "map50", "segm_map", "segm_map50") if name in figures]
        write_record(
            out,
            figures=figures,
            images=len(found),
            names=names,
            rows=[
                {"objects": int(count), **{name: values.get(name) for name in precisions}, "curve": _rounded(curve)}
                for count, (curve, values) in zip(objects, numbered, strict=True)
            ],
            judged_by="map",
            worst=worst,
            wrong=wrong,
            curve=_rounded(np.mean(list(curves.values()), axis=0)) if curves else None,
            drawn_score=DRAWN_SCORE,
            drawn_boxes=_BOXES,
        )

    def _describe(self, index: int, marks: Sequence[tuple[str, NDArray[Any], int, float | None]]) -> dict[str, Any]:
        """Describe an image for a record: its picture, with `_BOXES` boxes of each kind in pixels of it, best first."""
        image = decode(read_raw(self.data.val, index), channels=self.config.channels, dtype=np.uint8)
        small = thumbnail(to_rgb(image[None] / np.float32(255))[0], _THUMBNAIL)
        zoom = small["width"] / image.shape[1]
        of_kind = {kind: [mark for mark in marks if mark[0] == kind] for kind in ("missed", "right", "wrong")}
        return {
            "name": short(self.data.val.name(index)),
            "boxes": [
                {
                    "kind": kind,
                    "label": short(self.data.classes[label]),
                    "score": None if score is None else float(score),
                }
                | {"box": [round(zoom * float(side), 1) for side in box]}
                for marked in of_kind.values()
                for kind, box, label, score in marked[:_BOXES]
            ],
            **{f"{kind}_count": len(marked) for kind, marked in of_kind.items()},
            **small,
        }

    def judge(self, step: DetectStep, indices: Sequence[int], out: Path) -> dict[int, Found]:
        """Find the objects in each of the evaluation images `indices` that can be read."""
        config, val = self.config, self.data.val
        found: dict[int, Found] = {}
        with evaluating(step):
            for index, image in eval_batches(
                val,
                indices,
                crop=self.letterbox,
                channels=config.channels,
                dtype=np.uint8,
                batch_size=config.batch_size,
                threads=config.workers or cpu_cores(),
                bad_images=evaluation_bad_images(config, val, out),
                fill=ground(config),
            ):
                sizes = [(int(height), int(width)) for height, width in val.sizes[index]]
                found |= zip(index.tolist(), step.find(image, sizes), strict=True)
        return found

    def _pair(self, index: int, found: Found) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Draw an evaluation image twice: with its labels and with what is found."""
        image = decode(read_raw(self.data.val, index), channels=self.config.channels, dtype=np.uint8)
        objects, masks = self.data.val.objects[index], None
        if self.config.detector == "mask_rcnn" and len(objects.boxes):
            masks = np.moveaxis(decode_masks(objects.segmentations, *image.shape[:2]), 2, 0).astype(bool)
        names = [self.data.classes[label] for label in objects.labels]
        truth = draw_objects(image, objects.boxes, objects.labels, names, masks)
        return truth, draw_predicted(image, predicted(found, self.data.classes), self.data.classes)

    def save(self, step: DetectStep, directory: Path) -> None:
        save_detector(step, self.config, self.data.classes, directory)


class DetectPredictor(Predictor):
    """A trained detector.

    A prediction is `boxes`, best first: each with its label, its score in [0, 1], its box [left, top, width, height] in
    the image's own pixels, and with Mask R-CNN its mask as `rle`, COCO's compressed run lengths.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, step: DetectStep, config: DetectConfig, classes: tuple[str, ...]):
        assert config.image_size is not None
        self.channels = config.channels
        self._step, self._classes = step, classes
        self._letterbox, self._fill = Letterbox(size=config.image_size), ground(config)

    def predict(self, images: Sequence[NDArray[Any]]) -> list[dict[str, Any]]:
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        boxed = [
            crop_resize(image, self._letterbox.box(*image.shape[:2]), self._letterbox.size, self._fill)
            for image in images
        ]
        return [predicted(found, self._classes) for found in self._step.find(np.stack(boxed), sizes)]

    def draw(self, image: NDArray[Any], prediction: dict[str, Any]) -> NDArray[np.uint8]:
        return draw_predicted(image, prediction, self._classes)


def load_predictor(directory: Path, device: str) -> DetectPredictor:
    """Read the detector that a run keeps in RUN/model."""
    return DetectPredictor(*load_detector(directory, device))


def ground(config: DetectConfig) -> tuple[int, ...]:
    """Return the colour around images that do not fill their letterbox: the mean, which normalises to 0."""
    assert isinstance(config.mean, tuple)
    return tuple(round(255 * mean) for mean in config.mean)


def _rounded(curve: NDArray[np.float64] | None) -> list[float] | None:
    return None if curve is None else curve.round(3).tolist()


def coco_results(found: Found, image_id: int) -> list[dict[str, Any]]:
    """Convert what is found to COCO's results. Category numbers start at 1."""
    results = []
    for number, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
        result = {
            "image_id": image_id,
            "category_id": int(found.labels[number]) + 1,
            "bbox": [left, top, right - left, bottom - top],
            "score": float(found.scores[number]),
        }
        if found.masks is not None:
            result["segmentation"] = found.masks[number]
        results.append(result)
    return results


def predicted(found: Found, classes: Sequence[str]) -> dict[str, Any]:
    """Convert what is found in an image to what `simmim predict` writes."""
    boxes = []
    for result in coco_results(found, 0):
        box = {"label": classes[result["category_id"] - 1], "score": result["score"], "box": result["bbox"]}
        boxes.append(box | ({"rle": result["segmentation"]} if "segmentation" in result else {}))
    return {"boxes": boxes}


def draw_predicted(image: NDArray[Any], prediction: dict[str, Any], classes: Sequence[str]) -> NDArray[np.uint8]:
    """Draw the objects above `DRAWN_SCORE` into an image (H, W, C), the best on top."""
    drawn = [entry for entry in reversed(prediction["boxes"]) if entry["score"] >= DRAWN_SCORE]
    boxes = np.array([entry["box"] for entry in drawn], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([classes.index(entry["label"]) for entry in drawn], np.int64)
    texts = [f"{entry['label']} {entry['score']:.2f}" for entry in drawn]
    masks = None
    if drawn and "rle" in drawn[0]:
        masks = np.moveaxis(decode_masks([entry["rle"] for entry in drawn], *image.shape[:2]), 2, 0).astype(bool)
    return draw_objects(image, boxes, labels, texts, masks)


def _open(config: DetectConfig) -> DetectionData:
    assert config.data is not None
    return open_detection(
        config.data, val_fraction=config.val_fraction, seed=config.seed, masks=config.detector == "mask_rcnn"
    )


def _summarize(prediction: dict[str, Any]) -> str:
    drawn = [box for box in prediction["boxes"] if box["score"] >= DRAWN_SCORE]
    return ", ".join(f"{box['label']} {box['score']:.3f}" for box in drawn) or "nothing"


TASK = TaskSpec(
    config=DetectConfig, open_data=_open, create=DetectTask, load_predictor=load_predictor, summarize=_summarize
)
