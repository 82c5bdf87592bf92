"""Measure a pretraining's speed and memory: step, input, and both together.

`B` is the images of a step.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from simmim.config.pretraining import PretrainConfig
from simmim.data.bad_images import BadImages
from simmim.hardware.accelerators import gpu_peak_flops
from simmim.hardware.host import peak_process_memory
from simmim.hardware.roofline import Rates
from simmim.torch_engine.accelerators import describe_device, find_accelerator
from simmim.torch_engine.perf.cost import count_flops, measure_work
from simmim.torch_engine.perf.trial import build_update, random_batch
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.jpegs import open_decoder, read_batches
from simmim.torch_engine.train.update import DTYPES, Batch
from simmim.training.pretrain_plan import Plan

_WARM_UP = 2  # calls; the first one allocates the optimiser's state


class Trial:
    """A pretraining set up for measurement only."""

    def __init__(self, plan: Plan, world: World):
        self.plan, self.config, self.world = plan, plan.config, world
        self.step, self.update = build_update(plan.config, world)
        self.decoder = open_decoder(plan, world.device)

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        find_accelerator(self.world.device).synchronize()

    @contextlib.contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """Yield a run's batches, read ahead."""
        with tempfile.TemporaryDirectory() as directory:
            bad = BadImages(Path(directory, "bad_images.txt"), total=self.plan.train_images, max_fraction=1.0)
            reading = self.plan.reading(bad, start_step=0, rank=0, world=1)
            batches = read_batches(self.plan, reading, self.step.model.encoder, self.decoder, self.step.views.values())
            with contextlib.closing(batches):  # type: ignore[type-var]
                yield batches


def measure_step(trial: Trial, seconds: float) -> dict[str, Any]:
    """Measure the speed of whole updates on one random batch, and the share of what the machine could do by its rates.

    Speeds are in images and in FLOP, multiply and add counted apart.
    """
    config, device = trial.config, trial.world.device
    batch = random_batch(config, config.batch_size, trial.step)
    seconds_a_step = median_time(lambda: trial.update(0, batch), seconds, trial.wait)
    memory = peak_memory(device)  # before anything else is allocated
    speed, flops = config.batch_size / seconds_a_step, count_flops(config)
    peak = gpu_peak_flops(describe_device(device)) if find_accelerator(device).is_gpu else None
    rates = measure_rates(config, device, min(seconds, 2.0))
    work = measure_work(config)
    return {
        "images_per_second": speed,
        "seconds": seconds_a_step,
        "flops_per_image": flops,
        "flops_per_second": flops * speed,
        "mfu": flops * speed / peak if peak else None,
        "share_of_matmul": flops * speed / rates.flops,
        "matmul_flops_per_second": rates.flops,
        "copy_bytes_per_second": rates.bandwidth,
        "expected_seconds": work.seconds(config.batch_size, rates),
        "arithmetic_share": work.arithmetic_share(config.batch_size, rates),
        "parameters": sum(parameter.numel() for parameter in trial.step.parameters()),
        "memory_bytes": memory,
    }


def measure_input(trial: Trial, seconds: float) -> dict[str, Any]:
    """Measure the speed of reading, decoding, cropping and batching alone."""
    with trial.batches() as batches:
        for _ in range(2 * _WARM_UP):
            next(batches)
        begun, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - begun < seconds:
            next(batches)
            steps += 1
        elapsed = time.perf_counter() - begun
    config = trial.config
    speed = steps * config.batch_size / elapsed
    return {"images_per_second": speed, "workers": config.workers, "data": config.data}


def measure_end_to_end(trial: Trial, seconds: float) -> dict[str, Any]:
    """Measure training end to end, with batches read while the step runs."""
    figures = []
    with trial.batches() as batches:
        for _ in range(_WARM_UP):
            trial.update(0, next(batches))
        trial.wait()
        begun, steps = time.perf_counter(), 0
        while steps < 3 or time.perf_counter() - begun < seconds:
            figures.append(trial.update(steps, next(batches))[1])
            steps += 1
            if steps % trial.config.log_every_steps == 0:  # training synchronises here too
                torch.stack(figures).cpu()
                figures.clear()
        trial.wait()
        elapsed = time.perf_counter() - begun
    return {"images_per_second": steps * trial.config.batch_size / elapsed, "steps": steps}


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors occupied on the device, or else that this process had resident."""
    if peak := find_accelerator(device).peak_memory:
        return peak(device)
    most = peak_process_memory()
    assert most is not None, "Windows, which tells no peak"
    return most


def measure_rates(config: PretrainConfig, device: torch.device, seconds: float) -> Rates:
    """Measure the best rates of this machine.

    They are the FLOP/s of one large matrix product in the step's precision, and the bytes/s of a copy that no cache
    holds.
    """
    row = find_accelerator(device)
    side, size = (8192, 2**30) if row.total_memory else (2048, 2**28)
    left, right = (torch.randn(side, side, device=device, dtype=DTYPES[config.precision]) for _ in range(2))
    product = median_time(lambda: left @ right, seconds, row.synchronize)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_time(lambda: target.copy_(source), seconds, row.synchronize)
    return Rates(flops=2 * side**3 / product, bandwidth=2 * size / copy)


def median_time(call: Callable[[], Any], seconds: float, wait: Callable[[], None]) -> float:
    """Measure the median seconds of a call, over `seconds` and at least three calls, after two warm-up calls."""
    for _ in range(_WARM_UP):
        call()
    wait()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)
