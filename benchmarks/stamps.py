"""Does pretraining without labels help segmentation and detection where labels are few? Cut-outs on photographs.

    python benchmarks/stamps.py segment --stamps DIR --photos DIR --work DIR
    python benchmarks/stamps.py detect --stamps DIR --photos DIR --work DIR

`--stamps` holds train/ and test/ as `simmim finetune segment` and `detect` read them: 240 and 80 images of 192x192,
cut-outs of 9 classes on photographs; other cut-outs and other photographs in test. `--photos` holds a manifest.csv and
photographs, of which those with split "train" are cut into tiles. A small encoder is pretrained on the tiles and the
training images, without labels: once for both tasks. From it, and from scratch with the same settings, each task is
trained. From scratch it has the best of three rates, chosen on the test images of the first seed, in its favour, and a
row with three times the steps. The pretrained one has one rate, `--rate`. `--pretraining-steps` is for longer ones.
With `--pasted-steps` the whole model is pretrained after its encoder, on what `simmim paste` makes of the same images.
`--encoder vit` is a ViT 128 × 6 of patch 8 in place of a ResNet-18 of half width.

The settings of pretraining were chosen on other images (garments.py; results/stamps_search.md). Figures are those of
the last step, not of the best. Runs resume, and the figures are saved as they come.
"""

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import results
from PIL import Image

import simmim
from simmim.commands.paste import PasteConfig, paste
from simmim.data.labelled.detection import open_detection
from simmim.metrics.coco import average_precision

MODELS: dict[str, dict[str, Any]] = {
    "resnet": {"model": "resnet18", "model_args": {"channels": [32, 64, 128, 256]}},
    "vit": {
        "model": "vit_tiny_patch16_224",
        "model_args": {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    },
}
# Crops of the size of the objects, at half the resolution: what a cell of the feature map sees in a task.
PRETRAINING: dict[str, Any] = {
    "image_size": 64,
    "objectives": [{"kind": "descriptor", "see": "whole"}],
    "crop_scale": (0.05, 0.5),
    "batch_size": 32,
    "steps": 1500,
    "clip_grad": 3.0,
    "val_images": 0,
}
OF_ENCODER: dict[str, dict[str, Any]] = {
    "resnet": {},
    "vit": {
        "objectives": [{"kind": "descriptor"}],
        "mask": {"kind": "random", "cell": 8, "ratio": 0.5},
        "encode": "visible",
        "positions": "sincos",
    },
}
"""What an encoder's pretraining has else."""
TRAINING: dict[str, dict[str, Any]] = {
    "segment": {"steps": 300, "batch_size": 16, "dice": 1.0, "decoder_channels": 64},
    "detect": {
        "steps": 540,
        "batch_size": 8,
        "weight_decay": 0.1,
        "drop_path": 0.0,
        "detector": "fcos",
        "pyramid_channels": 64,
        "scale_jitter": (0.7, 1.5),
    },
}
COMMON: dict[str, Any] = {"image_size": 128, "warmup_epochs": 2.0, "eval_every_epochs": 1e4}  # evaluated at the end
RATE = 1e-3
SCRATCH_RATES = (1e-3, 2e-3, 4e-3)
LONGER = 3
SEEDS = (0, 1, 2)
FIGURE = {"segment": "miou", "detect": "map50"}
TILE = 224


Figures = dict[str, dict[int, dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=TRAINING)
    for folder in ("stamps", "photos", "work"):
        parser.add_argument(f"--{folder}", type=Path, required=True)
    parser.add_argument("--encoder", choices=MODELS, default="resnet")
    parser.add_argument("--pretraining-steps", type=int, default=PRETRAINING["steps"])
    parser.add_argument("--pasted-steps", type=int, default=0, help="steps on pasted pieces (default: none)")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate of the pretrained arm")
    options = parser.parse_args()
    task, steps = options.task, TRAINING[options.task]["steps"]
    images = options.work / "unlabelled"
    tiles = cut_tiles(options.photos, images) + link_images(options.stamps / "train" / "images", images)
    began = time.process_time()
    model = MODELS[options.encoder]
    pretraining = {**PRETRAINING, **OF_ENCODER[options.encoder], "steps": options.pretraining_steps}
    encoder = simmim.pretrain(data=str(images), out=str(options.work / "pretrained"), **model, **pretraining)
    about: dict[str, Any] = {
        **results.machine(),
        "command": f"python benchmarks/stamps.py {task} --stamps DIR --photos DIR --work DIR --rate {options.rate:g} "
        f"--pretraining-steps {options.pretraining_steps} --pasted-steps {options.pasted_steps}",
        "encoder": options.encoder,
        "model": model,
        "pretraining": {**pretraining, "images": tiles, "processor_seconds": round(time.process_time() - began)},
        "training": {**COMMON, **TRAINING[task]},
        "trivial": TRIVIAL[task](options.stamps),
    }
    file = f"stamps_{task}" if options.encoder == "resnet" else f"stamps_{task}_{options.encoder}"
    start = encoder.path
    if options.pasted_steps:
        file += "_pasted"
        began = time.process_time()
        paste(PasteConfig(images=str(images), run=str(encoder.path), out=str(options.work / "pasted")))
        whole = {**model, **COMMON, **TRAINING[task], "steps": options.pasted_steps}
        whole["lr"] = RATE * 512 / whole["batch_size"]
        out = options.work / f"{task}-on-pieces"
        start = simmim.finetune(task, data=str(options.work / "pasted"), out=str(out), init=str(start), **whole).path
        about["pasted"] = {"steps": options.pasted_steps, "processor_seconds": round(time.process_time() - began)}
    found: Figures = {}

    def train(arm: str, seed: int, init: str, rate: float, steps: int) -> float:
        settings = {**model, **COMMON, **TRAINING[task], "steps": steps}
        settings["lr"] = rate * 512 / settings["batch_size"]  # rates are for a batch of 512, and are scaled
        out = options.work / f"{task}-{arm}-{seed}".replace(" ", "-")
        began = time.process_time()
        run = simmim.finetune(task, data=str(options.stamps), out=str(out), init=init, seed=seed, **settings)
        figures = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
        row: dict[str, float] = {name: value for name, value in figures.items() if name != "best"}
        found.setdefault(arm, {})[seed] = row | {"processor_seconds": round(time.process_time() - began)}
        print(arm, seed, row, flush=True)
        results.save(file, {**about, "mean": means(found), "seeds": found}, quiet=True)
        return row[FIGURE[task]]

    for seed in SEEDS:
        train("pretrained", seed, str(start), options.rate, steps)
    reached = {rate: train(f"scratch {rate:g}", SEEDS[0], "scratch", rate, steps) for rate in SCRATCH_RATES}
    best = max(reached, key=lambda rate: reached[rate])
    for seed in SEEDS[1:]:
        train(f"scratch {best:g}", seed, "scratch", best, steps)
    for seed in SEEDS:
        train(f"scratch {best:g}, {LONGER} times the steps", seed, "scratch", best, LONGER * steps)


def means(found: Figures) -> dict[str, dict[str, float]]:
    """Each arm's figures, averaged over its seeds."""
    return {
        arm: {name: statistics.mean(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
        for arm, rows in found.items()
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
