"""Lowers training steps by TorchTPU and runs them on XLA's CPU: `python lower_and_run.py "MODEL [NAME=VALUE...]"...`.

With `visible` among the words of a case, the encoder sees visible cells only.

Prints, as JSON for each case, how far loss, gradients and the parameters after the step are from those of eager PyTorch
on the CPU, and how far the parameters moved.
"""

import dataclasses
import json
import os
import sys

from simmim.hardware.tpu_compiler import ENVIRONMENT

os.environ.update(ENVIRONMENT)
os.environ["JAX_ENABLE_X64"] = "1"  # BEiT has indices of 64 bits
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is most of a case's time

import jax
import numpy as np
import torch
from jax._src.interpreters.mlir import make_ir_context
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir
from torch.nn.attention import SDPBackend, sdpa_kernel

from simmim.config.field_types import parse_model_args
from simmim.config.pretraining import PretrainConfig
from simmim.config.validation import from_settings
from simmim.torch_engine.perf.trial import random_batch, update_of
from simmim.torch_engine.tpu.lower import Lowered, lower, with_model_sizes
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.storage import build_step

Arrays = dict[str, np.ndarray]
RATE = 1e-3
VISIBLE = {"encode": "visible", "head": "transformer", "decoder_width": 32, "mask": "uniform", "mask_ratio": 0.8125}


def run(stablehlo: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of a module on XLA's CPU."""
    device = jax.devices("cpu")[0]
    with make_ir_context() as context:
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(stablehlo)
    devices = xla_client.DeviceList((device,))
    executable = device.client.compile_and_load(module, devices, xla_client.CompileOptions())
    results = executable.execute_sharded([jax.device_put(array, device) for array in inputs])
    return [np.asarray(arrays[0]) for arrays in results.disassemble_into_single_device_arrays()]


def as_arrays(step: torch.nn.Module) -> Arrays:
    tensors = dict(step.named_parameters()) | dict(step.named_buffers())
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def config_of(words: list[str]) -> PretrainConfig:
    model, *arguments = words
    visible = "visible" in arguments
    config = from_settings(
        PretrainConfig,
        dict(
            model=model,
            model_args=parse_model_args(word for word in arguments if word != "visible"),
            image_size=(64, 64),
            mask_cell=16 if visible or model.startswith("vit") else None,
            **(VISIBLE if visible else {}),  # type: ignore[arg-type]
            batch_size=4,
            precision="fp32",
            drop_path=0.2,
            mean=(0.5, 0.4, 0.3),
            std=(0.25, 0.2, 0.3),
        ),
    )
    return with_model_sizes(config)


def compare(config: PretrainConfig, lowered: Lowered) -> dict[str, float]:
    torch.manual_seed(0)
    step = build_step(dataclasses.replace(config, device="cpu"))
    spread = 0.15 if config.encode == "visible" else 0.05  # more where a decoder makes gradients small
    for parameter in step.parameters():  # else zeros of an initialisation hide what they multiply
        torch.nn.init.normal_(parameter, std=spread)
    before = as_arrays(step)
    batch = random_batch(config, config.batch_size, step)

    update = update_of(step, dataclasses.replace(config, device="cpu"), World(device=torch.device("cpu")))
    for group in update.optimizer.param_groups:
        group["lr"] = RATE
    figures = update.advance({name: torch.from_numpy(array) for name, array in batch.items()}).numpy()
    after = as_arrays(step)
    averages = {
        f"exp_avg {name}": update.optimizer.state[parameter]["exp_avg"].numpy()
        for name, parameter in step.named_parameters()
        if parameter.requires_grad
    }

    shapes = {name: before[name.split(" ", 1)[1]] for name in lowered.inputs if name.startswith("exp_avg")}
    inputs = before | batch | {name: np.zeros_like(array) for name, array in shapes.items()}
    inputs |= {name: np.float32(0) for name in lowered.inputs if name.startswith("step ")}
    inputs |= {name: np.float32(RATE) for name in lowered.inputs if name.startswith("lr ")}
    outputs = run(lowered.stablehlo, [inputs[name] for name in lowered.inputs])
    found = dict(zip(lowered.outputs, outputs, strict=True))
    return {
        "loss": abs(float(found["figures"][0] - figures[0])),
        "parameters": max(float(np.abs(found[name] - array).max()) for name, array in after.items()),
        "gradients": max(distance(found[name], array) for name, array in averages.items()),
        "moved": min(
            float(np.abs(array - before[name]).max()) for name, array in after.items() if f"exp_avg {name}" in averages
        ),
    }


def main(cases: list[str]) -> dict[str, dict[str, float]]:
    configs = [config_of(case.split()) for case in cases]
    # All before the first backward pass, whose engine asks once how many devices there are.
    with sdpa_kernel(SDPBackend.MATH):  # TorchTPU's own kernel is for TPUs
        lowered = [lower(config) for config in configs]
    return {case: compare(*each) for case, *each in zip(cases, configs, lowered, strict=True)}


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1:])), flush=True)
    os._exit(0)  # TorchTPU may abort as the interpreter ends
