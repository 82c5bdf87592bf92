"""Image classification: the paper's fine-tuning (SimMIM, appendix A).

Shapes: `B` images, `C` channels, `H W` pixels, `K` classes.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from simmim.config.tasks import ClassifyConfig
from simmim.data.augment import CentreCrop, RandomResizedCrop
from simmim.data.bad_images import BadImages
from simmim.data.evaluation import eval_batches
from simmim.data.labelled.classes import LabelledImages, open_labelled
from simmim.data.pipeline import Augment, Reading, train_batches
from simmim.data.sound_augment import TimeCrop, sound_augment
from simmim.data.sources import sniff
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.metrics.classification import balanced_accuracy, class_rows, confusion_matrix, top1
from simmim.torch_engine.models.evaluating import evaluating
from simmim.torch_engine.models.masked_image_model import PixelStep
from simmim.torch_engine.models.sound_input import SoundInput
from simmim.torch_engine.tasks.augment import Mix, RandAugment, RandomErasing
from simmim.torch_engine.tasks.backbones import create_task_backbone
from simmim.torch_engine.tasks.base import TaskSpec, TaskStep, evaluation_bad_images
from simmim.torch_engine.tasks.classifier import ClassifyPredictor, ClassifyStep, classify
from simmim.torch_engine.tasks.draw_confusion import draw_confusion
from simmim.torch_engine.tasks.sound_pictures import picture_of
from simmim.torch_engine.tasks.spec_augment import draw_strips
from simmim.torch_engine.train.storage import save_hub
from simmim.training.evaluation_record import Worst, confusion_part, short, thumbnail, write_record
from simmim.training.plan import Batch, drop_path_numbers
from simmim.training.whole_files import write_json

_WORST, _THUMBNAIL = 24, 160  # wrong answers that a record pictures, and the pixels of a side


@dataclass
class Judged:
    """Answers of a process about N evaluation images: classes (N,), probabilities (N,), and its worst mistakes."""

    indices: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    true_probabilities: list[float] = field(default_factory=list)
    """Of the true classes."""
    worst: Worst = field(default_factory=lambda: Worst(_WORST))


class ClassifyTask:
    """Classification of labelled images, a `simmim.torch_engine.tasks.base.Task`."""

    best_figure = "top1"

    def __init__(self, config: ClassifyConfig, data: LabelledImages, weights: dict[str, Tensor] | None):
        self.config, self.data, self._weights = config, data, weights
        assert config.image_size is not None
        self.dtype = sniff(data.train, channels=config.channels)
        if config.rand_augment and config.channels not in (1, 3):
            raise UserError(f"RandAugment needs images of 1 or 3 channels, not {config.channels}; use --rand-augment 0")
        if config.rand_augment and self.dtype != np.uint8:
            raise UserError("RandAugment needs 8-bit images, and these have more bits; use --rand-augment 0")

    @property
    def train_count(self) -> int:
        return len(self.data.train)

    def describe(self) -> list[str]:
        counts = np.bincount(self.data.train_labels, minlength=len(self.data.classes))
        return [
            f"images     {len(self.data.train)} to train on, {len(self.data.val)} to evaluate on",
            f"classes    {len(self.data.classes)}, of {counts.min()} to {counts.max()} images",
        ]

    def build(self) -> ClassifyStep:
        # A ViT gets a fresh norm after its pooling, as in the official code; other families have theirs.
        fresh = {"fc_norm": True} if "fc_norm" in self.config.model_args else {}
        if "use_fc_norm" in self.config.model_args:
            fresh = {"use_fc_norm": True}
        classes = len(self.data.classes)
        backbone = create_task_backbone(self.config, self._weights, num_classes=classes, global_pool="avg", **fresh)
        return ClassifyStep(backbone, self.config, self._class_weights())

    def _class_weights(self) -> NDArray[np.float32]:
        counts = np.bincount(self.data.train_labels, minlength=len(self.data.classes))
        if self.config.class_weights == "none":
            return np.ones(len(counts), np.float32)
        return (counts.sum() / (len(counts) * np.maximum(counts, 1))).astype(np.float32)

    def batches(self, reading: Reading, step: TaskStep) -> Iterator[Batch]:
        config = self.config
        assert config.image_size is not None
        mix = Mix(mixup=config.mixup, cutmix=config.cutmix) if config.mixup or config.cutmix else None
        images = train_batches(
            self.data.train,
            reading,
            crop=(
                TimeCrop(size=config.read_size)
                if config.input == "sounds"
                else RandomResizedCrop(size=config.image_size, scale=config.crop_scale)
            ),
            channels=config.channels,
            dtype=self.dtype,
            augment=sound_augment(config.sound) if config.input == "sounds" else self._augment(),
        )
        for number, found in enumerate(images, reading.start_step):
            epoch, index = found["epoch"], found["index"]
            batch: Batch = {
                "image": found["image"],
                "flip": found["flip"],
                "label": self.data.train_labels[index].astype(np.int64),
            }
            if mix is not None:
                batch["mix"] = mix.draw(config.seed, number, len(index), *config.image_size)
            if config.time_mask or config.band_mask:
                most = (config.time_mask, config.band_mask)
                batch["strips"] = draw_strips(config.seed, epoch, index, config.image_size, most)
            if step.draws.layers:
                batch["drop_path"] = drop_path_numbers(config, epoch, index, step.draws.layers)
            yield batch

    def _augment(self) -> Augment:
        config = self.config
        assert isinstance(config.mean, tuple)
        assert isinstance(config.std, tuple)
        fill = tuple(round(255 * mean) for mean in config.mean)
        distort = RandAugment(magnitude=config.rand_augment, fill=fill) if config.rand_augment else None
        erase = RandomErasing(probability=config.erase, mean=config.mean, std=config.std)

        def augment(image: NDArray[Any], key: NDArray[np.uint64]) -> NDArray[Any]:
            return erase(image if distort is None else distort(image, key), key)

        return augment

    @torch.no_grad()
    def judge(self, step: ClassifyStep, indices: Sequence[int], out: Path) -> Judged:
        bad_images, judged = evaluation_bad_images(self.config, self.data.val, out), Judged()
        for index, image, found in self.predict(step, indices, bad_images):
            judged.indices += index.tolist()
            judged.answers += found.argmax(axis=1).tolist()
            judged.true_probabilities += found[np.arange(len(index)), self.data.val_labels[index]].tolist()
            for number, row, pixels in zip(index.tolist(), found, image, strict=True):
                answer = int(row.argmax())
                if answer != self.data.val_labels[number]:
                    judged.worst.offer(float(row[answer]), number, partial(self._mistake, step, number, row, pixels))
        return judged

    def conclude(self, parts: Sequence[Judged], out: Path) -> dict[str, float]:
        worst = Worst(_WORST)
        for part in parts:
            worst.add(part.worst)
        indices = np.concatenate([part.indices for part in parts]).astype(np.int64)
        if not len(indices):
            raise evaluation_bad_images(self.config, self.data.val, out).none_readable()
        order = np.argsort(indices)  # so that sums do not depend on the number of processes
        labels = self.data.val_labels[indices[order]]
        predictions = np.concatenate([part.answers for part in parts]).astype(np.int64)[order]
        true_probabilities = np.concatenate([part.true_probabilities for part in parts]).astype(np.float32)[order]
        classes = len(self.data.classes)
        loss = -np.log(np.maximum(true_probabilities, 1e-12)).mean()
        matrix = confusion_matrix(labels, predictions, classes)
        rows = class_rows(matrix, "images")
        write_json(out / "per_class.json", dict(zip(self.data.classes, rows, strict=True)))
        draw_confusion(matrix, self.data.classes, out / "confusion.png")
        figures = {
            "val_loss": float(loss),
            "top1": top1(labels, predictions),
            "balanced_accuracy": balanced_accuracy(labels, predictions, classes),
        }
        write_record(
            out,
            figures=figures,
            images=len(labels),
            names=self.data.classes,
            rows=rows,
            judged_by="f1",
            worst=worst,
            wrong=int((labels != predictions).sum()),
            right=base64.b64encode(np.packbits(labels == predictions).tobytes()).decode(),  # by index; 8 images a byte
            **confusion_part(matrix, self.data.classes),
        )
        return figures

    def predict(
        self, step: ClassifyStep, indices: Sequence[int], bad_images: BadImages
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[Any], NDArray[np.float32]]]:
        """Yield the readable ones of the evaluation images `indices`, in batches.

        A batch is indices (B,), pixels (B, H, W, C) and class probabilities (B, K).
        """
        config = self.config
        assert config.image_size is not None
        with evaluating(step):
            for index, image in eval_batches(
                self.data.val,
                indices,
                crop=CentreCrop(size=config.read_size, fraction=config.eval_crop),
                channels=config.channels,
                dtype=self.dtype,
                batch_size=max(config.batch_size, 64),
                threads=config.workers or cpu_cores(),
                bad_images=bad_images,
            ):
                yield index, image, classify(step.evaluated, step, image)

    def _mistake(
        self, step: ClassifyStep, index: int, row: NDArray[np.float32], pixels: NDArray[Any]
    ) -> dict[str, Any]:
        """Describe a wrong answer for a record: class probabilities (K,) of what was seen of an image (H, W, C)."""
        classes, true = self.data.classes, self.data.val_labels[index]
        return {
            "name": short(self.data.val.name(index)),
            "true": short(classes[true]),
            "true_probability": float(row[true]),
            "answer": short(classes[row.argmax()]),
            "probability": float(row.max()),
            **thumbnail(picture_of(step, pixels), _THUMBNAIL),
        }

    def save(self, step: ClassifyStep, directory: Path) -> None:
        model = step.evaluated
        config = self.config
        save_hub(
            directory,
            model,
            model.state_dict(),
            config,
            classes=self.data.classes,
            crop=config.eval_crop,
            dtype=self.dtype,
        )


def load_predictor(directory: Path, device: str) -> ClassifyPredictor:
    """Read the classifier of a fine-tuned run's model directory."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    facts = settings["pretrained_cfg"]
    channels, height, width = facts["input_size"]
    hears = SoundInput(settings) if "sound" in settings else None
    return ClassifyPredictor(
        backbone=timm.create_model(f"local-dir:{directory}", pretrained=True).eval().to(device),
        pixels=(hears or PixelStep(facts["mean"], facts["std"])).to(device),
        crop=CentreCrop(size=(hears.samples, 1) if hears else (height, width), fraction=facts["crop_pct"]),
        rate=hears.rate if hears else None,
        channels=channels,
        classes=tuple(settings["label_names"]),
        dtype=np.dtype(settings.get("pixel_dtype", "uint8")),  # not written by version 0.1
    )


def _open(config: ClassifyConfig) -> LabelledImages:
    assert config.data is not None
    return open_labelled(
        config.data,
        val_fraction=config.val_fraction,
        seed=config.seed,
        labels_per_class=config.labels_per_class,
        label_seed=config.label_seed,
        frames=config.frames,
    )


def _summarize(prediction: dict[str, Any]) -> str:
    return ", ".join(f"{label} {probability:.3f}" for label, probability in prediction["top"])


TASK = TaskSpec(
    config=ClassifyConfig, open_data=_open, create=ClassifyTask, load_predictor=load_predictor, summarize=_summarize
)
