"""Images to judge by: all of them in order, in batches, their middles or whole.

Shapes: `B` images, `H W` pixels, `C` channels; a size is (H, W).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from simmim.data.augment import CentreCrop, Letterbox, load
from simmim.data.bad_images import BadImages
from simmim.data.picture import BadImage, Raw
from simmim.data.sources import ImageSource, read_raw
from simmim.errors import UserError


def eval_images(
    source: ImageSource,
    indices: Sequence[int] | NDArray[np.integer],
    *,
    size: tuple[int, int],
    channels: int,
    dtype: DTypeLike,
    fraction: float = CentreCrop.fraction,
    bad_images: BadImages | None = None,
) -> NDArray[Any]:
    """Read the middles of images (B, H, W, C), always the same. Unreadable ones are left out and listed.

    `fraction` is the share of the largest sides that is seen.
    Raises `UserError` if none of them can be read.
    """
    crop, images, reason = CentreCrop(size=size, fraction=fraction), [], "it is empty"
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
    indices: Sequence[int] | None = None,
    *,
    crop: CentreCrop | Letterbox,
    channels: int,
    dtype: DTypeLike,
    batch_size: int,
    threads: int,
    bad_images: BadImages,
    fill: ArrayLike = 0,
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Yield images in order, in batches: their indices (B,) and what `crop` shows (B, H, W, C).

    All images, or those of `indices`. Unreadable ones are left out and listed in `bad_images`. `fill` is the colour
    beyond an image. Raises `TooManyBadImages`.
    """

    def read(raw: Raw) -> NDArray[Any]:
        return load(raw, crop.box, size=crop.size, channels=channels, dtype=dtype, fill=fill)

    for readable, images in readable_batches(
        source, read, indices, batch_size=batch_size, threads=threads, bad_images=bad_images
    ):
        yield np.array(readable, np.int64), np.stack(images)


def readable_batches(
    source: ImageSource,
    read: Callable[[Raw], NDArray[Any]],
    indices: Sequence[int] | None = None,
    *,
    batch_size: int,
    threads: int,
    bad_images: BadImages,
) -> Iterator[tuple[list[int], list[NDArray[Any]]]]:
    """Yield images in order, in batches: their indices, and what `read` makes of them.

    All images, or those of `indices`. Unreadable ones are left out and listed in `bad_images`; `source` may be a part
    of the set that it counts. Raises `TooManyBadImages`.
    """

    def attempt(index: int) -> NDArray[Any] | None:
        try:
            return read(read_raw(source, index))
        except BadImage as error:
            bad_images.add(source.name(index), str(error))
            return None

    readable, indices = False, range(len(source)) if indices is None else indices
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            pairs = zip(part, pool.map(attempt, part), strict=True)
            found = [(index, image) for index, image in pairs if image is not None]
            if found:
                readable = True
                yield [index for index, _ in found], [image for _, image in found]
    if not readable and len(indices) >= bad_images.total:
        raise bad_images.none_readable()
