"""The report: verdicts by rule, curves, comparison, and what names in it may hold."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simmim
from simmim.cli import main
from simmim.config.pretraining import PretrainConfig
from simmim.config.tasks import TASK_CONFIGS
from simmim.config.toml import to_toml
from simmim.errors import UserError
from simmim.method.losses import MSELoss
from simmim.method.objectives import DescriptorRegression, EmaTeacher
from simmim.report.facts import Facts, as_text, thinned
from simmim.report.labels import Accuracy, Judged, difference, judge_by_labels
from simmim.report.page import ReportConfig, report, unique_names
from simmim.report.verdict import judge
from simmim.training.run_lock import locked

TINY: dict[str, Any] = {
    "data": "demo",
    "objectives": ["pixels"],
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 1, "embed_dim": 24, "num_heads": 1, "patch_size": 8},
    "image_size": 32,
    "mask": {"kind": "random", "cell": 8},
    "batch_size": 8,
    "val_images": 4,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
    "warmup_epochs": 0,
}


def write_run(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Facts:
    """Write a run directory with these lines of metrics."""
    path.mkdir(parents=True)
    config = dataclasses.replace(PretrainConfig(data="images", out=str(path), steps=len(rows)), **settings)
    (path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    lines = [json.dumps({"step": step, "epoch": step / 10, "lr": 1e-3} | row) for step, row in enumerate(rows, 1)]
    (path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Facts.read(path)


def titles(facts: Facts, judged: tuple[Judged, ...] = ()) -> list[str]:
    return [finding.title for finding in judge(facts, judged)]


def falling(steps: int = 100, speed: float = 20) -> list[dict[str, Any]]:
    return [{"loss": 0.2 + float(np.exp(-step * speed / steps))} for step in range(steps)]


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        (falling(), "Converged"),
        (falling(speed=1), "Still falling"),
        ([{"loss": 1.0 + 0.001 * (step % 2)} for step in range(100)], "Learnt nothing"),
        ([{"loss": 1.0 + 0.01 * step} for step in range(100)], "The loss rose"),
        ([{"loss": None, "skipped_in_a_row": 1.0} if step > 80 else {"loss": 1.0} for step in range(100)], "Diverged"),
        ([*falling(1000), *({"loss": None, "skipped_in_a_row": n} for n in range(1, 11))], "Diverged"),
        ([{"loss": None, "skipped_in_a_row": n} for n in range(1, 51)], "Diverged"),
        (falling(10), "Too early to say"),
        ([], "Nothing is logged yet"),
    ],
)
def test_a_training_is_judged_by_its_loss(tmp_path: Path, rows: list[dict[str, Any]], title: str) -> None:
    found = titles(write_run(tmp_path / "run", rows, steps=len(rows) or 1))
    assert title in found and ("Converged" not in found or title == "Converged")


def test_features_are_judged_by_what_was_logged(tmp_path: Path) -> None:
    def last(name: str, **figures: float) -> list[str]:
        return titles(write_run(tmp_path / name, [*falling()[:-1], {"loss": 0.2, **figures}]))

    assert "Features collapsed" in last("a", effective_rank=1.5, feature_std=0.9)
    assert "Features collapsed" in last("b", effective_rank=20, feature_std=0.01)
    assert "Features collapsed" not in last("c", effective_rank=20, feature_std=0.9)
    assert "Better than raw pixels" in last("d", knn_top1=0.5, knn_raw_pixels=0.4)
    assert "No better than raw pixels" in last("e", knn_top1=0.4, knn_raw_pixels=0.4)
    assert "Features not judged" in last("f")


def test_a_loss_whose_target_moves_is_not_judged(tmp_path: Path) -> None:
    rising = [{"loss": 1.0 + 0.01 * step} for step in range(100)]
    found = titles(write_run(tmp_path / "run", rising, objectives=(EmaTeacher(),)))
    assert "Loss not judged" in found and "The loss rose" not in found


def test_a_run_in_its_warm_up_is_not_judged(tmp_path: Path) -> None:
    rows = [{"loss": 1.0, "lr": step * 1e-5} for step in range(50)]
    assert "Too early to say" in titles(write_run(tmp_path / "run", rows, steps=500))


def test_over_training_is_told_with_the_step_that_was_best(tmp_path: Path) -> None:
    rows = falling()
    rows[49] |= {"knn_top1": 0.6, "val_loss": 0.3}
    rows[99] |= {"knn_top1": 0.5, "val_loss": 0.4}
    found = [finding for finding in judge(write_run(tmp_path / "run", rows)) if finding.title == "Over-trained"]
    assert [finding.remedy for finding in found] == [
        "stop near step 50, or train on more images",
        "stop near step 50",
    ]


def test_a_fine_tuning_is_not_called_over_trained_by_its_loss(tmp_path: Path) -> None:
    rows = falling()
    rows[49]["val_loss"], rows[99]["val_loss"] = 0.3, 0.4
    facts = write_run(tmp_path / "run", rows)
    assert "Over-trained" in titles(facts)
    assert "Over-trained" not in titles(dataclasses.replace(facts, config=TASK_CONFIGS["classify"]()))
    moving = write_run(tmp_path / "moving", rows, objectives=(EmaTeacher(),))
    assert "Over-trained" not in titles(moving)


def test_a_run_that_was_broken_off_says_how_to_go_on(tmp_path: Path) -> None:
    found = judge(write_run(tmp_path / "run", falling(), steps=300))
    assert ("Not finished", "step 100 of 300") in [(finding.title, finding.figure) for finding in found]


def accuracy(value: float, count: int, seed: int = 0) -> Accuracy:
    """An accuracy of images that are told right at random."""
    right = np.arange(count) < round(value * count)
    return Accuracy(np.random.default_rng(seed).permutation(right))


def judged_as(features: Accuracy, floor: Accuracy) -> Judged:
    return Judged("k-NN", features, {"raw pixels": floor}, 10, 100, *[np.arange(features.count)] * 2)


def test_a_difference_within_chance_is_no_difference(tmp_path: Path) -> None:
    facts = write_run(tmp_path / "run", falling())

    def against(features: float, floor: float, count: int) -> str:
        judged = judged_as(accuracy(features, count), accuracy(floor, count, seed=1))
        return next(title for title in titles(facts, (judged,)) if "raw pixels" in title)

    assert against(0.45, 0.40, 100) == "Not clearly better than raw pixels"
    assert against(0.45, 0.40, 2000) == "Better than raw pixels"
    assert against(0.40, 0.45, 2000) == "No better than raw pixels"
    assert against(1.0, 1.0, 40) == "Not clearly better than raw pixels"
    assert against(1.0, 0.0, 1) == "Not clearly better than raw pixels"


def table(both: int, only: int, only_other: int, neither: int) -> tuple[Accuracy, Accuracy]:
    """Two accuracies on the same images, by how many of them each tells right."""
    mine = np.repeat([True, True, False, False], [both, only, only_other, neither])
    other = np.repeat([True, False, True, False], [both, only, only_other, neither])
    return Accuracy(mine), Accuracy(other)


@pytest.mark.parametrize(
    "counts", [(14, 5, 0, 22), (36, 12, 2, 0), (1, 1, 7, 12), (0, 0, 0, 9), (9, 0, 0, 0), (2, 9, 8, 1)]
)
def test_the_interval_of_a_paired_difference_is_newcombes_method_10(counts: tuple[int, int, int, int]) -> None:
    """In the letters of his paper: a table e, f, g, h, and limits of the margins as roots of Wilson's equation."""
    e, f, g, h = counts
    n = e + f + g + h

    def limits(right: int) -> list[float]:
        p = right / n  # (p - x)² = 1.96² x (1 - x) / n
        return sorted(np.roots([1 + 1.96**2 / n, -(2 * p + 1.96**2 / n), p * p]).real)

    (l2, u2), (l3, u3) = limits(e + f), limits(e + g)
    dl2, du2, dl3, du3 = (e + f) / n - l2, u2 - (e + f) / n, (e + g) / n - l3, u3 - (e + g) / n
    product, margins = e * h - f * g, (e + f) * (g + h) * (e + g) * (f + h)
    product = product - n / 2 if product > n / 2 else min(product, 0)
    phi = product / margins**0.5 if margins else 0
    delta = (dl2**2 - 2 * phi * dl2 * du3 + du3**2) ** 0.5
    epsilon = (du2**2 - 2 * phi * du2 * dl3 + dl3**2) ** 0.5
    theta = (f - g) / n
    assert difference(*table(*counts)) == pytest.approx((theta, theta - delta, theta + epsilon))


def test_pairing_tells_what_two_samples_would_not(tmp_path: Path) -> None:
    """20 images more of 400, told right besides the same others: an unpaired interval would hold 0."""
    facts = write_run(tmp_path / "run", falling())
    mine, other = table(200, 20, 0, 180)
    assert "Better than raw pixels" in titles(facts, (judged_as(mine, other),))
    assert difference(mine, mine)[0] == 0


def test_the_interval_holds_the_true_difference_19_times_in_20() -> None:
    """On 2,000 draws of 150 images each, of which both know the easy ones."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        ease = rng.random(150)
        mine, other = (Accuracy(rng.random(150) < np.clip(ease + shift, 0.05, 0.95)) for shift in (0.1, 0.0))
        held += difference(mine, other).low <= 0.0950 <= difference(mine, other).high
    assert 0.93 < held / 2000 < 0.98


def test_intervals_are_those_of_wilson() -> None:
    low, high = accuracy(0.3, 50).interval
    roots = np.roots([1 + 1.96**2 / 50, -(2 * 0.3 + 1.96**2 / 50), 0.3**2])  # (p - 0.3)² = 1.96² p (1 - p) / 50
    assert (low, high) == pytest.approx(sorted(roots))


def test_a_real_run_ends_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = simmim.pretrain(**TINY, out=str(tmp_path / "run"), steps=3)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert capsys.readouterr().err.splitlines()[-1] == f"the report is {run.path / 'report.html'}"
    pictures = [*run.reconstructions.glob("*.png"), *run.feature_pictures.glob("*.png")]
    assert page.count("data:image/jpeg") == len(pictures) == 3
    assert "<polyline" in page and "simmim pretrain --config" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_a_fine_tuning_ends_with_a_report(tmp_path: Path) -> None:
    run = simmim.pretrain(**TINY, out=str(tmp_path / "run"), steps=1)
    tuned = simmim.finetune(
        "classify", init=str(run.path), data="demo", out=str(tmp_path / "tuned"), steps=2, batch_size=8, device="cpu",
        precision="fp32", workers=1, warmup_epochs=0,
    )  # fmt: skip
    page = (tuned.path / "report.html").read_text(encoding="utf-8")
    assert "finetune classify" in page and "top-1" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((DescriptorRegression(),), "descriptor"),
        ((DescriptorRegression(see="whole", weight=0.5), EmaTeacher()), "descriptor weight=0.5 see=whole, ema"),
        (0.030169889330626032, "0.0301699"),
        ((0.6, 1.0), "0.6, 1"),
        ({"depth": 2}, "depth=2"),
        (None, "None"),
    ],
)
def test_settings_are_written_as_a_user_reads_them(value: Any, text: str) -> None:
    assert as_text(value) == text


def table_of(path: Path, *runs: Path) -> list[list[str]]:
    """The rows of the table side by side."""
    text = report(ReportConfig(runs=tuple(map(str, runs)), out=str(path))).read_text()
    table = text[text.index("<h2>Side by side") : text.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def test_runs_are_sorted_by_the_loss_that_the_table_shows(tmp_path: Path) -> None:
    """The mean of the last tenth, whatever the last step gave."""
    worse = [{"loss": 1.0}] * 99 + [{"loss": 0.1}]
    better = [{"loss": 0.6}] * 99 + [{"loss": 2.0}]
    for name, rows in (("worse", worse), ("better", better)):
        write_run(tmp_path / name, rows)
    found = table_of(tmp_path / "page.html", tmp_path / "worse", tmp_path / "better")
    assert [row[:2] for row in found[1:]] == [["better", "0.7400"], ["worse", "0.9100"]]


def test_runs_with_other_losses_are_not_ranked(tmp_path: Path) -> None:
    write_run(tmp_path / "first", [{"loss": 1.0}] * 100, loss=MSELoss())
    write_run(tmp_path / "second", [{"loss": 0.6}] * 100)
    found = table_of(tmp_path / "page.html", tmp_path / "first", tmp_path / "second")
    assert [row[0] for row in found[1:]] == ["first", "second"]


def test_a_run_that_is_locked_goes_on(tmp_path: Path) -> None:
    facts = write_run(tmp_path / "run", falling()[:50])
    text = (facts.run.path / "config.toml").read_text().replace("steps = 50", "steps = 100")
    (facts.run.path / "config.toml").write_text(text)
    with locked(facts.run.path):
        assert "the training went on" in report(ReportConfig(runs=(str(facts.run.path),))).read_text()
    assert "simmim resume" in report(ReportConfig(runs=(str(facts.run.path),))).read_text()


def test_a_finished_run_that_is_started_again_keeps_its_page(tmp_path: Path) -> None:
    """It may hold what labels and images took minutes to show."""
    simmim.pretrain(**TINY, out=str(tmp_path / "run"), steps=1)
    (tmp_path / "run" / "report.html").write_text("with labels")
    simmim.pretrain(**TINY, out=str(tmp_path / "run"), steps=1)
    assert (tmp_path / "run" / "report.html").read_text() == "with labels"


def test_images_are_looked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simmim.pretrain(**TINY, out=str(tmp_path / "run"), steps=1)
    monkeypatch.setattr("simmim.report.page.judge_by_labels", lambda *_: pytest.fail("labels were judged first"))
    with pytest.raises(UserError, match="nosuch does not exist"):
        report(ReportConfig(runs=(str(tmp_path / "run"),), labels="demo", data="nosuch"))


def test_a_report_that_cannot_be_written_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    simmim.pretrain(**TINY, out=str(run), steps=1)
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    simmim.pretrain(**TINY, out=str(run), steps=1)
    assert "warning    no report:" in capsys.readouterr().err


def test_labels_add_floors_and_chance(tmp_path: Path) -> None:
    run = simmim.pretrain(**TINY, out=str(tmp_path / "run"), steps=1)
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "set.npz",
        x_train=rng.integers(0, 256, (20, 32, 32, 3), np.uint8), y_train=np.arange(20) % 2,
        x_test=rng.integers(0, 256, (10, 32, 32, 3), np.uint8), y_test=np.arange(10) % 2,
    )  # fmt: skip
    assert (
        main(["report", str(run.path), "--labels", str(tmp_path / "set.npz"), "--out", str(tmp_path / "r.html")]) == 0
    )
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("k-NN", "linear", "raw pixels", "the untrained encoder", "chance"))
    assert "0.500" in page and "Features not judged" not in page


def test_a_run_is_compared_with_its_starting_weights_and_with_another_run(tmp_path: Path) -> None:
    first = simmim.pretrain(**TINY, out=str(tmp_path / "first"), steps=1)
    second = simmim.pretrain(**TINY, out=str(tmp_path / "second"), steps=2, lr=0.1, init_from=str(first.path))
    rng = np.random.default_rng(0)
    labels = {"y_train": np.arange(40) % 2, "y_test": np.arange(20) % 2}
    images = {f"x_{part}": rng.integers(0, 256, (len(y), 32, 32, 3), np.uint8) // (1 + y.reshape(-1, 1, 1, 1))
              for part, y in (("train", labels["y_train"]), ("test", labels["y_test"]))}  # fmt: skip
    images = {name: values.astype(np.uint8) for name, values in images.items()}
    np.savez(tmp_path / "set.npz", **images, **labels)
    data = str(tmp_path / "set.npz")
    mine, other = judge_by_labels(str(second.path), data), judge_by_labels(str(first.path), data)
    for each, base in zip(mine, other, strict=True):
        np.testing.assert_array_equal(each.floors["the starting weights"].right, base.features.right)
        assert each.against(base) == difference(each.features, base.features)
        assert "the starting weights" not in base.floors
    out = tmp_path / "both.html"
    report(ReportConfig(runs=(str(first.path), str(second.path)), labels=data, out=str(out)))
    page = out.read_text(encoding="utf-8")
    assert "Top-1 accuracy against first" in page and "<th>the starting weights</th>" in page
    shutil.rmtree(first.path)
    missing = judge_by_labels(str(second.path), data)
    assert "the starting weights" not in missing[0].floors
    assert "Starting weights not judged" in titles(Facts.read(second.path), tuple(missing))


def test_runs_whose_encoders_read_other_images_are_not_paired() -> None:
    mine = judged_as(accuracy(0.5, 10), accuracy(0.5, 10))
    assert mine.against(dataclasses.replace(mine, images=np.arange(1, 11))) is None


def test_too_many_runs_for_a_page_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = write_run(tmp_path / "run", falling())
    monkeypatch.setattr("simmim.report.page.section", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="50 runs are too many for a report of 5,000,000 bytes; give 49 at most"):
        report(ReportConfig(runs=(str(facts.run.path),) * 50, out=str(tmp_path / "r.html")))


def test_runs_are_compared_best_first(tmp_path: Path) -> None:
    low = write_run(tmp_path / "low" / "a", [{"loss": 1.0, "knn_top1": 0.2}], seed=1)
    high = write_run(tmp_path / "high" / "a", [{"loss": 2.0, "knn_top1": 0.4}], seed=2)
    assert unique_names([low, high]) == ["low/a", "high/a"]
    out = tmp_path / "both.html"
    report(ReportConfig(runs=(str(low.run.path), str(high.run.path)), out=str(out)))
    page = out.read_text(encoding="utf-8")
    table = page[page.index("Side by side") : page.index("Settings that differ")]
    assert table.index("high/a") < table.index("low/a")
    differing = page[page.index("Settings that differ") : page.index("</section>")]
    assert re.findall(r"<th>(\w+)</th><td", differing) == ["seed"]


def test_runs_of_different_objectives_keep_their_order(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [{"loss": 2.0}])
    other = write_run(tmp_path / "other", [{"loss": 1.0}], objectives=(DescriptorRegression(),))
    out = tmp_path / "both.html"
    page = report(ReportConfig(runs=(str(one.run.path), str(other.run.path)), out=str(out))).read_text(encoding="utf-8")
    table = page[page.index("Side by side") : page.index("Settings that differ")]
    assert table.index(">one<") < table.index(">other<")


def test_damage_is_told_in_one_line_and_ends_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = write_run(tmp_path / "run", falling())
    facts.run.data.write_text('{"train', encoding="utf-8")
    with facts.run.metrics.open("ab") as file:
        file.write(b'\n\xff\xfe{"step')
    facts.run.reconstructions.mkdir()
    (facts.run.reconstructions / "step-1 (copy).png").write_bytes(b"")
    report(ReportConfig(runs=(str(facts.run.path),)))
    facts.run.config.write_text("[[", encoding="utf-8")
    assert main(["report", str(facts.run.path)]) == 2
    assert "cannot be read as a run" in capsys.readouterr().err
    monkeypatch.setattr("simmim.report.page.report", lambda config: 1 / 0)
    simmim.pretrain(**TINY, out=str(tmp_path / "other"), steps=1)
    assert capsys.readouterr().err.splitlines()[-1] == "warning    no report: ZeroDivisionError: division by zero"


def test_names_are_shown_as_text(tmp_path: Path) -> None:
    name = "a\"'<script>alert(1)</script>\n&b"
    facts = write_run(tmp_path / name, falling(), data=f"{tmp_path}/{name}")
    page = report(ReportConfig(runs=(str(facts.run.path),))).read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_a_broken_picture_and_a_half_written_line_are_left_out(tmp_path: Path) -> None:
    facts = write_run(tmp_path / "run", falling())
    with facts.run.metrics.open("a", encoding="utf-8") as file:
        file.write('\n{"step": 101, "lo')
    facts.run.reconstructions.mkdir()
    (facts.run.reconstructions / "step-00000001.png").write_bytes(b"broken")
    assert Facts.read(facts.run.path).steps == 100
    page = report(ReportConfig(runs=(str(facts.run.path),))).read_text(encoding="utf-8")
    assert "data:image" not in page


def test_a_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    rows = [{"loss": 1 / step, "grad_norm": 1.0, "images_per_second": 9.0, "loss/ema": 0.1, "loss/descriptor": 0.2}
            for step in range(1, 20_001)]  # fmt: skip
    facts = write_run(tmp_path / "run", rows, objectives=(EmaTeacher(), DescriptorRegression()))
    assert report(ReportConfig(runs=(str(facts.run.path),))).stat().st_size < 300_000
    assert len(thinned(facts.series["loss"])) <= 400
    assert thinned(facts.series["loss"])[-1][0] == 20_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not a run: it has no config.toml"),
        (["run", "--out", "r.txt"], "--out r.txt is not an .html file; name one"),
        ([], "report names no run; give the --out directory of a training"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", falling())
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        Facts.read(tmp_path)
