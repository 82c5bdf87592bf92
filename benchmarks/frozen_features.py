"""Encoders of the benchmarks of features, and how frozen features are computed and judged."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from labelled_sets import SIDE
from numpy.typing import NDArray
from torch import Tensor

import simmim
from simmim.data.sources import ArrayImages
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.torch_engine.accelerators import choose_precision
from simmim.torch_engine.models.encoders import create_backbone
from simmim.torch_engine.models.masked_image_model import PixelStep
from simmim.torch_engine.tasks.features import FeatureReader, PooledFeatures
from simmim.torch_engine.tasks.linear import fit_linear
from simmim.torch_engine.tasks.probe import NEIGHBOURS, Features

ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {
        "model": "vit_tiny_patch16_224",
        "model_args": {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
        "image_size": 32,
        "mask": {"kind": "random", "cell": 4},
    },
    # Images are enlarged to 64 pixels, which leaves 2x2 cells of the feature map at the usual stride of 32.
    "resnet": {
        "model": "resnet18",
        "model_args": {"channels": [32, 64, 128, 256]},
        "image_size": 64,
        "mask": {"kind": "random", "cell": 16},
    },
}


def vote(features: Features) -> dict[str, Any]:
    return features.judge(features.vote(NEIGHBOURS))


def classify(features: Features, seed: int) -> dict[str, Any]:
    train, labels, classes = features.train, features.train_labels, features.num_classes
    linear = fit_linear(train, labels, classes, seed=seed, device=torch.device("cpu"))
    return {**features.judge(linear.classify(features.val)), "l2": linear.penalty}


def pretrained(start: Path, images: dict[str, Any]) -> Features:
    backbone: Any = simmim.load_encoder(start)
    facts = backbone.pretrained_cfg
    return read_features(PooledFeatures(backbone), images, facts["input_size"][1:], facts["mean"], facts["std"])


def untrained(encoder: str, seed: int, images: dict[str, Any]) -> Features:
    """Compute features by random weights, those that pretraining with this seed begins with."""
    settings, size = ENCODERS[encoder], (ENCODERS[encoder]["image_size"],) * 2
    torch.manual_seed(seed)
    backbone = create_backbone(settings["model"], image_size=size, model_args=settings["model_args"]).eval()
    return read_features(PooledFeatures(backbone), images, size)


def raw_pixels(images: dict[str, Any]) -> Features:
    """Flatten the pixels and standardise each over the training images: the vote gains by it, or is as good."""
    return standardised(read_features(lambda pixels: pixels.flatten(1), images, (SIDE, SIDE)))


def standardised(found: Features) -> Features:
    """Scale each value by its mean and deviation over the training images."""
    mean, std = found.train.mean(axis=0), np.maximum(found.train.std(axis=0), 1e-6)
    return dataclasses.replace(found, train=(found.train - mean) / std, val=(found.val - mean) / std)


def read_features(
    model: Callable[[Tensor], Tensor],
    images: dict[str, NDArray[Any]],
    size: tuple[int, int],
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Features:
    """Compute the features of a set's images, resized to `size` and normalised."""
    read = FeatureReader(
        model=model,
        pixels=PixelStep(mean, std),
        size=size,
        channels=3,
        dtype=np.dtype(np.uint8),
        precision=choose_precision("auto", "cpu"),
        batch_size=64,
        workers=1,
        max_bad_fraction=0.0,
    )
    (_, train), (_, test) = (read(ArrayImages(images[name], name)) for name in ("x_train", "x_test"))
    labels = (images[name].astype(np.int64) for name in ("y_train", "y_test"))
    return Features(train, next(labels), test, next(labels), len(images["class_names"]), np.arange(len(test)))
