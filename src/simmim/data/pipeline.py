"""From a source of images to batches, in Grain's threads.

Step `s` of a run takes the positions `s * batch_size …` of an endless stream of epochs. What a position holds follows
from the seed alone, so that any step can be the first, and the processes of a run share a step's positions out.

Shapes: `B` images, `H W` pixels, `C` channels; a size is (H, W).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from simmim.config.field_types import Flip
from simmim.data.augment import Box, CentreCrop, Letterbox, RandomResizedCrop, crop_resize, draw_flips, reduction
from simmim.data.bad_images import BadImages
from simmim.data.decode import BadImage, Picture, Raw, open_picture
from simmim.data.readers.processes import stream_from_processes
from simmim.data.readers.threads import Batch, Loader, Order, Read, Rows, Sample, stream
from simmim.data.sources import ImageSource, read_raw
from simmim.errors import UserError
from simmim.method.random_keys import sample_key, sample_keys

Augment = Callable[[NDArray[Any], NDArray[np.uint64]], NDArray[Any]]
"""A cropped image (H, W, C) and its key (1,) → the image that is trained on."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one process of a run reads: of steps `start_step` to `total_steps` (not included) its part.

    A step has `batch_size` images, dealt out one by one to the `world` processes, of which this is number `rank`.
    Images that cannot be read are listed in `bad_images`.
    """

    batch_size: int
    seed: int
    start_step: int
    total_steps: int
    rank: int = 0
    world: int = 1
    threads: int
    processes: bool = False
    """Have `threads` processes of one thread each, for `train_batches` without augmentation."""
    bad_images: BadImages
    flip: Flip = "horizontal"

    def draw_flips(self, batch: Batch) -> NDArray[np.bool_]:
        """Draw which images of a batch to mirror: (B, axes)."""
        return draw_flips(self.seed, batch["epoch"], batch["index"], self.flip)


def load(
    raw: Raw,
    choose_box: Callable[[int, int], Box],
    *,
    size: tuple[int, int],
    channels: int,
    dtype: DTypeLike,
    fill: ArrayLike = 0,
    out: NDArray[Any] | None = None,
    antialias: bool = True,
) -> NDArray[Any]:
    """The part of an image that `choose_box(height, width)` names, at `size`: (H, W, C). Raises `BadImage`.

    What the box has beyond the image is filled with the colour `fill`, (C,) or one number. The result is written into
    `out`, if given. Without `antialias` it is interpolated only, in less time.
    """
    picture = open_picture(raw)
    box = choose_box(picture.height, picture.width)
    how: dict[str, Any] = {"size": size, "channels": channels, "dtype": dtype, "fill": fill, "antialias": antialias}
    return show(picture, box, **how, out=out)


def show(
    picture: Picture,
    box: Box,
    *,
    size: tuple[int, int],
    channels: int,
    dtype: DTypeLike,
    fill: ArrayLike = 0,
    out: NDArray[Any] | None = None,
    antialias: bool = True,
) -> NDArray[Any]:
    """`load` for an image that is open."""
    pixels = picture.decode(channels=channels, dtype=dtype, reduction=reduction(box, size))
    height, width = pixels.shape[:2]
    if (height, width) != (picture.height, picture.width):
        box = box.scaled(height / picture.height, width / picture.width)
    return crop_resize(pixels, box, size, fill, out, antialias)


def train_batches(
    source: ImageSource,
    reading: Reading,
    *,
    crop: RandomResizedCrop,
    channels: int,
    dtype: DTypeLike,
    augment: Augment | None = None,
    antialias: bool = True,
) -> Iterator[Batch]:
    """The batches of `sample_batches` of an image each, cropped and resized (`load`), and augmented if asked for."""
    read = _ReadCrop(source, reading.seed, crop, channels, dtype, augment, antialias)
    rows = None if augment else Rows((reading.batch_size // reading.world, *crop.size, channels), dtype)
    return _batches(source, reading, read, rows)


@dataclass(frozen=True)
class _ReadCrop:
    """Reads an image for training; not a function within one, so that it can be sent to another process."""

    source: ImageSource
    seed: int
    crop: RandomResizedCrop
    channels: int
    dtype: DTypeLike
    augment: Augment | None
    antialias: bool

    def __call__(self, epoch: int, index: int, row: NDArray[Any] | None) -> Sample:
        image = load(
            read_raw(self.source, index),
            partial(self.crop.box, sample_key(self.seed, epoch, index, stream="crop")),
            size=self.crop.size,
            channels=self.channels,
            dtype=self.dtype,
            out=row,
            antialias=self.antialias,
        )
        if self.augment is not None:
            image = self.augment(image, sample_keys(self.seed, epoch, index, stream="augment"))
        return {"image": image}


def sample_batches(source: ImageSource, reading: Reading, read: Callable[[int, int], Sample]) -> Iterator[Batch]:
    """The batches of a reading.

    `read(epoch, index)` is called from several threads at once; arrays whose first sides differ within a batch are
    filled up with zeros. The last images of an epoch's order that fill no batch are left out of it. In place of an
    image that cannot be read the next one of the source is taken. Close the iterator to stop its threads. Raises
    `UserError`; at once where sizes don't fit.
    """
    return _batches(source, reading, lambda epoch, index, _: read(epoch, index), None)


def _batches(source: ImageSource, reading: Reading, read: Read, rows: Rows | None) -> Iterator[Batch]:
    return read_ahead(open_loader(source, reading, read, rows), reading)


def open_loader(source: ImageSource, reading: Reading, read: Read, rows: Rows | None) -> Loader:
    """What reads the images of a reading; a Raises `UserError` where sizes don't fit."""
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


def read_ahead(loader: Loader, reading: Reading) -> Iterator[Batch]:
    """The batches of a reading, read ahead by threads or processes."""
    batch_size, world = reading.batch_size, reading.world
    first, end = reading.start_step * batch_size + reading.rank, reading.total_steps * batch_size
    read = stream_from_processes if reading.processes else stream
    with contextlib.closing(read(loader, range(first, end, world), batch_size // world, reading.threads)) as batches:  # type: ignore[type-var]
        for batch in batches:
            yield {**batch, "flip": reading.draw_flips(batch)}


def eval_images(
    source: ImageSource,
    indices: Sequence[int] | NDArray[np.integer],
    *,
    size: tuple[int, int],
    channels: int,
    dtype: DTypeLike,
    bad_images: BadImages | None = None,
) -> NDArray[Any]:
    """Read the middles of images (B, H, W, C), always the same. Unreadable ones are left out and listed.

    Raises `UserError` if none of them can be read.
    """
    crop, images, reason = CentreCrop(size=size), [], "it is empty"
    for index in map(int, indices):
        try:
            images.append(load(read_raw(source, index), crop.box, size=size, channels=channels, dtype=dtype))
        except BadImage as error:
            reason = f"{source.name(index)}: {error}"
            if bad_images is not None:
                bad_images.add(source.name(index), str(error))
    if not images:
        raise UserError(f"none of {len(indices)} images can be read; the last: {reason}")
    return np.stack(images)


def eval_batches(
    source: ImageSource,
    *,
    crop: CentreCrop | Letterbox,
    channels: int,
    dtype: DTypeLike,
    batch_size: int,
    threads: int,
    bad_images: BadImages,
    fill: ArrayLike = 0,
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Yield all images in order, in batches: their indices (B,) and what `crop` shows (B, H, W, C).

    Unreadable images are left out and listed in `bad_images`. `fill` is the colour beyond an image. Raises
    `TooManyBadImages`.
    """

    def read(raw: Raw) -> NDArray[Any]:
        return load(raw, crop.box, size=crop.size, channels=channels, dtype=dtype, fill=fill)

    for indices, images in readable_batches(
        source, read, batch_size=batch_size, threads=threads, bad_images=bad_images
    ):
        yield np.array(indices, np.int64), np.stack(images)


def readable_batches(
    source: ImageSource,
    read: Callable[[Raw], NDArray[Any]],
    *,
    batch_size: int,
    threads: int,
    bad_images: BadImages,
) -> Iterator[tuple[list[int], list[NDArray[Any]]]]:
    """Yield all images in order, in batches: their indices, and what `read` makes of them.

    Unreadable images are left out and listed in `bad_images`. Raises `TooManyBadImages`.
    """

    def attempt(index: int) -> NDArray[Any] | None:
        try:
            return read(read_raw(source, index))
        except BadImage as error:
            bad_images.add(source.name(index), str(error))
            return None

    readable = False
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), batch_size):
            indices = range(start, min(start + batch_size, len(source)))
            pairs = zip(indices, pool.map(attempt, indices), strict=True)
            found = [(index, image) for index, image in pairs if image is not None]
            if found:
                readable = True
                yield [index for index, _ in found], [image for _, image in found]
    if not readable:
        raise bad_images.none_readable()
