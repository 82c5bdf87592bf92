"""Export to ONNX, with a free batch size.

Shapes: `B` images, `C` channels, `H W` pixels, `D` features, `K` classes.
"""

import copy
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simmim.errors import UserError
from simmim.torch_engine.interop.export import Outputs, Source, compare

_ONE_FILE = 1_500_000_000  # bytes; protobuf is limited to 2 GB, larger weights go into a separate file


def export_onnx(source: Source, out: Path, _allow_loss: bool) -> list[str]:
    """Export `model.onnx`: normalised images (B, C, H, W) → timm's `forward_features` and an embedding (B, D).

    A fine-tuned classifier outputs logits (B, K) instead.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--format onnx needs {package}: pip install 'simmim[onnx]'")
    import onnxruntime

    names = ("logits",) if source.classes else ("features", "embedding")
    file = out / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            _Outputs(_without_fused_attention(source.backbone), classify=bool(source.classes)),
            (source.images(),),
            dynamo=True,
            input_names=["images"],
            output_names=list(names),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    program.model.metadata_props.update(_description(source))
    program.save(str(file), external_data=sum(weight.nbytes for weight in source.backbone.parameters()) > _ONE_FILE)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    module = _Outputs(source.backbone, classify=bool(source.classes))

    def pair(number: int) -> tuple[str, Outputs, Outputs]:
        def reloaded(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run([names[number]], {"images": images.numpy()})[0])

        return names[number], lambda images: module(images)[number], reloaded

    pairs = [pair(number) for number in range(len(names))]
    found = [compare(source, "onnxruntime", pairs, source.images(batch)) for batch in (1, 7)]
    return [f"wrote {file.name}: images → {', '.join(names)}", *found]


class _Outputs(nn.Module):
    """Outputs of the exported graph."""

    def __init__(self, backbone: Any, *, classify: bool):
        super().__init__()
        self.backbone, self.classify = backbone, classify

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.classify:
            return (self.backbone(images),)
        features = self.backbone.forward_features(images)
        return features, self.backbone.forward_head(features)


def _without_fused_attention(backbone: nn.Module) -> nn.Module:
    """Copy the model with unfused attention: the exporter does not support fused attention with a bias."""
    backbone = copy.deepcopy(backbone)
    for part in backbone.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # type: ignore[assignment]
    return backbone


def _description(source: Source) -> dict[str, str]:
    """Describe the preprocessing, (pixel / 255 - mean) / std, in the file's metadata."""
    facts = {"mean": source.mean, "std": source.std, "input_size": source.input_size}
    if source.classes:
        facts["classes"] = source.classes
    return {name: json.dumps(value) for name, value in facts.items()}
