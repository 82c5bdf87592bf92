"""Memory of an eager update on CUDA: what `simmim advise` predicts, and what PyTorch's allocator holds.

    python benchmarks/gpu_memory.py [--parts truth cards] [--models MODEL ...]

truth  the most bytes of tensors, and what the allocator reserved for them, in a second update: 12 models, two batches
cards  the largest batch, a multiple of 8, whose update fits cards of 8 to 80 GiB: five models in bf16
compiled  as truth, of compiled steps, which take minutes each to compile: five models, one batch (only if asked for)

Run it on an NVIDIA GPU, or on the one of tests/nullgpu, which computes nothing. The allocator is the same, so that its
figures are exact, but for workspaces of cuDNN and the driver's context, of which it knows nothing:

    python tests/nullgpu/build.py FOLDER   # an empty one
    LD_PRELOAD=FOLDER/libcuda.so.1 TRITON_LIBCUDA_PATH=FOLDER TORCH_CUDNN_V8_API_DISABLED=1 \\
        NULLGPU_BYTES=100000000000 python benchmarks/gpu_memory.py
"""

import argparse
import gc
import importlib
import math
from typing import Any

import torch
from results import machine, save

from simmim.config.pretraining import PretrainConfig
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.hardware.accelerators import read_facts
from simmim.hardware.roofline import StepWork
from simmim.torch_engine.accelerators import choose_device
from simmim.torch_engine.perf.cost import measure_work
from simmim.torch_engine.perf.trial import build_update, random_batch
from simmim.torch_engine.train.distributed import World

MODELS = {  # pixels
    "vit_tiny_patch16_224": 224,
    "vit_small_patch16_224": 224,
    "vit_base_patch16_224": 224,
    "vit_large_patch16_224": 224,
    "beit_base_patch16_224": 224,
    "deit3_base_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "swin_base_patch4_window7_224": 224,
    "swinv2_base_window8_256": 256,
    "resnet50": 224,
    "convnext_base": 224,
    "regnety_032": 224,
}
BATCHES = (32, 128)
CARDS = (8, 12, 16, 24, 40, 80)
ON_CARDS = (
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "swin_base_patch4_window7_224",
    "resnet50",
)
CONTEXT_GIB = 0.6
"""What a process takes beside the allocator's memory on a card: an assumption, for the driver's context and kernels."""
STEP, MOST = 8, 4096


COMPILED = (
    "vit_small_patch16_224",
    "resnet50",
    "swin_tiny_patch4_window7_224",
    "beit_base_patch16_224",
    "convnext_base",
)
COMPILED_BATCH = 128


def configuration(model: str, batch: int, precision: str = "bf16", *, compiled: bool = False) -> PretrainConfig:
    pixels = MODELS[model]
    return PretrainConfig(
        model=model,
        image_size=(pixels, pixels),
        batch_size=batch,
        precision=precision,  # type: ignore[arg-type]
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        device="cuda",
        compile=compiled,
    )


def peak(config: PretrainConfig) -> dict[str, float]:
    """GiB of tensors and GiB reserved, at most, in a second update."""
    gc.collect()
    torch.cuda.empty_cache()
    step, update = build_update(config, World(device=torch.device("cuda", 0)))
    batch = random_batch(config, config.batch_size, step)
    update(0, batch)
    torch.cuda.reset_peak_memory_stats()
    update(1, batch)
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def truth(models: list[str]) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        work = measure_work(configuration(model, 2))
        rows += [beside_advise(model, batch, work) for batch in BATCHES]
    return rows


def beside_advise(model: str, batch: int, work: StepWork, *, compiled: bool = False) -> dict[str, Any]:
    """Return the peak of a step beside what `advise` counts for it; print it too."""
    found = peak(configuration(model, batch, compiled=compiled))
    predicted = work.peak_bytes(batch) / 2**30
    row = {"model": model, "pixels": MODELS[model], "batch": batch, "predicted_gib": predicted, **found}
    row["allocated_ratio"] = predicted / found["allocated_gib"]
    row["reserved_ratio"] = predicted / found["reserved_gib"]
    print(row, flush=True)
    return row


def compiled(models: list[str]) -> list[dict[str, Any]]:
    """The first of the two updates compiles, and measures kernels: only the second counts."""
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.triton.autotune_pointwise = False  # fewer variants to compile, in the same memory
    rows = []
    for model in (each for each in COMPILED if each in models):
        torch.compiler.reset()
        work = measure_work(configuration(model, 2))
        rows.append(beside_advise(model, COMPILED_BATCH, work, compiled=True))
    return rows


def cards(models: list[str]) -> list[dict[str, Any]]:
    """The card is made small by the allocator's own limit, which it keeps as a card keeps its size."""
    whole = torch.cuda.get_device_properties(0).total_memory
    rows = []
    for model in (each for each in ON_CARDS if each in models):
        work = measure_work(configuration(model, 2))
        for gib in (each for each in CARDS if each * 2**30 <= whole):
            torch.cuda.set_per_process_memory_fraction((gib - CONTEXT_GIB) * 2**30 / whole)
            start = advised(work, gib)
            row = {"model": model, "card_gib": gib, "largest_batch": largest(model, start), "advised_batch": start}
            rows.append(row)
            print(row, flush=True)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def fits(model: str, batch: int) -> bool:
    try:
        peak(configuration(model, batch))
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def largest(model: str, start: int) -> int:
    """Search upwards or downwards from `start`, in steps that double, then between the last two."""
    low, high, stride = 0, MOST, STEP
    middle = max(start, STEP)
    while high - low > STEP:
        if fits(model, middle):
            low, middle = middle, middle + stride
        else:
            high, middle = middle, middle - stride
        if low and high < MOST:
            middle = (low + high) // 2 // STEP * STEP
        elif middle <= 0:
            middle = STEP
            if high <= STEP:
                break
        stride *= 2
    return low


def advised(work: StepWork, gib: float) -> int:
    """The largest batch that `simmim advise` lets onto the card."""
    return work.largest_batch(read_facts().usable_gib(gib) * 2**30) // STEP * STEP


def main() -> None:
    parser = argparse.ArgumentParser(description="memory of an update on CUDA against simmim advise")
    parser.add_argument("--parts", nargs="+", choices=("truth", "cards", "compiled"), default=["truth", "cards"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--name", default="gpu_memory", help="of the results' file")
    arguments = parser.parse_args()
    choose_device("cuda")
    found: dict[str, list[dict[str, Any]]] = {}
    for part in arguments.parts:
        found[part] = {"truth": truth, "cards": cards, "compiled": compiled}[part](arguments.models)
        save(arguments.name, {**machine(), "device": torch.cuda.get_device_name(), **found})
    if rows := found.get("truth", []) + found.get("compiled", []):
        for name in ("allocated_ratio", "reserved_ratio"):
            ratios = [row[name] for row in rows]
            print(f"{name}: {min(ratios):.3f} to {max(ratios):.3f}, mean {math.fsum(ratios) / len(ratios):.3f}")


if __name__ == "__main__":
    main()
