"""Do an encoder's features tell the class of an object in its image as well as of the object cut out?

    OMP_NUM_THREADS=1 python benchmarks/class_in_context.py --stamps DIR --run RUN [RUN ...]

`--stamps` is read as by `simmim finetune detect`. `--run` takes runs of `simmim pretrain`, and of `simmim finetune
detect`, whose encoder is judged as that left it. Each object of the training images, in its true box, teaches a k-NN
vote and a linear classifier; those of the test images are judged, by balanced accuracy. Features are the mean of a
stage's cells: in the box, where the encoder sees the image of 128 pixels, as a detector of `stamps.py` does, or of the
box alone, cut out of that image and resized to 64 pixels.

Floors: chance, raw pixels of the boxes at 16 × 16, and the encoder with random weights.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from frozen_features import classify, vote
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align

import simmim
from simmim.data.decode import decode
from simmim.data.labelled.detection import AnnotatedImages, open_detection
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.torch_engine.tasks.detect_step import load_detector
from simmim.torch_engine.tasks.probe import Features
from simmim.torch_engine.train.storage import untrained_encoder

SIDE, CUT, RAW = 128, 64, 16
STRIDES = (8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stamps", type=Path, required=True)
    parser.add_argument("--run", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    data = open_detection(str(options.stamps))
    parts = read_part(data.train), read_part(data.val)
    classes = len(data.classes)
    found: dict[str, Any] = {"chance": 1 / classes, "objects": [len(labels) for _, _, labels in parts]}
    found["raw pixels"] = judge([cut(images, boxes, RAW).flatten(1) for images, boxes, _ in parts], parts, classes)
    torch.manual_seed(0)
    encoders = {"untrained": untrained_encoder(next(run for run in options.run if (run / "encoder").is_dir()))}
    for run in options.run:
        tuned = (run / "model").is_dir()
        encoders[run.name] = load_detector(run / "model", "cpu")[0].backbone if tuned else simmim.load_encoder(run)
    for name, encoder in encoders.items():
        found[name] = {}
        for place in ("in its image", "cut out"):
            pooled = [pool(encoder.eval(), images, boxes, place) for images, boxes, _ in parts]
            for number, stride in enumerate(STRIDES):
                row = judge([features[number] for features in pooled], parts, classes)
                found[name][f"{place}, stride {stride}"] = row
                print(name, place, stride, row, flush=True)
    about = {"command": "python benchmarks/class_in_context.py --stamps DIR --run RUN ...", **results.machine()}
    results.save("class_in_context", {**about, "balanced_accuracy": found}, quiet=True)


def read_part(source: AnnotatedImages) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return normalised images (N, 3, 128, 128), the boxes of each (n, 4) in their pixels, and all labels."""
    images = [Image.fromarray(decode(source.read(i), channels=3, dtype=np.uint8)) for i in range(len(source))]
    pixels = np.stack([np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for image in images])
    scales = [torch.tensor([SIDE / image.width, SIDE / image.height] * 2) for image in images]
    boxes = [torch.from_numpy(each.boxes).float() * scale for each, scale in zip(source.objects, scales, strict=True)]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    normal = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    return normal, boxes, torch.from_numpy(np.concatenate([each.labels for each in source.objects]))


def cut(images: Tensor, boxes: list[Tensor], side: int) -> Tensor:
    """Cut the boxes out of their images and resize them: (objects, 3, side, side)."""
    return roi_align(images, boxes, (side, side), aligned=True)


@torch.no_grad()
def pool(encoder: Any, images: Tensor, boxes: list[Tensor], place: str) -> list[Tensor]:
    """Return each stage's features of the objects, (objects, D), from stride 8 to 32."""
    if place == "cut out":
        images = cut(images, boxes, CUT)
        boxes = [torch.tensor([[0.0, 0.0, CUT, CUT]])] * len(images)
    parts = []
    for some, where in zip(images.split(32), [boxes[i : i + 32] for i in range(0, len(boxes), 32)], strict=True):
        maps = encoder.forward_intermediates(some, indices=len(STRIDES), intermediates_only=True)
        pairs = zip(maps, STRIDES, strict=True)
        parts.append([roi_align(x, where, (2, 2), 1 / stride, aligned=True).mean(dim=(2, 3)) for x, stride in pairs])
    return [torch.cat(stage) for stage in zip(*parts, strict=True)]


def judge(features: list[Tensor], parts: tuple[tuple[Tensor, list[Tensor], Tensor], ...], classes: int) -> list[float]:
    """Return the balanced accuracy of k-NN and of a linear classifier."""
    (train, test), (labels, test_labels) = features, (part[2].numpy() for part in parts)
    both = Features(train.numpy(), labels, test.numpy(), test_labels, classes, np.arange(len(test)))
    return [round(row["balanced_accuracy"], 4) for row in (vote(both), classify(both, 0))]


if __name__ == "__main__":
    main()
