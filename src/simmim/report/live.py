"""The report of a training that goes on."""

import time
from collections.abc import Callable

from simmim.training.run_directory import Run

_SHARE = 0.02  # of the training's time, at most
_FIRST = 1.0  # seconds that the first page is taken to cost
_MARGIN = 1.5  # a page may cost so many times what the last one did
_LONGEST = 10.0  # seconds of a page after which none follows: the next, at twice the steps, may take twice as long


class LiveReport:
    """Write RUN/report.html after checkpoints, as often as takes at most 2 % of the time since this was made.

    A page that fails, or takes over 10 s, is the last before the end. The user is told once.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._spent, self._expected = 0.0, _FIRST
        self._told = self._given_up = False

    def __call__(self, run: Run, say: Callable[[str], None]) -> None:
        begun = time.monotonic()
        if self._given_up or self._spent + self._expected > _SHARE * (begun - self._begun):
            return
        try:
            from simmim.report.page import ReportConfig, report

            path = report(ReportConfig(runs=(str(run.path),)), running=True)
        except Exception as error:  # a training never fails for its report, whatever is wrong with that
            self._given_up = True
            say(f"warning    no report before the end: {type(error).__name__}: {error}".splitlines()[0])
            return
        cost = time.monotonic() - begun
        self._spent += cost
        self._expected = _MARGIN * cost
        self._given_up = cost > _LONGEST
        if not self._told:
            say(f"the report so far is {path}")
        self._told = True
