"""The report while training goes on: what it costs, what it says, and that it disturbs nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

import simmim
from simmim.report import live, page
from simmim.report.live import LiveReport
from simmim.training.loop import Loop
from simmim.training.run_directory import Run

from .test_report import TINY


class Clock:
    """Time that passes when told, and while a page is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float):
        self.now, self.cost = 0.0, cost
        self.pages: list[float] = []
        self.said: list[str] = []
        monkeypatch.setattr("simmim.report.live.time.monotonic", lambda: self.now)
        monkeypatch.setattr(page, "report", self.write)

    def write(self, config: page.ReportConfig, *, running: bool) -> Path:
        assert running
        self.pages.append(self.now)
        self.now += self.cost
        return Path(config.runs[0], "report.html")

    def train(self, seconds: int, every: int = 10) -> None:
        report = LiveReport()
        for _ in range(seconds // every):
            self.now += every
            report(Run(Path("run")), self.said.append)


@pytest.mark.parametrize("cost", [1, 9])
def test_pages_cost_two_in_a_hundred_of_the_time(monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    clock = Clock(monkeypatch, cost)
    clock.train(20_000)
    assert 0.015 < len(clock.pages) * cost / clock.now <= 0.02
    assert clock.pages[0] == 50
    assert clock.said == ["the report so far is run/report.html"]


def test_a_page_that_takes_long_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 11)
    clock.train(100_000)
    assert len(clock.pages) == 1


def test_a_training_has_a_page_before_its_end_and_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(name: str) -> list[tuple[float, float]]:
        run = simmim.pretrain(**TINY, out=str(tmp_path / name), steps=4, save_every_steps=2)
        found = map(json.loads, run.metrics.read_text(encoding="utf-8").splitlines())
        return [(row["loss"], row["grad_norm"]) for row in found]

    pages: list[str] = []
    track = Loop._track

    def look(self: Loop, step: int, values: dict[str, Any]) -> None:
        if step == 3:
            pages.append((tmp_path / "often" / "report.html").read_text(encoding="utf-8"))
        track(self, step, values)

    never = train("never")
    assert "the report so far" not in capsys.readouterr().err
    monkeypatch.setattr(live, "_SHARE", 1e9)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_track", look)
        assert train("often") == never
    assert capsys.readouterr().err.count("the report so far is") == 1
    assert "step 2 of 4 when this was written, and the training went on" in pages[0]
    assert "when this was written" not in (tmp_path / "often" / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(page, "render", lambda *_: 1 / 0)
    assert train("broken") == never
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [
        "warning    no report before the end: ZeroDivisionError: division by zero",
        "warning    no report: ZeroDivisionError: division by zero",
    ]
