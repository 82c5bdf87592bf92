"""Semantic segmentation: a class for every pixel.

Shapes: `H W` pixels, `C` channels, `K` classes.
"""

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from simmim.accelerators import cpu_cores
from simmim.config import from_settings
from simmim.data.bad_images import BadImages
from simmim.data.decode import BadImage, decode
from simmim.data.pipeline import Sample, load, sample_batches
from simmim.data.segmentation import IGNORE, SegmentationImages, crop_mask
from simmim.data.sources import read_raw, sniff
from simmim.keys import sample_keys
from simmim.metrics import confusion_matrix, intersection_over_union
from simmim.panels import class_panel
from simmim.plan import Batch, TrainingPlan, drop_path_numbers
from simmim.run import written_whole
from simmim.task_config import SegmentConfig
from simmim.torch_engine.tasks.augment import ColourJitter
from simmim.torch_engine.tasks.base import TaskStep
from simmim.torch_engine.tasks.segmenter import SegmentPredictor, SegmentStep, build_step, to_picture, windows

_SETTINGS = "segment.json"
_WEIGHTS = "model.safetensors"
_OVERLAYS = 8  # evaluation images that are drawn


class SegmentTask:
    """Semantic segmentation, a `simmim.torch_engine.tasks.base.Task`."""

    best_figure = "miou"

    def __init__(self, config: SegmentConfig, data: SegmentationImages, weights: dict[str, Tensor] | None):
        self.config, self.data, self._weights = config, data, weights
        self.windows = windows(config)
        self.dtype = sniff(data.train, channels=config.channels)
        if config.jitter and (self.dtype != np.uint8 or config.channels not in (1, 3)):
            raise ValueError(
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
        return build_step(self.config, self._weights, len(self.data.classes))

    def batches(
        self, plan: TrainingPlan, step: TaskStep, *, start_step: int, rank: int, world: int, bad_images: BadImages
    ) -> Iterator[Batch]:
        config = self.config
        if config.batch_size // world // config.accumulate_steps < 2:
            raise ValueError(
                "the decoder's batch norms need 2 images at a time, and a process has 1; use --batch-size "
                f"{2 * world * config.accumulate_steps}, or fewer processes or --accumulate-steps"
            )
        found = sample_batches(
            self.data.train,
            self._read,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            total_steps=plan.total_steps,
            rank=rank,
            world=world,
            threads=config.workers or cpu_cores(),
            bad_images=bad_images,
        )
        for batch in found:
            epoch, index = batch.pop("epoch"), batch.pop("index")
            if step.draws.layers:
                batch["drop_path"] = drop_path_numbers(config, epoch, index, step.draws.layers)
            yield batch

    def _read(self, epoch: int, index: int) -> Sample:
        """The image (H, W, C) of a training step and its label (H, W), cut and resized alike."""
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

    def evaluate(self, step: SegmentStep, out: Path) -> dict[str, float]:
        predictor = SegmentPredictor(step, self.config, self.data.classes, self.dtype)
        classes = len(self.data.classes)
        matrix = np.zeros((classes, classes), np.int64)
        drawn = np.linspace(0, len(self.data.val) - 1, min(_OVERLAYS, len(self.data.val))).round().astype(int)
        for indices, images in self._val_images():
            for index, image, predicted in zip(indices, images, predictor.masks(images), strict=True):
                true = self.data.val_mask(index)
                judged = true != IGNORE
                matrix += confusion_matrix(true[judged], predicted[judged], classes)
                if index in drawn:
                    name = f"{index}-{Path(self.data.val.name(index)).stem}.png"
                    _write_png(out / "overlays" / name, class_panel(to_picture(image), true, predicted, classes))
        if not matrix.any():
            raise ValueError(f"none of the {len(self.data.val)} images to evaluate on can be read")
        _write_table(matrix, self.data.classes, out / "per_class.json")
        return {
            "miou": float(np.nanmean(intersection_over_union(matrix))),
            "pixel_accuracy": float(matrix.diagonal().sum() / matrix.sum()),
        }

    def _val_images(self) -> Iterator[tuple[list[int], list[NDArray[Any]]]]:
        """The images to evaluate on, by the batch: their numbers and pixels (H, W, C). Bad ones are left out."""

        def read(index: int) -> NDArray[Any] | None:
            try:
                return decode(read_raw(self.data.val, index), channels=self.config.channels, dtype=self.dtype)
            except BadImage:
                return None

        with ThreadPoolExecutor(self.config.workers or cpu_cores()) as pool:
            for start in range(0, len(self.data.val), self.config.batch_size):
                indices = range(start, min(start + self.config.batch_size, len(self.data.val)))
                found = [
                    (i, image) for i, image in zip(indices, pool.map(read, indices), strict=True) if image is not None
                ]
                yield [i for i, _ in found], [image for _, image in found]

    def save(self, step: SegmentStep, directory: Path) -> None:
        with written_whole(directory / _WEIGHTS) as path:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in step.model.state_dict().items()}, path
            )
        settings = {
            "classes": self.data.classes,
            "dtype": self.dtype.name,
            "config": dataclasses.asdict(self.config),
        }
        with written_whole(directory / _SETTINGS) as path:
            path.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def load_predictor(directory: Path, device: str) -> SegmentPredictor:
    """The model that `SegmentTask.save` wrote, in fp32 on the device."""
    settings = json.loads((directory / _SETTINGS).read_text(encoding="utf-8"))
    config = dataclasses.replace(from_settings(SegmentConfig, settings["config"]), precision="fp32")
    step = build_step(config, None, len(settings["classes"]))
    step.model.load_state_dict(load_file(directory / _WEIGHTS))
    return SegmentPredictor(step.eval().to(device), config, tuple(settings["classes"]), np.dtype(settings["dtype"]))


def _write_table(matrix: NDArray[np.int64], classes: tuple[str, ...], path: Path) -> None:
    """Of each class: its pixels, how many of them are found, how many that are found are of it, and their IoU."""
    right, pixels, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    ious = intersection_over_union(matrix)
    table = {
        name: {
            "pixels": int(pixels[k]),
            "iou": None if np.isnan(ious[k]) else float(ious[k]),
            "recall": float(right[k] / pixels[k]) if pixels[k] else None,
            "precision": float(right[k] / predicted[k]) if predicted[k] else None,
        }
        for k, name in enumerate(classes)
    }
    with written_whole(path) as aside:
        aside.write_text(json.dumps(table, indent=1), encoding="utf-8")


def _write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    from PIL import Image

    with written_whole(path) as aside:
        Image.fromarray(picture).save(aside, format="PNG")
