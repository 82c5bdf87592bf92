"""Does pretraining without labels help where labels are few? Segmentation of cut-outs on photographs, on a CPU.

    python benchmarks/stamps.py segment --stamps DIR --photos DIR --work DIR

`--stamps` holds train/ and test/ as `simmim finetune segment` reads them: 240 and 80 images of 192x192, 9 classes of
cut-outs and the background; other cut-outs and other photographs in test. `--photos` holds a manifest.csv and
photographs, of which those with split "train" are cut into tiles. A small ViT is pretrained on the tiles and the
training images, without labels. From it, and from scratch with the same settings, the task is trained; from scratch
also without layer decay, which is for pretrained layers. Figures are those of the last step, not of the best. Runs
resume.
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

MODEL: dict[str, Any] = {"model": "vit_tiny_patch16_224", "model_args": {"depth": 6}, "image_size": 192}
# The learning rate is for a batch of 512, and is scaled: 1e-3 here.
PRETRAINING: dict[str, Any] = {"epochs": 25.0, "batch_size": 32, "lr": 1.6e-2, "val_images": 8}
TRAINING: dict[str, dict[str, Any]] = {
    "segment": {"epochs": 30.0, "batch_size": 16, "lr": 1.6e-2, "decoder_channels": 64, "eval_every_epochs": 10.0},
}
# Where the encoder comes from, and what is not as in TRAINING. None is the pretraining.
ARMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "pretrained": (None, {"layer_decay": 0.75}),
    "scratch": ("scratch", {"layer_decay": 0.75}),
    "scratch without layer decay": ("scratch", {"layer_decay": 1.0}),
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
    figures: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm, (init, changes) in ARMS.items():
            run = simmim.finetune(
                options.task,
                data=str(options.stamps),
                out=str(options.work / f"{options.task} {arm} {seed}".replace(" ", "-")),
                init=init or str(encoder.path),
                seed=seed,
                **MODEL,
                **TRAINING[options.task],
                **changes,
            )
            found = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
            figures[arm].append({name: value for name, value in found.items() if name != "best"})
            print(arm, seed, figures[arm][-1])
    names = [name for name in figures["pretrained"][0] if name != "step"]
    means = {arm: {name: statistics.mean(row[name] for row in rows) for name in names} for arm, rows in figures.items()}
    found = {
        **results.machine(),
        "command": f"python benchmarks/stamps.py {options.task} --stamps DIR --photos DIR --work DIR",
        "model": MODEL,
        "pretraining": {**PRETRAINING, "images": tiles},
        "training": TRAINING[options.task],
        "trivial": TRIVIAL[options.task](options.stamps / "test"),
        "mean": means,
        "seeds": {arm: dict(zip(options.seeds, rows, strict=True)) for arm, rows in figures.items()},
    }
    results.save(f"stamps_{options.task}", found)


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


def all_background(part: Path) -> dict[str, float]:
    """The figures of a model that calls every pixel background."""
    masks = np.stack([np.asarray(Image.open(path)) for path in sorted((part / "masks").iterdir())])
    share = float((masks == 0).mean())
    return {"miou": share / len(np.unique(masks)), "pixel_accuracy": share}


TRIVIAL: dict[str, Callable[[Path], dict[str, float]]] = {"segment": all_background}


if __name__ == "__main__":
    main()
