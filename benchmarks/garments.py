"""Make a set like the stamps to choose settings on: garments on photographs, with boxes and masks.

    python benchmarks/garments.py --fashion photo_fashion32.npz --photos DIR --out DIR

240 training and 80 test images of 192x192, each with 1 to 4 garments of 10 classes (Fashion-MNIST, cut out by their
silhouettes, 36 to 89 pixels a side, mirrored by chance) on a crop of a photograph. Other garments and other
photographs in test. `--out` is what `simmim finetune segment` and `detect` read.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 192
COUNTS = {"train": 240, "test": 80}
OBJECTS = (1, 4)
SIZES = (36, 89)
LEAST = 300  # pixels of an object that stay visible


def main() -> None:
    parser = argparse.ArgumentParser()
    for path in ("fashion", "photos", "out"):
        parser.add_argument(f"--{path}", type=Path, required=True)
    options = parser.parse_args()
    fashion = np.load(options.fashion)
    names = [str(name) for name in fashion["class_names"]]
    with (options.photos / "manifest.csv").open(encoding="utf-8") as file:
        photos = [(row["split"], row["file"]) for row in csv.DictReader(file)]
    for seed, (split, count) in enumerate(COUNTS.items()):
        draw = np.random.default_rng(seed)
        grounds = [options.photos / name for part, name in photos if part == split]
        masks = np.unpackbits(fashion[f"mask_{split}"], 1).reshape(-1, 32, 32)
        folder = options.out / split
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        }
        for number in range(1, count + 1):
            picture, classes, boxes = compose(draw, grounds, fashion[f"x_{split}"], masks, fashion[f"y_{split}"])
            name = f"{number:03d}"
            picture.save(folder / "images" / f"{name}.jpg", quality=92)
            Image.fromarray(classes).save(folder / "masks" / f"{name}.png")
            rows["images"].append({"id": number, "file_name": f"{name}.jpg", "width": SIDE, "height": SIDE})
            for label, (left, top, width, height) in boxes:
                box = {"bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
                place = {"id": len(rows["annotations"]) + 1, "image_id": number, "category_id": label}
                rows["annotations"].append(place | box)
        (folder / "annotations.json").write_text(json.dumps(rows), encoding="utf-8")
    (options.out / "classes.txt").write_text("\n".join(["background", *names]) + "\n", encoding="utf-8")


def compose(
    draw: np.random.Generator, grounds: list[Path], garments: np.ndarray, masks: np.ndarray, labels: np.ndarray
) -> tuple[Image.Image, np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """Return an image, its classes (192, 192) and the class and box (left, top, width, height) of each garment."""
    ground = Image.open(grounds[draw.integers(len(grounds))]).convert("RGB")
    side = int(draw.integers(SIDE, min(ground.size) + 1)) if min(ground.size) > SIDE else min(ground.size)
    left, top = (int(draw.integers(length - side + 1)) for length in ground.size)
    picture = ground.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    owner = np.zeros((SIDE, SIDE), np.uint8)  # number of the garment on top
    classes: list[int] = []
    for number in range(1, int(draw.integers(OBJECTS[0], OBJECTS[1] + 1)) + 1):
        index, size = int(draw.integers(len(garments))), int(draw.integers(SIZES[0], SIZES[1] + 1))
        x, y = (int(draw.integers(SIDE - size + 1)) for _ in range(2))
        garment, mask = Image.fromarray(garments[index]), Image.fromarray(masks[index] * 255)
        if draw.integers(2):
            garment, mask = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (garment, mask))
        garment, mask = (part.resize((size, size), Image.Resampling.BICUBIC) for part in (garment, mask))
        picture.paste(garment, (x, y), mask)
        owner[y : y + size, x : x + size][np.asarray(mask) > 127] = number
        classes.append(int(labels[index]) + 1)
    found = np.zeros_like(owner)
    boxes: list[tuple[int, tuple[int, int, int, int]]] = []
    for number, label in enumerate(classes, start=1):
        rows, columns = np.nonzero(owner == number)
        found[owner == number] = label
        if len(rows) >= LEAST:
            low, high = (int(rows.min()), int(columns.min())), (int(rows.max()), int(columns.max()))
            boxes.append((label, (low[1], low[0], high[1] - low[1] + 1, high[0] - low[0] + 1)))
    return picture, found, boxes


if __name__ == "__main__":
    main()
