"""Does pretraining without labels help where labels are few? Cut-outs on photographs, segmented or found, on a CPU.

    python benchmarks/stamps.py segment --stamps DIR --photos DIR --work DIR
    python benchmarks/stamps.py detect --stamps DIR --photos DIR --work DIR

`--stamps` holds train/ and test/ as `simmim finetune segment` and `detect` read them: 240 and 80 images of 192x192,
cut-outs of 9 classes on photographs; other cut-outs and other photographs in test. `--photos` holds a manifest.csv and
photographs, of which those with split "train" are cut into tiles. A small encoder is pretrained on the tiles and the
training images, without labels: once for both tasks. From it, and from scratch with the same settings, each task is
trained. Figures are those of the last step, not of the best. Runs resume, and the figures are saved as they come.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import results
from PIL import Image

import simmim
from simmim.data.labelled.detection import open_detection
from simmim.metrics.coco import average_precision

MODEL: dict[str, Any] = {
    "model": "resnet18",
    "model_args": {"channels": [32, 64, 128, 256]},
    "image_size": 128,
}
# Learning rates are for a batch of 512, and are scaled: 1e-3 in both tasks, 2e-3 in pretraining.
PRETRAINING: dict[str, Any] = {
    "target": "hog",
    "loss": "mse",
    "mask_ratio": 0.5,
    "mask_cell": 16,
    "epochs": 60.0,
    "warmup_epochs": 10.0,
    "batch_size": 32,
    "lr": 0.032,
    "betas": (0.9, 0.95),
    "val_images": 8,
}
TRAINING: dict[str, dict[str, Any]] = {
    "segment": {
        "epochs": 30.0,
        "batch_size": 16,
        "lr": 0.032,
        "warmup_epochs": 2.0,
        "dice": 1.0,
        "decoder_channels": 64,
        "eval_every_epochs": 15.0,
    },
    "detect": {
        "epochs": 54.0,
        "batch_size": 8,
        "lr": 0.064,
        "warmup_epochs": 2.0,
        "weight_decay": 0.1,
        "drop_path": 0.0,
        "detector": "fcos",
        "pyramid_channels": 64,
        "scale_jitter": (0.7, 1.5),
        "eval_every_epochs": 9.0,
    },
}
TILE = 224


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=TRAINING)
    for folder in ("stamps", "photos", "work"):
        parser.add_argument(f"--{folder}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    images = options.work / "unlabelled"
    tiles = cut_tiles(options.photos, images) + link_images(options.stamps / "train" / "images", images)
    encoder = simmim.pretrain(data=str(images), out=str(options.work / "pretrained"), **MODEL, **PRETRAINING)
    found: dict[str, dict[int, dict[str, Any]]] = {"pretrained": {}, "scratch": {}}
    about = {
        **results.machine(),
        "command": f"python benchmarks/stamps.py {options.task} --stamps DIR --photos DIR --work DIR",
        "model": MODEL,
        "pretraining": {**PRETRAINING, "images": tiles},
        "training": TRAINING[options.task],
        "trivial": TRIVIAL[options.task](options.stamps),
    }
    for seed in options.seeds:
        for arm, rows in found.items():
            run = simmim.finetune(
                options.task,
                data=str(options.stamps),
                out=str(options.work / f"{options.task}-{arm}-{seed}"),
                init="scratch" if arm == "scratch" else str(encoder.path),
                seed=seed,
                **MODEL,
                **TRAINING[options.task],
            )
            figures = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
            rows[seed] = {name: value for name, value in figures.items() if name != "best"}
            print(arm, seed, rows[seed])
            results.save(f"stamps_{options.task}", {**about, "mean": means(found), "seeds": found})


def means(found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Each arm's figures, averaged over its seeds."""
    return {
        arm: {name: statistics.mean(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
        for arm, rows in found.items()
        if rows
    }


def cut_tiles(photos: Path, out: Path) -> int:
    """Squares of the photographs to train on, which touch and cover all but the borders; returns how many."""
    out.mkdir(parents=True, exist_ok=True)
    with (photos / "manifest.csv").open(encoding="utf-8") as file:
        names = [row["file"] for row in csv.DictReader(file) if row["split"] == "train"]
    count = 0
    for name in names:
        picture = Image.open(photos / name).convert("RGB")
        for top in range(0, picture.height - TILE + 1, TILE):
            for left in range(0, picture.width - TILE + 1, TILE):
                path = out / f"{Path(name).stem}-{top}-{left}.png"
                if not path.exists():
                    picture.crop((left, top, left + TILE, top + TILE)).save(path)
                count += 1
    return count


def link_images(images: Path, out: Path) -> int:
    for path in images.iterdir():
        if not (out / path.name).exists():
            (out / path.name).symlink_to(path.resolve())
    return len(list(images.iterdir()))


def all_background(stamps: Path) -> dict[str, float]:
    """The figures of a model that calls every pixel background."""
    masks = np.stack([np.asarray(Image.open(path)) for path in sorted((stamps / "test" / "masks").iterdir())])
    share = float((masks == 0).mean())
    return {"miou": share / len(np.unique(masks)), "pixel_accuracy": share}


def mean_boxes(stamps: Path) -> dict[str, float]:
    """The figures of a model that finds in every image one object of each class, where it is on average in training.

    Their scores are how often the class is there in training.
    """
    data = open_detection(str(stamps))
    objects = data.train.objects
    boxes, labels = np.concatenate([each.boxes for each in objects]), np.concatenate([each.labels for each in objects])
    found = []
    for label in range(len(data.classes)):
        left, top, right, bottom = boxes[labels == label].mean(axis=0).tolist()
        row = {"category_id": label + 1, "bbox": [left, top, right - left, bottom - top]}
        row["score"] = float((labels == label).mean())
        found += [{"image_id": number + 1, **row} for number in range(len(data.val))]
    return average_precision(data.truth, found)[0]


TRIVIAL: dict[str, Callable[[Path], dict[str, float]]] = {"segment": all_background, "detect": mean_boxes}


if __name__ == "__main__":
    main()
