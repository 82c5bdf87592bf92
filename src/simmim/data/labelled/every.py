"""All images of a set with the label of each, in the order of `open_source`; nothing is held out.

Shapes: `N` images, `K` classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simmim.config.frames import FRAMES
from simmim.data.archives import ArchiveImages
from simmim.data.files import PathList
from simmim.data.hugging_face import find_split
from simmim.data.labelled.classes import hugging_face_columns, number_classes, read_csv
from simmim.data.packed.format import is_packed
from simmim.data.sources import ImageSource, open_source, read_npz
from simmim.data.video.source import label_frames
from simmim.errors import UserError

_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class ClassLabels:
    """The class of each image (N,), as a number of `classes` (K,)."""

    classes: tuple[str, ...]
    numbers: NDArray[np.int64]

    def names(self, indices: NDArray[np.integer]) -> list[str]:
        """Return the class names of some images."""
        return [self.classes[number] for number in self.numbers[indices].tolist()]


def open_with_labels(data: str, frames: str = FRAMES) -> tuple[ImageSource, ClassLabels]:
    """Open the images that `open_source` opens, or those of a .csv of path,label, and the label of each.

    A label is a folder's name (below train, val or test, where there are such), WebDataset's `.cls`, a row's `label`,
    an array's `y_train` or `labels`, or a Hugging Face column. Raises `UserError` where an image has none.
    """
    path = Path(data).expanduser()
    if path.suffix.lower() == ".csv" and path.is_file():
        rows = read_csv(path)
        files = PathList([file for _, file, _ in rows], root=path.parent)
        source, labels = label_frames(files, [label for _, _, label in rows], frames)
        return source, _numbered(labels)
    if data.startswith("hf:") or (path.suffix.lower() == ".parquet" and path.is_file()):
        name, split, splits = find_split(data.removeprefix("hf:"))
        source, labels = hugging_face_columns(splits[split], name)
        return source, _numbered(labels)
    source = open_source(data, frames)
    path = Path(data.removeprefix("video:")).expanduser()
    if path.suffix.lower() == ".npz" and path.is_file():
        return source, _of_arrays(path, len(source))
    if isinstance(source, ArchiveImages):
        return source, _numbered(source.labels() or [_folder(name, data) for name in source.names()])
    if path.is_file():
        raise UserError(f"{data} lists paths without labels; give a .csv of path,label, or a folder of classes")
    root = f"{path}/" if path.is_dir() and not is_packed(path) else ""
    return source, _numbered([_folder(source.name(index).removeprefix(root), data) for index in range(len(source))])


def _numbered(names: Sequence[str]) -> ClassLabels:
    return ClassLabels(*number_classes(names))


def _folder(name: str, data: str) -> str:
    """Return the class folder of an image in a set."""
    folders = name.split("/")[:-1]
    if folders and folders[0] in _PARTS:
        folders = folders[1:]
    if not folders:
        raise UserError(f"{name} of {data} is in no class folder, so that it has no label; move it, or omit --labels")
    return folders[0]


def _of_arrays(path: Path, count: int) -> ClassLabels:
    arrays = read_npz(path, ("x_train", "y_train", "labels", "class_names"))
    name = "y_train" if "x_train" in arrays else "labels"
    if name not in arrays or arrays[name].shape != (count,):
        raise UserError(f"{path} has no array {name} ({count},) with the label of each image; add it, or omit --labels")
    labels = arrays[name]
    if "class_names" in arrays and labels.dtype.kind in "ui":
        names = arrays["class_names"]
        if not 0 <= labels.min(initial=0) <= labels.max(initial=0) < len(names):
            raise UserError(f"{path} has labels beyond its {len(names)} class_names; give each class a name")
        labels = names[labels]
    return _numbered(list(map(str, labels.tolist())))
