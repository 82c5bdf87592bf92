"""A training on frames of clips: killed and resumed, packed, and the commands that follow it."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

from simmim.cli import main
from simmim.config.pretraining import PretrainConfig
from simmim.data.sources import open_source

from . import tiny, worker

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from clip_files import picture, write_clip

STEPS = 12


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(("a.mp4", "b.mkv", "c.avi")):
        pictures = [picture(place + 100 * number, 96, 96) for place in range(40)]
        write_clip(folder / name, pictures=pictures, options={"bf": "3"})
    return folder


def settings(clips: Path, out: Path, **others: Any) -> PretrainConfig:
    usual = {"data": str(clips), "frames": "3", "out": str(out), "steps": STEPS, "save_every_steps": 3, "batch_size": 8}
    return tiny.config(**(usual | others))


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """A training that was not disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    config = settings(clips, folder / "run")
    assert worker.run(config, folder / "log") == 0, (folder / "log").read_text()
    return config


@pytest.mark.slow
@pytest.mark.parametrize("readers", ["threads", "processes"])
def test_a_killed_training_on_clips_resumes_to_the_same_weights(
    whole: PretrainConfig, readers: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(whole, out=str(tmp_path / "run"), readers=readers, workers=2)
    process = worker.start_pretrain(config, tmp_path / "log")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") > 4):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert worker.run(config, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert "resumes    after step" in (tmp_path / "log").read_text()
    tiny.assert_same(worker.weights(config), worker.weights(whole))


def test_packed_frames_are_the_frames(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    assert main(["pack", str(clips), "--out", str(out), "--frames", "key", "--form", "raw"]) == 0
    packed, loose = open_source(str(out)), open_source(str(clips), "key")
    assert [packed.name(index) for index in range(len(packed))] == [
        loose.name(index).removeprefix(f"{clips}/") for index in range(len(loose))
    ]
    for index in range(len(packed)):
        np.testing.assert_array_equal(np.asarray(packed.read(index)), loose.read(index))


def test_clips_are_packed_as_jpegs_unless_another_form_is_asked_for(clips: Path, tmp_path: Path) -> None:
    assert main(["pack", str(clips), "--out", str(tmp_path / "shards"), "--frames", "key"]) == 0
    raw = open_source(str(tmp_path / "shards")).read(0)
    assert isinstance(raw, bytes) and raw.startswith(b"\xff\xd8")


@pytest.mark.slow
def test_the_commands_take_the_frames_of_a_run(
    whole: PretrainConfig, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = str(whole.out), str(clips)
    commands = (
        ["embed", run, "--data", data, "--frames", "3", "--out", str(tmp_path / "a.npz")],
        ["search", run, "--data", data, "--frames", "3", "--query", data, "--features", str(tmp_path / "a.npz")],
        ["reconstruct", run, data, "--out", str(tmp_path / "a.png")],
        ["report", run, "--data", data, "--out", str(tmp_path / "a.html")],
        ["resume", run],
    )
    for command in commands:
        assert main(command) == 0, (command, capsys.readouterr())
    assert "a.mp4#000003" in (tmp_path / "a.html").read_text()
    assert len(np.load(tmp_path / "a.npz")["names"]) == 42


@pytest.mark.slow
def test_queries_and_predictions_are_of_the_frames_that_are_chosen(
    whole: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for name in "ab":
            write_clip(tmp_path / "set" / label / f"{name}.mp4", frames=20)
    run, out, data = str(whole.out), str(tmp_path / "run"), str(tmp_path / "set")
    clip, frames = f"{data}/cat/a.mp4", ["--frames", "10"]
    tuned = ["finetune", "classify", "--from", run, "--data", data, "--out", out, "--steps", "1", "--batch-size", "2"]
    assert main([*tuned, *frames]) == 0, capsys.readouterr()
    capsys.readouterr()
    for command in (["predict", out, clip], ["search", run, "--data", data, "--query", clip]):
        assert main([*command, *frames]) == 0
        lines = capsys.readouterr().out.splitlines()
        asked = [
            line for line in lines if line.endswith(f"{clip}#000010") and (command[0] == "predict" or line[0] != " ")
        ]
        assert len(asked) == 1, lines
    assert main(["predict", out, "demo", *frames]) == 2
    assert "--frames 10 is for clips, and demo holds none; leave it out" in capsys.readouterr().err
