"""What `simmim advise` predicts, against the truth that this machine can tell and one that others published.

    python benchmarks/advise_vs_truth.py [--rounds 5] [--part memory|time|published ...]

memory     the most bytes in use during an update: predicted from shapes, against what PyTorch's profiler saw allocated
time       seconds of an update: rates fitted to two models, against six other cases. One thread, its processor time,
           rounds that alternate over all cases, and the fastest of each: what other work on the machine disturbs least
published  images a second of ten trainings on one RTX 3090 (huggingface/pytorch-image-models, results/
           benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv at 5e7d47c): rates fitted to all ten, which is what
           `simmim/hardware/accelerators.toml` says a step reaches of the peaks
"""

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
from results import machine, save
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from simmim.config.pretraining import PretrainConfig
from simmim.hardware.accelerators import read_facts
from simmim.hardware.roofline import StepWork, fit_rates
from simmim.torch_engine.perf.cost import measure_work
from simmim.torch_engine.perf.trial import build_update, random_batch
from simmim.torch_engine.train.distributed import World

SWIN = {"window_size": 6}
MEMORY = [
    # model, pixels, batch, precision, checkpointing, arguments
    ("vit_tiny_patch16_224", 224, 8, "fp32", False, {}),
    ("vit_tiny_patch16_224", 224, 16, "bf16", True, {}),
    ("vit_small_patch16_224", 224, 8, "bf16", False, {}),
    ("vit_base_patch16_224", 224, 4, "fp32", False, {}),
    ("swin_tiny_patch4_window7_224", 192, 4, "fp32", False, SWIN),
    ("swin_tiny_patch4_window7_224", 192, 4, "bf16", False, SWIN),
    ("resnet50", 96, 8, "fp32", False, {}),
    ("convnext_tiny", 96, 8, "bf16", False, {}),
]
CALIBRATION = [
    ("vit_small_patch16_224", 224, 4, "fp32", False, {}),
    ("swin_tiny_patch4_window7_224", 192, 4, "fp32", False, SWIN),
]
TIME = [
    ("vit_tiny_patch16_224", 224, 8, "fp32", False, {}),
    ("vit_small_patch16_224", 224, 8, "fp32", False, {}),
    ("vit_small_patch16_224", 224, 8, "fp32", True, {}),
    ("vit_base_patch16_224", 224, 4, "fp32", False, {}),
    ("swin_small_patch4_window7_224", 192, 2, "fp32", False, SWIN),
    ("beit_base_patch16_224", 224, 2, "fp32", False, {}),
]
PUBLISHED = [
    # model, batch, images a second
    ("vit_tiny_patch16_224", 512, 2293.54),
    ("vit_small_patch16_224", 384, 1052.92),
    ("vit_base_patch16_224", 192, 390.86),
    ("beit_base_patch16_224", 192, 358.29),
    ("swin_tiny_patch4_window7_224", 256, 646.76),
    ("swin_base_patch4_window7_224", 128, 279.66),
    ("convnext_tiny", 256, 813.16),
    ("convnext_base", 128, 336.98),
    ("resnet50", 512, 826.06),
    ("resnet101", 256, 568.98),
]
Case = tuple[str, int, int, str, bool, dict[str, Any]]


def config(case: Case, device: str = "cpu") -> PretrainConfig:
    model, pixels, batch, precision, checkpoint, arguments = case
    return PretrainConfig(
        model=model,
        model_args=arguments,
        image_size=(pixels, pixels),
        batch_size=batch,
        precision=precision,  # type: ignore[arg-type]
        checkpoint_activations=checkpoint,
        device=device,  # type: ignore[arg-type]
        plain_step=device == "cuda",  # the published trainings are of whole models
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def name(case: Case) -> str:
    model, pixels, batch, precision, checkpoint, _ = case
    return f"{model} at {pixels}, batch {batch}, {precision}{', checkpointing' if checkpoint else ''}"


def updater(case: Case) -> Any:
    """A call that does one update."""
    settings = config(case)
    step, update = build_update(settings, World(device=torch.device("cpu")))
    if settings.checkpoint_activations:
        step.model.encoder.backbone.set_grad_checkpointing(True)
    batch = random_batch(settings, settings.batch_size, step)
    return lambda: update(0, batch)


def allocated_peak(case: Case) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update = updater(case)
        update()  # creates AdamW's averages
        with record_function("second"):
            update()
    recorded: Any = profiler.profiler
    events = list(recorded.kineto_results.experimental_event_tree())
    allocations, begin = [], 0
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.typed[1].alloc_size))
        elif event.name == "second":
            begin = event.start_time_ns
    times, sizes = np.array(sorted(allocations)).T
    return int(np.cumsum(sizes)[times >= begin].max())


def memory() -> dict[str, Any]:
    rows = {}
    for case in MEMORY:
        predicted, seen = measure_work(config(case)).peak_bytes(case[2]), allocated_peak(case)
        rows[name(case)] = {"predicted": round(predicted), "allocated": seen, "ratio": predicted / seen}
        print(f"{name(case):70}{predicted / 2**20:9.1f} MiB{seen / 2**20:9.1f} MiB{predicted / seen:8.3f}", flush=True)
    return rows


def seconds(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    cases = [*CALIBRATION, *TIME]
    works = [measure_work(config(case)) for case in cases]
    updates = [updater(case) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for round_number in range(rounds + 1):
        for update, taken in zip(updates, times, strict=True):
            begun = time.process_time()
            update()
            if round_number:  # the first warms up
                taken.append(time.process_time() - begun)
    fastest = [min(taken) for taken in times]
    known = len(CALIBRATION)
    rates = fit_rates([(works[i], cases[i][2], fastest[i]) for i in range(known)])
    print(f"fitted: {rates.flops / 1e9:.0f} GFLOP/s, {rates.bandwidth / 1e9:.1f} GB/s; load {os.getloadavg()[0]:.1f}")
    rows = {}
    for case, work, measured in zip(cases, works, fastest, strict=True):
        predicted = work.seconds(case[2], rates)
        rows[name(case)] = {"predicted": predicted, "measured": measured, "ratio": predicted / measured}
        print(f"{name(case):70}{predicted:9.3f} s  {measured:9.3f} s  {predicted / measured:8.3f}", flush=True)
    return {
        "load": os.getloadavg(),
        "calibrated_on": [name(case) for case in CALIBRATION],
        "flops_per_second": rates.flops,
        "bytes_per_second": rates.bandwidth,
        "cases": rows,
    }


def published() -> dict[str, Any]:
    card = read_facts().accelerators["rtx-3090"]
    measured: list[tuple[StepWork, int, float]] = []
    for model, batch, rate in PUBLISHED:
        work = measure_work(config((model, 224, batch, "bf16", False, {}), device="cuda"))
        measured.append((work, batch, batch / rate))
    rates = fit_rates(measured)
    arithmetic = rates.flops / (card.tflops["fp16"] * 1e12)
    bandwidth = rates.bandwidth / (card.bandwidth_gb_s * 1e9)
    print(f"reached: {arithmetic:.2f} of the peak FLOP/s, {bandwidth:.2f} of the bandwidth")
    rows = {}
    for (model, batch, rate), (work, _, taken) in zip(PUBLISHED, measured, strict=True):
        ratio = work.seconds(batch, rates) / taken
        rows[model] = {"published": rate, "predicted": rate / ratio, "time_ratio": ratio}
        print(f"{model:40}{rate:9.1f} images/s{rate / ratio:9.1f}{ratio:8.3f}")
    return {"arithmetic": arithmetic, "bandwidth": bandwidth, "cases": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parts = {"memory": memory, "time": lambda: seconds(arguments.rounds), "published": published}
    parser.add_argument("--part", nargs="+", choices=list(parts), default=list(parts))
    arguments = parser.parse_args()
    figures = {part: parts[part]() for part in arguments.part}
    whole = arguments.part == list(parts)
    save("advise_vs_truth" if whole else f"advise_vs_truth_{'_'.join(arguments.part)}", {**machine(), **figures})


if __name__ == "__main__":
    main()
