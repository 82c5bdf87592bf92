"""Write ONNX files, with the facts that preparing an input takes as metadata."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_ONE_FILE = 1_500_000_000  # bytes; protobuf is limited to 2 GB, larger weights go into a separate file


def write_onnx(
    file: Path,
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: tuple[str, ...],
    facts: dict[str, Any],
    **options: Any,
) -> Any:
    """Export a module of these inputs, by name and in order; return onnxruntime's session of the file.

    `facts` become the file's metadata, as JSON. `options` are those of `torch.onnx.export`.
    """
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
            **options,
        )
    program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    program.save(str(file), external_data=sum(weight.nbytes for weight in module.parameters()) > _ONE_FILE)
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
