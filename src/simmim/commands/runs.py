"""`simmim runs`: the runs below a directory, by what is on disk. Loads neither PyTorch nor a checkpoint."""

import math
import os
import shlex
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simmim.errors import UserError
from simmim.output import aligned
from simmim.training.checkpoint_directory import checkpoint_step
from simmim.training.run_directory import Run
from simmim.training.saved_work import count_steps, last_record, save_interval
from simmim.training.whole_files import read_json

_FIGURES = ("top1", "miou", "map")  # of a fine-tuning, in metrics.json
_PATIENCE = 10  # lines of metrics.jsonl that may fail to come before a run counts as ended
_AT_LEAST = 300.0  # seconds: the first step compiles, and evaluations take their time


def find_runs(directory: str | Path) -> list[dict[str, Any]]:
    """Describe the runs below a directory, by name.

    Each has "run", "model", "data", "objective", "step", "steps", "loss", "figure" (a pair of name and value), "state"
    and "resume", the command that goes on with it; what is not known is `None`. Raises `UserError` if there is no run.
    """
    if not Path(directory).is_dir():
        raise UserError(f"{directory} is not a directory; give the one that holds your runs")
    found = [_look(run) for run in _walk(Path(directory))]
    if not found:
        raise UserError(f"no run is below {directory}; give the directory that holds the --out directories")
    return found


def describe(runs: list[dict[str, Any]]) -> list[str]:
    """Format runs as lines of a table, and the commands that resume them."""
    rows: list[tuple[str, ...]] = [("run", "state", "step", "loss", "figure", "objective", "model", "data")]
    for run in runs:
        steps = "?" if run["steps"] is None else run["steps"]
        loss = "" if run["loss"] is None else f"{run['loss']:.4f}"
        figure = "{} {:.4f}".format(*run["figure"]) if run["figure"] else ""
        step = f"{run['step']}/{steps}"
        rows.append((run["run"], run["state"], step, loss, figure, run["objective"], run["model"], run["data"]))
    commands = [run["resume"] for run in runs if run["resume"]]
    return [*aligned(rows), *(["", "to resume:", *commands] if commands else [])]


def _walk(directory: Path) -> Iterator[Run]:
    """Yield the runs in a directory and below it, sorted. Runs in a run, its baselines, are left out."""
    run = Run(directory)
    if run.config.is_file():
        yield run
        return
    try:
        folders = sorted(Path(entry) for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))
    except OSError:  # not ours to read
        return
    for folder in folders:
        if not folder.name.startswith("."):
            yield from _walk(folder)


def _look(run: Run) -> dict[str, Any]:
    """Describe a run; see `find_runs`."""
    try:
        config = tomllib.loads(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not whole, or not TOML
        config = {}
    last = last_record(run.metrics)
    knn = last_record(run.metrics, "knn_top1").get("knn_top1")
    figure = None if knn is None else ("knn_top1", knn)
    step, loss = last.get("step", 0), last.get("loss")
    steps = count_steps(config, last)
    if "task" in config:
        best = read_json(run.path / "metrics.json").get("best", {})
        figure = next(((name, best[name]) for name in _FIGURES if name in best), None)
    state = _state(run, config, last, steps)
    place = shlex.quote(str(run.path))
    return {
        "run": str(run.path),
        "model": config.get("model", "?"),
        "data": config.get("data", "?"),
        "objective": config.get("task") or _objectives(config),
        "step": step,
        "steps": steps,
        "loss": loss,
        "figure": figure,
        "state": state,
        "resume": f"simmim resume {place}" if state in _RESUMED else None,
    }


_RESUMED = ("stopped", "failed")


def _objectives(config: dict[str, Any]) -> str:
    return "+".join(each["kind"] for each in config.get("objectives", [])) or "pixels"


def _state(run: Run, config: dict[str, Any], last: dict[str, Any], steps: int | None) -> str:
    """Tell what became of a run.

    - "finished": its last step is saved (checkpoints may be gone);
    - "stopped": it ended, and its last step is saved, as after a signal;
    - "running?": it wrote a line not long ago, for its speed (no file says that a process is alive);
    - "failed": it ended without saving its last step: killed, out of memory or diverged;
    - "converted": `simmim convert` wrote it, and no step was done.
    """
    saved = max(map(checkpoint_step, run.checkpoints.glob("step-*")), default=None)
    if not last:
        if saved == 0:
            return "converted"
        return "running?" if time.time() - run.config.stat().st_mtime < _AT_LEAST else "failed"
    if last["step"] == steps and saved in (steps, None) and (run.encoder.is_dir() or run.model.is_dir()):
        return "finished"
    saved_by_signal = saved == last["step"] and last["step"] % save_interval(config, last)
    changed = run.config.stat().st_mtime, run.metrics.stat().st_mtime  # a resume writes the configuration first
    if saved_by_signal and changed[0] < changed[1]:
        return "stopped"
    seconds = config.get("batch_size", 0) / (last.get("images_per_second") or math.inf)
    patience = max(_PATIENCE * config.get("log_every_steps", 10) * seconds, _AT_LEAST)
    if time.time() - max(changed) < patience:
        return "running?"
    return "stopped" if saved == last["step"] else "failed"
