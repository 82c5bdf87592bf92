"""Settings of sounds: how a file becomes a log-mel spectrogram, and what changes it at random."""

from dataclasses import dataclass
from typing import Any

from simmim.config.field_types import NotNegativeReal, Positive, PositiveReal, Word
from simmim.method.spectrogram import Spectrogram

SPECTROGRAM = (1024, 128)
"""Frames and mel bands of a spectrogram where no size is given (AudioMAE: 10 s)."""


@dataclass(frozen=True, kw_only=True)
class Sound:
    """Front end of sounds. Defaults are AudioMAE's; --image-size is frames x mel bands."""

    rate: Positive = 16000
    """Samples a second, to which sounds are resampled."""
    window_ms: PositiveReal = 25.0
    """Milliseconds of a frame."""
    hop_ms: PositiveReal = 10.0
    """Milliseconds from one frame to the next."""
    low_hz: NotNegativeReal = 20.0
    """Lowest frequency of the mel bands."""
    high_hz: NotNegativeReal = 0.0
    """Highest frequency of the mel bands (0: half the rate)."""
    gain_db: NotNegativeReal = 0.0
    """Largest random change of loudness in training, up or down, in dB (0: none)."""
    noise: Word = None
    """Sounds to mix in at random in training, as --data takes them (default: none)."""
    noise_db: tuple[float, float] = (10.0, 30.0)
    """Range of the sound's level above that of the noise, in dB."""

    def spectrogram(self, size: tuple[int, int]) -> Spectrogram:
        """Return the front end for a size of frames and bands. Raises `UserError` for settings that cannot be."""
        return Spectrogram(
            rate=self.rate,
            window=int(self.rate * self.window_ms / 1000 + 1e-9),  # cut off as in Kaldi
            hop=int(self.rate * self.hop_ms / 1000 + 1e-9),
            frames=size[0],
            bands=size[1],
            low_hz=self.low_hz,
            high_hz=self.high_hz or self.rate / 2,
        )

    def as_table(self) -> dict[str, Any]:
        """Return what a saved encoder needs to know of its front end, beside the size of its input."""
        return {name: getattr(self, name) for name in ("rate", "window_ms", "hop_ms", "low_hz", "high_hz")}
