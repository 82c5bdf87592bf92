import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from simmim.training.run_directory import Run
from simmim.training.tracking import Console, MetricsFile, duration, open_trackers


def scalars_of(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What a TensorBoard directory shows, by name: read from the records, each framed by its length and checksums."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(directory.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack("<Q", data[place : place + 8])
            event = Event()
            event.ParseFromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_metrics_are_one_json_object_a_line(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.scalars(1, {"loss": 0.5})
    file.scalars(2, {"loss": 0.25, "lr": 1e-3})
    file.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "lr": 1e-3}]


def test_metrics_are_on_disk_at_once(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").scalars(1, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_is_null(value, tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.scalars(1, {"loss": value})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def test_tensorboard_holds_the_scalars_and_the_pictures(tmp_path):
    trackers = open_trackers(Run(tmp_path), {}, (), 0)
    for tracker in trackers:
        tracker.scalars(3, {"loss": 0.5})
        tracker.picture(3, "reconstruction", np.zeros((8, 8, 3), np.uint8))
        tracker.close()
    found = scalars_of(tmp_path / "tensorboard")
    assert found["loss"] == [(3, 0.5)]
    assert "reconstruction" in found


@pytest.fixture(params=["wandb", "trackio"])
def stand_in(request, tmp_path, monkeypatch):
    """Name of a package for which there is a stand-in: a test must not reach it over the network."""
    package, text = (
        request.param,
        """
from types import SimpleNamespace

calls = []

def init(**settings):
    calls.append(("init", settings))
    return SimpleNamespace(id="a1b2", name="run-a-2")

log = lambda values, step: calls.append(("log", values, step))
finish = lambda: calls.append(("finish",))
Image = lambda pixels: pixels.shape
""",
    )
    (tmp_path / f"{package}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    yield package
    sys.modules.pop(package, None)


def test_a_hosted_tracker_gets_the_configuration_numbers_and_pictures(stand_in, tmp_path):
    run = Run(tmp_path / "run-a")
    run.path.mkdir()
    *_, tracker = open_trackers(run, {"lr": "0.1"}, (stand_in,), 0)
    tracker.scalars(2, {"loss": 0.5})
    tracker.picture(2, "reconstruction", np.zeros((8, 9, 3), np.uint8))
    tracker.close()
    assert sys.modules[stand_in].calls == [
        ("init", {"project": "simmim", "name": "run-a", "config": {"lr": "0.1"}}),
        ("log", {"loss": 0.5}, 2),
        ("log", {"reconstruction": (8, 9, 3)}, 2),
        ("finish",),
    ]


def test_a_resumed_training_goes_on_with_its_run_of_a_hosted_tracker(stand_in, tmp_path):
    run = Run(tmp_path / "run-a")
    run.path.mkdir()
    for start in (0, 5):
        for tracker in open_trackers(run, {}, (stand_in,), start):
            tracker.close()
    same_run = {"wandb": {"id": "a1b2", "name": "run-a"}, "trackio": {"name": "run-a-2"}}[stand_in]
    inits = [settings for name, *settings in sys.modules[stand_in].calls if name == "init"]
    assert inits == [
        [{"project": "simmim", "name": "run-a", "config": {}}],
        [{"project": "simmim", "config": {}, "resume": "allow"} | same_run],
    ]


FIGURES = {"epoch": 1.5, "loss": 0.25, "lr": 1e-3, "images_per_second": 12.34}


def test_without_a_terminal_progress_is_plain_lines(capsys):
    console = Console(total=100, start=0, enabled=True)
    console.progress(10, FIGURES)
    console.close()
    out, err = capsys.readouterr()
    assert out == ""  # standard output is for results
    assert err == "step 10/100  epoch 1.50  loss 0.2500  lr 1.00e-03  12.3 images/s  0s left\n"


def test_on_a_terminal_progress_is_a_bar_of_80_columns(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(total=123456, start=0, enabled=True)
    console.progress(100000, {**FIGURES, "images_per_second": 12345.6})
    console.close()
    last = capsys.readouterr().err.split("\n")[-2]
    assert "━" in last
    assert "12345.6 images/s  0s left" in last


def test_only_the_main_process_speaks(capsys):
    console = Console(total=100, start=0, enabled=False)
    console.say("hello")
    console.progress(10, FIGURES)
    console.close()
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_taken_from_the_steps_of_this_start(monkeypatch, capsys):
    now = iter([0.0, 50.0])
    monkeypatch.setattr("simmim.training.tracking.time.monotonic", lambda: next(now))
    console = Console(total=300, start=100, enabled=True)  # resumed: 100 steps took no time here
    console.progress(200, FIGURES)
    assert capsys.readouterr().err.endswith("50s left\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (95, "1m35s"), (3599.6, "1h00m"), (7384, "2h03m"), (200000, "2d7h")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
