"""Data sets with a class for every pixel, and the windows that a model sees of them."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from simmim.data.augment import Box
from simmim.data.labelled.segmentation import (
    IGNORE,
    SegmentationImages,
    Windows,
    crop_mask,
    open_segmentation,
    read_mask,
)
from simmim.method.random_keys import sample_keys

SUFFIXES = (
    ".avif, .bmp, .dcm, .dicom, .gif, .j2k, .jfif, .jp2, .jpe, .jpeg, .jpg, .nii, .nii.gz, .npy, .pbm, .pgm, .png, "
    ".pnm, .ppm, .svs, .tga, .tif, .tiff, .webp"
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data` with four images to train on and two to evaluate on, of classes 0 to 2 and pixels without class."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            Path("data", part, kind, "deep").mkdir(parents=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (10, 12, 3), np.uint8)).save(
                f"data/{part}/images/deep/{number}.jpg"
            )
            mask = random.choice(np.array([0, 1, 2, IGNORE], np.uint8), (10, 12))
            Image.fromarray(mask).save(f"data/{part}/masks/deep/{number}.png")
    return Path("data")


def write(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(path)


def test_the_masks_say_how_many_classes_there_are(root: Path) -> None:
    found = open_segmentation(str(root))
    assert (len(found.train), len(found.val)) == (4, 2)
    assert found.classes == ("class 0", "class 1", "class 2")
    masks = np.stack([found.train_mask(index) for index in range(4)])
    assert found.pixels.tolist() == [int((masks == k).sum()) for k in range(3)]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "ground\ncat\ndog\nnever seen\n"),
        ("id2label.json", '{"1": "cat", "0": "ground", "2": "dog", "3": "never seen"}'),
    ],
)
def test_a_file_may_name_the_classes(root: Path, file: str, text: str) -> None:
    (root / file).write_text(text)
    assert open_segmentation(str(root)).classes == ("ground", "cat", "dog", "never seen")


def test_without_val_a_part_of_the_images_is_kept_with_its_masks(root: Path) -> None:
    (root / "val").rename(root / "other")

    def parts(found: SegmentationImages) -> tuple[list[str], list[str]]:
        return [found.train.name(i) for i in range(len(found.train))], [
            found.val.name(i) for i in range(len(found.val))
        ]

    found = open_segmentation(str(root), val_fraction=0.25, seed=1)
    train, val = parts(found)
    assert (len(train), len(val), len({*train, *val})) == (3, 1, 4)
    mask = val[0].replace("images", "masks").replace("jpg", "png")
    assert (found.val_mask(0) == read_mask(Path(mask))).all()
    assert parts(open_segmentation(str(root), val_fraction=0.25, seed=1)) == (train, val)


def test_the_numbers_of_a_palette_are_the_classes_and_not_its_colours(tmp_path: Path) -> None:
    numbers = np.array([[0, 1], [2, IGNORE]], np.uint8)
    image = Image.fromarray(numbers, mode="P")
    image.putpalette([40, 50, 60] * 256)
    image.save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == numbers.tolist()


@pytest.mark.parametrize("value", [70_000, -1])
def test_class_numbers_beyond_16_bits_are_refused(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((2, 2), value, np.int32), mode="I").save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif has the value {value}; write class numbers from 0 to 65535"):
        read_mask(tmp_path / "a.tif")


def test_sixteen_bits_hold_more_than_255_classes(tmp_path: Path) -> None:
    numbers = np.array([[0, 300], [IGNORE, 65535]], np.uint16)
    write(tmp_path / "a.png", numbers)
    assert read_mask(tmp_path / "a.png").tolist() == numbers.tolist()


def one_class(root: Path) -> None:
    for mask in root.rglob("masks/**/*.png"):
        write(mask, np.zeros((10, 12), np.uint8))


def no_class(root: Path) -> None:
    for mask in root.rglob("masks/**/*.png"):
        write(mask, np.full((10, 12), IGNORE, np.uint8))


SMALL, HIGH = np.zeros((10, 11), np.uint8), np.full((10, 12), 7, np.uint8)
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (
        lambda root: (root / "train/images").rename(root / "train/pictures"),
        "data has no folder train/images; put images there and masks of their names in train/masks",
    ),
    "empty": (
        lambda root: [file.unlink() for file in (root / "val/images/deep").iterdir()],
        f"folder data/val/images holds no images; files read end in {SUFFIXES}",
    ),
    "no mask": (
        lambda root: (root / "train/masks/deep/2.png").unlink(),
        "image data/train/images/deep/2.jpg has no mask; write its class numbers to data/train/masks/deep/2.png",
    ),
    "another size": (
        lambda root: write(root / "train/masks/deep/1.png", SMALL),
        "mask data/train/masks/deep/1.png is 10x11 and its image 10x12 pixels; make them alike, without smoothing",
    ),
    "class of evaluation only": (
        lambda root: write(root / "val/masks/deep/1.png", HIGH),
        "mask data/val/masks/deep/1.png has class 7, and the masks to train on have 0 to 2; correct one of them, or "
        "write 255 where pixels have no class",
    ),
    "class without name": (
        lambda root: (root / "classes.txt").write_text("ground\ncat\n"),
        "mask data/train/masks/deep/0.png has class 2, and data/classes.txt names 2; correct one of them, or write 255 "
        "where pixels have no class",
    ),
    "names that are none": (
        lambda root: (root / "id2label.json").write_text('["ground"]'),
        'data/id2label.json is not an object of numbers and names; write {"0": "wall", …}',
    ),
    "colours": (
        lambda root: write(root / "train/masks/deep/0.png", np.zeros((10, 12, 3), np.uint8)),
        "mask data/train/masks/deep/0.png holds RGB colours; write one class number per pixel, of 8 or 16 bits",
    ),
    "damaged": (
        lambda root: (root / "train/masks/deep/0.png").write_text("no image"),
        "mask data/train/masks/deep/0.png is not an image; write it again as PNG",
    ),
    "truncated": (
        lambda root: (root / "train/masks/deep/0.png").write_bytes((root / "train/masks/deep/0.png").read_bytes()[:60]),
        "mask data/train/masks/deep/0.png cannot be read: image file is truncated",
    ),
    "one class": (one_class, "data has 1 class; give two or more, of which one may be the background"),
    "no class": (no_class, "no pixel of the masks in data/train/masks has a class; all are 255"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_data_is_said_in_one_line(root: Path, mistake: str) -> None:
    make, message = MISTAKES[mistake]
    make(root)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        open_segmentation(str(root))
    assert "\n" not in str(error.value)


def test_a_single_image_cannot_be_split(root: Path) -> None:
    (root / "val").rename(root / "other")
    for number in range(1, 4):
        (root / f"train/images/deep/{number}.jpg").unlink()
    with pytest.raises(ValueError, match=r"^data has one image, and no val or test; give more"):
        open_segmentation(str(root))


@pytest.mark.parametrize("box", [Box(3, 5, 20, 31), Box(0, 0, 40, 50), Box(10, 10, 5, 6)])
def test_a_mask_is_cut_and_resized_as_pillow_does_to_the_nearest(box: Box) -> None:
    mask = np.random.default_rng(0).integers(0, 200, (40, 50), np.uint8)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    expected = Image.fromarray(mask).resize((24, 16), Image.Resampling.NEAREST, box=corners)
    assert (crop_mask(mask, box, (16, 24)) == np.asarray(expected)).all()


sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(deadline=None)  # the machine may be busy
@given(sizes, st.tuples(st.integers(8, 100), st.integers(8, 100)), st.booleans())
def test_windows_cover_the_image_and_overlap_by_a_third(
    image: tuple[int, int], size: tuple[int, int], whole: bool
) -> None:
    boxes = Windows(size=size, whole=whole).boxes(*image)
    covered = np.zeros(image, np.int64)
    for top, left, height, width in boxes:
        assert 0 <= top <= image[0] - height and 0 <= left <= image[1] - width
        covered[top : top + height, left : left + width] += 1
    assert covered.min() >= 1
    assert len({(box.height, box.width) for box in boxes}) == 1
    tops = sorted({box.top for box in boxes})
    assert all(below - above <= boxes[0].height * 2 / 3 + 1 for above, below in itertools.pairwise(tops))
    assert not whole or boxes == [Box(0, 0, *image)]


def test_a_window_has_the_images_own_resolution_where_the_image_holds_one() -> None:
    windows = Windows(size=(64, 96), whole=False)
    assert {(box.height, box.width) for box in windows.boxes(200, 300)} == {(64, 96)}
    assert {(box.height, box.width) for box in windows.boxes(32, 300)} == {(32, 48)}  # enlarged twice


@settings(deadline=None)  # the machine may be busy
@given(sizes, st.integers(0, 1000), st.booleans())
def test_what_training_sees_is_within_the_image(image: tuple[int, int], number: int, whole: bool) -> None:
    box = Windows(size=(32, 48), whole=whole).random_box(sample_keys(0, 0, number, stream="crop"), *image)
    assert box.height >= 1 and 0 <= box.top <= image[0] - box.height
    assert box.width >= 1 and 0 <= box.left <= image[1] - box.width


def test_training_zooms_over_the_whole_range() -> None:
    windows = Windows(size=(50, 50), whole=False, zoom=(0.5, 2.0))
    keys = sample_keys(0, 0, np.arange(500), stream="crop")
    sides = [windows.random_box(keys[i : i + 1], 400, 400).height for i in range(500)]
    assert min(sides) == 25 and max(sides) in (99, 100)
    assert np.median(sides) == pytest.approx(50, rel=0.15)  # as often out as in


def test_a_zoom_that_is_no_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^zoom \(2.0, 0.5\) is not a range of positive numbers; use 0.5 2.0$"):
        Windows(size=(32, 32), whole=True, zoom=(2.0, 0.5))


def test_every_name_of_id2label_is_kept_at_its_number(root: Path) -> None:
    (root / "id2label.json").write_text(json.dumps({"2": "dog"}))
    assert open_segmentation(str(root)).classes == ("class 0", "class 1", "dog")
