"""Batches to train on: images from a source, read ahead by Grain's threads.

Step `s` of a run takes the positions `s * batch_size …` of an endless stream of epochs. The seed alone decides which
image a position holds, so any step can be the first, and the ranks of a run share the positions of a step.

Shapes: `B` images, `H W` pixels, `C` channels; a size is (H, W).
"""

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.config.field_types import Flip
from simmim.data.augment import RandomResizedCrop, draw_flips, load, whole_box
from simmim.data.bad_images import BadImages
from simmim.data.picture import BadImage
from simmim.data.sound_augment import TimeCrop
from simmim.data.sources import ImageSource, read_raw
from simmim.data.windows import RandomWindow
from simmim.errors import UserError
from simmim.method.random_keys import sample_key, sample_keys

Sample = dict[str, Any]
"""One image as read: "image" (H, W, C), unless it is written into a row, and a task's labels."""
Batch = dict[str, Any]
"""One rank's part of a step: the samples' arrays stacked, such as image (B, H, W, C), and

- flip (B, axes): which images the engine mirrors, left to right and upside down
- index (B,): the images' numbers in the source
- epoch (B,): counted from 0
"""
Read = Callable[[int, int, NDArray[Any] | None], Sample]
"""Epoch and index of an image, and the row to write it to, if any → sample."""
Crop = RandomResizedCrop | RandomWindow | TimeCrop
Augment = Callable[[NDArray[Any], NDArray[np.uint64]], NDArray[Any]]
"""A cropped image (H, W, C) and its key (1,) → the image that is trained on."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The images that one rank reads: its part of the steps from `start_step` to before `total_steps`.

    A step has `batch_size` images, dealt out one by one to the `world` ranks. `threads` of them are read at once.
    Unreadable images are listed in `bad_images`.
    """

    batch_size: int
    seed: int
    start_step: int
    total_steps: int
    rank: int = 0
    world: int = 1
    threads: int
    bad_images: BadImages
    flip: Flip = "horizontal"

    def draw_flips(self, batch: Batch) -> NDArray[np.bool_]:
        """Draw which images of a batch to mirror: (B, axes)."""
        return draw_flips(self.seed, batch["epoch"], batch["index"], self.flip)


class _Element(NamedTuple):
    sample: Sample
    index: int
    epoch: int


class Rows:
    """Images of unfinished batches, (B, H, W, C) each. Threads write into rows, so nothing is copied."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike):
        self.shape = shape
        self.dtype = dtype
        self._batches: dict[int, NDArray[Any]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.shape, self.dtype)

    def of(self, batch: int) -> NDArray[Any]:
        with self._lock:
            if batch not in self._batches:
                self._batches[batch] = np.empty(self.shape, self.dtype)
            return self._batches[batch]

    def take(self, batch: int) -> NDArray[Any]:
        with self._lock:
            return self._batches.pop(batch)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Read the image at a position of the stream."""

    source: ImageSource
    read: Read
    order: "Order"
    usable: int
    bad_images: BadImages
    rows: Rows | None

    def __call__(self, position: int, row: NDArray[Any] | None) -> _Element:
        epoch, place = divmod(position, self.usable)
        return self.load(epoch, self.order.index(epoch, place), row)

    def load(self, epoch: int, first: int, row: NDArray[Any] | None) -> _Element:
        """Read image number `first`, or the next readable one of the source."""
        for step in range(len(self.source)):
            index = (first + step) % len(self.source)
            try:
                return _Element(self.read(epoch, index, row), index, epoch)
            except BadImage as error:
                self.bad_images.add(self.source.name(index), str(error))
        raise self.bad_images.none_readable()


class Order:
    """A new order of the images for each epoch. Keeps two epochs, as many as threads that read ahead are in."""

    def __init__(self, images: int, seed: int):
        self._images = images
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Order, (self._images, self._seed)

    def index(self, epoch: int, place: int) -> int:
        with self._lock:
            if epoch not in self._orders:
                keys = sample_keys(self._seed, epoch, np.arange(self._images), stream="order")
                recent = self._orders.get(epoch - 1)
                self._orders = {} if recent is None else {epoch - 1: recent}
                self._orders[epoch] = np.argsort(keys)
            return int(self._orders[epoch][place])


Stream = Callable[[Loader, range, int, int], Iterator[Batch]]
"""Loader, positions, images of a batch, threads or processes → batches without flips."""


def train_batches(
    source: ImageSource,
    reading: Reading,
    *,
    crop: Crop,
    channels: int,
    dtype: DTypeLike,
    augment: Augment | None = None,
    antialias: bool = True,
    stream: Stream | None = None,
) -> Iterator[Batch]:
    """Yield the batches of a reading: images cropped and resized (`load`), and augmented if asked for.

    `stream` reads ahead: threads by default, or `stream_from_processes`, to which `augment` must be sent. Otherwise
    like `sample_batches`.
    """
    read = _ReadCrop(source, reading.seed, crop, channels, dtype, augment, antialias)
    rows = Rows((reading.batch_size // reading.world, *crop.size, channels), dtype)
    return read_ahead(open_loader(source, reading, read, rows), reading, stream)


@dataclass(frozen=True)
class _ReadCrop:
    """Read an image for training. A class, since a nested function cannot be sent to another process."""

    source: ImageSource
    seed: int
    crop: Crop
    channels: int
    dtype: DTypeLike
    augment: Augment | None
    antialias: bool

    def __call__(self, epoch: int, index: int, row: NDArray[Any] | None) -> Sample:
        raw, key = read_raw(self.source, index), sample_key(self.seed, epoch, index, stream="crop")
        if isinstance(self.crop, RandomWindow):
            raw, choose = self.crop.cut(raw, key), whole_box
        else:
            choose = partial(self.crop.box, key)
        image = load(
            raw,
            choose,
            size=self.crop.size,
            channels=self.channels,
            dtype=self.dtype,
            out=row,
            antialias=self.antialias,
        )
        if self.augment is not None:
            image = self.augment(image, sample_keys(self.seed, epoch, index, stream="augment"))
            if row is not None:
                row[:] = image
        return {"image": image}


def sample_batches(source: ImageSource, reading: Reading, read: Callable[[int, int], Sample]) -> Iterator[Batch]:
    """Yield the batches of a reading, of whatever `read(epoch, index)` returns.

    `read` is called from several threads at once. Arrays whose first sides differ within a batch are filled up with
    zeros. The last images of an epoch's order that fill no batch are left out. The next image of the source replaces
    one that cannot be read. Close the iterator to stop its threads. Raises `UserError`, at once if sizes do not fit.
    """
    return read_ahead(open_loader(source, reading, lambda epoch, index, _: read(epoch, index), None), reading)


def open_loader(source: ImageSource, reading: Reading, read: Read, rows: Rows | None) -> Loader:
    """Build the loader of a reading. Raises `UserError` if sizes do not fit."""
    batch_size, world = reading.batch_size, reading.world
    if batch_size > len(source):
        raise UserError(
            f"batch size {batch_size} is more than the {len(source)} images; use --batch-size {len(source)} or less"
        )
    if batch_size % world:
        raise UserError(
            f"batch size {batch_size} is not a multiple of the {world} processes; "
            f"use {max(1, batch_size // world) * world}"
        )
    return Loader(
        source=source,
        read=read,
        order=Order(len(source), reading.seed),
        usable=len(source) // batch_size * batch_size,
        bad_images=reading.bad_images,
        rows=rows,
    )


def read_ahead(loader: Loader, reading: Reading, stream: Stream | None = None) -> Iterator[Batch]:
    """Yield the batches of a reading, with flips, read ahead by threads or by another `stream`."""
    batch_size, world = reading.batch_size, reading.world
    first, end = reading.start_step * batch_size + reading.rank, reading.total_steps * batch_size
    positions = range(first, end, world)
    found: Any = (stream or stream_from_threads)(loader, positions, batch_size // world, reading.threads)
    with contextlib.closing(found) as batches:
        for batch in batches:
            yield {**batch, "flip": reading.draw_flips(batch)}


def stream_from_threads(loader: Loader, positions: range, size: int, threads: int) -> Iterator[Batch]:
    """Yield the batches of `size` images at these positions, read by Grain's threads. Close it to stop them."""

    def piece(number: int) -> list[_Element]:
        batch, part = divmod(number, len(parts))
        rows = loader.rows.of(batch) if loader.rows else [None] * size
        return [loader(positions[batch * size + place], rows[place]) for place in parts[part]]

    def batch(pieces: Sequence[list[_Element]]) -> Batch:
        samples, indices, epochs = zip(*itertools.chain(*pieces), strict=True)
        index, epoch = np.array(indices, np.int64), np.array(epochs, np.int64)
        if loader.rows:
            arrays: Batch = {name: [sample[name] for sample in samples] for name in samples[0] if name != "image"}
            arrays["image"] = loader.rows.take(next(numbers))
        else:
            arrays = {name: _stack([sample[name] for sample in samples]) for name in samples[0]}
        return {**arrays, "index": index, "epoch": epoch}

    numbers = itertools.count()  # of the batches, which Grain makes in their order
    grain = _import_grain()
    # Handing over an element takes Grain 40 µs, so that one is several images, but no fewer than keep all threads busy.
    together = min(8, max(1, size // max(1, threads)))
    parts = [range(first, min(first + together, size)) for first in range(0, size, together)]
    # One batch that is ready and one in the making: more would only take memory.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * len(parts), threads))
    pieces = grain.MapDataset.range(len(positions) // size * len(parts)).map(piece)
    batches = iter(pieces.to_iter_dataset(options).batch(len(parts), drop_remainder=True, batch_fn=batch))
    try:
        yield from batches
    finally:
        batches.close()


def _stack(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """Stack the arrays of one batch, the shorter ones filled up with zeros."""
    lengths = {len(array) for array in arrays}
    if len(lengths) == 1:
        return np.stack(arrays)
    stacked = np.zeros((len(arrays), max(lengths), *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked


def _import_grain() -> ModuleType:
    """Import Grain without its warning about JAX and the root logger's handler that its first import leaves."""
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        import grain
    finally:
        root.removeHandler(silent)
    return grain
