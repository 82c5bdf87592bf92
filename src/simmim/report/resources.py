"""What a run took: time, waiting for images, memory, energy, money. What was not measured is left out."""

import statistics
from collections.abc import Iterator

from simmim.hardware.accelerators import Accelerator, find_gpu
from simmim.report.facts import Facts
from simmim.training.tracking import duration

_KWH = 3_600_000  # joules


def taken(facts: Facts, price_per_hour: float | None) -> Iterator[tuple[str, str]]:
    """Yield lines about what a run took; `price_per_hour` is in USD, for the whole machine."""
    if (seconds := facts.seconds()) is not None:
        yield "Training time", f"{duration(seconds)}, without evaluations and saving"
    if wall := _sum(facts, "wall_seconds"):
        yield "Time in all", f"{duration(wall)}, with them"
    if speeds := facts.series.get("images_per_second"):
        yield "Speed", f"{statistics.median_high(value for _, value in speeds):.1f} images/s (median)"
    if (waits := input_wait(facts)) is not None:
        yield "Waiting for images", f"{waits:.1%} of the time (median)"
    kinds = {"device_memory_gib": "of tensors on the device", "process_memory_gib": "of the process"}
    peaks = {where: facts.series[name] for name, where in kinds.items() if name in facts.series}
    if peaks:  # of both kinds where a run was resumed on another device
        most = [f"{max(value for _, value in points):.2f} GiB {where}" for where, points in peaks.items()]
        yield "Peak memory", ", ".join(most)
    if joules := _sum(facts, "energy_joules"):
        gpu = "the GPU" if all(devices == 1 for _, devices in facts.hardware) else "one of the GPUs"
        yield "Energy", f"{joules / _KWH:.3g} kWh of {gpu}, by its own counter"
    if cost := _cost(facts, wall or seconds, price_per_hour):
        yield "Cost", cost


def input_wait(facts: Facts) -> float | None:
    """Return the median share of the time in which the device waited for images; `None` where it was not measured."""
    waits = facts.series.get("input_wait")
    return statistics.median(value for _, value in waits) if waits else None


def _cost(facts: Facts, seconds: float | None, price_per_hour: float | None) -> str | None:
    if not seconds:
        return None
    hours = seconds / 3600
    if price_per_hour is not None:
        return f"{_usd(hours * price_per_hour)} at {price_per_hour:g} USD an hour"
    if (known := _priced(facts)) is None:
        return None
    gpu, devices = known
    assert gpu.price is not None
    each = f"{devices} × {gpu.price:g}" if devices > 1 else f"{gpu.price:g}"
    source = ", ".join(filter(None, (gpu.price_source, gpu.price_date)))
    return f"about {_usd(hours * devices * gpu.price)} at {each} USD an hour ({gpu.title}: {source})"


def _priced(facts: Facts) -> tuple[Accelerator, int] | None:
    """Return the GPU that the run was trained on and how many, if there was one kind and its price is known."""
    if len(facts.hardware) != 1:
        return None
    name, devices = facts.hardware[0]
    gpu = find_gpu(name)
    return (gpu, devices) if gpu and gpu.price is not None else None


def _usd(value: float) -> str:
    return f"{value:.2f} USD" if value >= 0.01 else "less than 0.01 USD"


def _sum(facts: Facts, name: str) -> float:
    return sum(value for _, value in facts.series.get(name, []))
