"""The report of a fine-tuning: its figures are those of metrics.json, and of counts made anew."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import simmim
from simmim.data.labelled.detection import open_detection
from simmim.metrics.boxes import match_boxes
from simmim.metrics.classification import class_rows, confusion_matrix, most_confused
from simmim.report.evaluation import Matrix
from simmim.report.facts import Facts
from simmim.report.page import ReportConfig, report, section
from simmim.torch_engine.tasks.base import find_spec
from simmim.torch_engine.tasks.detect import DetectTask
from simmim.torch_engine.tasks.detect_step import Found
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.finetune import FinetuneSession
from simmim.training.evaluation_record import CLASSES as MOST_CLASSES
from simmim.training.evaluation_record import MATRIX, Worst, confusion_part, thumbnail, write_record
from simmim.training.run_directory import Run

from .conftest import CLASSES

TASKS = ("classify", "segment", "detect")


def read(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / name).read_text(encoding="utf-8"))


def write_page(run: Path, out: Path) -> str:
    return report(ReportConfig(runs=(str(run),), out=str(out))).read_text(encoding="utf-8")


def reported(run: Path) -> Any:
    return section(Facts.read(run), ReportConfig(runs=(str(run),))).evaluation


@pytest.mark.parametrize("task", TASKS)
def test_figures_of_the_page_are_those_of_the_kept_model(tuned: dict[str, Path], task: str) -> None:
    best = read(tuned[task], "metrics.json")["best"]
    page = (tuned[task] / "report.html").read_text(encoding="utf-8")
    table = page[page.index('<table class="figures">') :]
    shown = re.findall(r"<tr><th>[^<]+</th><td>([\d.]+)</td>", table[: table.index("</table>")])
    step = best.pop("step")
    assert f"of step {step}" in page
    assert shown == [f"{value:.4f}" for value in best.values()]


def test_what_a_classifier_confuses_is_counted_from_its_predictions(tuned: dict[str, Path]) -> None:
    run = tuned["classify"]
    with (run.parent / "labels.csv").open(encoding="utf-8") as file:
        truth = {row["path"]: row["label"] for row in csv.DictReader(file) if row["split"] == "test"}
    images = [str(run.parent / name) for name in truth]
    answers = {Path(each["image"]).name: each for each in simmim.predict(run, images)["images"]}
    matrix = np.zeros((3, 3), int)
    for name, label in truth.items():
        matrix[CLASSES.index(label), CLASSES.index(answers[name]["label"])] += 1
    record = read(run, "evaluation.json")
    assert record["confusion"] == {"names": list(CLASSES), "counts": matrix.tolist(), "totals": [10, 10, 10]}
    assert record["wrong"] == 30 - matrix.trace()
    scores = [row["f1"] for row in record["classes"]]
    assert scores == sorted(scores)
    for row in record["classes"]:
        k = CLASSES.index(row["name"])
        assert row["images"] == 10 and row["recall"] == matrix[k, k] / 10
        assert row["f1"] == pytest.approx(2 * matrix[k, k] / (10 + matrix[:, k].sum()))
    wrong = [each for name, each in answers.items() if each["label"] != truth[name]]
    wrong.sort(key=lambda each: -each["probability"])
    assert [each["probability"] for each in record["worst"]] == pytest.approx(
        [each["probability"] for each in wrong][:24]
    )
    assert [each["name"] for each in record["worst"]] == [each["image"] for each in wrong][:24]
    assert all(each["true"] == truth[Path(each["name"]).name] != each["answer"] for each in record["worst"])


def test_what_a_segmenter_confuses_is_counted_from_its_masks(tuned: dict[str, Path]) -> None:
    run = tuned["segment"]
    folder = run.parent / "scenes" / "val"
    predictor, matrix, scores = find_spec("segment").load_predictor(run / "model", "cpu"), np.zeros((3, 3), int), {}
    for file in sorted((folder / "images").iterdir()):
        predicted = predictor.predict([np.asarray(Image.open(file))])[0]["mask"]
        true = np.asarray(Image.open(folder / "masks" / file.name))
        for a in range(3):
            for b in range(3):
                matrix[a, b] += ((true == a) & (predicted == b)).sum()
        there = [(true == k, (predicted == k) & (true != 255)) for k in range(3)]
        scores[str(file)] = np.mean([(a & b).sum() / (a | b).sum() for a, b in there if (a | b).any()])
    record = read(run, "evaluation.json")
    assert record["confusion"]["counts"] == matrix.tolist()
    either = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    ious = dict(zip(record["confusion"]["names"], matrix.diagonal() / either, strict=True))
    assert {row["name"]: row["iou"] for row in record["classes"]} == pytest.approx(ious)
    assert record["figures"]["miou"] == pytest.approx(np.mean(list(ious.values())))
    assert [each["iou"] for each in record["worst"]] == pytest.approx(sorted(scores.values()))
    assert {each["name"]: each["iou"] for each in record["worst"]} == pytest.approx(scores)


def test_a_detectors_curves_and_mistakes_are_those_of_what_it_found(tuned: dict[str, Path], tmp_path: Path) -> None:
    """In six images of two objects, from 0 on: both found; then one of the other class, one missed, one twice …"""
    config: Any = Facts.read(tuned["detect"]).config
    data = open_detection(config.data)
    random, found = np.random.default_rng(0), {}
    for index, objects in enumerate(data.val.objects):
        boxes, labels = objects.boxes + random.uniform(-2, 2, (2, 4)), objects.labels.copy()
        if index == 1:
            labels[0] = 1 - labels[0]
        if index == 2:
            boxes, labels = boxes[:1], labels[:1]
        if index >= 3:
            boxes, labels = np.concatenate([boxes, boxes[:1]]), np.append(labels, labels[0])
        scores = np.sort(random.uniform(0.35 if index != 5 else 0.0, 1 if index != 5 else 0.25, len(boxes)))[::-1]
        found[index] = Found(boxes, labels, scores, None)
    task = DetectTask(config, data, None)
    figures = task.conclude([found], tmp_path)
    record, table = json.loads(Run(tmp_path).latest_evaluation.read_text()), read(tmp_path, "per_class.json")
    assert record["figures"] == figures and 0.2 < figures["map50"] < 1
    assert np.mean(record["curve"]) == pytest.approx(figures["map50"], abs=1e-3)
    for row in record["classes"]:
        assert len(row["curve"]) == 101 and row["objects"] == 6
        assert np.mean(row["curve"]) == pytest.approx(row["map50"], abs=1e-3)
        assert {name: row[name] for name in ("map", "map50")} == table[row["name"]]
    counts = {Path(each["name"]).stem: [each[f"{kind}_count"] for kind in ("missed", "wrong", "right")]
              for each in record["worst"]}  # fmt: skip
    assert counts == {"1": [1, 1, 1], "5": [2, 0, 0], "2": [1, 0, 1], "3": [0, 1, 2], "4": [0, 1, 2]}
    assert list(counts) == ["1", "5", "2", "3", "4"] and record["wrong"] == 5
    first = record["worst"][0]
    zoom = first["width"] / 56
    missed = next(mark for mark in first["boxes"] if mark["kind"] == "missed")
    assert missed["box"] == pytest.approx(zoom * data.val.objects[1].boxes[0], abs=0.06) and missed["score"] is None


def test_boxes_are_matched_as_by_hand() -> None:
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30]], float)
    found = np.array([[0, 0, 10, 9], [1, 0, 10, 10], [20, 0, 30, 10], [0, 25, 10, 35]], float)
    labels, true_labels = np.array([0, 0, 1, 2]), np.array([0, 0, 2])
    # The second has a free object of its class only far away, the third another class, the fourth an overlap of 1/3.
    right, seen = match_boxes(found, labels, truth, true_labels)
    assert right.tolist() == [True, False, False, False] and seen.tolist() == [True, False, False]
    right, seen = match_boxes(found[:0], labels[:0], truth, true_labels)
    assert right.shape == (0,) and not seen.any()
    assert match_boxes(found, labels, truth[:0], true_labels[:0])[0].tolist() == [False] * 4


def test_the_commonest_mistakes_come_first() -> None:
    matrix = np.array([[90, 10, 0], [0, 1, 3], [0, 0, 0]])
    assert most_confused(matrix, 5) == [(0, 1), (1, 2)]
    assert most_confused(matrix, 5, by_share=True) == [(1, 2), (0, 1)]
    assert most_confused(matrix, 1) == [(0, 1)]


def test_the_worst_images_are_kept_in_order() -> None:
    worst = Worst(2)
    for index, (name, badness) in enumerate((("a", 1), ("b", 3), ("c", 2), ("d", 3), ("e", 1))):
        worst.offer(badness, index, lambda name=name: {"name": name})
    assert [each["name"] for each in worst.images] == ["b", "d"]
    other = Worst(2)
    other.offer(3, 0, lambda: {"name": "of another process"})
    worst.add(other)
    assert [each["name"] for each in worst.images] == ["of another process", "b"]


def test_the_record_is_of_the_model_that_is_kept(tmp_path: Path) -> None:
    class Falling:
        best_figure, scores = "top1", iter((0.5, 0.7, 0.6))

        data = SimpleNamespace(val=[])

        def judge(self, step: Any, indices: Any, out: Path) -> None:
            return None

        def conclude(self, parts: Any, out: Path) -> dict[str, float]:
            figures = {"top1": next(self.scores)}
            row = {"f1": 0.5}
            write_record(out, figures=figures, images=1, names="a", rows=[row], judged_by="f1", worst=Worst(1))
            return figures

        def save(self, step: Any, directory: Path) -> None:
            directory.mkdir(exist_ok=True)

    session: Any = object.__new__(FinetuneSession)
    session.task, session.step, session.run = Falling(), torch.nn.Identity(), Run(tmp_path)
    session.world = World(device=torch.device("cpu"))
    session.plan = SimpleNamespace(config=SimpleNamespace(task="classify"))
    for done in (1, 2, 3):
        session._evaluate(done)
    assert read(tmp_path, "evaluation.json")["figures"] == {"top1": 0.7}
    assert read(tmp_path, "metrics.json")["best"] == {"step": 2, "top1": 0.7}
    assert not session.run.latest_evaluation.exists()


def test_many_classes_and_images_make_no_large_file_and_page(tuned: dict[str, Path], tmp_path: Path) -> None:
    random, K = np.random.default_rng(0), 1200
    labels, answers = random.integers(0, K, (2, 100_000))
    answers[::2] = labels[::2]
    matrix = confusion_matrix(labels, answers, K)
    names, worst = ["name" * 100 + f" {number}" for number in range(K)], Worst(24)
    for number in range(30):
        picture = thumbnail(random.integers(0, 256, (400, 300, 3), np.uint8), 160)
        worst.offer(1 / (1 + number), number, lambda n=number, p=picture: {"name": f"{n}.jpg", "true": "a"} | {
            "answer": "b", "probability": 0.9, "true_probability": 0.1} | p)  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(tuned["classify"], run, ignore=shutil.ignore_patterns("checkpoints", "model"))
    figures = read(run, "evaluation.json")["figures"]
    rows = class_rows(matrix, "images")
    write_record(run, figures=figures, images=100_000, names=names, rows=rows, judged_by="f1", worst=worst,
                 wrong=int((labels != answers).sum()), **confusion_part(matrix, names))  # fmt: skip
    Run(run).latest_evaluation.replace(Run(run).evaluation)
    assert Run(run).evaluation.stat().st_size < 1_000_000
    page = write_page(run, tmp_path / "page.html")
    assert len(page) < 2_000_000 and page.count("<tr><th>…") == MOST_CLASSES
    record = read(run, "evaluation.json")
    kept = [int(name.split()[1]) for name in record["confusion"]["names"]]
    assert len(record["confusion"]["counts"]) == MATRIX and "Of 1,200 classes, the 100 with the most mistakes" in page
    assert record["confusion"]["counts"] == matrix[np.ix_(kept, kept)].tolist()


@pytest.mark.parametrize("classes", [2, 10, 30, 100])
def test_a_matrix_is_as_large_as_its_labels_and_squares(classes: int) -> None:
    counts = (np.eye(classes, dtype=int) * 5 + 1).tolist()
    matrix = Matrix([f"class {number}" for number in range(classes)], counts, [classes + 5] * classes, "images")
    assert 9 <= matrix.cell <= 40 and matrix.side <= 1100
    places = [float(x) for _, _, path in matrix.paths for x in re.findall(r"M(\d+) ", path)]
    assert len(places) == classes**2
    assert min(places) == matrix.margin and max(places) + matrix.cell < matrix.side
    assert len(matrix.texts) == (classes**2 if classes <= 30 else 0)


def test_a_run_without_a_record_says_so_in_one_line(tuned: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned["segment"], run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "evaluation.json").write_text('{"figures"', encoding="utf-8")
    assert reported(run).startswith("evaluation.json is damaged")
    (run / "evaluation.json").unlink()
    assert reported(run).startswith("evaluation.json is missing, which older versions of simmim did not write.")
    assert "train again by the command below" in write_page(run, tmp_path / "page.html")
    (run / "metrics.json").unlink()
    assert reported(run).startswith("Not evaluated yet")


def test_a_record_of_another_evaluation_names_no_step(tuned: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"  # of a training that was killed between its files
    shutil.copytree(tuned["detect"], run, ignore=shutil.ignore_patterns("checkpoints"))
    figures = read(run, "metrics.json")
    figures["best"]["map50"] += 0.1
    (run / "metrics.json").write_text(json.dumps(figures), encoding="utf-8")
    assert reported(run).step is None


def test_names_are_shown_as_text(tuned: dict[str, Path]) -> None:
    for task in TASKS:
        page = (tuned[task] / "report.html").read_text(encoding="utf-8")
        assert "<script>alert" not in page and "<i>" not in page and "<u>" not in page
        assert all('alt="' in image for image in re.findall(r"<img [^>]+>", page))
    assert "&lt;script&gt;alert(1)" in (tuned["classify"] / "report.html").read_text(encoding="utf-8")


def test_classifiers_are_compared_by_their_kept_models_and_classes(tuned: dict[str, Path], tmp_path: Path) -> None:
    worse = tmp_path / "worse"
    shutil.copytree(tuned["classify"], worse, ignore=shutil.ignore_patterns("checkpoints"))
    figures, record = read(worse, "metrics.json"), read(worse, "evaluation.json")
    figures["best"]["top1"] = 0.01
    for row in record["classes"]:
        row["f1"] = 0.0125 if row["name"] == "c" else None
    (worse / "metrics.json").write_text(json.dumps(figures), encoding="utf-8")
    (worse / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")
    out = tmp_path / "both.html"
    report(ReportConfig(runs=(str(worse), str(tuned["classify"])), out=str(out)))
    page = out.read_text(encoding="utf-8")
    table = page[page.index("Side by side") : page.index("Classes, the worst first")]
    assert table.index(">classify<") < table.index(">worse<") and "0.0100" in table
    classes = page[page.index("Classes, the worst first") : page.index("Settings that differ")]
    assert classes.index("<th>c</th>") < classes.index("<th>b &amp;") and "0.0125" in classes
