"""Export a detector of one stage (FCOS, RetinaNet) to ONNX: an image in, its objects out.

Shapes: `C` channels, `H W` pixels of the letterbox, `n` objects. A box is (left, top, right, bottom) in its pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops

from simmim.errors import UserError
from simmim.torch_engine.interop.export import TOLERANCE, Source
from simmim.torch_engine.interop.onnx_file import write_onnx

INPUTS = ("images", "score_threshold")
OUTPUTS = ("boxes", "labels", "scores")
_PROBED = 4  # random images on which the file is compared


def export_detector(source: Source, detector: nn.Module, file: Path) -> list[str]:
    """Write `file`: a normalised letterbox (1, C, H, W) and the least score (a scalar) → `OUTPUTS`, best first.

    `detector` is the source's, changed to what the exporter takes. Raises `UserError` if onnxruntime finds other
    objects than PyTorch.
    """
    with _nms_without_branches(max(source.input_size[1:]) + 1):
        values = (source.images(1), torch.tensor(source.backbone.score_thresh))
        inputs: dict[str, Tensor] = dict(zip(INPUTS, values, strict=True))
        session = write_onnx(file, _Objects(detector), inputs, OUTPUTS, _facts(source))
    ours, largest, count = _Objects(source.backbone), 0.0, 0
    for image in source.images(_PROBED).split(1):
        least = torch.tensor(0.0)  # so that there is something to compare in images of noise
        with torch.no_grad():
            expected = ours(image, least)
        given = dict(zip(INPUTS, (image.numpy(), least.numpy()), strict=True))
        found = tuple(torch.from_numpy(array) for array in session.run(list(OUTPUTS), given))
        count += len(expected[0])
        largest = max(largest, distance(expected, found, max(source.input_size[1:])))
    if not largest <= TOLERANCE:
        raise UserError(
            f"onnxruntime finds other objects than {source.run} (off by {largest:.2g}), so nothing was written; use it "
            "with simmim predict"
        )
    return [
        f"wrote {file.name}: {', '.join(INPUTS)} → {', '.join(OUTPUTS)}",
        f"reloaded and compared, {_PROBED} images, {count} objects: within {largest:.1g}",
    ]


class _Objects(nn.Module):
    """Objects that a detector finds in one image, best first."""

    def __init__(self, detector: Any):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, least: Tensor) -> tuple[Tensor, ...]:
        usual, self.detector.score_thresh = self.detector.score_thresh, least
        try:
            found = self.detector(images)[0]
        finally:
            self.detector.score_thresh = usual
        return tuple(found[name] for name in OUTPUTS)


def distance(first: tuple[Tensor, ...], second: tuple[Tensor, ...], side: int) -> float:
    """Return how far an object of one finding is at most from the nearest of the other; infinite if one is empty.

    Boxes count as parts of `side` and scores as they are; objects of different classes are at least 1 apart. The order
    does not count, since scores that are equal but for rounding may come in any.
    """
    objects = [torch.cat([found[0] / side, found[1][:, None], found[2][:, None]], 1) for found in (first, second)]
    if not all(len(each) for each in objects):
        return 0.0 if len(objects[0]) == len(objects[1]) else float("inf")
    apart = torch.cdist(*objects, p=torch.inf)
    return float(torch.maximum(apart.min(0).values.max(), apart.min(1).values.max()))


@contextmanager
def _nms_without_branches(apart: float) -> Iterator[None]:
    """Replace torchvision's suppression by class, which chooses its way by the number of boxes, for an export.

    It moves the classes `apart`, by more than an image's side, so that boxes of two never overlap.
    """
    usual = box_ops.batched_nms

    def separated(boxes: Tensor, scores: Tensor, labels: Tensor, most: float) -> Tensor:
        return box_ops.nms(boxes + (apart * labels.to(boxes.dtype))[:, None], scores, most)

    box_ops.batched_nms = separated
    try:
        yield
    finally:
        box_ops.batched_nms = usual


def _facts(source: Source) -> dict[str, Any]:
    """Tell how to prepare an image, and to read what is found."""
    channels, height, width = source.input_size
    facts: dict[str, Any] = {
        "task": source.task, "input_size": source.input_size, "channels": channels, "crop": "letterbox",
        "interpolation": "bilinear", "antialias": True, "mean": source.mean, "std": source.std,
        "score_threshold": source.backbone.score_thresh, "classes": source.classes,
    }  # fmt: skip
    facts["preparation"] = (
        f"Turn the image upright (EXIF), lay transparency on white, convert it to {channels} channels. Resize it by "
        f"one factor, min({height} / its height, {width} / its width), by bilinear interpolation with antialiasing, as "
        f"Pillow's BILINEAR, into the top left of {height}x{width} (H x W); fill the rest with the mean. Then (8-bit "
        "values / 255 - mean) / std, in the order 1, C, H, W. Divide the boxes found by the factor and cut them off "
        "at the image's edges. Labels count the classes from 0."
    )
    return facts
