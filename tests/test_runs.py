"""`simmim runs`: states by what is on disk, figures, and commands that resume."""

import json
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from simmim.cli import main
from simmim.commands.runs import describe, find_runs
from simmim.errors import UserError
from simmim.training.loop import Loop

HOUR = 3600


def make(
    path: Path, config: str = "steps = 40", *, steps: int = 0, saved: int | None = None, age: float = HOUR, **last: Any
) -> Path:
    """A run directory of so many logged steps, last written `age` seconds ago; `last` are figures of the last step."""
    path.mkdir(parents=True)
    text = (
        f'data = "images"\nmodel = "resnet18"\nbatch_size = 8\nlog_every_steps = 10\nsave_every_steps = 20\n{config}\n'
    )
    (path / "config.toml").write_text(text)
    rows = [{"step": n, "epoch": n / 10, "loss": 1 / n, "images_per_second": 80.0} for n in range(1, steps + 1)]
    if rows:
        rows[-1] |= last
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if saved is not None:
        (path / f"checkpoints/step-{saved:08d}").mkdir(parents=True)
        (path / "encoder").mkdir()
    now = time.time()
    os.utime(path / "config.toml", (now - age - 60,) * 2)
    if rows:
        os.utime(path / "metrics.jsonl", (now - age,) * 2)
    return path


def look(path: Path) -> dict[str, Any]:
    [found] = find_runs(path)
    return found


@pytest.mark.parametrize(
    ("state", "settings"),
    [
        ("finished", {"steps": 40, "saved": 40}),
        ("finished", {"steps": 40, "saved": 40, "age": 1}),
        ("running?", {"steps": 10, "age": 30}),
        ("running?", {"steps": 20, "saved": 20, "age": 30}),  # a usual save
        ("running?", {"age": 30}),  # before its first line
        ("stopped", {"steps": 13, "saved": 13, "age": 1}),  # saved by the signal
        ("stopped", {"steps": 20, "saved": 20}),
        ("failed", {"steps": 30, "saved": 20}),
        ("failed", {"steps": 40, "saved": 20}),  # before its last save
        ("failed", {"steps": 5, "loss": None}),
        ("failed", {}),
        ("converted", {"saved": 0}),
    ],
)
def test_the_state_of_a_run(state: str, settings: dict[str, Any], tmp_path: Path) -> None:
    found = look(make(tmp_path / "a", **settings))
    assert found["state"] == state
    assert bool(found["resume"]) == (state in ("stopped", "failed"))


def test_a_finished_run_may_lack_its_checkpoints(tmp_path: Path) -> None:
    run = make(tmp_path / "a", steps=40, saved=40)
    shutil.rmtree(run / "checkpoints")
    assert look(run)["state"] == "finished"


def test_a_slow_run_is_given_more_time(tmp_path: Path) -> None:
    slow = make(tmp_path / "slow", steps=10, age=HOUR, images_per_second=0.1)  # 800 s for 10 steps
    assert look(slow)["state"] == "running?"


def test_the_steps_of_epochs_follow_from_the_metrics(tmp_path: Path) -> None:
    found = look(make(tmp_path / "a", "epochs = 2.5", steps=7))
    assert (found["step"], found["steps"], found["loss"]) == (7, 25, 1 / 7)


def test_the_last_probe_is_found_in_earlier_lines(tmp_path: Path) -> None:
    run = make(tmp_path / "a", steps=9)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    for line, figure in ((2, 0.25), (5, 0.5)):
        rows[line] = json.dumps(json.loads(rows[line]) | {"knn_top1": figure})
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n" + '{"step": 10, "lo')  # killed as it wrote a line
    found = look(run)
    assert found["figure"] == ("knn_top1", 0.5)
    assert found["step"] == 9


def test_objectives_and_tasks_are_named(tmp_path: Path) -> None:
    make(tmp_path / "a", '[[objectives]]\nkind = "pixels"\n[[objectives]]\nkind = "teacher"')
    tuned = make(tmp_path / "b", 'steps = 40\ntask = "classify"', steps=30, saved=20)
    (tuned / "metrics.json").write_text('{"top1": 0.5, "best": {"step": 10, "top1": 0.75}}')
    first, second = find_runs(tmp_path)
    assert first["objective"] == "pixels+teacher"
    assert (second["objective"], second["figure"]) == ("classify", ("top1", 0.75))
    assert second["resume"] == f"simmim resume {tuned}"


def test_runs_are_found_at_any_depth_in_order_and_damaged_ones_are_shown(tmp_path: Path) -> None:
    for name in ("z", "deep/down/b", "a"):
        make(tmp_path / name)
    (tmp_path / "a/config.toml").write_text("no = ")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/config.toml").touch()
    assert [Path(run["run"]).name for run in find_runs(tmp_path)] == ["a", "b", "z"]
    assert find_runs(tmp_path)[0]["model"] == "?"


def test_the_table_and_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path / "my run", steps=13, saved=13, knn_top1=0.5)
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "figure", "objective", "model", "data"]
    assert lines[1].removeprefix(str(run)).split() == [
        "stopped", "13/40", "0.0769", "knn_top1", "0.5000", "pixels", "resnet18", "images"
    ]  # fmt: skip
    assert lines[-1] == f"simmim resume '{run}'"
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": json.loads(json.dumps(find_runs(tmp_path)))}


def test_a_directory_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no run is below "):
        find_runs(tmp_path)
    with pytest.raises(UserError, match=r"nowhere is not a directory; give the one that holds your runs$"):
        find_runs(tmp_path / "nowhere")


def test_a_directory_name_that_is_no_text_is_shown(tmp_path: Path) -> None:
    make(tmp_path / os.fsdecode(b"\xff"))
    assert r"\udcff" in "\n".join(describe(find_runs(tmp_path)))


def test_the_command_resumes_a_killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "a run"
    options = (
        "--model vit_tiny_patch16_224 --model-args depth=1 embed_dim=12 num_heads=1 --image-size 32 --mask-cell 16"
    )
    options += " --batch-size 4 --steps 4 --save-every-steps 1 --log-every-steps 1 --device cpu --objective pixels=0.5"
    log = Loop._log

    def log_or_end(self: Loop, done: int, *rest: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt
        log(self, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_log", log_or_end)
        assert main(["pretrain", "--data", "demo", "--out", str(run), *options.split()]) == 130
    assert look(run)["state"] == "running?"
    for file in run.iterdir():
        os.utime(file, (time.time() - HOUR,) * 2)
    found = look(run)
    assert (found["state"], found["step"], found["steps"]) == ("stopped", 2, 4)
    assert main(shlex.split(found["resume"])[1:]) == 0
    found = look(run)
    assert (found["state"], found["step"], found["objective"]) == ("finished", 4, "pixels")
