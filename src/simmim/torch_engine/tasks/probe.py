"""Probe frozen features with labelled images: a k-nearest-neighbour vote or a linear classifier.

Shapes: `N` images, `D` features, `K` classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from simmim.config.commands import NEIGHBOURS, Method, ProbeConfig
from simmim.config.pretraining import PretrainConfig
from simmim.config.validation import from_settings
from simmim.data.augment import CentreCrop
from simmim.data.labelled.classes import LabelledImages, open_labelled
from simmim.data.sounds import as_sounds, holds_sounds, read_as
from simmim.data.sources import sniff
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.metrics.classification import balanced_accuracy, knn_predict, top1
from simmim.torch_engine.accelerators import choose_device, choose_precision
from simmim.torch_engine.models.evaluating import evaluating
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.tasks.features import FeatureReader, LastFeatures, PooledFeatures, choose_pool
from simmim.torch_engine.tasks.linear import LinearClassifier, fit_linear
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.storage import load_encoder, save_classifier, untrained_encoder
from simmim.training.origins import is_timms
from simmim.training.run_directory import Run, mark_task
from simmim.training.whole_files import new_directory


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Measure the accuracy of a classifier on frozen features; see `simmim.probe` for the figures."""
    config = from_settings(ProbeConfig, vars(config))
    if config.out is None:
        return _probe(config, None)
    _check_out(config)
    with new_directory(config.out) as out:
        return _probe(config, out)


def _check_out(config: ProbeConfig) -> None:
    """Raise `UserError` where there is no classifier to write."""
    if config.method != "linear":
        raise UserError(f"--out writes a linear classifier, and --method is {config.method}; add --method linear")
    if config.layer != -1 or config.pool not in ("auto", "avg"):
        option = f"--layer {config.layer}" if config.layer != -1 else f"--pool {config.pool}"
        raise UserError(f"--out writes a classifier on the mean of the last layer, and not {option}; leave that out")
    if is_timms(config.run):
        alone = "" if config.run.startswith("timm:") else "give its directory alone, or "
        remedy = f"{alone}use simmim finetune classify --from {config.run}"
        raise UserError(f"--out needs an encoder that simmim saved, and {config.run} is read as timm's; {remedy}")


def _probe(config: ProbeConfig, out: Path | None) -> dict[str, Any]:
    opened = Probe(config)
    features = opened.features()
    mine = opened.classify(features, config.method)
    if out is not None:
        assert mine.linear is not None
        opened.save(mine.linear, out)
    baselines = {}
    if config.baselines:
        for name, model in (("raw_pixels", raw_pixels), ("untrained", opened.untrained())):
            baseline = opened.features(model)
            baselines[name] = baseline.judge(opened.classify(baseline, config.method).classes)
    return {
        "method": config.method, **mine.setting, **features.judge(mine.classes), **baselines,
        **features.counts(opened.images), **({} if out is None else {"classifier": config.out}),
    }  # fmt: skip


class Probe:
    """An encoder with labelled images to judge it by, and with other features on these in the same way."""

    def __init__(self, config: ProbeConfig):
        """Raise `UserError` for a run without encoder, images that do not fit, and settings that do not."""
        self.config, self.device = config, choose_device(config.device)
        backbone = load_encoder(config.run)
        if config.out is not None and getattr(backbone, "sees_windows", False):
            raise UserError(f"{config.run} was trained on windows, for which there is no classifier; leave out --out")
        self.images = open_labelled(
            config.data,
            val_fraction=config.val_fraction,
            seed=config.seed,
            labels_per_class=config.labels_per_class,
            label_seed=config.label_seed,
            frames=config.frames,
        )
        # A written classifier computes in fp32.
        precision = "fp32" if config.out is not None and config.precision == "auto" else config.precision
        self._read = FeatureReader.of_encoder(
            config.run,
            backbone.to(self.device),
            self.pooled(backbone),
            self.images.train,
            precision=choose_precision(precision, self.device),
            batch_size=config.batch_size,
            workers=config.workers or cpu_cores(),
            max_bad_fraction=config.max_bad_fraction,
        )

    def pooled(self, backbone: nn.Module) -> nn.Module:
        """Return a model of the features that are asked for, of this encoder with any weights."""
        if self.config.out is not None:
            return LastFeatures(backbone.to(self.device))
        pool = choose_pool(self.config.pool, self.config.run, layer=self.config.layer)
        return PooledFeatures(backbone.to(self.device), layer=self.config.layer, pool=pool)

    def untrained(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        return self.pooled(untrained_encoder(self.config.run))

    def features(self, model: Callable[[Tensor], Tensor] | None = None) -> "Features":
        """Read the images' features: those of the encoder, or of another model."""
        return Features.read(self.images, replace(self._read, model=model) if model else self._read)

    def classify(self, features: "Features", method: Method, k: int | None = None) -> "Answers":
        """Classify the evaluation images; `k` neighbours may be given."""
        config, k = self.config, k or self.config.k
        if method == "knn":
            return Answers(features.vote(k, config.temperature), {"k": k})
        linear = fit_linear(
            features.train,
            features.train_labels,
            features.num_classes,
            seed=config.seed,
            device=torch.device(self.device),
        )
        return Answers(linear.classify(features.val), {"l2": linear.penalty}, linear)

    def save(self, linear: LinearClassifier, directory: Path) -> None:
        """Write the encoder with a linear classifier of its features as the model of a classification.

        Raises `UserError` where timm reads another model from what was written.
        """
        run = self.config.run
        backbone: Any = load_encoder(run)
        classes = self.images.classes
        backbone.reset_classifier(len(classes), global_pool="avg")
        last = backbone.get_classifier()
        with torch.no_grad():
            last.weight.copy_(torch.from_numpy(linear.weight))
            last.bias.copy_(torch.from_numpy(linear.bias))
        save_classifier(directory, run, backbone, classes, CentreCrop.fraction, self._read.dtype)
        again = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
        images = torch.randn(2, *backbone.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, theirs = backbone(images), again(images)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
            remedy = f"use simmim finetune classify --from {run}"
            raise UserError(f"timm reads another classifier than that of {run}, so nothing was written; {remedy}")
        mark_task(directory, "classify")


def raw_pixels(images: Tensor) -> Tensor:
    """Return the pixels themselves as features: (B, C, H, W) → (B, C·h·w), shrunk to 32 × 32 where larger."""
    height, width = images.shape[2:]
    return functional.adaptive_avg_pool2d(images, (min(height, 32), min(width, 32))).flatten(1)


@dataclass(frozen=True)
class Features:
    """Features (N, D) and labels (N,) of the training and evaluation images."""

    train: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    val: NDArray[np.float32]
    val_labels: NDArray[np.int64]
    num_classes: int
    val_images: NDArray[np.int64]
    """Numbers of the evaluation images that could be read."""

    @classmethod
    def read(cls, images: LabelledImages, read: FeatureReader, world: World | None = None) -> "Features":
        """Read the features of all images; the processes of a `world` share the reading, and all get them."""
        train, train_features = read(images.train, "probe train", world)
        val, val_features = read(images.val, "probe val", world)
        labels, val_labels = images.train_labels[train], images.val_labels[val]
        return cls(train_features, labels, val_features, val_labels, len(images.classes), val)

    def vote(self, k: int, temperature: float = 0.07) -> NDArray[np.int64]:
        return knn_predict(
            self.train, self.train_labels, self.val, num_classes=self.num_classes, k=k, temperature=temperature
        )

    def judge(self, predictions: NDArray[np.int64]) -> dict[str, float]:
        return {
            "top1": top1(self.val_labels, predictions),
            "balanced_accuracy": balanced_accuracy(self.val_labels, predictions, self.num_classes),
        }

    def counts(self, images: LabelledImages) -> dict[str, int]:
        return {
            "classes": self.num_classes,
            "train_images": len(self.train),
            "val_images": len(self.val),
            "bad_images": len(images.train) + len(images.val) - len(self.train) - len(self.val),
        }


@dataclass(frozen=True)
class Answers:
    """Classes (N,) of the evaluation images, and how they were found."""

    classes: NDArray[np.int64]
    setting: dict[str, float]
    linear: LinearClassifier | None = None


def describe(figures: dict[str, Any]) -> str:
    """Format the figures as text."""
    how = f"k-NN, k = {figures['k']}" if figures["method"] == "knn" else f"linear, L2 penalty {figures['l2']:g}"
    bad = f", {figures['bad_images']} could not be read" if figures["bad_images"] else ""
    baselines = "".join(
        f"{label}: top-1 {figures[name]['top1']:.4f}, balanced accuracy {figures[name]['balanced_accuracy']:.4f}\n"
        for name, label in (("raw_pixels", "raw pixels"), ("untrained", "untrained encoder"))
        if name in figures
    )
    written = f"\nthe classifier is {figures['classifier']}" if "classifier" in figures else ""
    return (
        f"{how}: top-1 {figures['top1']:.4f}, balanced accuracy {figures['balanced_accuracy']:.4f}\n{baselines}"
        f"{figures['val_images']} images of {figures['classes']} classes, judged from {figures['train_images']}{bad}"
        f"{written}"
    )


class KnnCheck:
    """The k-NN check of `--probe` during pretraining. Opens the images at once; raises `UserError` if it cannot."""

    def __init__(self, config: PretrainConfig):
        assert config.probe is not None
        self._name = config.probe
        self._images = open_labelled(config.probe, seed=config.seed)
        self._sounds = holds_sounds(self._images.train)
        train = as_sounds(self._images.train, config.sound.rate) if self._sounds else self._images.train
        self._dtype = sniff(train, channels=1 if self._sounds else config.channels)
        self._raw_pixels: float | None = None

    def describe(self) -> str:
        images = self._images
        return (
            f"{self._name}: {len(images.train)} labelled images judge {len(images.val)} others, "
            f"{len(images.classes)} classes"
        )

    def __call__(self, step: PretrainStep, config: PretrainConfig, world: World) -> dict[str, float]:
        """Return figures of the encoder of `step`, for the complete configuration. All ranks call it together."""
        encoder = step.model.encoder
        read_as(self._images.train, config.sound.rate if config.input == "sounds" else None, "the encoder")
        read = FeatureReader(
            # The encoder and not its backbone, in which the mask of the last training step still hangs.
            model=lambda images: encoder(images).float().mean(dim=(1, 2)),
            pixels=step,
            size=config.read_size,
            channels=config.channels,
            dtype=self._dtype,
            precision=config.precision,
            batch_size=min(config.batch_size, 64),
            workers=config.workers or cpu_cores(),
            max_bad_fraction=config.max_bad_fraction,
            windows=config.crop == "pixels",
            listed_in=Run(Path(config.out)).bad_images if config.out else None,
        )
        if self._raw_pixels is None:
            self._raw_pixels = self._judge(replace(read, model=raw_pixels), world)["top1"]
        with evaluating(step):
            figures = self._judge(read, world)
        return {f"knn_{name}": value for name, value in figures.items()} | {"knn_raw_pixels": self._raw_pixels}

    def _judge(self, read: FeatureReader, world: World) -> dict[str, float]:
        """Judge the evaluation images by a vote, of which each rank counts those of every `world.size`-th image."""
        features = Features.read(self._images, read, world)
        share = replace(features, val=features.val[world.rank :: world.size])
        votes = np.empty_like(features.val_labels)
        for rank, found in enumerate(world.collect(lambda: share.vote(min(NEIGHBOURS, len(features.train))))):
            votes[rank :: world.size] = found
        return features.judge(votes)
