"""Memory of an update on CUDA: what `simmim advise` predicts, and what PyTorch's allocator holds.

    python benchmarks/gpu_memory.py [--parts truth cards] [--models MODEL ...]
    python benchmarks/gpu_memory.py --compiled [--models MODEL ...]

truth  the most bytes of tensors, and what the allocator reserved for them, in a second update: two batches a model
states  what AdamW's averages in bf16 would save: the peak of the same update, eager, with half of their bytes
cards  the largest batch, a multiple of 8, whose update fits cards of 8 to 80 GiB: five models in bf16

`--compiled` measures compiled steps in their place, which take minutes each to compile: seven cases, one batch.

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
import time
from collections.abc import Iterator
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
    "convnext_tiny": 224,
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
COMPILED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("vit_small_patch16_224", {}),
    ("vit_small_patch16_224", {"encode": "visible"}),
    ("vit_base_patch16_224", {}),
    ("resnet50", {}),
    ("convnext_tiny", {}),
    ("beit_base_patch16_224", {}),
    ("swin_base_patch4_window7_224", {}),
)
"""Model and settings of each compiled case, the quickest to compile first."""
COMPILED_BATCH = STATES_BATCH = 128


def configuration(model: str, batch: int, *, compiled: bool = False, **settings: Any) -> PretrainConfig:
    pixels = MODELS[model]
    return PretrainConfig(
        model=model,
        image_size=(pixels, pixels),
        batch_size=batch,
        precision="bf16",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        device="cuda",
        compile=compiled,
        **settings,
    )


def peak(config: PretrainConfig, *, half_states: bool = False) -> dict[str, float]:
    """GiB of tensors and GiB reserved, at most, in a second update.

    `half_states`: AdamW's averages are there in bf16 and take no step, which happens in place and is not the peak.
    """
    gc.collect()
    torch.cuda.empty_cache()
    step, update = build_update(config, World(device=torch.device("cuda", 0)))
    batch = random_batch(config, config.batch_size, step)
    update(0, batch)
    if half_states:
        for state in update.optimizer.state.values():
            state.update({name: state[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")})
        update.optimizer.step = lambda: None  # type: ignore[method-assign,assignment]
    torch.cuda.reset_peak_memory_stats()
    update(1, batch)
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def truth(models: list[str]) -> Iterator[dict[str, Any]]:
    for model in models:
        work = measure_work(configuration(model, 2))
        for batch in BATCHES:
            yield beside_advise(model, batch, work)


def beside_advise(model: str, batch: int, work: StepWork, **settings: Any) -> dict[str, Any]:
    """Return the peak of a step beside what `advise` counts for it; print it too."""
    found = peak(configuration(model, batch, **settings))
    predicted = work.peak_bytes(batch) / 2**30
    row = {"model": model, "pixels": MODELS[model], "batch": batch, "predicted_gib": predicted, **settings, **found}
    row["allocated_ratio"] = predicted / found["allocated_gib"]
    row["reserved_ratio"] = predicted / found["reserved_gib"]
    print(row, flush=True)
    return row


def states(models: list[str]) -> Iterator[dict[str, Any]]:
    for model in models:
        whole, half = (peak(configuration(model, STATES_BATCH), half_states=each) for each in (False, True))
        saved = whole["allocated_gib"] - half["allocated_gib"]
        row = {"model": model, "batch": STATES_BATCH, "fp32_gib": whole["allocated_gib"], "saved_gib": saved}
        row["saved_share"] = saved / whole["allocated_gib"]
        print(row, flush=True)
        yield row


class NoKernel:
    """Stands where a Triton kernel would, on a GPU that would not run it."""

    def run(self, *arguments: Any, **settings: Any) -> None: ...


def leave_out_kernels() -> None:
    """Let Inductor write kernels that are never compiled: it allocates the same memory around them."""
    inductor: Any = importlib.import_module("torch._inductor.async_compile")
    inductor.AsyncCompile.triton = lambda *arguments, **settings: NoKernel()
    importlib.import_module("torch._inductor.config").force_disable_caches = True  # type: ignore[attr-defined]


def compiled(models: list[str]) -> Iterator[dict[str, Any]]:
    """The first of the two updates compiles, and on a GPU measures kernels: only the second counts."""
    if torch.cuda.get_device_name().startswith("Null "):
        leave_out_kernels()
    for model, settings in (each for each in COMPILED if each[0] in models):
        torch.compiler.reset()
        work = measure_work(configuration(model, 2, **settings))
        begun = time.perf_counter()
        row = beside_advise(model, COMPILED_BATCH, work, compiled=True, **settings)
        yield row | {"seconds": round(time.perf_counter() - begun)}


def cards(models: list[str]) -> Iterator[dict[str, Any]]:
    """The card is made small by the allocator's own limit, which it keeps as a card keeps its size."""
    whole = torch.cuda.get_device_properties(0).total_memory
    for model in (each for each in ON_CARDS if each in models):
        work = measure_work(configuration(model, 2))
        for gib in (each for each in CARDS if each * 2**30 <= whole):
            torch.cuda.set_per_process_memory_fraction((gib - CONTEXT_GIB) * 2**30 / whole)
            start = advised(work, gib)
            row = {"model": model, "card_gib": gib, "largest_batch": largest(model, start), "advised_batch": start}
            print(row, flush=True)
            yield row
    torch.cuda.set_per_process_memory_fraction(1.0)


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
    parser.add_argument("--parts", nargs="+", choices=("truth", "states", "cards"), default=["truth", "cards"])
    parser.add_argument("--compiled", action="store_true", help="measure compiled steps, and not the parts")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--name", help="of the results' file (default: gpu_memory, or gpu_memory_compiled)")
    arguments = parser.parse_args()
    choose_device("cuda")
    found: dict[str, list[dict[str, Any]]] = {}
    name = arguments.name or ("gpu_memory_compiled" if arguments.compiled else "gpu_memory")
    for part in ["compiled"] if arguments.compiled else arguments.parts:
        found[part] = []
        for row in {"truth": truth, "states": states, "cards": cards, "compiled": compiled}[part](arguments.models):
            found[part].append(row)
            save(name, {**machine(), "device": torch.cuda.get_device_name(), **found}, quiet=True)
    if rows := found.get("truth", []) + found.get("compiled", []):
        for kind in ("allocated_ratio", "reserved_ratio"):
            ratios = [row[kind] for row in rows]
            print(f"{kind}: {min(ratios):.3f} to {max(ratios):.3f}, mean {math.fsum(ratios) / len(ratios):.3f}")


if __name__ == "__main__":
    main()
