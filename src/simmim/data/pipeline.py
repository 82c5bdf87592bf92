"""From a source of images to batches, in Grain's threads.

Step `s` of a run takes the positions `s * batch_size …` of an endless stream of epochs. What a position holds follows
from the seed alone, so that any step can be the first, and the processes of a run share a step's positions out.

Shapes: `B` images, `H W` pixels, `C` channels; a size is (H, W).
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.data.augment import Box, CentreCrop, RandomResizedCrop, crop_resize, draw_flips, reduction
from simmim.data.decode import BadImage, Raw, open_picture
from simmim.data.sources import ImageSource, read_raw
from simmim.keys import sample_keys


class Batch(TypedDict):
    """The images of one process's part of a step."""

    image: NDArray[Any]
    """(B, H, W, C) uint8, or float32 in 0..255."""
    flip: NDArray[np.bool_]
    """(B,): which images the engine is to mirror."""
    index: NDArray[np.int64]
    """(B,): the images' numbers in the source."""
    epoch: NDArray[np.int64]
    """(B,): counted from 0."""


Augment = Callable[[NDArray[Any], NDArray[np.uint64]], NDArray[Any]]
"""A cropped image (H, W, C) and its key (1,) → the image that is trained on."""


class TooManyBadImages(ValueError):
    """More images than a run puts up with cannot be read."""


class BadImages:
    """The images that cannot be read, each listed once in a file of `NAME<TAB>REASON` lines.

    The file may be there already, and other processes may add to it. `add` raises `TooManyBadImages` once more than
    `max_fraction` (0..1) of `total` images are listed.
    """

    def __init__(self, path: Path, *, total: int, max_fraction: float = 0.01):
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"--max-bad-fraction {max_fraction} is not within 0..1; use 0.01")
        self.path = path
        self.total = total
        self.max_fraction = max_fraction
        self._names: set[str] = set()
        self._bytes_read = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            self._catch_up()
            return len(self._names)

    def add(self, name: str, reason: str) -> None:
        with self._lock:
            self._catch_up()
            name = re.sub(r"[\t\n]", " ", name)
            if name not in self._names:
                with self.path.open("ab") as file:
                    file.write(f"{name}\t{reason}\n".encode(errors="surrogateescape"))
                self._catch_up()
            bad = len(self._names)
        if bad > self.max_fraction * self.total:
            raise TooManyBadImages(
                f"{bad} of {self.total} images ({bad / self.total:.1%}) cannot be read, more than --max-bad-fraction "
                f"{self.max_fraction}; they are listed in {self.path}"
            )

    def _catch_up(self) -> None:
        """Read the lines that are new in the file."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._bytes_read)
            lines = file.read().split(b"\n")[:-1]  # what follows the last line's end is not written yet
        self._bytes_read += sum(len(line) + 1 for line in lines)
        self._names |= {line.split(b"\t")[0].decode(errors="surrogateescape") for line in lines}


def load(
    raw: Raw, choose_box: Callable[[int, int], Box], *, size: tuple[int, int], channels: int, dtype: DTypeLike
) -> NDArray[Any]:
    """The part of an image that `choose_box(height, width)` names, at `size`: (H, W, C). Raises `BadImage`."""
    picture = open_picture(raw)
    box = choose_box(picture.height, picture.width)
    pixels = picture.decode(channels=channels, dtype=dtype, reduction=reduction(box, size))
    height, width = pixels.shape[:2]
    if (height, width) != (picture.height, picture.width):
        box = box.scaled(height / picture.height, width / picture.width)
    return crop_resize(pixels, box, size)


def train_batches(
    source: ImageSource,
    *,
    crop: RandomResizedCrop,
    channels: int,
    dtype: DTypeLike,
    batch_size: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world: int = 1,
    threads: int,
    bad_images: BadImages,
    augment: Augment | None = None,
) -> Iterator[Batch]:
    """The batches of steps `start_step` to `total_steps` (not included) for the process `rank` of `world`.

    A step has `batch_size` images, dealt out to the processes one by one. The last images of an epoch's order that
    fill no batch are left out of it. An image that cannot be read is listed in `bad_images`, and the next one of the
    source taken. Close the iterator to stop its threads. Raises one-line `ValueError`s; at once where sizes don't fit.
    """
    if batch_size > len(source):
        raise ValueError(
            f"batch size {batch_size} is more than the {len(source)} images; use --batch-size {len(source)} or less"
        )
    if batch_size % world:
        raise ValueError(
            f"batch size {batch_size} is not a multiple of the {world} processes; "
            f"use {max(1, batch_size // world) * world}"
        )
    loader = _Loader(
        source=source,
        crop=crop,
        channels=channels,
        dtype=np.dtype(dtype),
        order=_Order(len(source), seed),
        usable=len(source) // batch_size * batch_size,
        seed=seed,
        bad_images=bad_images,
        augment=augment,
    )
    positions = range(start_step * batch_size + rank, total_steps * batch_size, world)
    return _stream(loader, positions, batch_size // world, threads)


def eval_images(
    source: ImageSource,
    indices: Sequence[int] | NDArray[np.integer],
    *,
    size: tuple[int, int],
    channels: int,
    dtype: DTypeLike,
) -> NDArray[Any]:
    """The middles of images (B, H, W, C), always the same; those that cannot be read are left out.

    Raises a one-line `ValueError` where none of them can be read.
    """
    crop, images, reason = CentreCrop(size=size), [], "it is empty"
    for index in map(int, indices):
        try:
            images.append(load(read_raw(source, index), crop.box, size=size, channels=channels, dtype=dtype))
        except BadImage as error:
            reason = f"{source.name(index)}: {error}"
    if not images:
        raise ValueError(f"none of {len(indices)} images can be read; the last: {reason}")
    return np.stack(images)


def eval_batches(
    source: ImageSource,
    *,
    crop: CentreCrop,
    channels: int,
    dtype: DTypeLike,
    batch_size: int,
    threads: int,
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """All images in order, by the batch: their indices (B,) and middles (B, H, W, C). Bad ones are left out."""

    def read(index: int) -> NDArray[Any] | None:
        try:
            return load(read_raw(source, index), crop.box, size=crop.size, channels=channels, dtype=dtype)
        except BadImage:
            return None

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), batch_size):
            indices = range(start, min(start + batch_size, len(source)))
            found = [(i, image) for i, image in zip(indices, pool.map(read, indices), strict=True) if image is not None]
            if found:
                yield np.array([i for i, _ in found], np.int64), np.stack([image for _, image in found])


class _Element(NamedTuple):
    image: NDArray[Any]
    index: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class _Loader:
    """What a position of the stream holds."""

    source: ImageSource
    crop: RandomResizedCrop
    channels: int
    dtype: np.dtype[Any]
    order: "_Order"
    usable: int
    seed: int
    bad_images: BadImages
    augment: Augment | None

    def __call__(self, position: int) -> _Element:
        epoch, place = divmod(int(position), self.usable)
        first = self.order.index(epoch, place)
        for step in range(len(self.source)):
            index = (first + step) % len(self.source)
            try:
                return _Element(self._load(epoch, index), index, epoch)
            except BadImage as error:
                self.bad_images.add(self.source.name(index), str(error))
        raise TooManyBadImages(
            f"none of the {len(self.source)} images can be read; they are listed in {self.bad_images.path}"
        )

    def _load(self, epoch: int, index: int) -> NDArray[Any]:
        key = sample_keys(self.seed, epoch, index, stream="crop")
        image = load(
            read_raw(self.source, index),
            lambda height, width: self.crop.box(key, height, width),
            size=self.crop.size,
            channels=self.channels,
            dtype=self.dtype,
        )
        if self.augment is None:
            return image
        return self.augment(image, sample_keys(self.seed, epoch, index, stream="augment"))


class _Order:
    """A new order of the images for each epoch. Threads that read ahead are in two epochs at a time at most."""

    def __init__(self, images: int, seed: int):
        self._images = images
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def index(self, epoch: int, place: int) -> int:
        with self._lock:
            if epoch not in self._orders:
                keys = sample_keys(self._seed, epoch, np.arange(self._images), stream="order")
                recent = self._orders.get(epoch - 1)
                self._orders = {} if recent is None else {epoch - 1: recent}
                self._orders[epoch] = np.argsort(keys)
            return int(self._orders[epoch][place])


def _stream(loader: _Loader, positions: range, size: int, threads: int) -> Iterator[Batch]:
    def batch(elements: Sequence[_Element]) -> Batch:
        images, indices, epochs = zip(*elements, strict=True)
        index, epoch = np.array(indices, np.int64), np.array(epochs, np.int64)
        return {
            "image": np.stack(images),
            "flip": draw_flips(loader.seed, epoch, index),
            "index": index,
            "epoch": epoch,
        }

    grain = _import_grain()
    # One batch that is ready and one in the making: more would only take memory.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * size, threads))
    images = grain.MapDataset.range(positions.start, positions.stop, positions.step).map(loader)
    batches = iter(images.to_iter_dataset(options).batch(size, drop_remainder=True, batch_fn=batch))
    try:
        yield from batches
    finally:
        batches.close()


def _import_grain() -> ModuleType:
    """Grain, without the warning about JAX and the handler of the root logger that its first import leaves behind."""
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        import grain
    finally:
        root.removeHandler(silent)
    return grain
