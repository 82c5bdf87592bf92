"""The probes against scikit-learn, and the k-NN check of a pretraining against a probe of the encoder it saved."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

import simmim
from simmim.cli import main
from simmim.data.evaluation import eval_images
from simmim.data.labelled.classes import open_labelled

SETTINGS: dict[str, Any] = {
    "data": "demo",
    "objectives": ["pixels"],
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "image_size": 32,
    "mask_cell": 16,
    "batch_size": 64,
    "steps": 20,
    "drop_path": 0.3,
    "precision": "fp32",
    "device": "cpu",
    "workers": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining of 20 steps, 16 an epoch, with k-NN checks."""
    out = tmp_path_factory.mktemp("probe") / "run"
    return simmim.pretrain(out=str(out), probe="demo", probe_every_epochs=0.5, **SETTINGS).path


def test_the_knn_probe_of_a_run_is_scikit_learns_on_the_features_of_its_timm_module(run: Path):
    images = open_labelled("demo")
    backbone = simmim.load_encoder(run)
    mean, std = (np.array(backbone.pretrained_cfg[name], np.float32) for name in ("mean", "std"))  # type: ignore[index]
    features = []
    for source in (images.train, images.val):
        pixels = eval_images(source, range(len(source)), size=(32, 32), channels=3, dtype=np.uint8)
        normal = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
        with torch.no_grad():
            features.append(backbone(torch.from_numpy(normal)).numpy())
    voters = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = voters.fit(features[0], images.train_labels).predict(features[1])
    figures = simmim.probe(str(run), "demo", precision="fp32", device="cpu")
    assert figures["top1"] == pytest.approx((expected == images.val_labels).mean(), abs=0.01)
    assert figures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(images.val_labels, expected), abs=0.01)
    assert figures["val_images"] == len(images.val)


def checks(path: Path) -> dict[int, dict[str, float]]:
    """The k-NN figures of a run by step."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        record["step"]: {name: value for name, value in record.items() if name.startswith("knn_")}
        for record in records
        if "knn_top1" in record
    }


def test_a_pretraining_logs_the_knn_check_every_so_many_epochs_and_at_the_end(run: Path):
    found = checks(run)
    assert list(found) == [8, 16, 20]
    assert all(set(figures) == {"knn_top1", "knn_balanced_accuracy", "knn_raw_pixels"} for figures in found.values())


def test_the_last_knn_check_is_the_probe_of_the_encoder_that_was_saved(run: Path):
    figures = simmim.probe(str(run / "encoder"), "demo", precision="fp32", device="cpu")
    last = checks(run)[20]
    assert last["knn_top1"] == pytest.approx(figures["top1"], abs=0.005)
    assert last["knn_balanced_accuracy"] == pytest.approx(figures["balanced_accuracy"], abs=0.005)


def test_the_knn_check_changes_nothing_of_the_training(run: Path, tmp_path: Path):
    plain = simmim.pretrain(out=str(tmp_path / "plain"), **SETTINGS).path
    losses = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines() if "lr" in line]
        for path in (run, plain)
    ]
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]


def test_probe_data_that_cannot_be_opened_is_refused_before_the_run_is_made(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^nowhere does not exist; give a folder of classes"):
        simmim.pretrain(out=str(tmp_path / "run"), probe="nowhere", **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_the_command_prints_the_figures_as_json(run: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--method", "linear", "--layer", "0", "--labels-per-class", "5", "--device", "cpu", "--json"]
    assert main(["probe", str(run), "--data", "demo", *words]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["method"] == "linear"
    assert figures["train_images"] == 5 * figures["classes"]
    assert 0 < figures["top1"] < 1


def test_the_command_prints_the_figures_for_a_person(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["probe", str(run), "--data", "demo", "--device", "cpu"]) == 0
    first, raw, untrained, counts = capsys.readouterr().out.splitlines()
    assert first.startswith("k-NN, k = 20: top-1 0.")
    assert raw.startswith("raw pixels: top-1 0.") and untrained.startswith("untrained encoder: top-1 0.")
    assert counts.endswith("judged from 828")


def test_the_figure_of_raw_pixels_is_a_vote_on_the_images_themselves(run: Path) -> None:
    images = open_labelled("demo", seed=0)
    parts = [
        eval_images(source, range(len(source)), size=(32, 32), channels=3, dtype=np.uint8).astype(np.float64)
        for source in (images.train, images.val)
    ]
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    train, val = (((part / 255 - mean) / std).reshape(len(part), -1) for part in parts)
    train, val = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (train, val))
    similar = val @ train.T
    nearest = np.argsort(-similar, axis=1)[:, :20]
    votes = np.zeros((len(val), len(images.classes)))
    for column in range(20):
        here = nearest[:, column]
        weights = np.exp(similar[np.arange(len(val)), here] / 0.07)
        np.add.at(votes, (np.arange(len(val)), images.train_labels[here]), weights)
    expected = (votes.argmax(axis=1) == images.val_labels).mean()
    figures = simmim.probe(str(run), "demo", precision="fp32", device="cpu")
    assert figures["raw_pixels"]["top1"] == pytest.approx(expected, abs=0.005)
    assert checks(run)[20]["knn_raw_pixels"] == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--data", "demo"], "nowhere has no encoder; give the --out directory of a run"),
        (["RUN", "--data", "demo", "--layer", "7"], "layer 7 is not among the encoder's 2 layers; use -2 to 1"),
        (
            ["RUN", "--data", "demo", "--labels-per-class", "2"],
            "20 neighbours are more than the 16 training images; use k of 16 or less",
        ),
        (
            ["RUN", "--data", "demo", "--labels-per-class", "500"],
            "class symbols has 59 images, fewer than --labels-per-class 500; use 59 or less",
        ),
    ],
)
def test_the_command_refuses_in_one_line(run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["probe", *(str(run) if word == "RUN" else word for word in words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"simmim: {message}")
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("shard", [True, False])
def test_the_knn_checks_of_two_processes_are_those_of_one(run: Path, tmp_path: Path, shard: bool):
    words = "--data demo --model vit_tiny_patch16_224 --model-args depth=2 embed_dim=48 num_heads=3 --image-size 32"
    words += " --mask-cell 16 --batch-size 64 --steps 20 --drop-path 0.3 --precision fp32 --device cpu --workers 1"
    words += " --objective pixels" + " --shard" * shard
    words += f" --probe demo --probe-every-epochs 0.5 --out {tmp_path / 'run'}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, "-m", "simmim", "pretrain", *words.split()],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    together, plain = checks(tmp_path / "run"), checks(run)
    assert list(together) == list(plain)
    assert all(abs(together[step]["knn_top1"] - plain[step]["knn_top1"]) < 0.03 for step in plain)
