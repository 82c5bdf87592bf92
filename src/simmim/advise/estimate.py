"""Estimate the time, memory, cost and command of a training on each accelerator.

Facts come from `simmim.hardware.accelerators`, the step's work from the real model (`simmim.torch_engine.perf.cost`),
time and memory from `simmim.hardware.roofline`. `docs/advise.md` works one answer out by hand.
"""

import dataclasses
import difflib
import functools
import json
import math
import shlex
from collections.abc import Iterator
from typing import Any

from simmim.advise.calibration import OWN, read_own_machine
from simmim.advise.kept_work import Measure, measure_once
from simmim.advise.request import Option, Range, Request
from simmim.config.pretraining import PretrainConfig, ask_objectives
from simmim.config.strategies import parse_strategy
from simmim.errors import UserError
from simmim.hardware.accelerators import Accelerator, Facts, read_facts
from simmim.hardware.roofline import Rates, StepWork
from simmim.method.heads import Head


class Estimator:
    """Shared inputs of every option: facts, prices, batch size, and the step's work by precision."""

    def __init__(self, request: Request, measure: Measure | None):
        self.request = request
        self.facts: Facts = read_facts(request.accelerators)
        self.config = config_of(request)
        self.batch_size = request.batch_size or _default_batch(request.images)
        if self.batch_size > request.images:
            raise UserError(f"batch size {self.batch_size} is more than {request.images} images; use a smaller one")
        measure = measure or measure_once
        self.own = read_own_machine(request.calibration, measure) if request.calibration else None
        self.rows = self._choose(self.facts.accelerators | ({OWN: self.own[0]} if self.own else {}))
        self._measure = measure
        self._work = functools.cache(self._count)

    def _count(self, device: str, precision: str, checkpoint: bool) -> StepWork:
        config = dataclasses.replace(self.config, device=device, precision=precision, checkpoint_activations=checkpoint)
        return self._measure(config)

    def _choose(self, rows: dict[str, Accelerator]) -> dict[str, Accelerator]:
        for name in self.request.accelerator:
            _known(name, rows)
        for text in self.request.price:
            name, usd = _parse_price(text)
            said = {"price": usd, "spot": usd, "price_source": "as you said", "price_date": "now"}
            rows = rows | {name: dataclasses.replace(_known(name, rows), **said)}
        return {
            name: row for name, row in rows.items() if not self.request.accelerator or name in self.request.accelerator
        }

    def work(self, row: Accelerator, *, checkpoint: bool, timed: bool = False) -> StepWork:
        """Return the step's work on an accelerator; `timed` selects the work that decides its time."""
        wide = self.precision(row) == "fp32"  # fp16's tensors are as large as bf16's
        # Like CUDA's fused attention, the TPU compiler usually keeps attention scores out of memory.
        device = "cuda" if timed and row.device == "tpu" else row.device
        return self._work(device, "fp32" if wide else "bf16", checkpoint)

    @property
    def steps(self) -> int:
        return math.ceil(self.request.images // self.batch_size * self.request.epochs)

    def precision(self, row: Accelerator) -> str | None:
        """Choose the precision for an accelerator; `None` if its FLOP/s in that precision is unknown."""
        wanted = ("bf16", "fp16", "fp32") if self.request.precision == "auto" else (self.request.precision,)
        return next((name for name in wanted if name in row.tflops), None)

    def counts(self, row: Accelerator) -> Iterator[int]:
        """Device counts to try."""
        if row.device is None or self.precision(row) is None:
            return
        counts = [self.request.devices] if self.request.devices else [1, 2, 4, 8]
        yield from (n for n in counts if n <= row.linked and self.batch_size % n == 0)

    def usable_gib(self, row: Accelerator) -> float:
        return self.facts.usable_gib(row.memory_gb)

    def rates(self, row: Accelerator) -> Rates:
        if self.own and row.name == OWN:
            return self.own[1]
        reached, precision = self.facts.reached, self.precision(row)
        assert precision is not None
        return Rates(
            flops=row.tflops[precision] * 1e12 * reached["arithmetic"],
            bandwidth=row.bandwidth_gb_s * 1e9 * reached["bandwidth"],
            launch=reached["launch"] if row.device == "cuda" else 0.0,
        )

    def option(self, row: Accelerator, devices: int) -> Option | None:
        """Return the fastest option for a device count; `None` if nothing fits.

        Tries the whole batch first, then accumulation with and without activation checkpointing, then sharding.
        """
        for shard in (False, True) if devices > 1 else (False,):
            plain = self._way(row, devices, checkpoint=False, shard=shard)
            if plain and plain.accumulate_steps == 1:
                return plain
            ways = [way for way in (plain, self._way(row, devices, checkpoint=True, shard=shard)) if way]
            if ways:
                return min(ways, key=lambda option: option.hours[1])
        return None

    def _way(self, row: Accelerator, devices: int, *, checkpoint: bool, shard: bool) -> Option | None:
        fit = self._fit(row, devices, checkpoint=checkpoint, shard=shard)
        if fit is None:
            return None
        pieces, memory = fit
        images, rates = self.batch_size // devices // pieces, self.rates(row)
        work = self.work(row, checkpoint=checkpoint, timed=True)
        compute = work.seconds(images, rates, pieces=pieces)
        exchange = self._exchange(work, row, devices, shard, pieces)
        # DDP overlaps its exchange with the last backward pass (two thirds of a piece); FSDP prefetches half
        # of its gathers.
        waited = max(0.0, exchange / 2 if shard else exchange - compute / pieces * 2 / 3)
        reading = self._reading(row, devices)
        seconds = max(compute + waited, reading)
        hours = self._spread(row, self.steps * seconds / 3600)
        usd = row.spot if self.request.spot else row.price
        precision = self.precision(row)
        assert precision is not None
        return Option(
            accelerator=row.name,
            title=row.title,
            devices=devices,
            images_at_a_time=images,
            accumulate_steps=pieces,
            precision=precision,
            checkpoint_activations=checkpoint,
            shard=shard,
            memory_gib=memory,
            memory_share=memory / row.memory_gb,
            images_per_second=self.batch_size / seconds,
            hours=hours,
            usd=None if usd is None else (hours[0] * usd * devices, hours[1] * usd * devices, hours[2] * usd * devices),
            limit="reading images" if reading >= seconds else _limit(work, images, rates, compute, waited),
            input_cores=self.batch_size / seconds / self.facts.input["images_per_second_core"],
            price=_price(row, spot=self.request.spot),
            command=self.command(row, devices, precision, pieces, checkpoint, shard),
        )

    def _fit(self, row: Accelerator, devices: int, *, checkpoint: bool, shard: bool) -> tuple[int, float] | None:
        """Return the fewest accumulation steps that fit, and the memory in GiB; `None` if nothing fits."""
        work, share, shards = self.work(row, checkpoint=checkpoint), self.batch_size // devices, devices if shard else 1
        for pieces in range(1, share + 1):
            if share % pieces == 0:
                kept = pieces > 1 or (devices > 1 and not shard)
                memory = work.peak_bytes(share // pieces, kept_gradients=kept, shards=shards) / 2**30
                if memory <= self.usable_gib(row):
                    return pieces, memory
        return None

    def _spread(self, row: Accelerator, likely: float) -> Range:
        low, high = self.facts.reached["range_fitted" if row.fitted or row.name == OWN else "range_other"]
        return likely * low, likely, likely * high

    def _exchange(self, work: StepWork, row: Accelerator, devices: int, shard: bool, pieces: int) -> float:
        """Seconds of a step's ring exchange: gradients once; if sharded, parameters twice per accumulation step."""
        if devices == 1 or row.link_gb_s is None:
            return 0.0
        one_way = row.link_gb_s / 2 * 1e9 * self.facts.reached["bandwidth"]
        rounds = 1 + 2 * pieces if shard else 2
        return rounds * (devices - 1) / devices * work.gradient_bytes / one_way

    def _reading(self, row: Accelerator, devices: int) -> float:
        """Seconds to read a step's images; 0 if the number of cores is unknown."""
        cores = self.cores(row)
        return self.batch_size / (cores * devices * self.facts.input["images_per_second_core"]) if cores else 0.0

    def cores(self, row: Accelerator) -> int | None:
        return self.request.cores or row.vcpus

    def command(
        self, row: Accelerator, devices: int, precision: str, pieces: int, checkpoint: bool, shard: bool
    ) -> str:
        request, (height, width) = self.request, self.config.image_size or (0, 0)
        start = f"torchrun --nproc-per-node {devices} -m simmim" if devices > 1 else "simmim"
        if devices > 1 and row.device == "tpu":  # TorchTPU must be told of all its processes (docs/tpu.md)
            start = f"env $(python -m torch.tpu.distributed | tr -d '\"') {start}"
        words = [f"{start} pretrain --data IMAGES --out RUN --model {request.model}"]
        if request.model_args:
            pairs = (f"{name}={json.dumps(value)}" for name, value in request.model_args.items())
            words.append("--model-args " + " ".join(map(shlex.quote, pairs)))
        words.append(f"--image-size {height if height == width else f'{height}x{width}'}")
        words.append(f"--channels {request.channels}" if request.channels != 3 else "")
        words.append(f"--head {request.head}" if request.head != "linear" else "")
        if request.objective or not request.teacher:
            words.append(f"--objective {' '.join(request.objective or ('pixels',))}")
        if request.teacher:
            words.append(f"--teacher {shlex.quote(request.teacher)}")
        words.append(f"--epochs {request.epochs:g} --batch-size {self.batch_size}")
        words.append(f"--accumulate-steps {pieces}" if pieces > 1 else "")
        words.append(f"--precision {precision} --device {row.device}")
        words.append("--checkpoint-activations" if checkpoint else "")
        words.append("--shard" if shard else "")
        return " ".join(filter(None, words))

    def why_not(self, row: Accelerator) -> str:
        if row.device is None:
            return "simmim has no --device that reaches it"
        if self.precision(row) is None:
            return f"its FLOP/s in {self.request.precision} are not known"
        counts = list(self.counts(row))
        if not counts:
            return f"joins at most {row.linked} devices, and their number must divide the batch of {self.batch_size}"
        need, has = self.least_gib(row, max(counts)), self.usable_gib(row)
        return f"needs {need:.1f} GiB a device, one image at a time on {max(counts)} devices; has {has:.1f}"

    def least_gib(self, row: Accelerator, devices: int) -> float:
        """GiB that a device needs with every memory saving switched on."""
        work = self.work(row, checkpoint=True)
        return work.peak_bytes(1, kept_gradients=devices > 1, shards=devices) / 2**30

    def nothing_fits(self, left_out: dict[str, str]) -> str:
        reachable = [row for row in self.rows.values() if any(self.counts(row))]
        if not reachable:
            name, why = next(iter(left_out.items()))
            return f"no accelerator is left: {name}: {why}; choose others with --accelerator"
        row = max(reachable, key=lambda row: row.memory_gb)
        devices = max(self.counts(row))
        need, has = self.least_gib(row, devices), self.usable_gib(row)
        return (
            f"model {self.request.model} fits nowhere: it needs {need:.0f} GiB a device on {devices} × {row.name}, "
            f"which has {has:.0f} free; the nearest is a model {has / need:.2g} times as large, or more --devices"
        )

    def describe(self) -> dict[str, Any]:
        row = next(row for row in self.rows.values() if self.precision(row))
        work = self.work(row, checkpoint=False)
        return {
            "model": self.request.model,
            "image_size": list(self.config.image_size or ()),
            "parameters": work.parameters,
            "forward_gflop_per_image": work.forward_flops / 1e9,
            "step_gflop_per_image": work.flops_per_image / 1e9,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "states_gib": (work.state_bytes + work.gradient_bytes) / 2**30,
        }


def config_of(request: Request) -> PretrainConfig:
    """Build the requested training's configuration without batch size and precision, which each option sets."""
    from simmim.torch_engine.models.encoders import default_image_size

    size = request.image_size or default_image_size(request.model)
    colour = (0.5,) * request.channels
    return PretrainConfig(
        model=request.model,
        model_args=request.model_args,
        image_size=size,
        channels=request.channels,
        head=parse_strategy(Head, request.head),
        objectives=ask_objectives(request.objective, request.teacher),
        mean=colour,
        std=colour,
    )


def _default_batch(images: int) -> int:
    """Default batch size: a power of two, 64 to SimMIM's 2048, for 100 steps an epoch, at most the image count."""
    batch = 2 ** int(math.log2(max(images / 100, 1)))
    return min(max(batch, min(64, images)), 2048)


def _known(name: str, rows: dict[str, Accelerator]) -> Accelerator:
    if name not in rows:
        close = difflib.get_close_matches(name, rows, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(rows)}"
        raise UserError(f"accelerator {name!r} is not known; {remedy}")
    return rows[name]


def _parse_price(text: str) -> tuple[str, float]:
    name, _, usd = text.partition("=")
    try:
        price = float(usd)
    except ValueError:
        price = -1.0
    if not 0 <= price < math.inf:
        raise UserError(f"price {text!r} is not NAME=USD an hour; write rtx-4090=0.5")
    return name, price


def _limit(work: StepWork, images: int, rates: Rates, compute: float, waited: float) -> str:
    if waited > compute:
        return "exchange of gradients"
    if work.seconds(images, dataclasses.replace(rates, launch=0.0)) < 0.6 * work.seconds(images, rates):
        return "starting operations"
    return "arithmetic" if work.arithmetic_share(images, rates) > 0.5 else "memory traffic"


def _price(row: Accelerator, *, spot: bool) -> str:
    usd = row.spot if spot else row.price
    if usd is None:
        return f"{'spot ' if spot else ''}price not known: give --price {row.name}=USD"
    return f"{usd:g} USD, {row.price_source}, {row.price_date or 'date not known'}"
