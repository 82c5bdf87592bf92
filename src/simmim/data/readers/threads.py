"""Grain's threads: what the positions of an endless stream of epochs hold, read ahead and put together as batches.

Shapes: `B` images, `H W` pixels, `C` channels.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.data.bad_images import BadImages
from simmim.data.decode import BadImage
from simmim.data.sources import ImageSource
from simmim.method.random_keys import sample_keys

Sample = dict[str, Any]
"""What is read of one image: "image" (H, W, C), unless it is written into a row, and whatever a task has beside it."""
Batch = dict[str, Any]
"""One rank's part of a step: the samples' arrays stacked, such as image (B, H, W, C), and

- flip (B, axes): which images the engine mirrors, left to right and upside down
- index (B,): the images' numbers in the source
- epoch (B,): counted from 0
"""
Read = Callable[[int, int, NDArray[Any] | None], Sample]
"""Epoch and index of an image, and where to write it if that is known → what is read of it."""


class _Element(NamedTuple):
    sample: Sample
    index: int
    epoch: int


class Rows:
    """The images of the batches in the making, (B, H, W, C) each: threads fill in rows, and nothing is copied."""

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
    """What a position of the stream holds."""

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
        """The image number `first`, or else the next one of the source that can be read."""
        for step in range(len(self.source)):
            index = (first + step) % len(self.source)
            try:
                return _Element(self.read(epoch, index, row), index, epoch)
            except BadImage as error:
                self.bad_images.add(self.source.name(index), str(error))
        raise self.bad_images.none_readable()


class Order:
    """A new order of the images for each epoch. Threads that read ahead are in two epochs at a time at most."""

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


def stream(loader: Loader, positions: range, size: int, threads: int) -> Iterator[Batch]:
    """The batches of `size` images at these positions. Close the iterator to stop its threads."""

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
    """Arrays of one batch together, the shorter ones filled up with zeros."""
    lengths = {len(array) for array in arrays}
    if len(lengths) == 1:
        return np.stack(arrays)
    stacked = np.zeros((len(arrays), max(lengths), *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked


def _import_grain() -> ModuleType:
    """Grain, without the warning about JAX and the handler of the root logger that its first import leaves behind."""
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        import grain
    finally:
        root.removeHandler(silent)
    return grain
