"""Make a log-mel spectrogram audible: least squares for its powers, Griffin-Lim for its phases.

Griffin and Lim, "Signal estimation from modified short-time Fourier transform" (1984), with the momentum of Perraudin
et al. (2013). What a spectrogram lacks (phases, and detail within a mel band) is lost: speech sounds hoarse.

Shapes: `T` frames, `F` frequencies, `M` mel bands, `n` samples.
"""

import math

import numpy as np
from numpy.typing import NDArray

from simmim.method.spectrogram import PRE_EMPHASIS, Spectrogram

_MOMENTUM = 0.99
_LEAST = 1e-12


def hear(spectrogram: Spectrogram, log_mel: NDArray[np.floating], *, rounds: int = 60) -> NDArray[np.float32]:
    """Return samples (n,) within -1..1 whose log-mel energies come near to `log_mel` (T, M)."""
    magnitude = np.sqrt(_powers(spectrogram, np.exp(log_mel.astype(np.float64))))  # (T, F)
    angles = math.pi * np.arange(magnitude.shape[1]) / (magnitude.shape[1] - 1)
    magnitude /= np.abs(1 - PRE_EMPHASIS * np.exp(-1j * angles))  # of the sound before pre-emphasis
    phases = np.exp(2j * math.pi * np.random.default_rng(0).random(magnitude.shape))
    before = np.zeros_like(phases)
    for _ in range(rounds):
        found = _frames(spectrogram, _overlap(spectrogram, magnitude * phases))
        phases = found + _MOMENTUM * (found - before)
        phases /= np.maximum(np.abs(phases), _LEAST)
        before = found
    samples = _overlap(spectrogram, magnitude * phases)
    return (samples / max(1.0, np.abs(samples).max())).astype(np.float32)


def _powers(spectrogram: Spectrogram, energies: NDArray[np.float64], rounds: int = 100) -> NDArray[np.float64]:
    """Find powers (T, F), none below 0, whose mel energies come near to those given (T, M).

    By multiplicative updates of the squared distance (Lee and Seung, 2001), which keep them positive.
    """
    filters = spectrogram.filters.astype(np.float64)
    powers = energies @ (filters / np.maximum(filters.sum(0), _LEAST)).T
    wanted = energies @ filters.T
    for _ in range(rounds):
        powers *= wanted / np.maximum(powers @ filters @ filters.T, _LEAST)
    return powers


def _frames(spectrogram: Spectrogram, samples: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Transform windows of samples: (n,) → (T, F)."""
    windows = np.lib.stride_tricks.sliding_window_view(samples, spectrogram.window)[:: spectrogram.hop]
    return np.fft.rfft(windows * spectrogram.hann, n=spectrogram.transform)


def _overlap(spectrogram: Spectrogram, transformed: NDArray[np.complex128]) -> NDArray[np.float64]:
    """Return the samples (n,) whose windows come nearest to transformed ones (T, F)."""
    hann, window = spectrogram.hann.astype(np.float64), spectrogram.window
    parts = np.fft.irfft(transformed, n=spectrogram.transform)[:, :window] * hann
    samples, weights = np.zeros(spectrogram.samples), np.zeros(spectrogram.samples)
    for number, part in enumerate(parts):
        place = slice(number * spectrogram.hop, number * spectrogram.hop + window)
        samples[place] += part
        weights[place] += hann**2
    return samples / np.maximum(weights, 0.1 * weights.max())  # the ends, which few windows cover, fade
