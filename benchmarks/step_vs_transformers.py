"""Our pretraining step against Transformers' `ViTForMaskedImageModeling`, in one run on this machine.

    python benchmarks/step_vs_transformers.py [--rounds 5] [--compile]

Both train ViT-B/16 at 224, batch 8, on the same images and masks with AdamW: forward, backward, clip, update. The peer
runs as its example script does by default (fp32) and tuned (bf16 autocast). Rounds alternate, so that a machine whose
speed drifts slows all alike; what counts is the ratio. The losses of the first step are printed beside the speeds.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from results import machine, save
from transformers import ViTConfig, ViTForMaskedImageModeling

from simmim.config import PretrainConfig
from simmim.schedules import CosineSchedule
from simmim.torch_engine.bench import random_batch
from simmim.torch_engine.distributed import World
from simmim.torch_engine.optim import create_optimizer
from simmim.torch_engine.storage import build_step
from simmim.torch_engine.update import Update

BATCH = 8


def ours(precision: Any, *, compiled: bool) -> Callable[[], float]:
    config = PretrainConfig(
        model="vit_base_patch16_224",
        image_size=(224, 224),
        batch_size=BATCH,
        precision=precision,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    torch.manual_seed(0)
    step = build_step(config)
    if compiled:
        step.compile(dynamic=False)
    optimizer = create_optimizer(step, weight_decay=0.05, betas=(0.9, 0.999), device=torch.device("cpu"))
    schedule = CosineSchedule(peak_lr=1e-5, warmup_lr=1e-5, warmup_steps=0, min_lr=1e-5, total_steps=1000)
    update = Update(step, optimizer, schedule, config=config, world=World(device=torch.device("cpu")))
    batch = random_batch(config, BATCH, 16)
    return lambda: float(update(0, batch)[1][0])


def transformers(*, bf16: bool) -> Callable[[], float]:
    """The peer, on the very pixels and masks of `ours`."""
    config = PretrainConfig(image_size=(224, 224))
    batch = random_batch(config, BATCH, 16)
    images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    images = torch.where(torch.from_numpy(batch["flip"]).view(-1, 1, 1, 1), images.flip(3), images)
    mask = torch.from_numpy(batch["mask"]).flatten(1)
    torch.manual_seed(0)
    model = ViTForMaskedImageModeling(ViTConfig(encoder_stride=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(images, bool_masked_pos=mask).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def alternate(steps: dict[str, Callable[[], float]], rounds: int) -> Iterator[tuple[str, float]]:
    for _ in range(rounds):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            yield name, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    steps = {
        "transformers fp32": transformers(bf16=False),
        "transformers bf16": transformers(bf16=True),
        "simmim fp32": ours("fp32", compiled=False),
        "simmim bf16": ours("bf16", compiled=False),
        "simmim bf16 compiled": ours("bf16", compiled=True),
    }
    losses = {name: step() for name, step in steps.items()}  # the first step warms up (and compiles) as well
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, seconds in alternate(steps, rounds):
        times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = "transformers fp32"
    print(f"{'step':22}{'images/s':>10}{'ratio':>8}{'first loss':>12}")
    for name, seconds in medians.items():
        ratio = statistics.median(np.divide(times[base], times[name]))
        print(f"{name:22}{BATCH / seconds:10.2f}{ratio:8.2f}{losses[name]:12.4f}")
    save(
        "step_vs_transformers",
        {
            **machine(),
            "model": "ViT-B/16 at 224, batch 8",
            "rounds": rounds,
            "images_per_second": {name: BATCH / seconds for name, seconds in medians.items()},
            "ratio_to_transformers_fp32": {
                name: float(statistics.median(np.divide(times[base], times[name]))) for name in steps
            },
            "first_loss": losses,
        },
    )


if __name__ == "__main__":
    main()
