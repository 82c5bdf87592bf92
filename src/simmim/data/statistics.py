"""Mean and standard deviation of a data set's pixels, for normalisation.

Shapes: `H W` pixels, `C` channels.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.data.augment import CentreCrop, load
from simmim.data.decode import BadImage
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
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure mean and standard deviation (C,) of pixels / 255, over centre crops of up to `limit` images.

    `seed` draws the images. They are resized to 224×224 first, since models see resized images, which vary less.
    With `spectrogram` they are those of the log-mel energies of sounds, of the samples in their middle. Unreadable
    images are skipped. A constant channel gets deviation 1. Raises `UserError` if no image can be read.
    """
    crop = CentreCrop(size=(spectrogram.samples, 1) if spectrogram else (224, 224))

    def moments(index: int) -> list[NDArray[Any]]:
        try:
            pixels = load(read_raw(source, index), crop.box, size=crop.size, channels=channels, dtype=dtype)
        except BadImage:
            return []
        if spectrogram:
            scaled = spectrogram(np, pixels.reshape(1, -1)).reshape(-1, 1).astype(np.float64)
        else:
            scaled = pixels.reshape(-1, channels) / np.float64(255)
        return [np.stack((scaled.mean(axis=0), np.square(scaled).mean(axis=0)))]

    drawn = np.argsort(sample_keys(seed, 0, np.arange(len(source)), stream="statistics"))[:limit]
    with ThreadPoolExecutor() as pool:
        found = list(chain.from_iterable(pool.map(moments, drawn.tolist())))
    if not found:
        raise UserError(f"none of {len(drawn)} images can be read, so their mean and deviation are not known")
    mean, mean_square = np.mean(found, axis=0)
    std = np.sqrt(np.maximum(mean_square - np.square(mean), 0))
    changes = std > 1e-6 * np.abs(mean)  # smaller values are rounding errors of constants
    return tuple(mean.tolist()), tuple(np.where(changes, std, 1.0).tolist())
