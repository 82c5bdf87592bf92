"""Profile a training, operator by operator."""

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from simmim.torch_engine.accelerators import find_accelerator
from simmim.torch_engine.perf.measure import Trial

READING = "next batch"


def profile_training(trial: Trial, path: Path, *, steps: int = 3, most: int = 10) -> dict[str, Any]:
    """Train `steps` steps on a run's own batches and write a Chrome trace to `path`.

    Returns the `most` operators with the largest self time: kernels on a GPU, else CPU operators. In the
    trace, `next batch` is the time spent waiting for input.
    """
    kind = find_accelerator(trial.world.device).profiled_as
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.__members__[kind]] if kind else [])
    with trial.batches() as batches:
        trial.update(0, next(batches))
        trial.wait()
        with profile(activities=activities) as profiler:
            for step in range(steps):
                with record_function(READING):
                    batch = next(batches)
                trial.update(step, batch)
            trial.wait()
    profiler.export_chrome_trace(str(path))

    def own(event: Any) -> float:
        return (event.self_device_time_total if kind else event.self_cpu_time_total) / 1e6

    events = list(profiler.key_averages())
    if kind:  # on a GPU, kernels are listed separately
        events = [event for event in events if event.device_type.name == kind and not event.is_user_annotation]
    events.sort(key=own, reverse=True)
    total = sum(map(own, events))
    rows = [
        {"name": event.key, "seconds": own(event) / steps, "share": own(event) / total, "calls": event.count / steps}
        for event in events[:most]
    ]
    return {"trace": str(path), "operators": rows}


def describe(figures: dict[str, Any]) -> str:
    """Format the operators as a table."""
    rows = [
        f"{row['share']:7.1%}{1000 * row['seconds']:10.1f} ms{row['calls']:8.0f} calls  {row['name'][:70]}"
        for row in figures["operators"]
    ]
    return "\n".join((f"profile  {figures['trace']}; of a step the costliest operators take", *rows))
