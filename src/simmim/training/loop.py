"""The training loop that every task and engine shares: update, log, save, stop.

Figures stay on the device until the next line of progress fetches them, all at once.
"""

import contextlib
import errno
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from numpy.typing import NDArray

from simmim.config.training import TrainingConfig
from simmim.disk import WriteError
from simmim.errors import TrainingDivergedError, TrainingFailedError, UserError
from simmim.training.meter import Meter
from simmim.training.resume import drop_metrics_after
from simmim.training.run_directory import Run
from simmim.training.stopping import StopRequests, stop_requests
from simmim.training.tracking import Console, Tracker, open_trackers


class Engine(Protocol):
    """Computing that the loop drives; all processes call these together. `simmim.training.trainer` implements most."""

    is_main: bool
    alone: bool
    """Whether no other process trains along."""
    bad_limit: int
    """Number of consecutive non-finite steps that ends a run."""
    meter: Meter

    def update(self, step: int, batch: Any) -> tuple[float, Any]:
        """Train on a batch. Return the learning rate, and the step's figures as the device holds them."""
        ...

    def fetch(self, figures: Sequence[Any]) -> list[dict[str, float]]:
        """Fetch the figures of several steps in one transfer, by name.

        `loss`, `grad_norm` and `skipped_in_a_row` (consecutive non-finite steps) are always among them; a loss of
        several components has `loss/COMPONENT` too.
        """
        ...

    def save(self, done: int) -> None:
        """Write the whole state after `done` steps, and the encoder; it may go on while the next steps are done."""
        ...

    def settle(self) -> None:
        """Wait until the last state is written. Raises `WriteError` where the disk does not take it."""
        ...

    @property
    def save_failed(self) -> bool:
        """Whether the disk did not take the last state: `settle` will raise."""
        ...

    def largest(self, number: int) -> int:
        """Return the largest number of all processes, none of which is negative; it may take some calls to be seen."""
        ...


@dataclass(frozen=True, kw_only=True)
class Event:
    """Work to do every `every_steps` steps and at the end. Called on every process."""

    every_steps: int
    call: Callable[[int], dict[str, float]]  # steps done → figures to log
    before_training: bool = False
    """Whether to call it before the first step of a new run too. No line is there for figures then."""

    def due(self, done: int, total: int) -> bool:
        return done % self.every_steps == 0 or done == total


TO_BE_CONTINUED = 75
"""Exit code that asks to be started again (EX_TEMPFAIL of sysexits.h)."""


@dataclass(frozen=True)
class Outcome:
    """End of a training: steps done, steps done before it started, and the signal that stopped it early, if any."""

    step: int
    start: int
    stopped_by: int | None = None
    """The end of `max_hours` counts as SIGUSR1, by which a scheduler says that time is up."""
    is_main: bool = True
    """Whether this is the process that writes."""
    late_signal: int | None = None
    """A signal that came too late to stop it, for whoever would begin another training."""

    @property
    def exit_code(self) -> int:
        """0 if it is finished, else that of the signal."""
        return 0 if self.stopped_by is None else code_of_signal(self.stopped_by)


def code_of_signal(number: int) -> int:
    """Return `TO_BE_CONTINUED` where the time was up, else 128 + the signal."""
    return TO_BE_CONTINUED if number == signal.SIGUSR1 else 128 + number


_FAILED = 1000
"""What a process that cannot go on tells the others: larger than any signal."""


class Loop:
    """Train from step `start` to the end, or until a signal; the last checkpoint holds all that was done."""

    def __init__(
        self,
        engine: Engine,
        run: Run,
        config: TrainingConfig,
        *,
        start: int,
        total_steps: int,
        steps_per_epoch: int,
        save_every_steps: int,
        batches: Callable[[int], Iterator[Any]],
        events: Sequence[Event] = (),
        after_save: Callable[[], None] = lambda: None,
    ):
        """Open the console. `batches(first_step)` yields a batch for each step from `first_step` on.

        `after_save` is called on the main process after each checkpoint but the last of this process.
        """
        self._engine, self._run, self._config = engine, run, config
        self._start, self._total = start, total_steps
        self._per_epoch, self._save_every = steps_per_epoch, save_every_steps
        self._batches, self._events, self._after_save = batches, events, after_save
        self._trackers: list[Tracker] = []
        self._rows: list[tuple[int, float, Any]] = []  # step, learning rate, figures on the device
        self._waits: list[float] = []  # seconds that the host waited for the batch of each of these steps
        self.console = Console(total=total_steps, start=start, enabled=engine.is_main)
        self._clock = _Clock(start)
        self._failure: Exception | None = None
        self._saved = self._saving = start

    def fit(self) -> Outcome:
        try:
            if self._start >= self._total:
                return Outcome(self._start, self._start)
            if self._engine.is_main:
                drop_metrics_after(self._run.metrics, self._start)
                values = {name: str(value) for name, value in vars(self._config).items()}
                self._trackers = open_trackers(self._run, values, self._config.log, self._start)
            with stop_requests(self._config.max_hours) as stop:
                return self._train(stop)
        except WriteError as error:
            if error.errno == errno.ENOENT:  # the run was removed, with what was saved
                raise TrainingFailedError(str(error)) from error
            saved = f"step {self._saved} is saved" if self._saved else "no step was saved yet"
            raise TrainingFailedError(f"{error} ({saved})") from error
        finally:
            if self._engine.alone:  # others may be lost, and wait for nothing then
                with contextlib.suppress(WriteError):  # after an error, which says more
                    self._engine.settle()
            self.console.close()
            for tracker in self._trackers:
                tracker.close()

    def picture(self, step: int, name: str, pixels: NDArray[Any]) -> None:
        for tracker in self._trackers:
            tracker.picture(step, name, pixels)

    def _train(self, stop: StopRequests) -> Outcome:
        for event in self._events:
            if event.before_training and not self._start:
                event.call(0)
        self._clock = _Clock(self._start)
        with contextlib.closing(self._batches(self._start)) as batches:  # type: ignore[type-var]
            for step in range(self._start, self._total):
                done = step + 1
                try:
                    batch = self._next(batches)
                except (UserError, OSError) as error:  # images cannot be read
                    self._save_before(error, step)
                with self._engine.meter.step():
                    self._rows.append((done, *self._engine.update(step, batch)))
                # All processes save together, so those that can go on must hear of one that cannot.
                failed = self._failure or self._engine.save_failed
                request = self._engine.largest(_FAILED if failed else stop.request())
                stopping = request > 0 and done < self._total
                last = done == self._total or stopping
                due = [event for event in self._events if event.due(done, self._total)]
                saving = done % self._save_every == 0 or last
                # Before a save too: a resumed run does not do the steps again that a checkpoint holds.
                if done % self._config.log_every_steps == 0 or due or saving:
                    self._log(done, due)
                if saving:
                    self._save(done)
                    if last:
                        self._settle()
                    if self._engine.is_main and not last:
                        self._after_save()
                    self._clock.restart(done)
                if stopping and not self._failure:
                    return Outcome(done, self._start, signal.SIGTERM if request == _FAILED else request)
                if last:
                    break
        if self._failure:
            raise TrainingFailedError(
                f"{self._failure} (stopped after step {done} of {self._total})"
            ) from self._failure
        # All ranks hear of it, so that none goes on to another training alone.
        return Outcome(self._total, self._start, late_signal=self._engine.largest(stop.signal or 0) or None)

    def _next(self, batches: Iterator[Any]) -> Any:
        begun = time.monotonic()
        batch = next(batches)
        self._waits.append(time.monotonic() - begun)
        return batch

    def _save_before(self, error: Exception, step: int) -> NoReturn:
        """Save the steps that were done, and raise what ended the training.

        Where others train along, they wait for this process in their step, and cannot save with it.
        """
        if step == self._start:  # nothing was done: a mistake of the command
            raise error
        if self._engine.alone and self._saved < step:
            if self._rows:
                self._log(step, [])
            self._save(step)
        self._settle()
        raise TrainingFailedError(f"{error} (stopped after step {step} of {self._total})") from error

    def _save(self, done: int) -> None:
        for tracker in self._trackers:
            tracker.keep()
        self._settle()
        self._engine.save(done)
        self._saving = done

    def _settle(self) -> None:
        self._engine.settle()
        self._saved = self._saving

    def _log(self, done: int, due: Sequence[Event]) -> None:
        """Fetch the figures of the steps since the last line, add those of due events, then write and show them."""
        fetched = self._engine.fetch([figures for _, _, figures in self._rows])
        speed = self._clock.rate(done) * self._config.batch_size
        taken = self._engine.meter.read(self._waits, self._clock.seconds())
        self._waits.clear()
        found: dict[str, float] = {}
        for event in due:
            try:
                found |= event.call(done)
            except (UserError, OSError) as error:
                self._failure = error
        values: dict[str, float] = {}
        for (step, lr, _), figures in zip(self._rows, fetched, strict=True):
            values = {"epoch": step / self._per_epoch, **figures, "lr": lr, "images_per_second": speed}
            if not values["skipped_in_a_row"]:
                del values["skipped_in_a_row"]
            if step == done:
                values |= found | taken
            self._track(step, values)
        self.console.progress(done, values)
        if found:
            self.console.say(f"step {done}  " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
        skips = [figures["skipped_in_a_row"] for figures in fetched]
        if skipped := sum(bad > 0 for bad in skips):
            self.console.say(
                f"step {done}  {skipped} of the last {len(fetched)} steps skipped: loss or gradient not finite"
            )
        self._rows.clear()
        self._clock.restart(done)  # an event's time is no training time
        limit = self._engine.bad_limit
        if any(bad >= limit for bad in skips):
            with contextlib.suppress(WriteError):  # all ranks come here alike, so that none waits in vain
                self._settle()
            raise TrainingDivergedError(
                f"loss or gradient was not finite for {limit} steps in a row, up to step {done}; they changed nothing "
                "and the last checkpoint is intact; start again (--fresh) with a lower --lr or --precision fp32"
            )

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.scalars(step, values)


class _Clock:
    """Steps per second since the last restart."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._begun = step, time.monotonic()

    def rate(self, step: int) -> float:
        return (step - self._step) / max(self.seconds(), 1e-9)

    def seconds(self) -> float:
        return time.monotonic() - self._begun
