"""The training loop with an engine that only keeps a diary."""

import errno
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import simmim
from simmim.config.pretraining import PretrainConfig
from simmim.data.bad_images import TooManyBadImages
from simmim.disk import WriteError
from simmim.errors import TrainingDivergedError, TrainingFailedError, UserError
from simmim.training.loop import Event, Loop, Outcome
from simmim.training.meter import Meter
from simmim.training.run_directory import Run


class Diary:
    """An `Engine` whose loss at step n is n, written down with all that it is asked to do."""

    is_main = True
    alone = True
    bad_limit = 3

    def __init__(self, start: int = 0, bad: Sequence[int] = ()):
        self.start, self.bad_steps = start, set(bad)
        self.bad = 0
        self.done: list[str] = []
        self.meter = Meter()
        self.closed = False
        self.components: dict[str, float] = {}
        self.signals: dict[int, list[int]] = {}
        self.unreadable: set[int] = set()
        self.others = 0

    def batches(self, start_step: int) -> Iterator[int]:
        try:
            while True:
                if start_step in self.unreadable:
                    raise TooManyBadImages("4 of 100 images cannot be read")
                yield start_step
                start_step += 1
        finally:
            self.closed = True

    def update(self, step: int, batch: int) -> tuple[float, Any]:
        assert batch == step
        self.bad = self.bad + 1 if step in self.bad_steps else 0
        for number in self.signals.get(step, []):
            os.kill(os.getpid(), number)
        loss = math.nan if self.bad else float(step + 1)
        return 0.5, {"loss": loss, "grad_norm": 1.0, "skipped_in_a_row": float(self.bad)} | self.components

    def fetch(self, figures: Sequence[Any]) -> list[dict[str, float]]:
        self.done.append(f"fetch {len(figures)}")
        return list(figures)

    def save(self, done: int) -> None:
        self.done.append(f"save {done}")

    def settle(self) -> None:
        pass

    save_failed = False

    def largest(self, number: int) -> int:
        return max(number, self.others)


def loop(
    engine: Diary,
    out: Path,
    *,
    total: int = 10,
    save_every: int = 4,
    log_every: int = 3,
    max_hours: float | None = None,
    **others: Any,
) -> Loop:
    config = PretrainConfig(out=str(out), log_every_steps=log_every, batch_size=2, max_hours=max_hours)
    out.mkdir(exist_ok=True)
    steps = {"start": engine.start, "total_steps": total, "steps_per_epoch": 5, "save_every_steps": save_every}
    return Loop(engine, Run(out), config, **steps, batches=engine.batches, **others)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_logged_once_before_the_checkpoint_that_holds_it(tmp_path: Path) -> None:
    engine = Diary()
    assert loop(engine, tmp_path).fit() == Outcome(10, 0)
    assert engine.done == [
        "fetch 3",
        "fetch 1",
        "save 4",
        "fetch 2",
        "fetch 2",
        "save 8",
        "fetch 1",
        "fetch 1",
        "save 10",
    ]
    assert [(row["step"], row["loss"], row["epoch"]) for row in rows(tmp_path)] == [
        (step, step, step / 5) for step in range(1, 11)
    ]
    assert engine.closed


def test_a_resumed_run_drops_the_lines_of_the_steps_that_it_does_again(tmp_path: Path) -> None:
    loop(Diary(), tmp_path, total=7).fit()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert loop(Diary(start=4), tmp_path).fit() == Outcome(10, 4)
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 11)]


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    engine = Diary(start=10)
    assert loop(engine, tmp_path).fit() == Outcome(10, 10)
    assert engine.done == []
    assert not (tmp_path / "metrics.jsonl").exists()


def test_figures_of_events_are_in_their_steps_line_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    event = Event(every_steps=4, call=lambda done: {"val_loss": done / 10})
    loop(Diary(), tmp_path, events=[event, Event(every_steps=8, call=lambda done: {"knn": 0.5})]).fit()
    found = {row["step"]: (row.get("val_loss"), row.get("knn")) for row in rows(tmp_path)}
    assert found[4] == (0.4, None)
    assert found[8] == (0.8, 0.5)
    assert found[10] == (1.0, 0.5)
    assert all(found[step] == (None, None) for step in found.keys() - {4, 8, 10})
    assert "step 8  val_loss 0.8000  knn 0.5000" in capsys.readouterr().err


def test_the_components_of_a_loss_are_logged_and_shown_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Diary()
    engine.components = {"loss/pixels": 0.25, "loss/teacher": 2.0}
    loop(engine, tmp_path).fit()
    assert [(row["loss/pixels"], row["loss/teacher"]) for row in rows(tmp_path)] == [(0.25, 2.0)] * 10
    assert "loss 10.0000 (pixels 0.2500, teacher 2.0000)  lr" in capsys.readouterr().err


def test_skipped_steps_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop(Diary(bad=[3, 4, 7]), tmp_path, log_every=10, save_every=10).fit()
    assert [row.get("skipped_in_a_row") for row in rows(tmp_path)] == [None] * 3 + [1, 2, None, None, 1, None, None]
    assert rows(tmp_path)[3]["loss"] is None
    assert "step 10  3 of the last 10 steps skipped: loss or gradient not finite" in capsys.readouterr().err


def test_too_many_skipped_steps_end_the_run_without_another_checkpoint(tmp_path: Path) -> None:
    engine = Diary(bad=[5, 6, 7, 8, 9])
    with pytest.raises(TrainingDivergedError) as error:
        loop(engine, tmp_path).fit()
    assert str(error.value) == (
        "loss or gradient was not finite for 3 steps in a row, up to step 8; they changed nothing and the last "
        "checkpoint is intact; start again (--fresh) with a lower --lr or --precision fp32"
    )
    assert [entry for entry in engine.done if entry.startswith("save")] == ["save 4"]
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 9)]
    assert engine.closed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("SIGHUP is ignored here, as nohup does")
    before = signal.getsignal(number)
    engine = Diary()
    engine.signals = {4: [number]}
    assert loop(engine, tmp_path).fit() == Outcome(5, 0, number)
    assert engine.done[-1] == "save 5"
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 6)]
    assert signal.getsignal(number) is before


def test_a_signal_is_noted_though_no_one_reads_what_is_said_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(place: int, text: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    engine = Diary()
    engine.signals = {4: [signal.SIGINT]}
    assert loop(engine, tmp_path).fit() == Outcome(5, 0, signal.SIGINT)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_in_python_a_training_that_was_stopped_does_not_pass_for_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, error: type[BaseException]
) -> None:
    stopped = Run(tmp_path), Outcome(5, 0, number)
    monkeypatch.setattr("simmim.engines.pretrain", lambda config: stopped)
    with pytest.raises(error):
        simmim.pretrain(data="demo", out=str(tmp_path))
    monkeypatch.setattr("simmim.torch_engine.train.finetune.finetune", lambda config, watch: stopped)
    with pytest.raises(error):
        simmim.finetune("segment", data="demo", out=str(tmp_path))


def test_a_hang_up_that_is_ignored_as_under_nohup_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        engine = Diary()
        engine.signals = {4: [signal.SIGHUP]}
        assert loop(engine, tmp_path).fit() == Outcome(10, 0)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_run_saves_and_asks_to_be_started_again_when_its_hours_are_up(tmp_path: Path) -> None:
    outcome = loop(Diary(), tmp_path, max_hours=1e-9).fit()
    assert (outcome.step, outcome.exit_code) == (1, 75)
    assert Outcome(5, 0, signal.SIGUSR1).exit_code == 75
    assert Outcome(5, 0, signal.SIGHUP).exit_code == 129
    assert loop(Diary(start=1), tmp_path, max_hours=1).fit() == Outcome(10, 1)


def test_what_is_done_is_saved_before_bad_images_end_a_run(tmp_path: Path) -> None:
    engine = Diary()
    engine.unreadable = {5}
    with pytest.raises(TrainingFailedError, match=r"4 of 100 images cannot be read \(stopped after step 5 of 10\)"):
        loop(engine, tmp_path).fit()
    assert engine.done[-1] == "save 5"
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 6)]


def test_bad_images_before_the_first_step_are_a_mistake_of_the_command(tmp_path: Path) -> None:
    engine = Diary()
    engine.unreadable = {0}
    with pytest.raises(UserError):
        loop(engine, tmp_path).fit()
    assert engine.done == []


def test_an_evaluation_that_cannot_read_its_images_ends_the_run_after_a_save(tmp_path: Path) -> None:
    def fail(done: int) -> dict[str, float]:
        raise TooManyBadImages("none of the 2 images can be read")

    engine = Diary()
    with pytest.raises(TrainingFailedError, match="none of the 2 images"):
        loop(engine, tmp_path, events=[Event(every_steps=3, call=fail)]).fit()
    assert engine.done[-1] == "save 4"
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 5)]


def test_a_process_saves_with_another_that_cannot_go_on(tmp_path: Path) -> None:
    engine = Diary()
    engine.others = 1000
    assert loop(engine, tmp_path).fit() == Outcome(1, 0, signal.SIGTERM)
    assert engine.done[-1] == "save 1"


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    engine = Diary()
    engine.signals = {4: [signal.SIGINT, signal.SIGINT]}
    with pytest.raises(KeyboardInterrupt):
        loop(engine, tmp_path).fit()
    assert engine.done[-1] == "save 4"
    assert engine.closed


def test_a_signal_in_the_last_step_does_not_undo_that_the_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Diary()
    engine.signals = {9: [signal.SIGTERM]}
    finished = loop(engine, tmp_path).fit()
    assert finished == Outcome(10, 0, late_signal=signal.SIGTERM) and finished.exit_code == 0
    monkeypatch.setattr("simmim.engines.pretrain", lambda config: (Run(tmp_path), finished))
    with pytest.raises(SystemExit):  # a script must not begin its next training
        simmim.pretrain(data="demo", out=str(tmp_path))


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Diary()
    engine.is_main = False
    loop(engine, tmp_path).fit()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert engine.done[-1] == "save 10"


class HostMeter(Meter):
    """Of an engine whose device waits when its process does."""

    def waited(self, waits: Sequence[float]) -> float:
        return sum(waits)


class SlowReader(Diary):
    """Waits for each batch as long as it trains on it."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = HostMeter()

    def batches(self, start_step: int) -> Iterator[int]:
        for batch in super().batches(start_step):
            time.sleep(0.01)
            yield batch

    def update(self, step: int, batch: int) -> tuple[float, Any]:
        time.sleep(0.01)
        return super().update(step, batch)


def test_lines_of_progress_have_what_their_steps_took(tmp_path: Path) -> None:
    begun = time.monotonic()
    loop(SlowReader(), tmp_path).fit()
    elapsed = time.monotonic() - begun
    logged = {row["step"]: row for row in rows(tmp_path) if "input_wait" in row}
    assert [*logged] == [3, 4, 6, 8, 9, 10]
    assert all(0.2 < row["input_wait"] < 0.8 for row in logged.values())
    assert 0.1 < sum(row["wall_seconds"] for row in logged.values()) <= elapsed + 0.1
    assert all(0.01 < row["process_memory_gib"] < 100 for row in logged.values())


def test_an_engine_that_runs_ahead_of_its_device_says_nothing_of_waiting(tmp_path: Path) -> None:
    loop(Diary(), tmp_path).fit()
    assert not any("input_wait" in row for row in rows(tmp_path))


def test_after_save_is_called_between_checkpoints_on_the_main_process_alone(tmp_path: Path) -> None:
    engine, called = Diary(), []
    loop(engine, tmp_path, after_save=lambda: called.append(engine.done[-1])).fit()
    assert called == ["save 4", "save 8"]  # not the last, after which the training ends
    engine = Diary()
    engine.is_main = False
    loop(engine, tmp_path, after_save=lambda: 1 / 0).fit()


def test_what_is_drawn_before_training_is_drawn_for_new_runs_alone(tmp_path: Path) -> None:
    def steps(start: int) -> list[int]:
        called: list[int] = []
        event = Event(every_steps=5, call=lambda done: called.append(done) or {}, before_training=True)
        loop(Diary(start=start), tmp_path, events=[event]).fit()
        return called

    assert steps(0) == [0, 5, 10]
    assert steps(5) == [10]


def test_a_checkpoint_that_does_not_fit_ends_a_training_with_one_line_and_what_is_saved(tmp_path: Path) -> None:
    class Full(Diary):
        def save(self, done: int) -> None:
            if done == 8:
                raise WriteError(errno.ENOSPC, "No space left on device", "runs/a/checkpoints/writing-00000008")
            super().save(done)

    with pytest.raises(TrainingFailedError) as error:
        loop(Full(), tmp_path).fit()
    assert str(error.value) == (
        "runs/a/checkpoints/writing-00000008 cannot be written: No space left on device; free space there, then repeat "
        "the command (step 4 is saved)"
    )


def test_a_checkpoint_that_fails_in_the_background_ends_a_training_at_the_next_step(tmp_path: Path) -> None:
    class FullLater(Diary):
        @property
        def save_failed(self) -> bool:
            return "save 8" in self.done

        def settle(self) -> None:
            if self.save_failed:
                raise WriteError(errno.ENOSPC, "No space left on device", "runs/a/checkpoints/writing-00000008")

    engine = FullLater()
    with pytest.raises(TrainingFailedError, match=r"No space left on device.* \(step 4 is saved\)$"):
        loop(engine, tmp_path, total=100).fit()
    assert rows(tmp_path)[-1]["step"] == 9


def test_a_checkpoint_that_is_being_written_is_waited_for_before_a_divergence_ends_the_training(tmp_path: Path) -> None:
    class Slow(Diary):
        alone = False

        def settle(self) -> None:
            self.done.append("settle")

    engine = Slow(bad=range(5, 40))
    with pytest.raises(TrainingDivergedError):
        loop(engine, tmp_path, total=40).fit()
    assert engine.done[-1] == "settle"


def test_figures_are_on_the_disk_before_the_checkpoint_that_holds_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, fsync = Diary(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (engine.done.append("sync"), fsync(file))[1])
    loop(engine, tmp_path).fit()
    saves = [place for place, what in enumerate(engine.done) if what.startswith("save")]
    assert [engine.done[place - 1] for place in saves] == ["sync"] * 3
