"""Measure a pretraining's speed on this machine, its limit and a remedy (`simmim bench`)."""

import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simmim.config.commands import BenchConfig
from simmim.config.pretraining import PretrainConfig, ask_objectives
from simmim.config.validation import from_settings, validated
from simmim.data.packed.format import PackedImages
from simmim.data.sounds import holds_sounds
from simmim.data.sources import ArrayImages, ImageSource, Subset, open_source, sniff
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.torch_engine.accelerators import choose_device, choose_precision, describe_device, find_accelerator
from simmim.torch_engine.models.encoders import default_image_size, sketch_encoder
from simmim.torch_engine.perf import profiling
from simmim.torch_engine.perf.kernel_choice import KINDS, choose_kernels, describe_times, measure_kernels
from simmim.torch_engine.perf.limits import compare, judge
from simmim.torch_engine.perf.measure import Trial, measure_end_to_end, measure_input, measure_step
from simmim.torch_engine.train import distributed
from simmim.training.pretrain_images import Images
from simmim.training.pretrain_plan import Plan
from simmim.training.whole_files import write_json


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure step, input and both together. Raises `UserError` for bad settings.

    Progress goes to standard error.
    """
    config = from_settings(BenchConfig, {field.name: getattr(config, field.name) for field in fields(BenchConfig)})
    if config.save_calibration and (config.objective or config.teacher):
        raise UserError("--save-calibration is for the objective pixels alone; leave --objective and --teacher out")
    for file in filter(None, (config.profile, config.save_calibration)):
        if not Path(file).absolute().parent.is_dir():  # fail before measuring, not after minutes
            raise UserError(f"{file} cannot be written: its folder is not there; make it, or give another file")
    device = choose_device(config.device)
    source = open_source(config.data, config.frames)
    if holds_sounds(source):
        raise UserError(
            f"simmim bench is for images, and {config.data} holds sounds; the progress of a pretraining shows its speed"
        )
    plan = plan_of(config, source, device)
    training = plan.config
    figures = {
        "device": describe_device(torch.device(device)),
        "kind": device,
        "memory_gib": device_memory(device) / 2**30,
        "cores": cpu_cores(),
        "has_bf16": choose_precision("auto", device) == "bf16",
        "torch": torch.__version__,
        "model": training.model,
        "image_size": list(training.image_size or ()),
        "batch_size": training.batch_size,
        "precision": training.precision,
        "objective": [each.kind for each in training.objectives],
        "compile": training.compile,
        "decode": training.decode,
        "readers": training.readers,
        "antialias": training.antialias,
    }
    with distributed.join(device, training.precision) as world:
        plan = plan.replace(kernels=choose_kernels(plan.config, world.main_says))
        figures["kernels"] = {
            name: {"seconds": seconds, "chosen": getattr(plan.config.kernels, name)}
            for name, seconds in measure_kernels(plan.config).items()
        }
        trial = Trial(plan, world)
        _say("step")
        figures["step"] = measure_step(trial, config.seconds)
        _say("input")
        figures["input"] = measure_input(trial, config.seconds) | {"stored": _stored(source)}
        _say("both at once")
        both = measure_end_to_end(trial, config.seconds)
        rates = (figures[name]["images_per_second"] for name in ("step", "input"))
        figures["end_to_end"] = both | compare(both["images_per_second"], *rates, shared_cores=device == "cpu")
        figures["limit"] = judge(figures)
        if config.profile:
            _say("operators")
            figures["profile"] = profiling.profile_training(trial, Path(config.profile))
    if config.save_calibration:
        add_calibration(Path(config.save_calibration), figures)
    return figures


def _say(what: str) -> None:
    print(f"measuring the {what}" if what == "step" else f"measuring {what}", file=sys.stderr, flush=True)


def plan_of(config: BenchConfig, source: ImageSource, device: str) -> Plan:
    """Build the plan to measure. A set smaller than a batch is repeated."""
    size = config.image_size or default_image_size(config.model)
    training = validated(
        PretrainConfig(
            data=config.data,
            out="unused",
            model=config.model,
            objectives=ask_objectives(config.objective, config.teacher),
            batch_size=config.batch_size,
            workers=config.workers,
            decode=config.decode,
            readers=config.readers,
            antialias=config.antialias,
            steps=10**9,
            warmup_epochs=0,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
    )
    encoder = sketch_encoder(config.model, size, {})
    images = Subset(source, np.resize(np.arange(len(source)), max(len(source), config.batch_size)))
    return Plan.complete(
        training,
        Images(train=images, val=Subset(source, np.arange(0)), dtype=sniff(source, channels=training.channels)),
        patch=encoder.patch_size,
        width=encoder.width,
        image_size=size,
        device=device,
        precision=choose_precision(config.precision, device),
        compile=find_accelerator(device).compiles if config.compile is None else config.compile,
    )


def _stored(source: ImageSource) -> str:
    """Storage form: that of packed images, `pixels` for an array, else `files`."""
    if isinstance(source, PackedImages):
        return source.manifest.form
    return "pixels" if isinstance(source, ArrayImages) else "files"


def device_memory(device: str) -> int:
    """Return the bytes of the device's own memory, or of the host's if it has none."""
    if total := find_accelerator(device).total_memory:
        return total(torch.device(device))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def add_calibration(path: Path, figures: dict[str, Any]) -> None:
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else []
    if steps and steps[0]["device"] != figures["device"]:
        raise UserError(f"calibration {path} is of {steps[0]['device']!r}; give another file for {figures['device']!r}")
    write_json(path, {"steps": [*steps, figures]})


def describe(figures: dict[str, Any]) -> str:
    """Format the figures as text."""
    step, source, whole, limit = (figures[name] for name in ("step", "input", "end_to_end", "limit"))
    size = "x".join(map(str, figures["image_size"]))
    share = f"{step['mfu']:.1%} of the peak" if step["mfu"] else f"{step['share_of_matmul']:.1%} of a large product's"
    gflops, rate = step["flops_per_image"] / 1e9, step["flops_per_second"] / 1e9
    place = "on the device" if find_accelerator(figures["kind"]).peak_memory else "of this process, libraries included"
    readers = f"{source['workers']} {figures['readers']}{' and nvJPEG' if figures['decode'] == 'gpu' else ''}"
    lines = [
        f"machine  {figures['device']}, torch {figures['torch']}",
        f"step     {figures['model']} at {size}, batch {figures['batch_size']}, {figures['precision']}, objective "
        f"{' + '.join(figures['objective'])}: {step['images_per_second']:.2f} images/s",
        f"         {gflops:.1f} GFLOP an image, {rate:.0f} GFLOP/s, {share}",
        f"memory   {step['memory_bytes'] / 2**30:.2f} GiB at most {place}",
        f"input    {source['images_per_second']:.1f} images/s by {readers} from {source['data']}",
        f"both     {whole['images_per_second']:.2f} images/s end to end, {whole['share_of_slower']:.0%} of the slower",
        f"limit    {limit['limit']}: {limit['because']}",
        f"try      {limit['suggestion']}",
    ]
    if "share_of_shared" in whole:
        lines.insert(6, f"         {whole['share_of_shared']:.0%} of what step and input can reach on the same cores")
    for name, row in figures["kernels"].items():
        lines.insert(3, f"kernels  {KINDS[name]}: {describe_times(row['seconds'], row['chosen'])}")
    if "profile" in figures:
        lines.append(profiling.describe(figures["profile"]))
    return "\n".join(lines)
