"""What could make a step faster on an NVIDIA GPU, one choice at a time, each beside the step without it.

    python benchmarks/gpu_choices.py [--seconds 120] [--models vit beit swin resnet] [--device cpu --tiny]

The arms are ordered by what they may gain; those for which no time is left are named. Each trains in bf16 from the same
weights on the same images: forward, backward, clipping, AdamW. The fastest of the rounds counts. Parity is the loss of
the third step beside that of the first arm of the same model and batch. Figures are saved as they come. On the GPU that
computes nothing (docs/gpu.md) `launches` is the finding, and times and losses say nothing.
"""

import argparse
import ctypes
import dataclasses
import gc
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from results import machine, save

from simmim.config.pretraining import PretrainConfig
from simmim.config.training import Gpu, Kernels
from simmim.torch_engine.accelerators import choose_device, find_accelerator
from simmim.torch_engine.models.attention import attention_kernels, set_attention
from simmim.torch_engine.models.kernels import set_kernels
from simmim.torch_engine.perf.trial import random_batch, update_of
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.storage import build_step

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", 224, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "beit": ("beit_base_patch16_224", 224, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "swin": ("swin_base_patch4_window7_224", 224, {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}),
    "resnet": ("resnet50", 224, {"channels": (8, 16, 32, 64)}),
}
"""timm name, pixels, and what makes it small."""


@dataclass(frozen=True)
class Arm:
    """A model with one choice. `mode` is torch.compile's; `None` is eager."""

    model: str
    choice: str = "as it is"
    attention: str = "auto"
    mode: str | None = None
    contiguous: bool = False
    batch: int = 256


# Eager arms first: none waits for a compiler. What is compiled as a training compiles it is the base of its modes.
ARMS = (
    Arm("vit"),
    Arm("swin"),
    Arm("swin", "attention efficient", attention="efficient"),
    Arm("vit", "attention cudnn", attention="cudnn"),
    Arm("vit", "attention efficient", attention="efficient"),
    Arm("beit"),
    Arm("beit", "attention products", attention="products"),
    Arm("resnet"),
    Arm("resnet", "contiguous", contiguous=True),
    Arm("vit", "compiled", mode="default"),
    Arm("vit", "compiled, CUDA graphs", mode="reduce-overhead"),
    Arm("swin", "compiled", mode="default"),
    Arm("swin", "compiled, attention efficient", attention="efficient", mode="default"),
    Arm("vit", "batch 128", batch=128),
    Arm("vit", "batch 512", batch=512),
    Arm("vit", "attention products", attention="products"),
    Arm("resnet", "compiled", mode="default"),
    Arm("resnet", "compiled, CUDA graphs", mode="reduce-overhead"),
    Arm("vit", "compiled, max-autotune", mode="max-autotune-no-cudagraphs"),
)
STEPS, ROUNDS = 4, 3


def configuration(arm: Arm, device: str, batch: int, *, tiny: bool) -> PretrainConfig:
    name, pixels, small = MODELS[arm.model]
    return PretrainConfig(
        model=name,
        model_args=small if tiny else {},
        image_size=(64, 64) if tiny else (pixels, pixels),
        batch_size=batch,
        precision="bf16",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        device=device,  # type: ignore[arg-type]
        compile=False,
        gpu=Gpu(attention=arm.attention),  # type: ignore[arg-type]
    )


def measure(arm: Arm, config: PretrainConfig) -> dict[str, Any]:
    """Return seconds a step, the third loss, seconds until then, peak GiB and, on the null GPU, launches of a step."""
    world = World(device=torch.device(config.device))
    row = find_accelerator(config.device)
    begun = time.perf_counter()
    torch.manual_seed(0)
    step = build_step(config)
    set_attention(step.model.encoder.backbone, arm.attention)
    if arm.contiguous:
        set_kernels(step, step.model.encoder.backbone, Kernels(memory_format="contiguous"))
    if arm.mode is not None:
        step.compile(dynamic=False, mode=arm.mode)
    update = update_of(step, config, world)
    batch = random_batch(config, config.batch_size, step)
    losses = [float(update(number, batch)[1][0]) for number in range(3)]
    found: dict[str, Any] = {"loss": losses[-1], "warm_up_seconds": time.perf_counter() - begun}
    if "nullgpu" in os.environ.get("LD_PRELOAD", ""):
        null = ctypes.CDLL("libcuda.so.1")
        null.nullgpu_report.restype = ctypes.c_long
        null.nullgpu_reset()
        update(3, batch)
        return found | {"seconds": [0.0], "launches": null.nullgpu_report(b"/dev/null")}
    found["seconds"] = []
    for _ in range(ROUNDS):
        row.synchronize()
        begun = time.perf_counter()
        for number in range(STEPS):
            update(number, batch)
        row.synchronize()
        found["seconds"].append((time.perf_counter() - begun) / STEPS)
    if row.peak_memory:
        found["peak_gib"] = row.peak_memory(world.device) / 2**30
    return found


def run(arm: Arm, config: PretrainConfig) -> dict[str, Any]:
    torch.compiler.reset()
    gc.collect()
    if config.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        # PyTorch's switches are for the CPU too, which has no such choice.
        wanted = arm.attention if config.device == "cuda" else "auto"
        with attention_kernels(wanted), find_accelerator(config.device).arithmetic(config.precision):
            return measure(arm, config)
    except Exception as error:  # out of memory, a kernel that is not there: the finding
        return {"error": " ".join(str(error).split())[:200]}


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown: each arm beside the first of its model, compiled ones beside the first compiled one."""
    lines = ["| model | batch | choice | images/s | against | loss apart |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        start = f"| {row['model']} | {row['batch']} | {row['choice']} | "
        if "error" in row:
            lines.append(f"{start}{row['error']} | | |")
            continue
        speed, base = images_a_second(row), base_of(row, rows)
        shown = f"{row['launches']} launches" if "launches" in row else f"{speed:.1f}"
        if base is None or base is row:
            lines.append(f"{start}{shown} | | |")
            continue
        ratio = row["launches"] / base["launches"] if "launches" in row else speed / images_a_second(base)
        apart = f"{abs(row['loss'] / base['loss'] - 1):.1e}" if base["loss"] and row["batch"] == base["batch"] else ""
        lines.append(f"{start}{shown} | × {ratio:.3f} | {apart} |")
    return "\n".join(lines)


def images_a_second(row: dict[str, Any]) -> float:
    return row["batch"] / max(min(row["seconds"]), 1e-9)


def base_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first arm of the model that ran and is compiled if this one is, unless it is "compiled" itself."""
    compiled = row["mode"] is not None and row["choice"] != "compiled"
    alike = (each for each in rows if each["model"] == row["model"] and "error" not in each)
    return next((each for each in alike if (each["mode"] is not None) == compiled), None)


def main() -> None:
    parser = argparse.ArgumentParser(description="choices for a step on an NVIDIA GPU, each beside the step without it")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no further arm after so long")
    parser.add_argument("--batch-size", type=int, help="of every arm, in place of its own")
    parser.add_argument("--eager", action="store_true", help="leave out what a compiler must compile")
    parser.add_argument("--tiny", action="store_true", help="very small models, to see that it runs")
    parser.add_argument("--name", default="gpu_choices", help="of the results' file")
    arguments = parser.parse_args()
    device, begun = choose_device(arguments.device), time.perf_counter()
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        if arm.model not in arguments.models or (arguments.eager and arm.mode is not None):
            continue
        if arm.attention == "cudnn" and device != "cuda":
            continue
        row = dataclasses.asdict(arm) | {"batch": arguments.batch_size or arm.batch}
        if time.perf_counter() - begun > arguments.seconds:
            row["error"] = "no time left"
        else:
            row |= run(arm, configuration(arm, device, row["batch"], tiny=arguments.tiny))
        rows.append(row)
        print(row, flush=True)
        name = find_accelerator(device).device_name(torch.device(device))
        save(arguments.name, {**machine(), "device": name, "rows": rows}, quiet=True)
    print(table(rows))


if __name__ == "__main__":
    main()
