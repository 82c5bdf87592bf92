"""Counter-based random numbers keyed by (seed, epoch, image).

Every random choice about an image (crop, flip, mask, drop path) is drawn from its 64-bit key in that epoch. The choice
is the same on every engine, for any world size and after a resume, and a whole batch is drawn at once. The generator is
SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), used as a counter-based hash.

Shapes: `B` images, `n` numbers an image.
"""

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LAST = 2**64 - 1
_GOLDEN_INT, _MULTIPLIER_1_INT, _MULTIPLIER_2_INT = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GOLDEN, _MULTIPLIER_1, _MULTIPLIER_2 = map(np.uint64, (_GOLDEN_INT, _MULTIPLIER_1_INT, _MULTIPLIER_2_INT))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2**64 by design
        z = z + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MULTIPLIER_1
        z = (z ^ (z >> np.uint64(27))) * _MULTIPLIER_2
    return z ^ (z >> np.uint64(31))


def sample_keys(seed: int, epoch: ArrayLike, index: ArrayLike, *, stream: str) -> NDArray[np.uint64]:
    """Compute keys (B,) of the images `index` (B,) in the epochs `epoch`, (B,) or one for all.

    `stream` names what is drawn ("mask", "crop", …): two streams of one image are independent.
    """
    key = _mix(np.asarray([zlib.crc32(stream.encode())], np.uint64))
    key = _mix(key ^ np.uint64(seed % 2**64))
    key = _mix(key ^ np.asarray(epoch).astype(np.uint64))
    return _mix(key ^ np.asarray(index).astype(np.uint64))


def random_bits(keys: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Return `n` independent 64-bit numbers for each key: (B,) → (B, n)."""
    with np.errstate(over="ignore"):
        counters = np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
        return _mix(keys[:, None] + counters)


def uniforms(keys: NDArray[np.uint64], n: int) -> NDArray[np.float64]:
    """Return `n` independent numbers in [0, 1) for each key: (B,) → (B, n)."""
    return (random_bits(keys, n) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_key(seed: int, epoch: int, index: int, *, stream: str) -> int:
    """Compute one image's key: the same value as `sample_keys`, ten times faster for a single image."""
    return _mix_one(_epoch_key(seed, epoch, stream) ^ index)


def draws(key: int, first: int, n: int) -> list[float]:
    """Return `n` of a key's `uniforms`, starting at number `first`."""
    numbers = range(first + 1, first + n + 1)
    return [(_mix_one(key + number * _GOLDEN_INT) >> 11) * 2.0**-53 for number in numbers]


@lru_cache(maxsize=64)
def _epoch_key(seed: int, epoch: int, stream: str) -> int:
    key = _mix_one(zlib.crc32(stream.encode()))
    for part in (seed, epoch):
        key = _mix_one(key ^ part % 2**64)
    return key


def _mix_one(z: int) -> int:
    z = z + _GOLDEN_INT & _LAST
    z = (z ^ z >> 30) * _MULTIPLIER_1_INT & _LAST
    z = (z ^ z >> 27) * _MULTIPLIER_2_INT & _LAST
    return z ^ z >> 31
