"""Semantic segmentation: a class for every pixel.

Shapes: `H W` pixels, `C` channels, `K` classes.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from simmim.config.tasks import SegmentConfig
from simmim.config.validation import from_settings
from simmim.data.augment import load
from simmim.data.decode import decode
from simmim.data.evaluation import readable_batches
from simmim.data.labelled.segmentation import IGNORE, Mask, SegmentationImages, crop_mask, open_segmentation
from simmim.data.picture import Raw
from simmim.data.pipeline import Reading, Sample, sample_batches
from simmim.data.sources import read_raw, sniff
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.method.random_keys import sample_keys
from simmim.metrics.classification import class_rows, confusion_matrix, intersection_over_union
from simmim.torch_engine.tasks.augment import ColourJitter
from simmim.torch_engine.tasks.backbones import encoder_alone, take_head
from simmim.torch_engine.tasks.base import TaskSpec, TaskStep, evaluation_bad_images, save_model
from simmim.torch_engine.tasks.segmenter import SegmentPredictor, SegmentStep, build_segment_step, to_picture, windows
from simmim.training.evaluation_record import Worst, confusion_part, short, thumbnail, write_record
from simmim.training.pictures import class_colours, class_panel, lay_classes, save_png
from simmim.training.plan import Batch, drop_path_numbers
from simmim.training.whole_files import write_json

# What of a configuration a saved model is built from again.
_BUILT_FROM = ("model", "model_args", "image_size", "channels", "mean", "std", "evaluation", "decoder_channels")
_OVERLAYS = 8  # evaluation images that are drawn
_WORST, _THUMBNAIL, _LEGEND = 12, 200, 8  # images that a record pictures, pixels of a side, classes named below each


@dataclass
class Judged:
    """Evaluation images of a process: their pixels by true class (rows) and answer (K, K), and the worst of them."""

    matrix: NDArray[np.int64]
    images: int = 0
    worst: Worst = field(default_factory=lambda: Worst(_WORST))


class SegmentTask:
    """Semantic segmentation, a `simmim.torch_engine.tasks.base.Task`."""

    best_figure = "miou"

    def __init__(self, config: SegmentConfig, data: SegmentationImages, weights: dict[str, Tensor] | None):
        self.config, self.data, self._weights = config, data, weights
        self.windows = windows(config)
        self.dtype = sniff(data.train, channels=config.channels)
        if config.jitter and (self.dtype != np.uint8 or config.channels not in (1, 3)):
            raise UserError(
                "--jitter changes 8-bit images of 1 or 3 channels only, and these are others; use --jitter 0"
            )

    @property
    def train_count(self) -> int:
        return len(self.data.train)

    def describe(self) -> list[str]:
        shares = self.data.pixels / self.data.pixels.sum()
        rarest, commonest = int(shares.argmin()), int(shares.argmax())
        return [
            f"images     {len(self.data.train)} to train on, {len(self.data.val)} to evaluate on",
            f"classes    {len(shares)}, from {self.data.classes[rarest]} ({shares[rarest]:.2%} of the pixels) to "
            f"{self.data.classes[commonest]} ({shares[commonest]:.2%})",
        ]

    def build(self) -> SegmentStep:
        step = build_segment_step(self.config, encoder_alone(self._weights), len(self.data.classes))
        take_head(step.model, self.config, self._weights, of_classes=("decoder.classifier",))
        return step

    def batches(self, reading: Reading, step: TaskStep) -> Iterator[Batch]:
        config = self.config
        if config.batch_size // reading.world // config.pieces < 2:
            raise UserError(
                "the decoder's batch norms need 2 images at a time, and a process has 1; use --batch-size "
                f"{2 * reading.world * config.pieces}, or fewer processes or --accumulate-steps"
            )
        for batch in sample_batches(self.data.train, reading, self._read):
            epoch, index = batch.pop("epoch"), batch.pop("index")
            if step.draws.layers:
                batch["drop_path"] = drop_path_numbers(config, epoch, index, step.draws.layers)
            yield batch

    def _read(self, epoch: int, index: int) -> Sample:
        """Read an image (H, W, C) and its label (H, W) for training, with the same crop and size."""
        config, size = self.config, self.windows.size
        key = sample_keys(config.seed, epoch, index, stream="crop")

        def choose(height: int, width: int) -> Any:
            return self.windows.random_box(key, height, width)

        image = load(read_raw(self.data.train, index), choose, size=size, channels=config.channels, dtype=self.dtype)
        if config.jitter:
            jitter = ColourJitter(strength=config.jitter)
            image = jitter(image, sample_keys(config.seed, epoch, index, stream="augment"))
        mask = self.data.train_mask(index)
        label = crop_mask(mask, choose(*mask.shape), size)
        return {"image": image, "label": label.astype(np.uint8 if label.dtype == np.uint8 else np.int32)}

    def judge(self, step: SegmentStep, indices: Sequence[int], out: Path) -> Judged:
        predictor = SegmentPredictor(step, self.config, self.data.classes, self.dtype)
        classes = len(self.data.classes)
        judged = Judged(np.zeros((classes, classes), np.int64))
        drawn = np.linspace(0, len(self.data.val) - 1, min(_OVERLAYS, len(self.data.val))).round().astype(int)

        def read(raw: Raw) -> NDArray[Any]:
            return decode(raw, channels=self.config.channels, dtype=self.dtype)

        batch_size, threads = self.config.batch_size, self.config.workers or cpu_cores()
        bad_images = evaluation_bad_images(self.config, self.data.val, out)
        for readable, pixels in readable_batches(
            self.data.val, read, indices, batch_size=batch_size, threads=threads, bad_images=bad_images
        ):
            for index, image, predicted in zip(readable, pixels, predictor.masks(pixels), strict=True):
                true = self.data.val_mask(index)
                counts = true != IGNORE
                found = confusion_matrix(true[counts], predicted[counts], classes)
                judged.matrix += found
                judged.images += 1
                if counts.any():
                    iou = float(np.nanmean(intersection_over_union(found)))
                    if iou < 1:
                        judged.worst.offer(-iou, index, partial(self._picture, index, iou, image, true, predicted))
                if index in drawn:
                    name = f"{index}-{Path(self.data.val.name(index)).stem}.png"
                    save_png(class_panel(to_picture(image), true, predicted, classes), out / "overlays" / name)
        return judged

    def conclude(self, parts: Sequence[Judged], out: Path) -> dict[str, float]:
        matrix, images, worst = sum(part.matrix for part in parts), sum(part.images for part in parts), Worst(_WORST)
        assert isinstance(matrix, np.ndarray)
        for part in parts:
            worst.add(part.worst)
        if not images:
            raise evaluation_bad_images(self.config, self.data.val, out).none_readable()
        rows, ious = class_rows(matrix, "pixels"), intersection_over_union(matrix)
        for row, iou in zip(rows, ious.tolist(), strict=True):
            row["iou"] = None if math.isnan(iou) else iou
        write_json(out / "per_class.json", dict(zip(self.data.classes, rows, strict=True)))
        figures = {
            "miou": float(np.nanmean(ious)),
            "pixel_accuracy": float(matrix.diagonal().sum() / matrix.sum()),
        }
        write_record(
            out,
            figures=figures,
            images=images,
            names=self.data.classes,
            rows=rows,
            judged_by="iou",
            worst=worst,
            **confusion_part(matrix, self.data.classes, by_share=True),
        )
        return figures

    def _picture(self, index: int, iou: float, image: NDArray[Any], true: Mask, predicted: Mask) -> dict[str, Any]:
        """Describe an image for a record: the picture, its true and its predicted classes, each at most 200 pixels."""
        names, seen = self.data.classes, to_picture(image)
        counts = np.bincount(np.concatenate((true[true != IGNORE], predicted.ravel())), minlength=len(names))
        shown = [int(k) for k in np.argsort(-counts, kind="stable")[:_LEGEND] if counts[k]]
        colours = class_colours(len(names))
        return {
            "name": short(self.data.val.name(index)),
            "iou": iou,
            "panels": [
                thumbnail(picture, _THUMBNAIL)
                for picture in (seen, lay_classes(seen, true, len(names)), lay_classes(seen, predicted, len(names)))
            ],
            "legend": [[short(names[k]), "#" + bytes(colours[k]).hex()] for k in shown],
        }

    def save(self, step: SegmentStep, directory: Path) -> None:
        settings = {name: getattr(self.config, name) for name in _BUILT_FROM}
        facts = {**settings, "dtype": self.dtype.name, "label_names": self.data.classes}
        save_model(directory, step.model, facts)


def load_predictor(directory: Path, device: str) -> SegmentPredictor:
    """Read the model that `SegmentTask.save` wrote, in fp32 on the device."""
    facts = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings = {name: facts[name] for name in _BUILT_FROM}
    config = from_settings(SegmentConfig, {**settings, "precision": "fp32"})
    classes = tuple(facts["label_names"])
    step = build_segment_step(config, None, len(classes))
    step.model.load_state_dict(load_file(directory / "model.safetensors"))
    return SegmentPredictor(step.eval().to(device), config, classes, np.dtype(facts["dtype"]))


def _open(config: SegmentConfig) -> SegmentationImages:
    assert config.data is not None
    return open_segmentation(config.data, val_fraction=config.val_fraction, seed=config.seed)


def _summarize(prediction: dict[str, Any]) -> str:
    shares = sorted(prediction["shares"].items(), key=lambda pair: -pair[1])
    return ", ".join(f"{label} {share:.1%}" for label, share in shares if share > 0)


TASK = TaskSpec(
    config=SegmentConfig, open_data=_open, create=SegmentTask, load_predictor=load_predictor, summarize=_summarize
)
