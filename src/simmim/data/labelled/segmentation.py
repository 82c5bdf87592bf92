"""Images with a class for every pixel, and the parts of them that a model of a fixed size sees.

Shapes: `H W` pixels, `K` classes; a size is (H, W). Class 255 is no class: such pixels are neither trained on nor
judged.
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
from simmim.data.decode import BadImage, open_picture
from simmim.data.files import SUFFIXES, PathList, find_images
from simmim.data.labelled.classes import evaluation_folder, hold_out
from simmim.data.sources import ImageSource, Subset, read_raw
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.method.random_keys import uniforms

IGNORE = 255
_HIGHEST = 65535  # class number of a mask

Mask = NDArray[Any]
"""(H, W) class numbers, uint8 or uint16."""


@dataclass(frozen=True)
class SegmentationImages:
    """Images to train on and to evaluate on; `train_mask` and `val_mask` read the mask of one by its number."""

    train: ImageSource
    train_mask: Callable[[int], Mask]
    val: ImageSource
    val_mask: Callable[[int], Mask]
    classes: tuple[str, ...]
    """(K,) names."""
    pixels: NDArray[np.int64]
    """(K,) pixels of each class to train on."""


def open_segmentation(data: str, *, val_fraction: float = 0.2, seed: int = 0) -> SegmentationImages:
    """Open `train/images`, `train/masks` and `val|test/…`; a mask is a PNG of class numbers, named like its image.

    Classes may be named by `classes.txt` (a name a line) or `id2label.json` (`{"0": "wall", …}`); without, the masks
    to train on say how many there are. Without `val` or `test`, `val_fraction` of the images is kept to evaluate on,
    drawn by `seed`. Every mask is read once, so that a mistake shows before the training does. One-line `ValueError`s.
    """
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
    """Images and their masks; both are asked for by number."""

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
        """For each mask, its pixels of class 0, 1 … up to its highest class."""
        with ThreadPoolExecutor(cpu_cores()) as pool:
            return list(pool.map(self._count, range(len(self.images))))

    def _count(self, index: int) -> NDArray[np.int64]:
        mask = self.read(index)
        try:
            picture = open_picture(read_raw(self.images, index))
        except BadImage:  # skipped and listed where images are read
            pass
        else:
            if mask.shape != (picture.height, picture.width):
                raise UserError(
                    f"mask {self.masks.name(index)} is {mask.shape[0]}x{mask.shape[1]} and its image "
                    f"{picture.height}x{picture.width} pixels; make them alike, without smoothing"
                )
        return np.bincount(mask[mask != IGNORE])

    def total(self, counts: list[NDArray[np.int64]], classes: int, limit: str) -> NDArray[np.int64]:
        """The pixels of each class (K,) in all masks; `ValueError` for a class that is none of them."""
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
    """The class numbers of a PNG: its values, or those of a palette (not their colours). One-line `ValueError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # np.asarray alone swallows the error of a truncated file
            mode, mask = image.mode, np.asarray(image)
    except UnidentifiedImageError:
        raise UserError(f"mask {path} is not an image; write it again as PNG") from None
    except Exception as error:  # damaged files raise anything at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"mask {path} cannot be read: {reason}; write it again as PNG") from error
    if mode not in ("1", "L", "P", "I;16", "I"):
        raise UserError(f"mask {path} holds {mode} colours; write one class number a pixel, of 8 or 16 bits")
    if mode == "I" and (beyond := mask[(mask < 0) | (mask > _HIGHEST)]).size:
        raise UserError(f"mask {path} has the value {beyond[0]}; write class numbers from 0 to {_HIGHEST}")
    return mask.astype(np.uint8 if mode in ("1", "L", "P") else np.uint16)


def _read_names(root: Path) -> tuple[tuple[str, ...], str]:
    """The names of classes that a data set gives, none if it doesn't, and the file that does."""
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
    """Cut `box` out of a mask and bring it to `size`, each pixel taking the class of the nearest."""
    rows = box.top + ((np.arange(size[0]) + 0.5) * box.height / size[0]).astype(np.int64)
    columns = box.left + ((np.arange(size[1]) + 0.5) * box.width / size[1]).astype(np.int64)
    return mask[rows[:, None], columns]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What a model of a fixed `size` sees of an image: in evaluation, and zoomed at random in training.

    `whole`: the whole image, squeezed to `size`. Else windows of `size` at the image's own resolution, that overlap by
    a third; a smaller image is enlarged until it holds one. `zoom` is the range by which training magnifies such a
    window, as far as the image holds it. Raises `ValueError`.
    """

    size: tuple[int, int]
    whole: bool
    zoom: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise UserError(f"zoom {self.zoom} is not a range of positive numbers; use 0.5 2.0")

    def boxes(self, height: int, width: int) -> list[Box]:
        """The windows that cover an image."""
        rows, columns = (max(1, round(side)) for side in self._window(height, width))
        return [Box(y, x, rows, columns) for y in _starts(height, rows) for x in _starts(width, columns)]

    def random_box(self, key: NDArray[np.uint64], height: int, width: int) -> Box:
        """The part of an image that training sees, for its key (1,)."""
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
    """Where windows begin that cover a length, evenly spaced and at most two thirds of a window apart."""
    count = 1 + math.ceil((length - window) / (window * 2 / 3))
    return [round(start) for start in np.linspace(0, length - window, count).tolist()]
