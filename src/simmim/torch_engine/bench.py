"""`simmim bench`: how fast this machine takes a pretraining step and reads images, and its share of the peak."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simmim.accelerators import cpu_cores, gpu_peak_flops
from simmim.config import PretrainConfig, from_settings, validated
from simmim.data.augment import RandomResizedCrop
from simmim.data.bad_images import BadImages
from simmim.data.pipeline import Reading, train_batches
from simmim.data.sources import ImageSource, open_source, sniff
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.fields import ImageSize, Positive, PositiveReal, Word, YesNo
from simmim.plan import draw_masks
from simmim.run import write_json
from simmim.schedules import CosineSchedule
from simmim.torch_engine import distributed
from simmim.torch_engine.encoders import default_image_size
from simmim.torch_engine.model import PretrainStep
from simmim.torch_engine.optim import create_optimizer
from simmim.torch_engine.storage import build_step
from simmim.torch_engine.update import Batch, Update


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure."""

    model: str = "vit_base_patch16_224"
    """The encoder, by its timm name."""
    batch_size: Positive = 8
    """Images of a step."""
    image_size: ImageSize = None
    """Pixels, N or HxW (default: the model's own)."""
    data: str = "demo"
    """Images for the input figure."""
    device: Literal["auto", "cpu", "cuda", "tpu"] = "auto"
    """Accelerator."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass."""
    compile: YesNo = None
    """Compile the step with torch.compile (default: on CUDA and TPU only, as in training)."""
    seconds: PositiveReal = 10.0
    """How long to measure each figure, after warming up."""
    save_calibration: Word = None
    """Add the figures to this JSON file, from which simmim advise --calibration learns what the machine reaches."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Figures of the step, of the input, and what they were measured on. One-line `ValueError`s for bad settings."""
    config = from_settings(BenchConfig, {field.name: getattr(config, field.name) for field in fields(BenchConfig)})
    device = distributed.choose_device(config.device)
    source = open_source(config.data)
    training = validated(
        PretrainConfig(
            data=config.data,
            out="unused",
            model=config.model,
            image_size=config.image_size or default_image_size(config.model),
            batch_size=config.batch_size,
            device=device,  # type: ignore[arg-type]
            precision=distributed.choose_precision(config.precision, device),  # type: ignore[arg-type]
            compile=device != "cpu" if config.compile is None else config.compile,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
    )
    figures = {
        "device": distributed.device_name(torch.device(device)),
        "kind": device,
        "memory_gib": device_memory(device) / 2**30,
        "torch": torch.__version__,
        "model": training.model,
        "image_size": list(training.image_size or ()),
        "batch_size": training.batch_size,
        "precision": training.precision,
        "compile": training.compile,
        "step": measure_step(training, config.seconds),
        "input": measure_input(source, training, config.seconds),
    }
    if config.save_calibration:
        add_calibration(Path(config.save_calibration), figures)
    return figures


def device_memory(device: str) -> int:
    """Bytes: the GPU's, else the machine's."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def add_calibration(path: Path, figures: dict[str, Any]) -> None:
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else []
    if steps and steps[0]["device"] != figures["device"]:
        raise ValueError(
            f"calibration {path} is of {steps[0]['device']!r}; give another file for {figures['device']!r}"
        )
    write_json(path, {"steps": [*steps, figures]})


def describe(figures: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    step, source = figures["step"], figures["input"]
    size = "x".join(map(str, figures["image_size"]))
    share = f"{step['mfu']:.1%} of the peak" if step["mfu"] else f"{step['share_of_matmul']:.1%} of a large product's"
    gflops, rate = step["flops_per_image"] / 1e9, step["flops_per_second"] / 1e9
    slower = "input" if source["images_per_second"] < step["images_per_second"] else "step"
    return "\n".join(
        (
            f"machine  {figures['device']}, torch {figures['torch']}",
            f"step     {figures['model']} at {size}, batch {figures['batch_size']}, {figures['precision']}: "
            f"{step['images_per_second']:.2f} images/s",
            f"         {gflops:.1f} GFLOP an image, {rate:.0f} GFLOP/s, {share}",
            f"input    {source['images_per_second']:.1f} images/s by {source['threads']} threads from {source['data']}",
            f"limit    the {slower}",
        )
    )


def measure_step(config: PretrainConfig, seconds: float) -> dict[str, Any]:
    """Speed of whole updates on one random batch, in images and in FLOP (multiply and add counted apart)."""
    with distributed.join(config.device) as world:
        step, update = build_update(config, world)
        flops = count_flops(config)
        batch = random_batch(config, config.batch_size, step.model.encoder.patch_size)
        seconds_a_step = median_time(lambda: update(0, batch), seconds, world.device)
        speed = config.batch_size / seconds_a_step
        peak = gpu_peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        return {
            "images_per_second": speed,
            "seconds": seconds_a_step,
            "flops_per_image": flops,
            "flops_per_second": flops * speed,
            "mfu": flops * speed / peak if peak else None,
            "share_of_matmul": flops * speed / matmul_rate(config, world.device, min(seconds, 2.0)),
            "parameters": sum(parameter.numel() for parameter in step.parameters()),
            "memory_bytes": torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None,
        }


def build_update(config: PretrainConfig, world: distributed.World) -> tuple[PretrainStep, Update]:
    """What one step trains, and the update that does it, with a small learning rate."""
    torch.manual_seed(0)
    step = build_step(config)
    return step, update_of(step, config, world)


def update_of(step: PretrainStep, config: PretrainConfig, world: distributed.World) -> Update:
    """The update that trains `step` on the device of `world`, compiled if so configured, with a small learning rate."""
    step.to(world.device)
    if config.compile:
        step.compile(dynamic=False)
    optimizer = create_optimizer(step, weight_decay=config.weight_decay, betas=config.betas, device=world.device)
    schedule = CosineSchedule(peak_lr=1e-5, warmup_lr=0, warmup_steps=0, min_lr=0, total_steps=10**6)
    return Update(step, optimizer, schedule, config=config, world=world)


def try_devices() -> dict[str, str]:
    """One training step of a very small model on each device found: `training on DEVICE` → how it went."""
    found = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        precision = distributed.choose_precision("auto", device)
        config = PretrainConfig(
            model="vit_tiny_patch16_224",
            model_args={"depth": 1, "embed_dim": 48},
            image_size=(64, 64),
            batch_size=2,
            precision=precision,  # type: ignore[arg-type]
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
        try:
            _, update = build_update(config, distributed.World(device=torch.device(device)))
            _, figures = update(0, random_batch(config, 2, patch=16))
            found[f"training on {device}"] = f"works in {precision}, a step gave the loss {float(figures[0]):.3f}"
        except Exception as error:  # whatever a driver or a library raises is the finding
            found[f"training on {device}"] = f"does not work: {' '.join(str(error).split())}"
    return found


def random_batch(config: PretrainConfig, size: int, patch: int) -> Batch:
    assert config.image_size is not None
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, *config.image_size, config.channels), dtype=np.uint8),
        "flip": rng.random(size) < 0.5,
        "mask": draw_masks(config, 0, np.arange(size), patch),
    }


def count_flops(config: PretrainConfig) -> int:
    """FLOP of forward and backward for one image, counted on the real step.

    Attention runs unfused here: PyTorch's counter does not know the CPU's fused kernel and would leave it out.
    """
    with torch.device("meta"):
        step = build_step(config)
    batch = random_batch(config, 1, step.model.encoder.patch_size)
    with FakeTensorMode() as shapes:  # nothing is computed
        step._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # `to_empty` would mix the two kinds
        tensors = {name: shapes.from_tensor(torch.from_numpy(array)) for name, array in batch.items()}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(**tensors).backward()
    return counter.get_total_flops()


def matmul_rate(config: PretrainConfig, device: torch.device, seconds: float) -> float:
    """FLOP/s of one large matrix product in the step's precision: what this machine reaches at best."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median_time(lambda: left @ right, seconds, device)


def median_time(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Median seconds of a call, over `seconds` and at least three calls, after two to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        call()
    wait()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure_input(source: ImageSource, config: PretrainConfig, seconds: float) -> dict[str, Any]:
    """Speed of reading, decoding, cropping and batching the images of a source, with one thread a core."""
    assert config.image_size is not None
    dtype = sniff(source, channels=config.channels)
    size = min(config.batch_size, len(source))
    with tempfile.TemporaryDirectory() as directory:
        batches = train_batches(
            source,
            Reading(
                batch_size=size,
                seed=0,
                start_step=0,
                total_steps=10**9,
                threads=cpu_cores(),
                bad_images=BadImages(Path(directory) / "bad_images.txt", total=len(source), max_fraction=1.0),
            ),
            crop=RandomResizedCrop(size=config.image_size),
            channels=config.channels,
            dtype=dtype,
        )
        for _ in range(4):
            next(batches)
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            next(batches)
            steps += 1
        elapsed = time.perf_counter() - begun
    return {"images_per_second": steps * size / elapsed, "threads": cpu_cores(), "data": config.data}
