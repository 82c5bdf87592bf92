"""Which images are trained on and evaluated on, under which class, and what is said where that cannot be told."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simmim.data.labelled.classes import LabelledImages, hold_out, open_labelled
from simmim.data.sources import ImageSource, open_source


def write(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"")
    return folder


def listed(source: ImageSource, labels: np.ndarray, images: LabelledImages, root: Path) -> dict[str, str]:
    """File → class."""
    names = [Path(source.name(index)).relative_to(root).as_posix() for index in range(len(source))]
    return dict(zip(names, [images.classes[label] for label in labels], strict=True))


def many(*classes: str, images: int = 10) -> list[str]:
    return [f"{name}/{number}.png" for name in classes for number in range(images)]


@pytest.mark.parametrize("second", ["val", "test"])
def test_train_and_val_or_test_folders_are_taken_as_they_are(tmp_path: Path, second: str):
    write(tmp_path, "train/b/1.png", "train/a/deep/2.png", "train/b/3.jpg", f"{second}/b/4.png")
    found = open_labelled(str(tmp_path))
    assert listed(found.train, found.train_labels, found, tmp_path) == {
        "train/a/deep/2.png": "a",
        "train/b/1.png": "b",
        "train/b/3.jpg": "b",
    }
    assert listed(found.val, found.val_labels, found, tmp_path) == {f"{second}/b/4.png": "b"}


def test_one_folder_of_classes_is_split_by_the_fraction_in_each_class(tmp_path: Path):
    found = open_labelled(str(write(tmp_path, *many("a", images=20), *many("b"))), val_fraction=0.3)
    assert np.bincount(found.val_labels).tolist() == [6, 3]
    train = listed(found.train, found.train_labels, found, tmp_path)
    val = listed(found.val, found.val_labels, found, tmp_path)
    assert sorted(train | val) == sorted(many("a", images=20) + many("b"))
    assert all(file.startswith(label) for file, label in (train | val).items())


def test_a_train_folder_alone_is_split(tmp_path: Path):
    found = open_labelled(str(write(tmp_path, *(f"train/{file}" for file in many("a", "b")))))
    assert (len(found.train), len(found.val)) == (16, 4)


def test_the_split_depends_on_the_seed_alone(tmp_path: Path):
    write(tmp_path, *many("a", "b", images=20))
    splits = [open_labelled(str(tmp_path), seed=seed) for seed in (0, 0, 1)]
    first, again, other = (listed(split.val, split.val_labels, split, tmp_path) for split in splits)
    assert first == again != other


def test_holding_out_leaves_every_class_an_image():
    held = hold_out(np.array([0, 1, 1, 2, 2, 2, 2, 2, 2]), 0.5, seed=0)
    assert [int(held[place].sum()) for place in ([0], [1, 2], range(3, 9))] == [0, 1, 3]


def test_few_labels_are_so_many_of_each_class_and_a_part_of_more(tmp_path: Path):
    write(tmp_path, *many("a", "b", images=20))
    few, more = (open_labelled(str(tmp_path), labels_per_class=count) for count in (2, 5))
    assert np.bincount(few.train_labels).tolist() == [2, 2]
    few_files, more_files = (listed(part.train, part.train_labels, part, tmp_path) for part in (few, more))
    assert few_files.items() < more_files.items()
    assert len(few.val) == 8


def test_few_labels_are_others_for_another_label_seed(tmp_path: Path):
    write(tmp_path, *many("a", "b", images=20))
    parts = [open_labelled(str(tmp_path), labels_per_class=3, label_seed=seed) for seed in (0, 1)]
    first, second = (listed(part.train, part.train_labels, part, tmp_path) for part in parts)
    assert first != second


def test_demo_has_the_emoji_under_their_groups():
    found = open_labelled("demo")
    assert len(found.train) + len(found.val) == len(open_source("demo"))
    assert all(found.val.name(i).startswith(found.classes[found.val_labels[i]] + "/") for i in range(len(found.val)))


def test_a_csv_gives_paths_relative_to_itself(tmp_path: Path):
    (tmp_path / "labels.csv").write_text('path,label\n"x/1.png",cat\n2.png,dog\n3.png,dog\n4.png,cat\n')
    found = open_labelled(str(tmp_path / "labels.csv"))
    files = listed(found.train, found.train_labels, found, tmp_path) | listed(
        found.val, found.val_labels, found, tmp_path
    )
    assert files == {"x/1.png": "cat", "2.png": "dog", "3.png": "dog", "4.png": "cat"}


def test_a_csv_is_split_by_its_column_and_val_is_evaluated_on_rather_than_test(tmp_path: Path):
    rows = ["path,split,label", "1.png,train,a", "2.png,,b", "3.png,val,a", "4.png,test,b"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    found = open_labelled(str(tmp_path / "labels.csv"))
    assert listed(found.train, found.train_labels, found, tmp_path) == {"1.png": "a", "2.png": "b"}
    assert listed(found.val, found.val_labels, found, tmp_path) == {"3.png": "a"}


def arrays(path: Path, **changes: np.ndarray | None) -> Path:
    pixels = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    given: dict[str, Any] = {"x_train": pixels, "y_train": np.array([2, 0, 1, 1, 0], np.uint8)}
    given = given | {"x_test": pixels[:2], "y_test": np.array([1, 2], np.uint8)} | changes
    np.savez(path, **{name: array for name, array in given.items() if array is not None})
    return path


def test_an_npz_keeps_its_class_numbers_and_names(tmp_path: Path):
    path = arrays(tmp_path / "data.npz", class_names=np.array(["shirt", "coat", "bag"]))
    found = open_labelled(str(path))
    assert found.classes == ("shirt", "coat", "bag")
    assert found.train_labels.tolist() == [2, 0, 1, 1, 0]
    assert np.array_equal(found.val.read(1), np.load(path)["x_test"][1])


def test_the_training_images_of_an_npz_are_a_source_without_labels(tmp_path: Path):
    source = open_source(str(arrays(tmp_path / "data.npz")))
    assert len(source) == 5
    assert np.array_equal(source.read(3), np.load(tmp_path / "data.npz")["x_train"][3])


def test_a_hugging_face_set_gives_images_and_class_names(tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    picture = np.zeros((4, 4, 3), np.uint8)
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["fish", "bird", "none"])}
    )
    parts = {
        part: datasets.Dataset.from_dict({"picture": [picture] * len(kinds), "kind": kinds}, features=features)
        for part, kinds in (("train", [1, 0, 1]), ("validation", [0, 1]))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    found = open_labelled(f"hf:{tmp_path / 'set'}")
    assert [found.classes[label] for label in found.train_labels] == ["bird", "fish", "bird"]
    assert [found.classes[label] for label in found.val_labels] == ["fish", "bird"]
    assert isinstance(found.train.read(0), bytes)


FOLDERS = {
    "empty class": (["a/1.png", "b/notes.txt"], "class folder {0}/b holds no images; add some, or remove it "),
    "one class": (["a/1.png", "a/2.png"], "{0} has 1 class (a); give two or more"),
    "no classes": (["1.png"], "folder {0} has no class folders; put each class's images in a folder of its name"),
    "unknown class": (
        ["train/a/1.png", "train/b/2.png", "val/c/3.png"],
        "class c of {0} has images to evaluate on but none to train on; add some, or remove it",
    ),
    "one image": (
        ["a/1.png", "a/2.png", "b/3.png"],
        "class b has 1 image; give two, to train on and to evaluate on",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_cannot_be_are_refused_in_one_line(tmp_path: Path, case: str):
    files, message = FOLDERS[case]
    with pytest.raises(ValueError, match="^" + re.escape(message.format(tmp_path))) as refusal:
        open_labelled(str(write(tmp_path, *files)))
    assert "\n" not in str(refusal.value)


def test_more_labels_than_a_class_has_are_refused(tmp_path: Path):
    write(tmp_path, *many("a"), *many("b", images=4))
    with pytest.raises(ValueError, match=r"^class b has 3 images, fewer than --labels-per-class 5; use 3 or less$"):
        open_labelled(str(tmp_path), labels_per_class=5)


def with_member(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)
    return path


def csv(text: str, encoding: str = "utf-8") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "d.csv").write_text(text, encoding=encoding)
        return folder / "d.csv"

    return make


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (
        lambda folder: folder / "none",
        "{0} does not exist; give a folder of classes, loose or in a .zip or .tar, a .csv, an .npz, hf:NAME or demo",
    ),
    "csv without header": (
        csv("1.png,cat\n2.png,dog\n"),
        "{0} has no rows with the columns path and label; write a header path,label or path,label,split",
    ),
    "csv without label": (
        csv("path,label\n1.png,\n"),
        "row 2 of {0} is 1.png,; give a path, a label and, where there is a column split, train, val or test",
    ),
    "csv with another split": (
        csv("path,label,split\n1.png,a,train\n2.png,b,holdout\n"),
        "row 3 of {0} is 2.png,b,holdout; give a path, a label and, where there is a column split, train, val or test",
    ),
    "npz without labels": (
        lambda folder: arrays(folder / "d.npz", y_train=None),
        "{0} has no array y_train; it needs x_train, y_train, x_test, y_test",
    ),
    "npz with too few labels": (
        lambda folder: arrays(folder / "d.npz", y_test=np.array([0])),
        "array y_test of {0} is int64 (1,); give a class number from 0 on for each of the 2 images of x_test",
    ),
    "npz with a negative label": (
        lambda folder: arrays(folder / "d.npz", y_test=np.array([0, -1])),
        "array y_test of {0} is int64 (2,); give a class number from 0 on for each of the 2 images of x_test",
    ),
    "npz with too few names": (
        lambda folder: arrays(folder / "d.npz", class_names=np.array(["a", "b"])),
        "{0} has class number 2 and 2 class_names; give each class a name",
    ),
    "npz with a class number that is none": (
        lambda folder: arrays(folder / "d.npz", y_test=np.array([0, 4_000_000_000])),
        "{0} has class number 4000000000; number the classes from 0 on, below 1,000,000",
    ),
    "npz with something else": (
        lambda folder: with_member(arrays(folder / "d.npz"), "class_names.npy", b"text"),
        "{0} cannot be read as .npz (class_names is no array); write it with numpy.savez",
    ),
    "csv of another encoding": (
        csv("path,label\na.png,Bäume\n", encoding="latin-1"),
        "{0} cannot be read as CSV ('utf-8' codec can't decode byte 0xe4",
    ),
    "no npz": (
        lambda folder: csv("text")(folder).rename(folder / "d.npz"),
        "{0} cannot be read as .npz (",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_are_refused_in_one_line(tmp_path: Path, case: str):
    make, message = FILES[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match="^" + re.escape(message.format(path))) as refusal:
        open_labelled(str(path))
    assert "\n" not in str(refusal.value)
