"""The training loop that every task shares: update, log, save, stop, resume.

Losses stay on the device until the next line of progress fetches them, all at once.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from simmim.config import TrainingConfig
from simmim.errors import TrainingDivergedError
from simmim.run import Run, drop_metrics_after
from simmim.torch_engine.checkpoint import checkpoint_step, load_checkpoint, newest_checkpoint, save_checkpoint
from simmim.torch_engine.distributed import World
from simmim.torch_engine.update import Batch, Update
from simmim.tracking import Console, Tracker, open_trackers


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something to do after every so many steps and, on request, at the end. Called on every process."""

    every_steps: int
    call: Callable[[int], dict[str, float]]  # steps done → figures to log
    at_end: bool = True

    def due(self, done: int, total: int) -> bool:
        return done % self.every_steps == 0 or (self.at_end and done == total)


@dataclass(frozen=True)
class Outcome:
    """How a training ended: steps done, and the signal that stopped it early, if one did."""

    step: int
    stopped_by: int | None = None


@dataclass(kw_only=True)
class Trainer:
    """Runs `update` over the batches of a run."""

    config: TrainingConfig
    world: World
    run: Run
    update: Update
    total_steps: int
    steps_per_epoch: int
    batches: Callable[[int], Iterator[Batch]]  # first step → this process's batches from there
    save_every_steps: int
    events: list[Event] = field(default_factory=list)
    on_save: Callable[[], None] = lambda: None
    console: Console = field(init=False)
    _trackers: list[Tracker] = field(init=False, default_factory=list)
    _rows: list[tuple[int, float, Tensor]] = field(init=False, default_factory=list)  # step, lr, (loss, norm, bad)

    def __post_init__(self) -> None:
        self._start = self._resume()
        self.console = Console(total=self.total_steps, start=self._start, enabled=self.world.is_main)

    @property
    def start(self) -> int:
        """Steps that were done when this process began."""
        return self._start

    def _resume(self) -> int:
        path = newest_checkpoint(self.run.checkpoints)
        if path is None:
            return 0
        self.update.load_state(load_checkpoint(path, self.update.model, self.update.optimizer))
        return checkpoint_step(path)

    def fit(self) -> Outcome:
        """Train to the end, or until SIGINT or SIGTERM; the last checkpoint holds all that was done."""
        if self._start >= self.total_steps:
            self.console.close()
            return Outcome(self._start)
        if self.world.is_main:
            drop_metrics_after(self.run.metrics, self._start)
            values = {name: str(value) for name, value in vars(self.config).items()}
            self._trackers = open_trackers(self.run, values, self.config.log, self._start)
        self._since = (self._start, time.monotonic())
        try:
            with stop_requests() as stop:
                return self._loop(stop)
        finally:
            self.console.close()
            for tracker in self._trackers:
                tracker.close()

    def _loop(self, stop: "StopRequests") -> Outcome:
        batches = self.batches(self._start)
        for step in range(self._start, self.total_steps):
            done = step + 1
            self._rows.append((done, *self.update(step, next(batches))))
            stopping = self.world.any(stop.signal is not None)
            last = done == self.total_steps or stopping
            due = [event for event in self.events if event.due(done, self.total_steps)]
            if done % self.config.log_every_steps == 0 or last or due:
                self._log(done)
            for event in due:
                self._report(done, event.call(done))
            if done % self.save_every_steps == 0 or last:
                self._save(done)
            if stopping:
                return Outcome(done, stop.signal or signal.SIGTERM)
        return Outcome(self.total_steps)

    def _log(self, done: int) -> None:
        """Fetch the figures of the steps since the last line, in one transfer; write and show them."""
        if not self._rows:
            return
        figures = self.world.mean(torch.stack([row for _, _, row in self._rows])).cpu().tolist()
        since, begun = self._since
        now = time.monotonic()
        speed = (done - since) * self.config.batch_size / (now - begun)
        values: dict[str, float] = {}
        for (step, lr, _), (loss, norm, _bad) in zip(self._rows, figures, strict=True):
            epoch = step / self.steps_per_epoch
            values = {"epoch": epoch, "loss": loss, "lr": lr, "grad_norm": norm, "images_per_second": speed}
            self._track(step, values)
        self.console.progress(done, values)
        self._rows.clear()
        self._since = (done, now)
        if any(bad >= self.update.bad_limit for _, _, bad in figures):
            raise TrainingDivergedError(
                f"the loss was not finite for {self.update.bad_limit} steps in a row, up to step {done}; they changed "
                "nothing, and the last checkpoint is intact: lower --lr, or use --precision fp32"
            )

    def _report(self, done: int, values: dict[str, float]) -> None:
        if values:
            self._track(done, values)
            self.console.say(f"step {done}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self._since = (done, time.monotonic())  # an event's time is no training time

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        for tracker in self._trackers:
            tracker.picture(step, name, pixels)

    def _save(self, done: int) -> None:
        save_checkpoint(
            self.run.checkpoints,
            done,
            self.update.model,
            self.update.optimizer,
            self.update.state(),
            world=self.world,
            keep=self.config.keep,
        )
        self.on_save()
        self._since = (done, time.monotonic())


class StopRequests:
    """SIGINT and SIGTERM, noted for the loop to see between steps; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"\nstopping after this step and saving; once more to stop at once\n")


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequests]:
    requests = StopRequests()
    try:
        previous = {number: signal.signal(number, requests.note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a notebook's executor): the caller's handlers stay
        yield requests
        return
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
