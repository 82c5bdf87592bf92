"""Spectrograms as people expect them: time to the right, low frequencies below, loudness as colour.

Shapes: `B` sounds, `T` frames, `M` mel bands.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_DARKEST, _BRIGHTEST = 0.02, 0.998  # quantiles of a spectrogram that end the range of colours


def upright(maps: NDArray[Any]) -> NDArray[Any]:
    """Turn maps (B, T, M, …) so that rows are bands, the highest first: (B, M, T, …)."""
    return np.flip(np.swapaxes(maps, 1, 2), 1)


def in_colour(values: NDArray[np.floating], like: NDArray[np.floating] | None = None) -> NDArray[np.float32]:
    """Draw spectrograms (B, T, M) in matplotlib's magma: (B, M, T, 3) within 0..1.

    The range of colours is that of the spectrogram itself, or of that in its place in `like`.
    """
    from matplotlib import colormaps

    low, high = np.quantile(values if like is None else like, (_DARKEST, _BRIGHTEST), axis=(1, 2), keepdims=True)
    scaled = (values - low) / np.maximum(high - low, 1e-6)
    return colormaps["magma"](upright(np.clip(scaled, 0, 1)))[..., :3].astype(np.float32)
