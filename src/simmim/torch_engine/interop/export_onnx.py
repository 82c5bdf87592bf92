"""Export to ONNX, with a free batch size.

Shapes: `B` images, `C` channels, `H W` pixels, `D` features, `K` classes.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from simmim.errors import UserError
from simmim.torch_engine.interop.export import Outputs, Source, compare
from simmim.torch_engine.interop.export_detector import export_detector
from simmim.torch_engine.interop.onnx_file import write_onnx
from simmim.torch_engine.models.sound_input import SoundInput


def export_onnx(source: Source, out: Path, _allow_loss: bool) -> list[str]:
    """Export `model.onnx`: normalised images (B, C, H, W) → timm's `forward_features` and an embedding (B, D).

    A fine-tuned classifier outputs logits (B, K) instead, a segmenter logits (B, K, H, W), and a detector the objects
    of one image. A model of sounds takes `samples` (B, n) within -1..1, as the front end is in the file. The file's
    metadata say how to prepare an image, or a sound.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--format onnx needs {package}: pip install 'simmim[onnx]'")
    if source.task == "detect":
        return export_detector(source, _without_fused_attention(source.backbone), out / "model.onnx")
    names = ("features", "embedding") if source.task == "encoder" else ("logits",)
    file = out / "model.onnx"
    given, example = ("images", source.images) if source.hears is None else ("samples", source.samples)
    session = write_onnx(
        file,
        _Outputs(_without_fused_attention(source.backbone), source.task, source.hears),
        {given: example(2)},
        names,
        _facts(source),
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    module = _Outputs(source.backbone, source.task, source.hears)

    def pair(number: int) -> tuple[str, Outputs, Outputs]:
        def reloaded(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run([names[number]], {given: images.numpy()})[0])

        return names[number], lambda images: module(images)[number], reloaded

    pairs = [pair(number) for number in range(len(names))]
    found = [compare(source, "onnxruntime", pairs, example(batch)) for batch in (1, 7)]
    return [f"wrote {file.name}: {given} → {', '.join(names)}", *found]


class _Outputs(nn.Module):
    """Outputs of the exported graph, for images, or for samples where there is a front end."""

    def __init__(self, backbone: Any, task: str, hears: nn.Module | None):
        super().__init__()
        self.backbone, self.task, self.hears = backbone, task, hears

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.hears is not None:
            images = self.hears(images)
        if self.task == "classify":
            return (self.backbone(images),)
        if self.task == "segment":
            size = (images.shape[2], images.shape[3])
            return (functional.interpolate(self.backbone(images), size=size, mode="bilinear", align_corners=False),)
        features = self.backbone.forward_features(images)
        return features, self.backbone.forward_head(features)


def _without_fused_attention(backbone: nn.Module) -> nn.Module:
    """Copy the model with unfused attention: the exporter does not support fused attention with a bias."""
    backbone = copy.deepcopy(backbone)
    for part in backbone.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # type: ignore[assignment]
    return backbone


def _facts(source: Source) -> dict[str, Any]:
    """Tell all that preparing an image takes, as values and in words."""
    if source.hears is not None:
        return _facts_of_sounds(source, source.hears)
    channels, height, width = source.input_size
    crop = {"crop": "whole"} if source.crop is None else {"crop": "centre", "crop_fraction": source.crop}
    windows = source.config is not None and source.config.crop == "pixels"
    if windows:
        crop = {"crop": "window"}
    facts: dict[str, Any] = {
        "task": source.task, "input_size": source.input_size, "channels": channels, **crop,
        "interpolation": "bilinear", "antialias": True, "mean": source.mean, "std": source.std,
    }  # fmt: skip
    if source.classes:
        facts["classes"] = source.classes
    box = (
        "the whole image"
        if source.crop is None
        else f"the box in the middle with {source.crop:g} of the sides of the largest one of shape {height}:{width}"
    )
    if windows:
        box = f"a window of {height}x{width} pixels, of an image with a shorter side the largest box of this shape,"
    values = "8-bit values, or 16-bit values / 257" if source.dtype == "float32" else "8-bit values"
    facts["preparation"] = (
        f"Turn the image upright (EXIF), lay transparency on white, convert it to {channels} channels. Take {box} and "
        f"resize it to {height}x{width} (H x W) by bilinear interpolation with antialiasing, as Pillow's BILINEAR. "
        f"Then ({values} / 255 - mean) / std, in the order B, C, H, W."
    )
    if source.task == "segment":
        facts["preparation"] += " Resize the logits to the image's size by bilinear interpolation; the largest decides."
    return facts


def _facts_of_sounds(source: Source, hears: SoundInput) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "task": source.task,
        "input_size": (hears.samples,),
        "rate": hears.rate,
        "preparation": (
            f"Average the channels, resample to {hears.rate} Hz, and take {hears.samples} samples in the middle as "
            "float32 within -1..1, in the order B, samples; let a shorter sound end in zeros. The file computes the "
            "spectrogram and normalises it."
        ),
    }
    if source.classes:
        facts["classes"] = source.classes
    return facts
