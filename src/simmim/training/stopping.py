"""What stops a training early: signals, and the end of `max_hours`."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType


class StopRequests:
    """Signals and the end of `max_hours`, noted for the loop to check between steps; a second SIGINT stops at once."""

    def __init__(self, max_hours: float | None = None) -> None:
        self.signal: int | None = None
        self._end = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours

    def request(self) -> int:
        """Return the signal to stop by, 0 if there is none."""
        if self.signal is None and time.monotonic() >= self._end:
            return signal.SIGUSR1
        return self.signal or 0

    def note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        with contextlib.suppress(OSError):  # no one reads it any more
            os.write(2, b"\nstopping after this step and saving; Ctrl-C to stop at once\n")


@contextlib.contextmanager
def stop_requests(max_hours: float | None = None) -> Iterator[StopRequests]:
    """Note signals while a training runs; the handlers that were there before come back."""
    requests, previous = StopRequests(max_hours), {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                previous[number] = signal.signal(number, requests.note)
    except ValueError:  # not the main thread (a notebook's executor): the caller's handlers stay
        yield requests
        return
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
