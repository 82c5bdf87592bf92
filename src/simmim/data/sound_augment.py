"""Random changes of sounds in training: which part is heard, how loud, and over which noise.

Shapes: `n` samples.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.config.sound import Sound
from simmim.data.augment import Box
from simmim.data.picture import BadImage
from simmim.data.sounds import Clip, Sounds, as_sounds
from simmim.data.sources import open_source, read_raw
from simmim.errors import UserError
from simmim.method.random_keys import draws, uniforms

_SILENCE = 1e-10  # power below which there is nothing to compare levels with


@dataclass(frozen=True, kw_only=True)
class TimeCrop:
    """Draw a part of `size[0]` samples, by a sound's key; a shorter sound is heard whole."""

    size: tuple[int, int]

    def box(self, key: int, height: int, width: int) -> Box:
        (place,) = draws(key, 0, 1)
        return Box(int(place * max(1, height - self.size[0] + 1)), 0, self.size[0], width)


@dataclass(frozen=True)
class SoundAugment:
    """Change loudness by up to `gain_db` and mix in noise, `noise_db` below the sound; random by the sound's key."""

    sound: Sound
    noise: Sounds | None

    def __call__(self, samples: NDArray[Any], key: NDArray[np.uint64]) -> NDArray[Any]:
        """Return samples (n, 1, 1) of the same type."""
        gain, which, place, level = uniforms(key, 4)[0]
        values = samples.astype(np.float64)
        if self.noise is not None:
            noise = self._noise(int(which * len(self.noise)), place, len(samples))
            low, high = self.sound.noise_db
            wanted = np.mean(values**2) / 10 ** ((low + (high - low) * level) / 10)
            if (power := np.mean(noise**2)) > _SILENCE:
                values += (noise * np.sqrt(wanted / power))[:, None, None]
        values *= 10 ** ((2 * gain - 1) * self.sound.gain_db / 20)
        if samples.dtype == np.int16:
            values = np.clip(np.rint(values), -32768, 32767)
        return values.astype(samples.dtype)

    def _noise(self, index: int, place: float, count: int) -> NDArray[np.float32]:
        """Read a random part of a noise, repeated where it is short: (count,)."""
        assert self.noise is not None
        try:
            clip = read_raw(self.noise, index)
            assert isinstance(clip, Clip)
            part = clip.cut(int(place * max(1, clip.height - count + 1)), min(count, clip.height))
        except BadImage as error:
            raise UserError(f"noise {self.noise.name(index)} cannot be used: {error}; remove it") from None
        return np.resize(part, count)


def sound_augment(sound: Sound) -> SoundAugment | None:
    """Open the noise of the settings; `None` where nothing is to be changed. Raises `UserError`."""
    if not sound.gain_db and sound.noise is None:
        return None
    return SoundAugment(sound, None if sound.noise is None else as_sounds(open_source(sound.noise), sound.rate))
