"""Log-mel spectrograms as Kaldi computes them, which AudioMAE, AST and SSAST train on (arXiv 2207.06405, 2104.01778).

Each frame loses its mean, is sharpened by a pre-emphasis of 0.97 and weighted by a symmetric Hann window. Triangular
filters in the mel scale sum its power spectrum, and the logarithm follows. Nothing is dithered. The array library is an
argument (`xp`), so that NumPy and PyTorch share one text; values are float32.

Shapes: `B` sounds, `n` samples, `T` frames, `F` frequencies of the transform, `M` mel bands.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.errors import UserError

PRE_EMPHASIS = 0.97
FLOOR = 1.1920929e-07
"""Least power of a band: the spacing of float32 at 1, as in Kaldi. Its logarithm is -15.94."""
_FULL_SCALE = 32768  # of 16-bit samples; the loudest float sample is 1


@dataclass(frozen=True, kw_only=True)
class Spectrogram:
    """Turn samples (B, n) into the logarithms of mel energies (B, T, M).

    Samples are floats within -1..1. Exactly `samples` of them make `frames` frames. Raises `UserError` for settings
    that contradict each other.
    """

    rate: int
    """Samples a second."""
    window: int
    """Samples of a frame."""
    hop: int
    """Samples from one frame to the next."""
    frames: int
    bands: int
    low_hz: float
    high_hz: float

    def __post_init__(self) -> None:
        if not 2 <= self.hop <= self.window:
            raise UserError(
                f"a hop of {self.hop} samples is not within 2 and the window of {self.window}; "
                "use --sound.window-ms 25 --sound.hop-ms 10"
            )
        if not 0 <= self.low_hz < self.high_hz <= self.rate / 2:
            raise UserError(
                f"mel bands from {self.low_hz:g} to {self.high_hz:g} Hz are not within 0 and half the rate "
                f"{self.rate}; use --sound.low-hz 20, and leave --sound.high-hz out"
            )

    @property
    def samples(self) -> int:
        """Number of samples that make all frames."""
        return self.window + (self.frames - 1) * self.hop

    @property
    def transform(self) -> int:
        """Samples of the Fourier transform: the window filled up with zeros to a power of two."""
        return 1 << (self.window - 1).bit_length()

    @cached_property
    def hann(self) -> NDArray[np.float32]:
        """The window (window,)."""
        angles = 2 * math.pi * np.arange(self.window) / (self.window - 1)
        return (0.5 - 0.5 * np.cos(angles)).astype(np.float32)

    @cached_property
    def filters(self) -> NDArray[np.float32]:
        """Triangular filters (F, M), of height 1, evenly spaced in mel = 1127 ln(1 + Hz / 700)."""
        edges = np.linspace(_mel(self.low_hz), _mel(self.high_hz), self.bands + 2)
        left, centre, right = edges[:-2], edges[1:-1], edges[2:]
        bins = _mel(np.arange(self.transform // 2 + 1) * self.rate / self.transform)[:, None]
        weights = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
        weights[-1] = 0  # Kaldi leaves out the highest frequency
        return np.maximum(weights, 0).astype(np.float32)

    def __call__(self, xp: Any, samples: Any, hann: Any = None, filters: Any = None) -> Any:
        """Compute log-mel energies (B, T, M) of samples (B, n), int16 or float32.

        An engine passes its own arrays `hann` and `filters`, which are on its device. Shapes depend on settings alone.
        """
        hann, filters = self.hann if hann is None else hann, self.filters if filters is None else filters
        frames = self._frame(xp, samples)  # (B, T, window)
        frames = frames - xp.mean(frames, axis=-1, keepdims=True)
        before = xp.concatenate((frames[..., :1], frames[..., :-1]), axis=-1)
        power = xp.fft.rfft((frames - PRE_EMPHASIS * before) * hann, n=self.transform)
        energies = (power.real**2 + power.imag**2) @ filters
        return xp.log(xp.clip(energies, FLOOR, None))

    def _frame(self, xp: Any, samples: Any) -> Any:
        """Cut overlapping frames: (B, n) → (B, T, window). Slices of whole hops only, which any compiler takes."""
        hops = -(-self.window // self.hop)  # that a frame touches
        missing = (self.frames + hops - 1) * self.hop - self.samples
        scale = 1 / _FULL_SCALE if samples.dtype in (xp.int16,) else 1.0
        samples = samples * np.float32(scale) if xp is np else samples.float() * scale
        if missing:
            samples = xp.concatenate((samples, xp.zeros_like(samples[:, :missing])), axis=1)
        parts = xp.reshape(samples, (-1, self.frames + hops - 1, self.hop))
        together = [parts[:, first : first + self.frames] for first in range(hops)]
        return xp.concatenate(together, axis=-1)[..., : self.window]


def _mel(hz: Any) -> Any:
    return 1127 * np.log(1 + np.asarray(hz) / 700)
