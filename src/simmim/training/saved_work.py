"""What a run directory holds of worth, by its files alone: checkpoints, and the steps that metrics.jsonl tells of."""

import json
import math
import mmap
from pathlib import Path
from typing import Any

from simmim.errors import UserError
from simmim.training.run_directory import Run


def last_record(path: Path, having: str = "step") -> dict[str, Any]:
    """Return the last whole line of a metrics.jsonl of any length that has a figure; `{}` where there is none."""
    if not path.is_file() or not path.stat().st_size:
        return {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        at = text.rfind(b"\n")
        if having != "step":
            at = text.rfind(f'"{having}"'.encode())
            at = text.find(b"\n", at) if at >= 0 else -1
        if at < 0:
            return {}
        try:
            record = json.loads(text[text.rfind(b"\n", 0, at) + 1 : at])
        except ValueError:
            return {}
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else {}


def steps_per_epoch(last: dict[str, Any]) -> int | None:
    return round(last["step"] / last["epoch"]) if last.get("epoch") else None


def count_steps(config: dict[str, Any], last: dict[str, Any]) -> int | None:
    """Return the steps of the whole run; `None` where it has not begun and counts epochs."""
    per_epoch = steps_per_epoch(last)
    if "steps" in config or per_epoch is None:
        return config.get("steps")
    return math.ceil(config.get("epochs", 100) * per_epoch)


def save_interval(config: dict[str, Any], last: dict[str, Any]) -> int:
    """Return the steps between two checkpoints of a run, as `TrainingPlan.save_every_steps` has them."""
    return config.get("save_every_steps") or max(steps_per_epoch(last) or 0, 100)


def check_checkpoints(run: Run, config: dict[str, Any], origin: str) -> None:
    """Raise `UserError` for a run whose checkpoints were deleted: to train from step 0 would write over its work.

    A process that was killed before its first checkpoint left no work. `config` is the run's; `origin` the option that
    starts another run from its weights.
    """
    if run.has_checkpoint or not _has_work(run, config):
        return
    step = last_record(run.metrics).get("step", 0)
    weights = next((path for path in (run.encoder, run.model) if path.is_dir()), None)
    held = " and ".join([*([str(weights)] if weights else []), f"metrics of {step} steps"])
    start = f" (with {origin} {weights} to start from its weights)" if weights else ""
    raise UserError(
        f"{run.checkpoints} has no checkpoint, and training from step 0 would write over {held}; bring the checkpoints "
        f"back, give another --out{start}, or start again with --fresh, which moves the old run aside"
    )


def _has_work(run: Run, config: dict[str, Any]) -> bool:
    """Tell whether a run without a checkpoint has had one, or has finished."""
    last = last_record(run.metrics)
    step = last.get("step", 0)
    if run.encoder.is_dir() or step > save_interval(config, last):  # an encoder is written after a checkpoint
        return True
    saving = any(run.checkpoints.glob("writing-*"))  # killed there
    return run.model.is_dir() and step == count_steps(config, last) and not saving
