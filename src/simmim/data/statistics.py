"""Mean and standard deviation of a data set's pixels, for normalisation.

Shapes: `H W` pixels, `C` channels.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.data.augment import Box, CentreCrop, crop_resize, show
from simmim.data.decode import open_picture
from simmim.data.picture import BadImage, Picture
from simmim.data.sources import ImageSource, read_raw
from simmim.errors import UserError
from simmim.method.random_keys import sample_keys
from simmim.method.spectrogram import Spectrogram

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def measure_mean_std(
    source: ImageSource,
    *,
    channels: int,
    dtype: DTypeLike,
    seed: int,
    limit: int = 1000,
    spectrogram: Spectrogram | None = None,
    windows: tuple[int, int] | None = None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure mean and standard deviation (C,) of pixels / 255, over centre crops of up to `limit` images.

    `seed` draws the images. They are resized to 224×224 first, since models see resized images, which vary less.
    With `windows` the images are windows of this size (H, W), which are seen whole and not resized.
    With `spectrogram` they are those of the log-mel energies of sounds, of the samples in their middle.
    Values that were missing, and those that resizing mixes with them, are left out; an image counts by its share of
    others. Unreadable images are skipped. A constant channel gets deviation 1. Raises `UserError` if there are none.
    """
    crop = CentreCrop(size=(spectrogram.samples, 1) if spectrogram else (224, 224))
    if windows:
        crop = CentreCrop(size=windows, fraction=1.0)

    def moments(index: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        try:
            picture = open_picture(read_raw(source, index))
            box = crop.box(picture.height, picture.width)
            pixels = show(picture, box, size=crop.size, channels=channels, dtype=dtype)
            known = _known(picture, box, crop.size, channels)
        except BadImage:
            return []
        if spectrogram:
            scaled = spectrogram(np, pixels.reshape(1, -1)).reshape(-1, 1).astype(np.float64)
        else:
            scaled = pixels.reshape(-1, channels) / np.float64(255)
        if known is None:
            return [(np.stack((scaled.mean(axis=0), np.square(scaled).mean(axis=0))), np.ones(channels))]
        counts = known.sum(axis=0)
        sums = np.stack((scaled.sum(axis=0, where=known), np.square(scaled).sum(axis=0, where=known)))
        return [(sums / np.maximum(counts, 1), counts / len(known))]

    drawn = np.argsort(sample_keys(seed, 0, np.arange(len(source)), stream="statistics"))[:limit]
    with ThreadPoolExecutor() as pool:
        found = list(chain.from_iterable(pool.map(moments, drawn.tolist())))
    if not found:
        raise UserError(f"none of {len(drawn)} images can be read, so their mean and deviation are not known")
    each, shares = map(np.stack, zip(*found, strict=True))
    if not shares.any(axis=0).all():
        raise UserError("the middle of the images holds nothing but nodata; give --mean and --std")
    mean, mean_square = np.average(each, axis=0, weights=np.broadcast_to(shares[:, None], each.shape))
    std = np.sqrt(np.maximum(mean_square - np.square(mean), 0))
    changes = std > 1e-6 * np.abs(mean)  # smaller values are rounding errors of constants
    return tuple(mean.tolist()), tuple(np.where(changes, std, 1.0).tolist())


def _known(picture: Picture, box: Box, size: tuple[int, int], channels: int) -> NDArray[np.bool_] | None:
    """Return which values (pixels, C) of a crop come from none that was missing; `None` where none is."""
    missing = picture.missing() if picture.missing else None
    if missing is None or not missing.any():
        return None
    if missing.shape[2] != channels:  # grey ↔ colour, or transparency: all of a pixel
        missing = np.repeat(missing.any(axis=2, keepdims=True), channels, axis=2)
    return crop_resize(missing.astype(np.float32), box, size).reshape(-1, channels) == 0
