"""Compiles training steps for TPUs that are not here: `python compile_tpu.py BACKEND CASE…` prints reports as JSON."""

import dataclasses
import json
import os
import re
import sys
from typing import Any

from simmim.hardware.tpu_compiler import ENVIRONMENT, topology_devices

os.environ.update(ENVIRONMENT)

from simmim.config.pretraining import PretrainConfig
from simmim.keras_engine import compile_step, use_backend

VIT = {"model": "vit_tiny_patch16_224", "model_args": {"depth": 1, "embed_dim": 96}}
SWIN = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit, sharded": VIT | {"shard": True},
    "vit in pieces, with drop path": VIT | {"accumulate_steps": 2, "drop_path": 0.1},
    "vit, too large": VIT | {"batch_size": 2**23},
    "vit, batch that does not divide": VIT | {"batch_size": 30},
    "vit in fp32": VIT | {"precision": "fp32"},
    "swin": {"model": "swin_tiny_patch4_window7_224", "model_args": SWIN},
    "resnet": {"model": "resnet18", "model_args": {"layers": [1, 1, 1, 1], "channels": [16, 32, 48, 64]}},
}


def report_of(backend: str, case: str) -> dict[str, Any]:
    settings = {"batch_size": 32, "image_size": (64, 64), "precision": "bf16"} | CASES[case]
    config = PretrainConfig(
        backend="jax" if backend == "jax" else "tensorflow", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), **settings
    )
    if config.precision == "fp32":
        return {"products": sorted(products(config))}
    try:
        return dataclasses.asdict(compile_step(config, "v5e:2x4"))
    except ValueError as error:
        return {"error": str(error)}


def products(config: PretrainConfig) -> set[str]:
    """With which precision matrices are multiplied, in the step as it goes to the compiler."""
    assert config.backend is not None
    use_backend(config.backend)
    from simmim.keras_engine import lower

    if config.backend == "jax":
        text = lower.lower_jax(config, topology_devices("v5e:2x4")).as_text()
    else:
        text = lower.lower_tensorflow(config, 4)
    lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot|dot_general|convolution)\b", line)]
    return {word for line in lines for word in re.findall(r"DEFAULT|HIGHEST", line) or ["DEFAULT"]}


if __name__ == "__main__":
    print(json.dumps({case: report_of(sys.argv[1], case) for case in sys.argv[2:]}))
