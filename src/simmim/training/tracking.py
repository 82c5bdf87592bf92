"""Outlets of a run's numbers and pictures: the console, metrics.jsonl, TensorBoard, and hosted trackers."""

import contextlib
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from simmim.disk import to_disk, writing
from simmim.output import SafeStream, printable, say
from simmim.training.run_directory import Run
from simmim.training.whole_files import read_json, write_json

Item = TypeVar("Item")


class Tracker(Protocol):
    """Outlet of numbers and pictures (H, W, 3); `step` counts the steps done."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None: ...
    def keep(self) -> None:
        """Write all so far to the disk: a checkpoint follows, after which these steps are not done again."""

    def close(self) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, appended at once. NaN and infinity are written as null."""

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            self._file = path.open("ab", buffering=0)  # nothing is left to write when it is closed

    def scalars(self, step: int, values: dict[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        rest = json.dumps({"step": step, **finite}).encode() + b"\n"
        with writing(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        pass

    def keep(self) -> None:
        with writing(self._path):
            to_disk(self._path)

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """`RUN/tensorboard/`; steps after `start` that a killed run wrote are hidden.

    A disk that does not take it ends no training: metrics.jsonl has the same figures.
    """

    def __init__(self, directory: Path, start: int):
        from tensorboardX import SummaryWriter

        with contextlib.suppress(OSError):
            self._writer = SummaryWriter(str(directory), purge_step=start + 1 if start else None)
            # A thread of tensorboardX writes, and would end with a traceback, after which the queue to it fills up.
            events: Any = self._writer.file_writer.event_writer._ev_writer  # type: ignore[union-attr]
            events._py_recordio_writer = _Forgiving(events._py_recordio_writer)
            return
        self._writer = SummaryWriter(write_to_disk=False)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def keep(self) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


class _Forgiving:
    """Writer of records that does nothing more once its disk is full."""

    def __init__(self, writer: Any):
        self._writer, self._failed = writer, False

    def write(self, record: bytes) -> None:
        self._call(lambda: self._writer.write(record))

    def flush(self) -> None:
        self._call(self._writer.flush)

    def close(self) -> None:
        self._call(self._writer.close)

    def _call(self, function: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            function()
        except OSError:
            self._failed = True
            with contextlib.suppress(OSError):  # it tries to write what it still holds, once more, and is closed
                self._writer.close()


_RESUMED_BY = {"wandb": "id", "trackio": "name"}
"""How each hosted tracker finds a run again: an argument of its `init`, and an attribute of what that returns."""


class HostedTracker:
    """Weights & Biases, or trackio, which has the same three calls.

    `RUN/trackers.json` keeps the id of the tracker's run, so that a resumed training goes on with it.
    """

    def __init__(self, package: str, run: Run, config: dict[str, Any]):
        self._module: Any = importlib.import_module(package)
        known = read_json(run.trackers)
        settings = {"project": "simmim", "name": run.path.name, "config": config}
        if package in known:
            settings |= {_RESUMED_BY[package]: known[package], "resume": "allow"}
        opened = self._module.init(**settings)
        write_json(run.trackers, known | {package: getattr(opened, _RESUMED_BY[package])})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._module.log(values, step=step)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self._module.log({name: self._module.Image(pixels)}, step=step)

    def keep(self) -> None:
        pass

    def close(self) -> None:
        self._module.finish()


def open_trackers(run: Run, config: dict[str, Any], log: Sequence[str], start: int) -> list[Tracker]:
    hosted = [HostedTracker(package, run, config) for package in log]
    return [MetricsFile(run.metrics), TensorBoard(run.tensorboard, start), *hosted]


class Console:
    """Progress for a person: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, *, total: int, start: int, enabled: bool):
        self._enabled = enabled
        self._total = total
        self._start = start
        self._begun = time.monotonic()
        self._bar: Any = None
        if enabled and SafeStream(sys.stderr).isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            # Narrow enough for 80 columns.
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(12), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=RichConsole(file=cast(IO[str], SafeStream(sys.stderr))))
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def say(self, text: str) -> None:
        if not self._enabled:
            return
        if self._bar:
            self._bar.console.print(printable(text), highlight=False, soft_wrap=True, markup=False)
        else:
            say(text)

    def progress(self, step: int, values: dict[str, float]) -> None:
        if not self._enabled:
            return
        elapsed = time.monotonic() - self._begun
        left = elapsed / max(step - self._start, 1) * (self._total - step)
        loss, speed = _losses(values), f"{values['images_per_second']:.1f} images/s  {duration(left)} left"
        if self._bar:
            self._bar.update(self._task, completed=step, description=f"{loss}  {speed}")
        else:
            self.say(f"step {step}/{self._total}  epoch {values['epoch']:.2f}  {loss}  lr {values['lr']:.2e}  {speed}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _losses(values: dict[str, float]) -> str:
    """Format the loss, and its components where it has several: `loss 0.2500 (pixels 0.2000, teacher 0.0500)`."""
    prefix = "loss/"
    parts = [f"{name.removeprefix(prefix)} {value:.4f}" for name, value in values.items() if name.startswith(prefix)]
    return f"loss {values['loss']:.4f}" + (f" ({', '.join(parts)})" if parts else "")


def progress(items: Iterable[Item], total: int, what: str, *, every_seconds: float = 10) -> Iterator[Item]:
    """Yield the items and show on standard error how many are done: a bar on a terminal, else a line now and then."""
    if SafeStream(sys.stderr).isatty():
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(20), TimeRemainingColumn())
        with Progress(*columns, console=RichConsole(file=cast(IO[str], SafeStream(sys.stderr)))) as bar:
            yield from bar.track(items, total=total)
        return
    begun = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) - said >= every_seconds:
            said = now
            left = (now - begun) / done * (total - done)
            say(f"{done} of {total} {what}, {duration(left)} left")


def duration(seconds: float) -> str:
    """Format seconds: `95` → `1m35s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
