"""A training that was stopped, however and whenever, ends as if it had not been. Real processes, fp32, the CPU."""

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from simmim.cli import main
from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import read_toml
from simmim.errors import UserError
from simmim.torch_engine.accelerators import ACCELERATORS
from simmim.torch_engine.train.pretrain import pretrain
from simmim.training.checkpoint_directory import checkpoint_path, newest_checkpoint
from simmim.training.run_directory import Run

from . import tiny, worker
from .worker import STEPS, Finished, rows, settings, weights


def assert_same_training(config: PretrainConfig, whole: PretrainConfig) -> None:
    """Weights bit by bit, each step's figures once and the same, and nothing left behind."""
    tiny.assert_same(weights(config), weights(whole))
    keys = ("step", "loss", "lr", "grad_norm", "val_loss")
    assert [[row.get(key) for key in keys] for row in rows(config)] == [
        [row.get(key) for key in keys] for row in rows(whole)
    ]
    assert config.out
    assert {path.name for path in Run(Path(config.out)).checkpoints.iterdir()} == {"step-00000015", "step-00000016"}


def kill_and_resume(whole: Finished, folder: Path, *, kills: int, seed: int) -> None:
    """Kill trainings at random moments, resuming each until it has finished, `kills` times in all."""
    draw = np.random.default_rng(seed)
    done, number = 0, 0
    while done < kills:
        config = dataclasses.replace(whole.config, out=str(folder / f"run {number}"))
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            due = int(draw.integers(whole.calls)) if done < kills else None
            code = worker.run(config, folder / "log", kill_at_call=due)
            done += code == -signal.SIGKILL
        assert code == 0, (folder / "log").read_text()
        assert_same_training(config, whole.config)
        number += 1


def test_a_killed_training_resumes_to_the_same_weights(whole: Finished, tmp_path: Path) -> None:
    kill_and_resume(whole, tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_a_training_killed_at_ten_random_moments_resumes_to_the_same_weights(whole: Finished, tmp_path: Path) -> None:
    kill_and_resume(whole, tmp_path, kills=10, seed=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    whole: Finished, tmp_path: Path, number: signal.Signals
) -> None:
    config = dataclasses.replace(whole.config, out=str(tmp_path / "run"), save_every_steps=1000, log_every_steps=1)
    process = worker.start_pretrain(config, tmp_path / "log")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, number)
    process.join(timeout=60)
    assert process.exitcode == 128 + number, (tmp_path / "log").read_text()
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    step = int(newest.name.removeprefix("step-"))
    assert 2 <= step < STEPS
    assert f"stopped at step {step} of {STEPS}; simmim resume {config.out} goes on" in (tmp_path / "log").read_text()
    assert worker.run(config, tmp_path / "log") == 0
    tiny.assert_same(weights(config), weights(whole.config))
    assert [row["step"] for row in rows(config)] == [*range(1, STEPS + 1)]


def test_a_training_whose_output_is_closed_goes_on_to_the_same_weights(whole: Finished, tmp_path: Path) -> None:
    config = dataclasses.replace(whole.config, out=str(tmp_path / "run"))
    os.mkfifo(tmp_path / "pipe")
    process = worker.start_pretrain(config, tmp_path / "pipe")
    with (tmp_path / "pipe").open() as lines:
        assert next(lines).startswith("model")
    process.join(timeout=60)
    assert process.exitcode == 0
    assert_same_training(config, whole.config)


def test_a_training_read_by_processes_has_the_same_weights(whole: Finished, tmp_path: Path) -> None:
    config = dataclasses.replace(whole.config, out=str(tmp_path / "run"), readers="processes", workers=2)
    assert worker.run(config, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same_training(config, whole.config)


def test_a_finished_training_says_so_and_changes_nothing(whole: Finished, tmp_path: Path) -> None:
    before = weights(whole.config)
    assert worker.run(whole.config, tmp_path / "log") == 0
    assert f"finished already: {whole.config.out} holds all {STEPS} steps" in (tmp_path / "log").read_text()
    tiny.assert_same(weights(whole.config), before)


@pytest.mark.parametrize("left", ["none", "that of an earlier step"])
def test_an_encoder_that_a_kill_kept_from_being_written_is_written_by_a_resume(
    whole: Finished, tmp_path: Path, left: str
) -> None:
    """The last checkpoint is there, so that nothing is left to train."""
    assert whole.config.out
    config = dataclasses.replace(whole.config, out=str(tmp_path / "run"))
    shutil.copytree(whole.config.out, tmp_path / "run")
    encoder = Run(tmp_path / "run").encoder / "model.safetensors"
    expected = encoder.read_bytes()
    if left == "none":
        shutil.rmtree(encoder.parent)
    else:
        encoder.write_bytes(b"earlier")
    pretrain(config)
    assert encoder.read_bytes() == expected


def test_simmim_resume_goes_on_with_a_run_says_when_it_is_finished_and_extends_it(
    whole: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(whole.config, out=str(tmp_path / "run"))
    worker.break_off(config, 8, monkeypatch)
    command = ["resume", str(tmp_path / "run")]
    capsys.readouterr()
    assert main(command) == 0
    assert "resumes    after step 6" in capsys.readouterr().err
    assert_same_training(config, whole.config)
    assert main(command) == 0
    assert f"finished already: {config.out} holds all {STEPS} steps" in capsys.readouterr().err
    assert_same_training(config, whole.config)
    before = rows(config)
    assert main([*command, "--steps", str(STEPS + 2)]) == 0
    assert f"the cosine schedule now spans {STEPS + 2} steps" in capsys.readouterr().err
    assert rows(config)[:STEPS] == before
    assert [row["step"] for row in rows(config)] == [*range(1, STEPS + 3)]


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(whole: Finished, tmp_path: Path) -> None:
    config = dataclasses.replace(whole.config, out=str(tmp_path / "run"))
    assert worker.run(config, tmp_path / "first") == 0
    damaged = checkpoint_path(tmp_path / "run" / "checkpoints", STEPS)
    shard = next(damaged.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert worker.run(config, tmp_path / "log") == 0
    log = (tmp_path / "log").read_text()
    assert f"warning    checkpoint {damaged} is damaged ({shard.name} does not match its checksum)" in log
    assert "UserWarning" not in log
    assert "resumes    after step 15" in log
    assert_same_training(config, whole.config)


def test_a_training_resumes_without_the_weights_that_it_began_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tiny.config(out=str(tmp_path / "origin"), steps=1, val_images=0)
    pretrain(origin)
    whole = dataclasses.replace(origin, out=str(tmp_path / "whole"), steps=3, init_from=origin.out, save_every_steps=1)
    pretrain(whole)
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"))
    worker.break_off(parts, 2, monkeypatch)
    shutil.rmtree(tmp_path / "origin")
    with pytest.raises(UserError, match="is not there"):
        pretrain(dataclasses.replace(parts, out=str(tmp_path / "other")))
    pretrain(parts)
    tiny.assert_same(weights(parts), weights(whole))


def test_a_run_keeps_its_precision_on_a_machine_that_would_choose_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tiny.config(out=str(tmp_path / "run"), steps=1, val_images=0, device="auto", precision="auto", workers=None)
    has_bf16 = {"cpu": False}
    rows = {**ACCELERATORS, "cpu": dataclasses.replace(ACCELERATORS["cpu"], has_bf16=lambda: has_bf16["cpu"])}
    monkeypatch.setattr("simmim.torch_engine.accelerators.ACCELERATORS", rows)
    run, _ = pretrain(asked)
    has_bf16["cpu"] = True
    assert main(["resume", str(run.path), "--steps", "2"]) == 0
    assert run.read_config(PretrainConfig).precision == "fp32"
    repeated = read_toml(run.config, PretrainConfig)
    assert (repeated.device, repeated.precision, repeated.workers) == ("auto", "auto", None)
    pretrain(dataclasses.replace(repeated, out=str(tmp_path / "repeated")))
    assert Run(tmp_path / "repeated").read_config(PretrainConfig).precision == "bf16"


@pytest.mark.slow
def test_batch_norm_statistics_resume_too(tmp_path: Path) -> None:
    whole = worker.finish(settings(tmp_path / "whole", "resnet18"), tmp_path / "log")
    parts = settings(tmp_path / "parts", "resnet18")
    assert worker.run(parts, tmp_path / "log", kill_at_call=whole.calls * 3 // 4) == -signal.SIGKILL
    assert worker.run(parts, tmp_path / "log") == 0
    assert_same_training(parts, whole.config)
