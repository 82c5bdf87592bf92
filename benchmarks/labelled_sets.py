"""Five labelled sets of small images (32x32 unless a benchmark asks for more), to judge features by.

    python benchmarks/labelled_sets.py ../shared/data --out DIR

| set | images | classes | what a class is | test images |
| --- | --- | --- | --- | --- |
| fashion | 14,000 + 3,500 | 10 | Fashion-MNIST garment, tinted, on a photograph | unseen garments and photographs |
| emoji | 828 + 208 | 8 | group of the demo's emoji | a fifth of each class |
| stamps | 564 + 211 | 9 | photographic cut-out on a photograph | unseen cut-outs and photographs |
| photo-crops | 6,000 + 1,500 | 60 | the photograph that a crop is from | the other half of each photograph |
| photo-dev | 6,000 + 1,500 | 60 | as photo-crops, of 60 other photographs | the other half of each photograph |

Recipes are chosen on fashion and photo-dev, and proven on the others.

Each is an .npz as `simmim` reads it (x_train, y_train, x_test, y_test, class_names) with three label sets, `few_0` to
`few_2`: indices of the training images that have labels, 100 of each class of fashion, 25 of each class of the others.

The command also draws a contact sheet of each set, one class a row: training images, then test images.

Shapes: `N` images, `K` classes.
"""

import argparse
import csv
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simmim.data.evaluation import eval_images
from simmim.data.labelled.classes import open_labelled
from simmim.method.random_keys import sample_keys

SIDE = 32
LABEL_SETS = (0, 1, 2)
FEW = 25
"""Labels of a class in a label set, but for fashion, which has label sets of 100."""
Arrays = dict[str, NDArray[Any]]


def fashion(data: Path, side: int) -> Arrays:
    """Read photo_fashion32 with its label sets of 100 images a class."""
    assert side == SIDE, "fashion is stored at 32 pixels"
    with np.load(data / "photo_fashion32" / "photo_fashion32.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in ("x_train", "y_train", "x_test", "y_test", "class_names")}
        return arrays | {f"few_{number}": stored[f"few100_seed{number}"] for number in LABEL_SETS}


def emoji(_: Path, side: int) -> Arrays:
    """Shrink the demo's emoji from 64x64, split as `open_labelled` splits them."""
    images = open_labelled("demo", val_fraction=0.2, seed=0)

    def read(source: Any) -> NDArray[np.uint8]:
        return eval_images(source, range(len(source)), size=(side, side), channels=3, dtype=np.uint8)

    return {
        "x_train": read(images.train),
        "y_train": images.train_labels,
        "x_test": read(images.val),
        "y_test": images.val_labels,
        "class_names": np.array(images.classes),
    }


def stamps(data: Path, side: int) -> Arrays:
    """Cut the objects of stamps_detseg out by their boxes; train and test are its own."""
    arrays: Arrays = {}
    for part in ("train", "test"):
        folder = data / "stamps_detseg" / part
        listed = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
        files = {row["id"]: folder / "images" / row["file_name"] for row in listed["images"]}
        names = {row["id"]: row["name"] for row in listed["categories"]}
        ids, objects = sorted(names), listed["annotations"]
        arrays[f"x_{part}"] = np.stack([cut_object(files[row["image_id"]], row["bbox"], side) for row in objects])
        arrays[f"y_{part}"] = np.array([ids.index(row["category_id"]) for row in objects])
        arrays["class_names"] = np.array([names[number] for number in ids])
    return arrays


def cut_object(file: Path, box: list[float], out: int, margin: float = 0.1) -> NDArray[np.uint8]:
    """Cut a square around a box [left, top, width, height], with a margin on each side, from within the image."""
    image = Image.open(file).convert("RGB")
    left, top, width, height = box
    side = min(max(width, height) * (1 + 2 * margin), *image.size)
    x = min(max(left + width / 2 - side / 2, 0), image.width - side)
    y = min(max(top + height / 2 - side / 2, 0), image.height - side)
    return shrink(image, (x, y, x + side, y + side), out)


def photo_crops(data: Path, side: int) -> Arrays:
    """Crop squares of 60 photographs."""
    return crop_photographs(data, side, seed=0)


def photo_dev(data: Path, side: int) -> Arrays:
    """Crop squares of 60 photographs that photo-crops leaves out."""
    taken = crop_photographs(data, side, seed=0, train=1, test=1)["class_names"]
    return crop_photographs(data, side, seed=1, without=set(taken))


def crop_photographs(
    data: Path,
    side: int,
    *,
    seed: int,
    without: Collection[str] = (),
    photographs: int = 60,
    train: int = 100,
    test: int = 25,
) -> Arrays:
    """Crop squares of a quarter of the short side from one half of each photograph to train, from the other to test.

    Halves are split across the long side, with train on either side. Photographs with a flat half are left out.
    """
    rng = np.random.default_rng(seed)
    with (data / "photos" / "manifest.csv").open(encoding="utf-8") as file:
        names = sorted(row["file"] for row in csv.DictReader(file) if Path(row["file"]).stem not in without)
    arrays: dict[str, list[Any]] = {"x_train": [], "y_train": [], "x_test": [], "y_test": [], "class_names": []}
    for name in rng.permutation(names):
        image = Image.open(data / "photos" / name).convert("RGB")
        sides = zip(rng.permutation(2), (train, test), strict=True)
        halves = [crop_half(image, half, count, rng, side) for half, count in sides]
        if min(half.std(axis=(1, 2)).mean() for half in halves) < 16:  # of 255: mostly sky, water or dark
            continue
        for part, half in zip(("train", "test"), halves, strict=True):
            arrays[f"x_{part}"].append(half)
            arrays[f"y_{part}"] += [len(arrays["class_names"])] * len(half)
        arrays["class_names"].append(Path(name).stem)
        if len(arrays["class_names"]) == photographs:
            break
    assert len(arrays["class_names"]) == photographs
    return {name: np.concatenate(rows) if name[0] == "x" else np.array(rows) for name, rows in arrays.items()}


def crop_half(image: Image.Image, half: int, count: int, rng: np.random.Generator, out: int) -> NDArray[np.uint8]:
    """Crop `count` random squares from the first or second half of an image, along its long side: (N, out, out, 3)."""
    side = min(image.size) // 4
    wide = image.width >= image.height
    middle, end = max(image.size) // 2, max(image.size)
    along = rng.integers(*((0, middle - side + 1) if half == 0 else (middle, end - side + 1)), size=count)
    across = rng.integers(0, min(image.size) - side + 1, size=count)
    corners = zip(along, across, strict=True) if wide else zip(across, along, strict=True)
    return np.stack([shrink(image, (x, y, x + side, y + side), out) for x, y in corners])


def shrink(image: Image.Image, box: tuple[float, float, float, float], side: int) -> NDArray[np.uint8]:
    """Resize a box (left, top, right, bottom) of an image to `side` by `side` pixels."""
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))


SETS: dict[str, Callable[[Path, int], Arrays]] = {
    "photo-dev": photo_dev,
    "photo-crops": photo_crops,
    "emoji": emoji,
    "stamps": stamps,
    "fashion": fashion,
}


def choose_few(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Choose the images that `--labels-per-class` and `--label-seed` choose; all of a class that has fewer."""
    order = np.argsort(sample_keys(seed, 0, np.arange(len(labels)), stream="few labels"))
    return np.sort(np.concatenate([order[labels[order] == label][:count] for label in np.unique(labels)]))


def load_set(name: str, data: Path, folder: Path, side: int = SIDE) -> Arrays:
    """Read a set of `side` pixels, with its label sets, from `folder`; build it there first if it is not there."""
    path = folder / f"{name}.npz"
    if not path.exists():
        arrays = SETS[name](data, side)
        for number in LABEL_SETS:
            arrays.setdefault(f"few_{number}", choose_few(arrays["y_train"], FEW, number))
        for number in LABEL_SETS:
            chosen = {part: arrays[part][arrays[f"few_{number}"]] for part in ("x_train", "y_train")}
            write_npz(few_path(name, number, folder), without_label_sets(arrays) | chosen)
        write_npz(path, arrays)
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def few_path(name: str, label_set: int, folder: Path) -> Path:
    """Name the .npz of a label set: its training images, and all test images."""
    return folder / f"{name}_few_{label_set}.npz"


def without_label_sets(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if not name.startswith("few_")}


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write an .npz, whole or not at all, also where another process writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    np.savez(aside, **arrays)  # type: ignore[arg-type]
    aside.replace(path)


def contact_sheet(arrays: Arrays, columns: int = 12) -> Image.Image:
    """Draw the first training images and, after a gap, the first test images of each class, one class a row."""
    rows = []
    for label in range(len(arrays["class_names"])):
        parts = [arrays[f"x_{part}"][arrays[f"y_{part}"] == label][:columns] for part in ("train", "test")]
        padded = [np.pad(part, ((0, columns - len(part)), (0, 2), (0, 2), (0, 0))) for part in parts]
        lines = [np.concatenate(list(part), axis=1) for part in padded]  # (34, columns × 34, 3)
        rows.append(np.concatenate([lines[0], np.full((SIDE + 2, 16, 3), 255, np.uint8), lines[1]], axis=1))
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description="build the labelled sets and draw their contact sheets")
    parser.add_argument("data", type=Path, help="folder with photo_fashion32, stamps_detseg and photos")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for name in SETS:
        arrays = load_set(name, options.data, options.out)
        contact_sheet(arrays).save(options.out / f"{name}.png")
        few = [len(arrays[f"few_{number}"]) for number in LABEL_SETS]
        train, test = (np.bincount(arrays[f"y_{part}"]) for part in ("train", "test"))
        print(f"{name:12} {train.sum()} to train on, {test.sum()} to test, few {few}, {len(train)} classes")
        print(f"{'':12} train {train.min()} to {train.max()} a class, test {test.min()} to {test.max()}")


if __name__ == "__main__":
    main()
