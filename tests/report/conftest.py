"""A tiny fine-tuning of each task, for the tests of their reports."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import simmim

CLASSES = ("<script>alert(1)</script>", "b & 'b'", "c")
COLOURS = np.array([(30, 30, 30), (220, 60, 60), (60, 60, 220)], np.uint8)
SETTINGS: dict[str, Any] = {
    "init": "scratch",
    "model": "resnet18",
    "model_args": {"channels": [8, 16, 32, 64]},
    "batch_size": 4,
    "epochs": 2,
    "lr": 3.0,  # learns little, but answers vary
    "eval_every_epochs": 2,
    "warmup_epochs": 0,
    "device": "cpu",
    "precision": "fp32",
    "workers": 1,
}


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by task; the images of each are in the folder `data` beside it."""
    root = tmp_path_factory.mktemp("tuned")
    more: dict[str, dict[str, Any]] = {
        "classify": {"data": str(write_labelled(root)), "image_size": 32},
        "segment": {"data": str(write_scenes(root / "scenes")), "image_size": 32, "decoder_channels": 16, "epochs": 4},
        "detect": {"data": str(root / "scenes"), "image_size": 64, "pyramid_channels": 32, "detector": "fcos"},
    }
    return {
        task: simmim.finetune(task, out=str(root / task), **SETTINGS | settings).path for task, settings in more.items()
    }


def write_labelled(root: Path) -> Path:
    """Write images of noise and a table of their classes: 12 to train on, 30 to evaluate on."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(42):
        name = f"<u>{number}.png"
        Image.fromarray(random.integers(0, 256, (32, 40, 3), np.uint8)).save(root / name)
        rows.append((name, CLASSES[number % 3], "train" if number < 12 else "test"))
    with (root / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return root / "labels.csv"


def write_scenes(root: Path) -> Path:
    """Write eight images to train on and six to evaluate on, 40x56 pixels, with squares: masks and boxes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 6)):
        images, annotations = [], []
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((40, 56), np.uint8)
            for label in (1, 2):
                top, left = (int(random.integers(0, limit)) for limit in (20, 36))
                mask[top : top + 16, left : left + 18] = label
                box = {"bbox": [left, top, 18, 16], "area": 288, "iscrowd": 0}
                annotations.append({"id": len(annotations), "image_id": number, "category_id": label, **box})
            Image.fromarray(COLOURS[mask]).save(root / part / "images" / f"{number}.png")
            mask[:3] = 255
            Image.fromarray(mask).save(root / part / "masks" / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 56})
        categories = [{"id": 1, "name": "red <i>"}, {"id": 2, "name": "blue"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / part / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    (root / "classes.txt").write_text("ground\nred <i>\nblue", encoding="utf-8")
    return root
