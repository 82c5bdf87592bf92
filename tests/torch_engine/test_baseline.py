"""`simmim baseline`: the same fine-tuning from random weights, and what the report says of the two."""

import base64
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import simmim
from simmim.cli import main
from simmim.commands.baseline import settings_of
from simmim.config.commands import BaselineConfig
from simmim.config.tasks import ClassifyConfig
from simmim.report.baselines import Baselines, Frozen, read_baselines
from simmim.report.facts import Facts
from simmim.report.labels import Accuracy, difference
from simmim.report.page import ReportConfig, report, section
from simmim.report.verdict import judge_baselines
from simmim.torch_engine.tasks.base import find_spec
from simmim.torch_engine.tasks.classify import ClassifyTask
from simmim.torch_engine.train.update import Update
from simmim.training.run_directory import Run

TUNING: dict[str, Any] = {
    "data": "demo",
    "batch_size": 16,
    "labels_per_class": 4,
    "steps": 6,
    "lr": 0.04,
    "eval_every_epochs": 2,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
}
ENCODER: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 16, "depth": 2, "embed_dim": 48, "num_heads": 2},
    "image_size": 32,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with baselines at two rates."""
    root = tmp_path_factory.mktemp("baseline")
    machine = {"device": "cpu", "precision": "fp32", "workers": 1}
    simmim.pretrain(
        data="demo", out=str(root / "a"), objectives=["pixels"], steps=2, batch_size=8, **ENCODER, **machine
    )
    run = simmim.finetune("classify", init=str(root / "a"), out=str(root / "run"), **TUNING).path
    assert main(["baseline", str(run), "--rates", "1", "2"]) == 0
    return run


def found(run: Path) -> Baselines:
    baselines = read_baselines(Facts.read(run))
    assert baselines is not None
    return baselines


def test_a_baseline_is_the_same_training_from_scratch(finished: Path, tmp_path: Path) -> None:
    expected = simmim.finetune(
        "classify", init="scratch", out=str(tmp_path / "run"), layer_decay=1.0, **(TUNING | ENCODER | {"lr": 0.08})
    )
    mine, theirs = (load_file(run.model / "model.safetensors") for run in (expected, Run(baselines(finished)[1])))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_command_prints_the_run_beside_its_baselines(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["baseline", str(finished), "--rates", "1", "2"]) == 0
    said = capsys.readouterr()
    assert said.err.count("finished already") == 2
    heads, *rows = said.out.splitlines()[:7]
    verdict, _, page = said.out.splitlines()[7:]
    kept = [json.loads((path / "metrics.json").read_text())["best"] for path in (finished, *baselines(finished))]
    assert heads.split() == ["training", "steps", "rate", "top-1", "balanced", "accuracy"]
    assert [line.split()[-2:] for line in rows[:3]] == [
        [f"{best['top1']:.4f}", f"{best['balanced_accuracy']:.4f}"] for best in kept
    ]
    assert [line.split()[-3] for line in rows[:3]] == ["1.25e-03", "1.25e-03", "2.50e-03"]  # for a batch of 16
    mine, *others = (best["top1"] for best in kept)
    assert f"top-1 {mine:.3f}, from scratch {max(others):.3f} at the best of 2 learning rates" in verdict
    assert page == f"the report is {finished / 'report.html'}"


def test_frozen_features_and_their_floors_are_rows_without_steps(finished: Path) -> None:
    config = Run(finished).read_config(ClassifyConfig)
    probed = {
        name: simmim.probe(config.init, "demo", method=method, k=20, labels_per_class=4, device="cpu", workers=1)
        for name, method in (("k-NN", "knn"), ("linear", "linear"))
    }

    def best(of: Callable[[dict[str, Any]], dict[str, float]]) -> tuple[dict[str, float], str]:
        return max(((of(each), name) for name, each in probed.items()), key=lambda row: row[0]["top1"])

    rows = {row.name: row.cells for row in found(finished).table()}
    for what, (figures, method) in (
        ("frozen features", best(lambda each: each)),
        ("raw pixels", best(lambda each: each["raw_pixels"])),
        ("the untrained encoder", best(lambda each: each["untrained"])),
    ):
        cells = [f"{figures[name]:.4f}" for name in ("top1", "balanced_accuracy")]
        assert rows[f"{what} ({method})"] == ["–", "–", *cells]
    page = report(ReportConfig(runs=(str(finished),))).read_text(encoding="utf-8")
    assert page.count("<th>frozen features (") == page.count("<th>raw pixels (") == 1


@pytest.mark.parametrize("damage", ["damaged", "of other images"])
def test_a_record_that_does_not_fit_counts_for_nothing_and_is_made_again(
    finished: Path, tmp_path: Path, damage: str
) -> None:
    run = Run(shutil.copytree(finished, tmp_path / "run"))
    whole = run.frozen.read_bytes()
    record = json.loads(whole)
    record["data"]["train"]["names_sha256"] = "0"
    run.frozen.write_text('{"images": 208' if damage == "damaged" else json.dumps(record))
    before = found(run.path)
    assert before.over_frozen is None
    assert {each.flaw for each in before.frozen} == (set() if damage == "damaged" else {"on other images"})
    assert main(["baseline", str(run.path), "--rates", "1", "2"]) == 0
    assert run.frozen.read_bytes() == whole and found(run.path).over_frozen


def test_features_that_do_not_fit_in_memory_leave_table_and_report(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    run = Run(shutil.copytree(finished, tmp_path / "run"))
    run.frozen.unlink()
    monkeypatch.setattr("simmim.commands.baseline.judge_by_labels", fail)
    assert main(["baseline", str(run.path), "--rates", "1", "2"]) == 0
    said = capsys.readouterr()
    assert "warning    the frozen features are not judged: out of memory" in said.err
    assert "from scratch" in said.out and not run.frozen.exists()


def test_features_that_are_gone_are_not_judged(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    Run(run).frozen.unlink()
    gone = str(tmp_path / "gone")
    for path in (run, *baselines(run)):
        config = Run(path).read_config(ClassifyConfig)
        if config.init != "scratch":
            Run(path).config.write_text(Run(path).config.read_text().replace(str(config.init), gone))
    assert main(["baseline", str(run), "--rates", "1", "2"]) == 0
    said = capsys.readouterr()
    assert f"warning    the frozen features are not judged: {gone}" in said.err
    assert "from scratch" in said.out and "frozen features" not in said.out


@pytest.mark.parametrize(
    ("mine", "other", "title"),
    [(90, 60, "Better"), (60, 90, "Worse"), (61, 60, "Not clearly better")],
)
def test_a_fine_tuning_is_compared_with_the_features_that_it_began_from(
    finished: Path, mine: int, other: int, title: str
) -> None:
    record = found(finished)
    accuracy = {right: Accuracy(np.arange(100) < right) for right in (mine, other)}
    frozen = [Frozen("frozen features", "linear", accuracy[other], 0.5)]
    baselines = dataclasses.replace(record, run=dataclasses.replace(record.run), frozen=frozen)
    baselines.run.__dict__["accuracy"] = accuracy[mine]
    *_, finding = judge_baselines(baselines)
    assert finding.title == f"{title} than the frozen features"
    assert f"top-1 {mine / 100:.3f}, frozen features (linear) {other / 100:.3f}" in finding.figure
    config = record.run.config
    command = f"simmim probe {config.init} --data {config.data} --method linear --out DIR"
    assert finding.remedy.endswith(command) == (title == "Worse")


def baselines(run: Path) -> list[Path]:
    return [Run(run).baselines / f"lr-{lr}-steps-6" for lr in ("0.04", "0.08")]


def test_the_page_shows_the_baselines_and_their_verdict(finished: Path) -> None:
    page = report(ReportConfig(runs=(str(finished),))).read_text(encoding="utf-8")
    part = page[page.index("Does pretraining help?") :]
    assert part[: part.index("</section>")].count("<th>from scratch") == 2
    verdict = page[page.index('class="verdict"') : page.index("Does pretraining help?")]
    assert f"{found(finished).gains[0].figure}" in verdict


def test_the_difference_is_that_of_the_same_images(finished: Path) -> None:
    """What `right` in evaluation.json says of each image is what the model predicts."""
    best = max(baselines(finished), key=lambda path: json.loads((path / "metrics.json").read_text())["best"]["top1"])
    truth = json.loads((finished / "data.json").read_text())
    mine, other = (Accuracy(right(path)) for path in (finished, best))
    assert mine.count == other.count == truth["val"]["images"]
    [gain] = found(finished).gains
    assert gain.difference == difference(mine, other)
    assert (gain.mine, gain.other) == pytest.approx((mine.value, other.value))


def right(run: Path) -> Any:
    """Judge the evaluation images by the model that was kept."""
    data: Any = find_spec("classify").open_data(Run(run).read_config(ClassifyConfig))
    answers = {each["image"]: each["label"] for each in simmim.predict(run, ["demo"])["images"]}
    true = [(data.val.name(index), data.classes[label]) for index, label in enumerate(data.val_labels)]
    return np.array([answers[name] == label for name, label in true])


def test_more_steps_are_compared_apart_and_what_does_not_count_is_said(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(["baseline", str(run), "--rates", "1", "--longer", "2"]) == 0
    assert [(gain.times, gain.rates) for gain in found(run).gains] == [(1, 2), (2, 1)]

    shorter, other = baselines(run)
    lines = (shorter / "metrics.jsonl").read_text().splitlines()
    (shorter / "metrics.jsonl").write_text("\n".join(lines[:3]))
    images = json.loads((other / "data.json").read_text())
    images["train"]["names_sha256"] = "0"
    (other / "data.json").write_text(json.dumps(images))
    assert [arm.flaw for arm in found(run).arms] == ["not finished, at step 3", "on other images", ""]
    assert [gain.times for gain in found(run).gains] == [2]

    (other / "metrics.json").write_text("{")
    (run / "data.json").unlink()
    assert [arm.flaw for arm in found(run).arms][1:] == [
        "its metrics.json cannot be read",
        "its images are not known",
    ]


def test_baselines_of_fewer_steps_than_an_extended_run_do_not_count(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(["resume", str(run), "--steps", "8"]) == 0
    assert {arm.flaw for arm in found(run).arms} == {"has fewer steps; run simmim baseline again"}
    assert found(run).gains == []


def test_a_longer_baseline_has_a_longer_schedule(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    config = Run(run).config
    config.write_text(config.read_text().replace('schedule = "cosine"', 'schedule = "multistep"\nmilestones = [2.0]'))
    config.write_text(config.read_text().replace("milestones = []\n", ""))
    asked = BaselineConfig(run=str(run), rates=(1.0,), longer=3.0)
    [settings] = settings_of(asked, Facts.read(run))
    base = Run(run).read_config(ClassifyConfig)
    assert base.warmup_epochs and settings.warmup_epochs == pytest.approx(3 * base.warmup_epochs)
    assert (settings.steps, settings.milestones) == (18, (6.0,))


@pytest.mark.parametrize("damaged", ["AAAA", "", base64.b64encode(bytes(26)).decode()])
def test_a_damaged_record_gives_no_interval(finished: Path, tmp_path: Path, damaged: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    record = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(record | {"right": damaged}))
    assert [gain.difference for gain in found(run).gains] == [None]


def test_a_best_rate_at_the_edge_asks_for_further_ones(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for path, top1 in zip(baselines(run), (0.2, 0.3), strict=True):
        figures = json.loads((path / "metrics.json").read_text())
        figures["best"]["top1"] = top1
        (path / "metrics.json").write_text(json.dumps(figures))
    assert found(run).gains[0].search == "try higher --rates of simmim baseline"


@pytest.mark.parametrize(
    ("mine", "other", "title"),
    [
        (70, 40, "Better than training from scratch"),
        (40, 70, "Worse than training from scratch"),
        (50, 48, "Not clearly better than training from scratch"),
        (None, None, "Ahead of training from scratch"),
        (None, 70, "Not ahead of training from scratch"),
    ],
)
def test_the_verdict_follows_the_interval(
    finished: Path, tmp_path: Path, mine: int | None, other: int | None, title: str
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(baselines(run)[1])
    for path, count, usual in ((run, mine, 0.6), (baselines(run)[0], other, 0.4)):
        figures = json.loads((path / "metrics.json").read_text())
        figures["best"]["top1"] = usual if count is None else count / 100
        (path / "metrics.json").write_text(json.dumps(figures))
        record = {"images": 100, "right": base64.b64encode(np.packbits(np.arange(100) < (count or 0))).decode()}
        (path / "evaluation.json").write_text("" if count is None else json.dumps(record))
    config = ReportConfig(runs=(str(run),))
    assert title in [finding.title for finding in section(Facts.read(run), config).findings]


def test_a_rate_that_diverges_does_not_end_the_others(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    build = Update.__init__

    def build_impatient(self: Update, *parts: Any, **settings: Any) -> None:
        build(self, *parts, **settings)
        self.bad_limit = 2

    monkeypatch.setattr(Update, "__init__", build_impatient)
    assert main(["baseline", str(run), "--rates", "1e30", "3"]) == 0
    assert (Run(run).baselines / "lr-0.12-steps-6" / "model").is_dir()
    said = capsys.readouterr()
    assert "warning    loss or gradient was not finite for 2 steps in a row" in said.err
    assert [line.split()[0] for line in said.out.splitlines() if line.endswith("diverged")] == ["from"]


def test_ctrl_c_in_the_last_step_of_a_baseline_begins_no_other(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(Run(run).baselines)
    judge = ClassifyTask.judge

    def interrupt(self: ClassifyTask, *parts: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return judge(self, *parts)

    monkeypatch.setattr(ClassifyTask, "judge", interrupt)
    short = ["baseline", str(run), "--rates", "1", "2"]
    config = Run(run).config
    config.write_text(re.sub(r"eval_every_epochs = .*", "eval_every_epochs = 100.0", config.read_text()))
    assert main(short) == 130
    assert [path.name for path in Run(run).baselines.iterdir()] == ["lr-0.04-steps-6"]
    assert "from scratch" in capsys.readouterr().out  # what is done is shown


def test_a_stopped_baseline_stops_the_command_and_is_resumed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for path in baselines(run):
        shutil.rmtree(path)
    config = Run(run).config
    config.write_text("max_hours = 1e-7\n" + config.read_text())
    assert main(["baseline", str(run), "--rates", "1"]) == 75
    capsys.readouterr()
    config.write_text(config.read_text().replace("max_hours = 1e-7\n", ""))
    assert main(["baseline", str(run), "--rates", "1"]) == 0
    assert "resumes    after step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a", "is a pretraining; give a fine-tuning that began from it"),
        (
            "run/baselines/lr-0.04-steps-6",
            "began from random weights itself; give a fine-tuning of a pretrained encoder",
        ),
        ("short", "is not finished, at step 2 of 6; run simmim resume"),
    ],
)
def test_only_a_finished_fine_tuning_of_an_encoder_has_baselines(
    finished: Path, name: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished.parent / name
    if name == "short":
        shutil.copytree(finished, run)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("\n".join(lines[:2]))
    capsys.readouterr()
    assert main(["baseline", str(run)]) == 2
    assert f"simmim: {run} {line}" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_trains_several_baselines_in_a_row(finished: Path, tmp_path: Path) -> None:
    """Its store outlives a training: the next one must not find the addresses of the last one's ranks."""
    run = shutil.copytree(finished, tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "-m", "simmim", "baseline", str(run), "--rates", "0.5", "0.25"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("from scratch ") == 4 + 1  # rows, and the verdict
    assert ended.stderr.count("baseline 1 of 2") == 1
