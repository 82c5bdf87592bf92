"""Images with a class for every pixel, and their windows for a model of a fixed size.

Shapes: `H W` pixels, `K` classes; a size is (H, W). Pixels of class 255 are ignored in training and evaluation.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.augment import Box
from simmim.data.decode import open_picture
from simmim.data.files import SUFFIXES, PathList, find_images
from simmim.data.labelled.classes import evaluation_folder, hold_out
from simmim.data.picture import BadImage
from simmim.data.sources import ImageSource, Subset, read_raw, refuse_archive
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.method.random_keys import uniforms

IGNORE = 255
_HIGHEST = 65535  # largest class number of a mask

Mask = NDArray[Any]
"""(H, W) class numbers, uint8 or uint16."""


@dataclass(frozen=True)
class SegmentationImages:
    """Training and evaluation images; `train_mask` and `val_mask` read a mask by its image's number."""

    train: ImageSource
    train_mask: Callable[[int], Mask]
    val: ImageSource
    val_mask: Callable[[int], Mask]
    classes: tuple[str, ...]
    """(K,) names."""
    pixels: NDArray[np.int64]
    """(K,) training pixels of each class."""


def open_segmentation(data: str, *, val_fraction: float = 0.2, seed: int = 0) -> SegmentationImages:
    """Open `train/images`, `train/masks` and `val|test/…`; a mask is a PNG of class numbers, named like its image.

    `classes.txt` (one name per line) or `id2label.json` (`{"0": "wall", …}`) names the classes; without them, the
    training masks determine their number. Without `val` or `test`, `val_fraction` of the images is held out for
    evaluation, drawn by `seed`. Every mask is read once, to find errors before training. Raises `UserError`.
    """
    refuse_archive(data)
    root = Path(data).expanduser()
    if not (root / "train" / "images").is_dir():
        raise UserError(f"{data} has no folder train/images; put images there and masks of their names in train/masks")
    train = _Part.open(root / "train")
    part = evaluation_folder(root)
    if part is None:
        if len(train.images) < 2:
            raise UserError(f"{data} has one image, and no val or test; give more, to train on and to evaluate on")
        held = hold_out(np.zeros(len(train.images), np.int64), val_fraction, seed)
        train, val = train.choose(~held), train.choose(held)
    else:
        val = _Part.open(part)
    names, source = _read_names(root)
    counts = [part.count_pixels() for part in (train, val)]
    classes = len(names) if names else max(len(count) for count in counts[0])
    limit = f"{source} names {classes}" if names else f"the masks to train on have 0 to {classes - 1}"
    totals = [part.total(count, classes, limit) for part, count in zip((train, val), counts, strict=True)]
    if classes < 2:
        raise UserError(f"{data} has {classes} class; give two or more, of which one may be the background")
    return SegmentationImages(
        train.images, train.read, val.images, val.read, names or tuple(f"class {k}" for k in range(classes)), totals[0]
    )


@dataclass(frozen=True)
class _Part:
    """Images and masks of a split, by number."""

    path: Path
    images: ImageSource
    masks: ImageSource

    @classmethod
    def open(cls, path: Path) -> "_Part":
        names = find_images(path / "images") if (path / "images").is_dir() else ()
        if not names:
            raise UserError(f"folder {path / 'images'} holds no images; files read end in {', '.join(SUFFIXES)}")
        masks = [str(Path(name).with_suffix(".png")) for name in names]
        for name, mask in zip(names, masks, strict=True):
            if not (path / "masks" / mask).is_file():
                raise UserError(
                    f"image {path / 'images' / name} has no mask; write its class numbers to {path / 'masks' / mask}"
                )
        return cls(path, PathList(names, root=path / "images"), PathList(masks, root=path / "masks"))

    def choose(self, chosen: NDArray[np.bool_]) -> "_Part":
        numbers = chosen.nonzero()[0]
        return _Part(self.path, Subset(self.images, numbers), Subset(self.masks, numbers))

    def read(self, index: int) -> Mask:
        return read_mask(Path(self.masks.name(index)))

    def count_pixels(self) -> list[NDArray[np.int64]]:
        """Count the pixels of each class 0, 1, … of every mask."""
        with ThreadPoolExecutor(cpu_cores()) as pool:
            return list(pool.map(self._count, range(len(self.images))))

    def _count(self, index: int) -> NDArray[np.int64]:
        mask = self.read(index)
        try:
            picture = open_picture(read_raw(self.images, index))
        except BadImage:  # the reader skips and lists it
            pass
        else:
            if mask.shape != (picture.height, picture.width):
                raise UserError(
                    f"mask {self.masks.name(index)} is {mask.shape[0]}x{mask.shape[1]} and its image "
                    f"{picture.height}x{picture.width} pixels; make them alike, without smoothing"
                )
        return np.bincount(mask[mask != IGNORE])

    def total(self, counts: list[NDArray[np.int64]], classes: int, limit: str) -> NDArray[np.int64]:
        """Sum the pixels of each class (K,) over all masks. Raises `UserError` for an unknown class."""
        total = np.zeros(classes, np.int64)
        for index, count in enumerate(counts):
            if len(count) > classes:
                raise UserError(
                    f"mask {self.masks.name(index)} has class {len(count) - 1}, and {limit}; "
                    f"correct one of them, or write {IGNORE} where pixels have no class"
                )
            total[: len(count)] += count
        if not total.any():
            raise UserError(f"no pixel of the masks in {self.path / 'masks'} has a class; all are {IGNORE}")
        return total


def read_mask(path: Path) -> Mask:
    """Read the class numbers of a PNG: its values or palette indices, not colours. Raises `UserError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # np.asarray alone swallows the error of a truncated file
            mode, mask = image.mode, np.asarray(image)
    except UnidentifiedImageError:
        raise UserError(f"mask {path} is not an image; write it again as PNG") from None
    except Exception as error:  # damaged files raise arbitrary errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"mask {path} cannot be read: {reason}; write it again as PNG") from error
    if mode not in ("1", "L", "P", "I;16", "I"):
        raise UserError(f"mask {path} holds {mode} colours; write one class number per pixel, of 8 or 16 bits")
    if mode == "I" and (beyond := mask[(mask < 0) | (mask > _HIGHEST)]).size:
        raise UserError(f"mask {path} has the value {beyond[0]}; write class numbers from 0 to {_HIGHEST}")
    return mask.astype(np.uint8 if mode in ("1", "L", "P") else np.uint16)


def _read_names(root: Path) -> tuple[tuple[str, ...], str]:
    """Return a data set's class names, empty without a list, and the file that lists them."""
    text, table = root / "classes.txt", root / "id2label.json"
    if text.is_file():
        lines = text.read_text(encoding="utf-8-sig").splitlines()
        return tuple(name for line in lines if (name := line.strip())), str(text)
    if table.is_file():
        try:
            found = {int(number): str(name) for number, name in json.loads(table.read_text(encoding="utf-8")).items()}
        except (ValueError, AttributeError):
            raise UserError(f'{table} is not an object of numbers and names; write {{"0": "wall", …}}') from None
        return tuple(found.get(k, f"class {k}") for k in range(max(found, default=-1) + 1)), str(table)
    return (), ""


def crop_mask(mask: Mask, box: Box, size: tuple[int, int]) -> Mask:
    """Cut `box` out of a mask and resize it to `size` by nearest neighbour."""
    rows = box.top + ((np.arange(size[0]) + 0.5) * box.height / size[0]).astype(np.int64)
    columns = box.left + ((np.arange(size[1]) + 0.5) * box.width / size[1]).astype(np.int64)
    return mask[rows[:, None], columns]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of an image for a model of a fixed `size`: regular in evaluation, zoomed at random in training.

    With `whole`, the only window is the whole image, resized to `size`. Otherwise windows of `size` at the image's own
    resolution overlap by a third; smaller images are enlarged to hold one. `zoom` is the range of random magnification
    in training, limited by the image. Raises `UserError`.
    """

    size: tuple[int, int]
    whole: bool
    zoom: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise UserError(f"zoom {self.zoom} is not a range of positive numbers; use 0.5 2.0")

    def boxes(self, height: int, width: int) -> list[Box]:
        """Return windows that cover an image."""
        rows, columns = (max(1, round(side)) for side in self._window(height, width))
        return [Box(y, x, rows, columns) for y in _starts(height, rows) for x in _starts(width, columns)]

    def random_box(self, key: NDArray[np.uint64], height: int, width: int) -> Box:
        """Draw the training window of an image by its key (1,)."""
        magnify, down, right = uniforms(key, 3)[0]
        low, high = self.zoom
        rows, columns = self._window(height, width)
        share = min(1 / (low * (high / low) ** magnify), height / rows, width / columns)
        rows, columns = max(1, round(rows * share)), max(1, round(columns * share))
        return Box(int(down * (height - rows + 1)), int(right * (width - columns + 1)), rows, columns)

    def _window(self, height: int, width: int) -> tuple[float, float]:
        if self.whole:
            return height, width
        enlarged = max(1.0, self.size[0] / height, self.size[1] / width)
        return self.size[0] / enlarged, self.size[1] / enlarged


def _starts(length: int, window: int) -> list[int]:
    """Return evenly spaced starts of windows that cover a length, at most two thirds of a window apart."""
    count = 1 + math.ceil((length - window) / (window * 2 / 3))
    return [round(start) for start in np.linspace(0, length - window, count).tolist()]
