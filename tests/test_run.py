"""The run directory: made, found again, refused, moved aside, and never half written."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import read_toml
from simmim.errors import UserError
from simmim.training.resume import asked_precision, drop_metrics_after, hold_run, open_run, recall
from simmim.training.run_directory import Run
from simmim.training.whole_files import written_whole


def config(out: Path, **others: Any) -> PretrainConfig:
    complete: dict[str, Any] = {
        "image_size": (64, 64),
        "flip": "horizontal",
        "crop_scale": (0.67, 1.0),
        "crop_ratio": (0.75, 4 / 3),
        "lr": 2e-4,
    }
    return PretrainConfig(data="demo", out=str(out), **(complete | others))


def save(run: Path, step: int = 1) -> None:
    (Run(run).checkpoints / f"step-{step:08d}").mkdir(parents=True)


def refusal(config: PretrainConfig) -> str:
    with pytest.raises(ValueError, match="run") as error:
        open_run(config)
    return str(error.value)


def test_a_new_run_holds_its_configuration(tmp_path: Path) -> None:
    mine = config(tmp_path / "deep" / "run", lr=1e-3, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert open_run(mine).read_config(PretrainConfig) == mine


def test_an_empty_directory_becomes_a_run(tmp_path: Path) -> None:
    assert open_run(config(tmp_path)).config.exists()


def test_what_a_process_left_that_was_killed_as_it_began_becomes_a_run(tmp_path: Path) -> None:
    with written_whole(Run(tmp_path).config) as left:
        left.write_text("data = ")
    Run(tmp_path).config.rename(left)  # a killed process does not clean up
    assert open_run(config(tmp_path)).read_config(PretrainConfig) == config(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "machine.json"]
    Run(tmp_path).config.unlink()  # killed in between
    assert open_run(config(tmp_path)).config.exists()


def test_what_the_machine_decided_is_kept_beside_what_was_asked(tmp_path: Path) -> None:
    asked = config(tmp_path / "run", workers=None)
    decided = dataclasses.replace(asked, device="cpu", precision="bf16", compile=False, workers=2)
    run = open_run(decided, asked)
    assert read_toml(run.config, PretrainConfig) == asked  # what --config repeats elsewhere
    assert run.read_config(PretrainConfig) == decided
    save(run.path)
    assert open_run(decided, asked).read_config(PretrainConfig) == decided
    assert "precision bf16 → fp32" in refusal(dataclasses.replace(decided, precision="fp32"))


def test_a_resumed_run_keeps_the_precision_that_a_machine_chose(tmp_path: Path) -> None:
    asked = config(tmp_path / "run")
    assert asked_precision(asked) == "auto"
    run = open_run(dataclasses.replace(asked, precision="fp32"), asked)
    assert asked_precision(asked) == "auto"  # nothing is saved yet: it begins anew
    save(run.path)
    assert asked_precision(asked) == "fp32"
    assert asked_precision(dataclasses.replace(asked, precision="bf16")) == "bf16"
    assert asked_precision(dataclasses.replace(asked, fresh=True)) == "auto"


def test_the_same_configuration_is_resumed_and_what_does_not_matter_may_change(tmp_path: Path) -> None:
    open_run(config(tmp_path))
    other = config(tmp_path, device="cpu", workers=3, save_every_steps=7, accumulate_steps=2, compile=True, keep=5)
    assert open_run(other).read_config(PretrainConfig) == other


def test_a_changed_configuration_is_refused_naming_the_fields(tmp_path: Path) -> None:
    open_run(config(tmp_path))
    save(tmp_path)
    message = refusal(config(tmp_path, lr=1e-3, seed=4, keep=5))
    assert message == (
        f"{tmp_path} holds a run with another configuration (lr 0.0002 → 0.001, seed 0 → 4); "
        f"repeat its command to resume it, give another --out (with --init-from {tmp_path} to start from its weights), "
        "or start again with --fresh"
    )


def test_a_longer_run_is_refused_unless_it_is_to_be_extended(tmp_path: Path) -> None:
    open_run(config(tmp_path, steps=50))
    save(tmp_path)
    assert f"(steps 50 → 100); simmim resume {tmp_path} --steps N extends it, give" in refusal(
        config(tmp_path, steps=100)
    )
    open_run(config(tmp_path, steps=100, extend=True))
    assert Run(tmp_path).read_config(PretrainConfig).steps == 100
    assert "lr 0.0002 → 0.001" in refusal(config(tmp_path, steps=200, lr=1e-3, extend=True))


def logged(run: Path, steps: int) -> None:
    Run(run).metrics.write_text("".join(f'{{"step": {n}, "epoch": {n / 10}}}\n' for n in range(1, steps + 1)))


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    first = config(tmp_path, save_every_steps=7)
    open_run(first)
    logged(tmp_path, 7)
    with hold_run(first, is_main=True):
        open_run(first)
    assert Run(tmp_path).metrics.read_text() == ""
    assert recall(first) is None  # what was measured then is measured anew


def test_a_run_killed_before_its_first_checkpoint_may_be_repeated_with_other_settings(tmp_path: Path) -> None:
    first = config(tmp_path / "run", save_every_steps=7)
    open_run(first)
    logged(tmp_path / "run", 7)
    other = dataclasses.replace(first, lr=1e-3)
    with hold_run(other, is_main=True):
        assert open_run(other).read_config(PretrainConfig) == other
    (aside,) = tmp_path.glob("run.old-*")
    assert Run(aside).read_config(PretrainConfig) == first
    assert not Run(tmp_path / "run").metrics.exists()


@pytest.mark.parametrize(("steps", "weights"), [(8, None), (5, "encoder"), (30, "model")])
def test_a_run_that_lost_its_checkpoints_is_refused_and_left_alone(
    tmp_path: Path, steps: int, weights: str | None
) -> None:
    mine = config(tmp_path, save_every_steps=30 if weights == "model" else 7, steps=30)
    open_run(mine)
    logged(tmp_path, steps)
    if weights:
        (tmp_path / weights).mkdir()
    before = Run(tmp_path).metrics.read_bytes()
    with pytest.raises(UserError) as error, hold_run(mine, is_main=True):
        pass
    held, start = "", ""
    if weights:
        held = f"{tmp_path / weights} and "
        start = f" (with --init-from {tmp_path / weights} to start from its weights)"
    assert str(error.value) == (
        f"{tmp_path}/checkpoints has no checkpoint, and training from step 0 would write over {held}metrics of {steps} "
        f"steps; bring the checkpoints back, give another --out{start}, or start again with --fresh, which moves the "
        "old run aside"
    )
    assert Run(tmp_path).metrics.read_bytes() == before
    with hold_run(dataclasses.replace(mine, fresh=True), is_main=True):
        pass


def test_a_run_of_another_kind_is_named(tmp_path: Path) -> None:
    Run(tmp_path).config.write_text('format = 2\ntask = "classify"\n')
    assert refusal(config(tmp_path)) == (
        f"{tmp_path} holds a fine-tuning (classify), not a pretraining; give another directory"
    )


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    old = config(tmp_path / "run")
    open_run(old)
    new = dataclasses.replace(old, lr=1e-3, fresh=True)
    assert open_run(new).read_config(PretrainConfig).lr == 1e-3
    (aside,) = tmp_path.glob("run.old-*")
    assert Run(aside).read_config(PretrainConfig) == old


def test_a_clock_that_is_set_back_mixes_no_old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20261129-120000")
    for lr in (1e-3, 2e-3, 3e-3):
        open_run(dataclasses.replace(config(tmp_path / "run"), lr=lr, fresh=True))
    olds = [tmp_path / "run.old-20261129-120000", tmp_path / "run.old-20261129-120000-2"]
    assert [Run(old).read_config(PretrainConfig).lr for old in olds] == [1e-3, 2e-3]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_with_something_else_in_it_is_refused_and_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    assert refusal(config(tmp_path, fresh=fresh)) == (
        f"{tmp_path} exists and is not a run; give a new directory as --out"
    )
    assert (tmp_path / "thesis.tex").exists()


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert refusal(config(tmp_path / "run")).endswith("exists and is not a run; give a new directory as --out")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(config(tmp_path / "file" / "run"))
    assert message == f"{tmp_path}/file/run cannot be written: Not a directory; give another --out"


def test_reading_the_configuration_of_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run") as error:
        Run(tmp_path).read_config(PretrainConfig)
    assert str(error.value) == (
        f"{tmp_path} is not a run: it has no config.toml; give the --out directory of a training"
    )


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with written_whole(path) as aside:
        aside.write_text("old")
    with contextlib.suppress(ZeroDivisionError), written_whole(path) as aside:
        aside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_metrics_of_later_steps_and_half_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    drop_metrics_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_no_metrics_are_nothing_to_drop(tmp_path: Path) -> None:
    drop_metrics_after(tmp_path / "metrics.jsonl", 2)
    assert list(tmp_path.iterdir()) == []
