"""Export a run's model. Each format is reloaded by the tool that reads it, and its outputs are compared.

Shapes: `B` images, `C` channels, `H W` pixels, `p` patch side.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from simmim.config.pretraining import PretrainConfig
from simmim.data.augment import CentreCrop
from simmim.errors import UserError
from simmim.interop.weight_names import State, from_official_simmim, to_official_simmim
from simmim.torch_engine.models.heads import LinearDecoder
from simmim.torch_engine.models.masked_image_model import MaskedImageModel, build_model
from simmim.torch_engine.models.sound_input import SoundInput
from simmim.torch_engine.tasks.detect_step import load_detector
from simmim.torch_engine.tasks.detectors import TWO_STAGES
from simmim.torch_engine.tasks.segment import load_predictor
from simmim.torch_engine.train.storage import load_run, save_hub
from simmim.training.masks import draw_masks
from simmim.training.run_directory import find_model, find_task_of

TOLERANCE = 1e-4  # relative to the largest value; allows for other kernels and summation orders in fp32


@dataclass(frozen=True)
class Source:
    """Model to export: a backbone with its classifier or the whole pretraining model, a segmenter, or a detector."""

    run: Path
    backbone: Any  # a timm module, a `Segmenter`, or a detector of torchvision's
    input_size: tuple[int, int, int]  # C, H, W
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    task: str = "encoder"
    crop: float | None = CentreCrop.fraction
    """Share of the largest centre box of the input's shape that evaluation sees; `None`: the whole image, squashed."""
    dtype: str = "uint8"
    """Type of the pixels that evaluation decodes."""
    hears: SoundInput | None = None
    """Front end of a model of sounds."""
    model: MaskedImageModel | None = None
    config: PretrainConfig | None = None

    def images(self, batch: int = 2) -> Tensor:
        """Return fixed random normalised images (B, C, H, W)."""
        return torch.randn(batch, *self.input_size, generator=torch.Generator().manual_seed(0))

    def samples(self, batch: int) -> Tensor:
        """Return fixed noise as samples (B, n) for a model of sounds."""
        assert self.hears is not None
        return 0.1 * torch.randn(batch, self.hears.samples, generator=torch.Generator().manual_seed(0))

    def pretrained(self, format: str) -> tuple[MaskedImageModel, PretrainConfig]:
        if self.model is None or self.config is None:
            raise UserError(f"{self.run} is fine-tuned, and format {format} is of pretraining; use --format timm")
        return self.model, self.config


def open_exported(path: Path, format: str = "timm") -> Source:
    """Open the model of a run. Raises `UserError` if there is none, or the format has no place for it."""
    if task := find_task_of(path):
        if task == "segment" and format == "onnx":
            return _open_segmenter(path)
        if task == "detect" and format == "onnx":
            return _open_detector(path)
        if task != "classify":
            raise UserError(
                f"{path} is fine-tuned for {task}, which format {format} has no place for; use --format onnx or simmim "
                "predict, or export the run that it began from"
            )
        hub = find_model(path)
        settings = json.loads((hub / "config.json").read_text(encoding="utf-8"))
        data = settings["pretrained_cfg"]
        return Source(
            path,
            timm.create_model(f"local-dir:{hub}", pretrained=True).eval(),
            tuple(data["input_size"]),
            tuple(data["mean"]),
            tuple(data["std"]),
            classes=tuple(settings.get("label_names", ())),
            task="classify",
            crop=data["crop_pct"],
            dtype=settings.get("pixel_dtype", "uint8"),
            hears=SoundInput(settings) if "sound" in settings else None,
        )
    step, config = load_run(path)
    assert config.image_size is not None
    assert isinstance(config.mean, tuple)
    assert isinstance(config.std, tuple)
    size = (config.channels, *config.image_size)
    backbone = step.model.encoder.backbone
    hears = None
    if config.input == "sounds":
        facts = {"input_size": size, "mean": config.mean, "std": config.std}
        hears = SoundInput({"pretrained_cfg": facts, "sound": config.sound.as_table()})
    return Source(path, backbone, size, config.mean, config.std, hears=hears, model=step.model, config=config)


def _open_segmenter(path: Path) -> Source:
    predictor = load_predictor(find_model(path), "cpu")
    config = predictor.config
    if config.evaluation == "slide":
        raise UserError(
            f"{path} is evaluated by sliding windows, and an ONNX file sees one image; use simmim predict, or "
            "fine-tune with --evaluation resize"
        )
    assert config.image_size is not None and isinstance(config.mean, tuple) and isinstance(config.std, tuple)
    size = (config.channels, *config.image_size)
    return Source(
        path,
        predictor.step.model.eval(),
        size,
        config.mean,
        config.std,
        classes=predictor.classes,
        task="segment",
        crop=None,
        dtype=predictor.dtype.name,
    )


def _open_detector(path: Path) -> Source:
    step, config, classes = load_detector(find_model(path), "cpu")
    if config.detector in TWO_STAGES:
        raise UserError(
            f"{path} is a {config.detector}, whose second stage cannot be exported; use it with simmim predict, or "
            "fine-tune with --detector fcos or retinanet"
        )
    assert config.image_size is not None and isinstance(config.mean, tuple) and isinstance(config.std, tuple)
    size = (config.channels, *config.image_size)
    return Source(path, step.detector, size, config.mean, config.std, classes=classes, task="detect", crop=None)


def export_timm(source: Source, out: Path, _allow_loss: bool) -> list[str]:
    """Export a hub directory of encoder or classifier for `timm.create_model("local-dir:OUT", pretrained=True)`."""
    write_hub(source, out)
    reloaded = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=len(source.classes)).eval()
    same = compare(source, "timm", [("output", source.backbone, reloaded)], source.images())
    kept = f"{len(source.classes)} classes" if source.classes else "the encoder; mask token and head stay in the run"
    return [f"wrote a timm hub directory: {kept}", same]


def write_hub(source: Source, out: Path) -> None:
    if source.config is None:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(find_model(source.run) / name, out)
    else:
        save_hub(out, source.backbone, source.backbone.state_dict(), source.config)


def export_official(source: Source, out: Path, allow_loss: bool) -> list[str]:
    """Export the official SimMIM's `.pth`, which its fine-tuning code reads."""
    model, config = source.pretrained("official")
    kind = type(source.backbone).__name__
    if kind not in ("Beit", "SwinTransformer", "SwinTransformerV2"):
        raise UserError(
            f"official SimMIM has no {config.model}: its models are Swin, SwinV2 and a ViT that timm calls BEiT; "
            "use --format timm or transformers"
        )
    if source.input_size[1] != source.input_size[2]:
        raise UserError(
            f"official SimMIM takes square images, not {source.input_size[1]}x{source.input_size[2]}; use --format timm"
        )
    head = lost_head(model) if config.reconstructs else None
    if head:
        refuse_loss(source, "official SimMIM", [head], "writes encoder and mask token", allow_loss)
    state = arrays(model)
    if head or not config.reconstructs:
        state = {name: array for name, array in state.items() if not name.startswith("head.")}
    tensors = {name: torch.from_numpy(array) for name, array in to_official_simmim(state).items()}
    file = out / "official_pretrain.pth"
    torch.save({"model": tensors}, file)
    read = torch.load(file, weights_only=True)["model"]
    mapped = from_official_simmim({name: tensor.numpy() for name, tensor in read.items()}).state
    again = build_model(config).eval()
    again.load_state_dict({**model.state_dict(), **{name: torch.from_numpy(array) for name, array in mapped.items()}})
    mask = probe_mask(source, model, config)
    pairs = [("prediction", lambda images: model.predict(images, mask), lambda images: again.predict(images, mask))]
    return [f"wrote {file.name}: {len(tensors)} tensors", compare(source, "the file", pairs, source.images())]


def lost_head(model: MaskedImageModel) -> str | None:
    """Describe a head that other SimMIM implementations lack; they have one linear layer to the cell's pixels."""
    if not isinstance(model.head, LinearDecoder):
        return f"the {type(model.head).__name__} (only a linear head has a place)"
    stride, channels = model.encoder.stride, model.encoder.backbone.get_submodule("patch_embed").proj.in_channels
    if model.head.out_features != channels * stride**2:
        return f"the head for target {model.target.kind} (only one for pixels has a place)"
    return None


def refuse_loss(source: Source, home: str, lost: list[str], instead: str, allow_loss: bool) -> None:
    if not allow_loss:
        raise UserError(
            f"{home} has no place for all of {source.run}: {', '.join(lost)} would be lost; "
            f"--allow-loss {instead}, and --format timm is the encoder alone"
        )


def arrays(model: nn.Module) -> State:
    return {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}


def probe_mask(source: Source, model: MaskedImageModel, config: PretrainConfig) -> Tensor:
    """Return a mask (B, H/p, W/p) for `source.images()`."""
    return torch.from_numpy(draw_masks(config, 0, np.arange(2), model.encoder.patch_size))


Outputs = Callable[[Tensor], Tensor]


@torch.no_grad()
def compare(source: Source, tool: str, pairs: list[tuple[str, Outputs, Outputs]], images: Tensor) -> str:
    """Report the difference of each pair (name, ours, theirs). Raises `UserError` if it is too large."""
    found = []
    for name, ours, theirs in pairs:
        expected = ours(images).float()
        distance = float((theirs(images).float() - expected).abs().max())
        limit = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not distance <= limit:
            raise UserError(
                f"{tool} gives another {name} than {source.run} (off by {distance:.2g}, where rounding is at most "
                f"{limit:.2g}), so nothing was written; use another --format"
            )
        found.append(f"{name} within {distance:.1g}" if distance else f"{name} equal")
    return f"reloaded and compared, {len(images)} images: {', '.join(found)}"
