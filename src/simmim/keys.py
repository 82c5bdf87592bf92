"""Random numbers that depend on (seed, epoch, image) and on nothing else.

Every random choice about an image (its crop, flip, mask, drop path) is drawn from a 64-bit key of that image in that
epoch. So the choice is the same on every engine, on any number of processes and after a resume, and a whole batch is
drawn at once. The generator is SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), used as a counter-based hash.

Shapes: `B` images, `n` numbers an image.
"""

import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2**64 by design
        z = z + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MULTIPLIER_1
        z = (z ^ (z >> np.uint64(27))) * _MULTIPLIER_2
    return z ^ (z >> np.uint64(31))


def sample_keys(seed: int, epoch: ArrayLike, index: ArrayLike, *, stream: str) -> NDArray[np.uint64]:
    """Keys (B,) of the images `index` (B,) in the epochs `epoch` (B,) or one epoch for all.

    `stream` names what is drawn ("mask", "crop", …): two streams of one image are independent.
    """
    key = _mix(np.asarray([zlib.crc32(stream.encode())], np.uint64))
    key = _mix(key ^ np.uint64(seed % 2**64))
    key = _mix(key ^ np.asarray(epoch).astype(np.uint64))
    return _mix(key ^ np.asarray(index).astype(np.uint64))


def random_bits(keys: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """`n` independent 64-bit numbers for each key: (B,) → (B, n)."""
    with np.errstate(over="ignore"):
        counters = np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
        return _mix(keys[:, None] + counters)


def uniforms(keys: NDArray[np.uint64], n: int) -> NDArray[np.float64]:
    """`n` independent numbers in [0, 1) for each key: (B,) → (B, n)."""
    return (random_bits(keys, n) >> np.uint64(11)).astype(np.float64) * 2.0**-53
