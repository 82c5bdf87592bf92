"""Labelled images for probes and classification.

Sources: folders of classes (loose or packed), CSV lists, `.npz` arrays, Hugging Face data sets, demo.

Shapes: `N` images, `K` classes.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.config.frames import FRAMES
from simmim.data.archives import ArchiveImages, open_archives
from simmim.data.files import CLIP_SUFFIXES, SOUND_SUFFIXES, SUFFIXES, PathList, find_images
from simmim.data.hugging_face import HuggingFaceImages, image_column, load_hugging_face
from simmim.data.packed.format import PackedImages, is_packed, open_packed
from simmim.data.sources import ArrayImages, DemoImages, ImageSource, Subset, check_there, read_npz
from simmim.data.video.source import check_frames, clip_numbers, label_frames
from simmim.errors import UserError
from simmim.method.random_keys import sample_keys

Labels = NDArray[np.int64]

CLASSES = "give a folder of classes, loose or in a .zip or .tar, a .csv, an .npz, hf:NAME or demo"
"""What to do where there is no labelled data."""

_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class LabelledImages:
    """Training and evaluation images with class numbers (N,); `classes` (K,) are the names."""

    train: ImageSource
    train_labels: Labels
    val: ImageSource
    val_labels: Labels
    classes: tuple[str, ...]


def open_labelled(
    data: str,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    labels_per_class: int | None = None,
    label_seed: int = 0,
    frames: str = FRAMES,
) -> LabelledImages:
    """Open labelled images.

    `data` is `train/CLASS/*` with `val|test/CLASS/*` or one folder of classes, loose, packed or in a zip or tar, tars
    of WebDataset with `.cls` files (`train-*.tar` and `val-*.tar` or `test-*.tar` where there are both), a CSV of
    `path,label[,split]`, an `.npz` of x_train, y_train, x_test and y_test, a `.parquet`, `hf:NAME_OR_PATH`, or `demo`.

    Without a split, `val_fraction` of each class is held out for evaluation, drawn by `seed`. With `labels_per_class`,
    only this many images of each class are trained on, drawn by `label_seed`. Of clips, `frames` chooses the
    images, and whole clips are held out. Raises `UserError`.
    """
    path = Path(data).expanduser()
    if data == "demo":
        demo = DemoImages()
        names = [demo.name(index).split("/")[0] for index in range(len(demo))]
        found = _split(demo, names, val_fraction, seed)
    elif data.startswith("hf:"):
        found = _open_hugging_face(data.removeprefix("hf:"), val_fraction, seed)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        found = _open_hugging_face(str(path), val_fraction, seed)
    elif path.suffix.lower() == ".npz" and path.is_file():
        found = _open_npz(path)
    elif path.suffix.lower() == ".csv" and path.is_file():
        found = _open_csv(path, val_fraction, seed, frames)
    elif "://" in data or is_packed(path):
        found = _open_named(open_packed(data), data, val_fraction, seed)
    elif archives := open_archives(path):
        found = _open_archives(archives, data, val_fraction, seed)
    elif path.is_dir():
        found = _open_folders(path, val_fraction, seed, frames)
    else:
        check_there(data, CLASSES)
        raise UserError(f"{data} is not labelled data; {CLASSES}")
    check_frames(frames, found.train, data)
    if len(found.classes) < 2:
        raise UserError(f"{data} has {len(found.classes)} class ({', '.join(found.classes)}); give two or more")
    unknown = np.setdiff1d(found.val_labels, found.train_labels)
    if len(unknown):
        raise UserError(
            f"class {found.classes[unknown[0]]} of {data} has images to evaluate on but none to train on; "
            "add some, or remove it"
        )
    return found if labels_per_class is None else _few(found, labels_per_class, label_seed)


def _few(images: LabelledImages, count: int, seed: int) -> LabelledImages:
    labels, classes = images.train_labels, images.classes
    counts = np.bincount(labels, minlength=len(classes))
    if (least := counts.min()) < count:
        name = classes[counts.argmin()]
        raise UserError(f"class {name} has {least} images, fewer than --labels-per-class {count}; use {least} or less")
    order = np.argsort(sample_keys(seed, 0, np.arange(len(labels)), stream="few labels"))
    chosen = [order[labels[order] == label][:count] for label in range(len(classes))]
    indices = np.sort(np.concatenate(chosen))
    return replace(images, train=Subset(images.train, indices), train_labels=labels[indices])


def hold_out(labels: Labels, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose images (N,) to hold out, drawn by `seed`: `fraction` of each class, at least one and never all."""
    order = np.argsort(sample_keys(seed, 0, np.arange(len(labels)), stream="val"))
    held = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return held


def _split(source: ImageSource, names: Sequence[str], val_fraction: float, seed: int) -> LabelledImages:
    classes, labels = number_classes(names)
    # Frames of a clip are alike, so that whole clips are held out.
    first, part = np.unique(clip_numbers(source), return_index=True, return_inverse=True)[1:]
    counts = np.bincount(labels[first])
    if counts.min(initial=2) < 2:
        kind = "image" if len(first) == len(labels) else "clip"
        raise UserError(f"class {classes[counts.argmin()]} has 1 {kind}; give two, to train on and to evaluate on")
    held = hold_out(labels[first], val_fraction, seed)[part]
    train, val = np.flatnonzero(~held), np.flatnonzero(held)
    return LabelledImages(Subset(source, train), labels[train], Subset(source, val), labels[val], classes)


def number_classes(names: Sequence[str]) -> tuple[tuple[str, ...], Labels]:
    """Number class names (N,) in their order: the names (K,), and the number of each image (N,)."""
    classes, labels = np.unique(np.asarray(names, dtype=np.str_), return_inverse=True)
    return tuple(classes.tolist()), labels.astype(np.int64)


def _pair(train: ImageSource, train_names: Sequence[str], val: ImageSource, val_names: Sequence[str]) -> LabelledImages:
    classes, labels = number_classes([*train_names, *val_names])
    return LabelledImages(train, labels[: len(train)], val, labels[len(train) :], classes)


def _open_folders(root: Path, val_fraction: float, seed: int, frames: str) -> LabelledImages:
    train = root / "train"
    if not train.is_dir():
        return _split(*_read_classes(root, frames), val_fraction, seed)
    if val := evaluation_folder(root):
        return _pair(*_read_classes(train, frames), *_read_classes(val, frames))
    return _split(*_read_classes(train, frames), val_fraction, seed)


def evaluation_folder(root: Path) -> Path | None:
    """Return a data set's folder of evaluation images, or `None` without one."""
    return next((root / name for name in ("val", "test") if (root / name).is_dir()), None)


def _read_classes(folder: Path, frames: str) -> tuple[ImageSource, list[str]]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"folder {folder} has no class folders; put each class's images in a folder of its name")
    files, names = [], []
    kinds = (SUFFIXES, SOUND_SUFFIXES, CLIP_SUFFIXES)  # the first of which any class has some
    suffixes = next((kind for kind in kinds if any(find_images(folder / name, kind) for name in classes)), SUFFIXES)
    for name in classes:
        found = find_images(folder / name, suffixes)
        if not found:
            raise UserError(
                f"class folder {folder / name} holds no images; add some, or remove it "
                f"(files read end in {', '.join(sorted(SUFFIXES))})"
            )
        files += [f"{name}/{file}" for file in found]
        names += [name] * len(found)
    return label_frames(PathList(files, root=folder), names, frames)


def _open_named(source: PackedImages | ArchiveImages, data: str, val_fraction: float, seed: int) -> LabelledImages:
    """Split packed images or those of archives by the names within."""
    names = source.names()
    folders = {name.split("/")[0] for name in names}
    if "train" not in folders:
        return _split(*_in_class_folders(source, names, "", data), val_fraction, seed)
    train = _in_class_folders(source, names, "train/", data)
    for part in ("val", "test"):
        if part in folders:
            return _pair(*train, *_in_class_folders(source, names, f"{part}/", data))
    return _split(*train, val_fraction, seed)


def _open_archives(source: ArchiveImages, data: str, val_fraction: float, seed: int) -> LabelledImages:
    """Split the images of archives by WebDataset's `.cls` files and the names of archives, else by the names within."""
    labels = source.labels()
    if labels is None:
        return _open_named(source, data, val_fraction, seed)
    parts = np.array(source.parts())
    train, val = (np.flatnonzero(parts == part) for part in ("train", "val" if "val" in parts else "test"))
    if not len(train) or not len(val):
        return _split(source, labels, val_fraction, seed)
    both = [(Subset(source, chosen), [labels[index] for index in chosen]) for chosen in (train, val)]
    return _pair(*both[0], *both[1])


def _in_class_folders(source: ImageSource, names: Sequence[str], folder: str, data: str) -> tuple[Subset, list[str]]:
    """Return the images in class folders of `folder`, in the order of `_read_classes`, and their classes."""
    found = []
    for index, name in enumerate(names):
        label, slash, file = name.removeprefix(folder).partition("/")
        if slash and name.startswith(folder):
            found.append((label, file, index))
    if not found:
        raise UserError(f"the images of {data} are in no class folders; pack a folder of class folders")
    found.sort()
    return Subset(source, np.array([index for _, _, index in found])), [label for label, _, _ in found]


def read_csv(path: Path) -> list[tuple[str, str, str]]:
    """Read a CSV of path,label[,split]: split (train, val or test), path and label of each row. Raises `UserError`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}); save it as CSV in UTF-8") from None
    if not rows or not {"path", "label"} <= set(rows[0]):
        raise UserError(
            f"{path} has no rows with the columns path and label; write a header path,label or path,label,split"
        )
    found = []
    for number, row in enumerate(rows, 2):
        split = row.get("split") or "train"
        if not row["path"] or not row["label"] or split not in ("train", "val", "test"):
            shown = ",".join(" ".join(str(value).split()) for value in row.values())
            raise UserError(
                f"row {number} of {path} is {shown}; "
                "give a path, a label and, where there is a column split, train, val or test"
            )
        found.append((split, row["path"], row["label"]))
    return found


def _open_csv(path: Path, val_fraction: float, seed: int, frames: str) -> LabelledImages:
    splits: dict[str, tuple[list[str], list[str]]] = {"train": ([], []), "val": ([], []), "test": ([], [])}
    for split, file, name in read_csv(path):
        splits[split][0].append(file)
        splits[split][1].append(name)
    (train, train_names), (val, val_names) = splits["train"], splits["val" if splits["val"][0] else "test"]
    labelled = label_frames(PathList(train, root=path.parent), train_names, frames)
    if not val:
        return _split(*labelled, val_fraction, seed)
    return _pair(*labelled, *label_frames(PathList(val, root=path.parent), val_names, frames))


def _open_npz(path: Path) -> LabelledImages:
    needed = ("x_train", "y_train", "x_test", "y_test")
    arrays = read_npz(path, (*needed, "class_names"))
    for name in needed:
        if name not in arrays:
            raise UserError(f"{path} has no array {name}; it needs {', '.join(needed)}")
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if labels.dtype.kind not in "ui" or labels.shape != images.shape[:1] or labels.min(initial=0) < 0:
            raise UserError(
                f"array y_{part} of {path} is {labels.dtype} {labels.shape}; "
                f"give a class number from 0 on for each of the {len(images)} images of x_{part}"
            )
    highest = max(int(arrays[name].max(initial=0)) for name in ("y_train", "y_test"))
    if highest >= _MOST_CLASSES:
        raise UserError(f"{path} has class number {highest}; number the classes from 0 on, below {_MOST_CLASSES:,}")
    names = arrays.get("class_names", np.arange(highest + 1))
    if names.ndim != 1:
        raise UserError(f"array class_names of {path} has {names.ndim} dimensions; give a name for each class")
    if highest >= len(names):
        raise UserError(f"{path} has class number {highest} and {len(names)} class_names; give each class a name")
    return LabelledImages(
        ArrayImages(arrays["x_train"], "x_train"),
        arrays["y_train"].astype(np.int64),
        ArrayImages(arrays["x_test"], "x_test"),
        arrays["y_test"].astype(np.int64),
        tuple(map(str, names)),
    )


def _open_hugging_face(name: str, val_fraction: float, seed: int) -> LabelledImages:
    loaded = load_hugging_face(name)
    val = next((split for split in ("validation", "val", "test") if split in loaded), None)
    train, train_names = hugging_face_columns(loaded["train" if "train" in loaded else next(iter(loaded))], name)
    if val is None:
        return _split(train, train_names, val_fraction, seed)
    return _pair(train, train_names, *hugging_face_columns(loaded[val], name))


def hugging_face_columns(dataset: Any, name: str) -> tuple[ImageSource, list[str]]:
    """Return the images of a Hugging Face split and their class names. Raises `UserError`."""
    named = [column for column, feature in dataset.features.items() if type(feature).__name__ == "ClassLabel"]
    column = next(iter(named or ("label",)))
    if column not in dataset.features:
        raise UserError(f"data set hf:{name} has no column of labels, only {', '.join(dataset.features)}; give another")
    values = list(dataset[column])
    if any(value is None or value == -1 for value in values):  # -1: the label is withheld
        raise UserError(f"column {column} of hf:{name} has images without label; remove them, or give another set")
    names = [dataset.features[column].int2str(value) for value in values] if named else list(map(str, values))
    return HuggingFaceImages(dataset, image_column(dataset, name)), names
