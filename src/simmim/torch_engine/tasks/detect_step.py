"""The detection module: its training step, its predictions and its file.

Shapes: `B` images, `C` channels, `H W` pixels, `n` objects of an image. A box is (left, top, right, bottom) in pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from simmim.config.tasks import DetectConfig
from simmim.config.validation import from_settings
from simmim.data.labelled.detection import boxes_in_image, encode_mask
from simmim.torch_engine.models.drop_path import route_drop_path
from simmim.torch_engine.models.evaluating import by_halves
from simmim.torch_engine.models.masked_image_model import mirror
from simmim.torch_engine.tasks.backbones import count_levels
from simmim.torch_engine.tasks.base import TaskStep, save_model
from simmim.torch_engine.tasks.detectors import SampleKeys, create_detector, first_label
from simmim.torch_engine.tasks.pyramid import create_pyramid

# What of a configuration a saved detector is built from again.
_BUILT_FROM = ("model", "model_args", "image_size", "channels", "mean", "std", "detector", "pyramid_channels")


@dataclass(frozen=True)
class Found:
    """Objects found in an image, in its own pixels, best first."""

    boxes: NDArray[np.float64]
    """(n, 4)."""
    labels: NDArray[np.int64]
    """(n,), from 0 on."""
    scores: NDArray[np.float64]
    """(n,), in [0, 1]."""
    masks: list[dict[str, Any]] | None
    """n of (H, W), as COCO's compressed run lengths: a hundred masks of every evaluation image must fit in memory."""


class DetectStep(TaskStep):
    """A detector's losses on a batch, and the objects that it finds in images."""

    def __init__(
        self, config: DetectConfig, classes: int, weights: dict[str, Tensor] | None, *, levels: int | None = None
    ):
        assert isinstance(config.mean, tuple)
        assert isinstance(config.std, tuple)
        assert config.image_size is not None
        super().__init__(config.mean, config.std)
        self.size, self.keys = config.image_size, SampleKeys()
        self.first_label, self.finds_masks = first_label(config.detector), config.detector == "mask_rcnn"
        pyramid = create_pyramid(config, weights, channels=config.pyramid_channels)
        self.draws = route_drop_path(pyramid.backbone)
        self.detector = create_detector(config, pyramid, classes, self.keys, levels=levels)

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]  # no attribute: the detector holds it already
        return self.detector.backbone.pyramid.backbone

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what makes the maps: what follows has shapes that depend on what is found."""
        self.detector.backbone.compile(*args, **kwargs)

    def forward(
        self,
        image: Tensor,
        flip: Tensor,
        boxes: Tensor,
        label: Tensor,
        key: Tensor,
        mask: Tensor | None = None,
        drop_path: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        `boxes` (B, n, 4), `label` (B, n) from 1 on, 0 where there is no object, `mask` (B, n, H, W), `key` (B,).
        """
        self.draws.uniform = drop_path
        self.keys.numbers = key.tolist()
        boxes = mirror_boxes(boxes, flip, self.size)
        if mask is not None:
            mask = mirror(mask, flip)
        targets = []
        for number, there in enumerate(label > 0):
            target = {"boxes": boxes[number, there], "labels": label[number, there] - 1 + self.first_label}
            if mask is not None:
                target["masks"] = mask[number, there]
            targets.append(target)
        losses = self.detector(self.prepare(image, flip), targets)
        total = sum(losses.values(), torch.zeros((), device=image.device))
        return {"loss": total} | {f"loss/{name.removeprefix('loss_')}": loss for name, loss in losses.items()}

    @torch.no_grad()
    def find(self, image: NDArray[Any], sizes: Sequence[tuple[int, int]]) -> list[Found]:
        """Find objects in the letterboxes (B, H, W, C) of images of `sizes` (height, width), in evaluation mode."""

        def look(part: slice) -> list[Found]:
            images = self.normalize(torch.from_numpy(image[part]).to(self.mean.device))
            return [self._place(found, *size) for found, size in zip(self.detector(images), sizes[part], strict=True)]

        return [found for part in by_halves(look, [slice(0, len(image))]) for found in part]

    def _place(self, found: dict[str, Tensor], height: int, width: int) -> Found:
        boxes = boxes_in_image(found["boxes"].double().cpu().numpy(), height, width, self.size)
        clipped = boxes.clip(0, [width, height] * 2)
        kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)  # others lie beside the image in its letterbox
        masks = None
        if self.finds_masks:
            shapes = found["masks"].float().cpu()[torch.from_numpy(kept)]
            # Into the whole boxes: cut off at the image's edges, a mask would be squeezed.
            whole = paste_masks_in_image(shapes, torch.from_numpy(boxes[kept]), (height, width))[:, 0] >= 0.5
            masks = [encode_mask(mask) for mask in whole.numpy()]
        labels = found["labels"].cpu().numpy() - self.first_label
        return Found(clipped[kept], labels[kept], found["scores"].double().cpu().numpy()[kept], masks)


def mirror_boxes(boxes: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """Mirror boxes (B, n, 4) in images of `size` (H, W) as `mirror` does their pixels."""
    for chosen, axis in zip(flip.unbind(1), (0, 1), strict=False):
        mirrored = boxes.clone()
        mirrored[..., axis] = size[1 - axis] - boxes[..., axis + 2]
        mirrored[..., axis + 2] = size[1 - axis] - boxes[..., axis]
        boxes = torch.where(chosen.view(-1, 1, 1), mirrored, boxes)
    return boxes


def save_detector(step: DetectStep, config: DetectConfig, classes: Sequence[str], directory: Path) -> None:
    """Write the detector under torchvision's names, each file whole or not at all."""
    settings = {name: getattr(config, name) for name in _BUILT_FROM}
    save_model(directory, step.detector, {**settings, "label_names": list(classes)})


def load_detector(directory: Path, device: str) -> tuple[DetectStep, DetectConfig, tuple[str, ...]]:
    """Read what `save_detector` wrote: the step in evaluation mode on a device, its configuration, its classes."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = from_settings(DetectConfig, {name: settings[name] for name in _BUILT_FROM})
    classes = tuple(settings["label_names"])
    weights = load_file(directory / "model.safetensors")
    step = DetectStep(config, len(classes), None, levels=count_levels(weights))
    step.detector.load_state_dict(weights)
    return step.to(device).eval(), config, classes
