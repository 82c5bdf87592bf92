"""Spectrograms of sounds, computed on the device as a part of the step.

Shapes: `B` sounds, `n` samples, `T` frames, `M` mel bands.
"""

import torch
from torch import Tensor, nn

from simmim.method.spectrogram import Spectrogram


class FrontEnd(nn.Module):
    """Samples (B, n) or (B, n, 1, 1), int16 or float32 within -1..1 → log-mel energies (B, 1, T, M) in fp32.

    It has no parameters, and its constants are in no checkpoint. Shapes are static and nothing waits for the device.
    """

    hann: Tensor
    filters: Tensor

    def __init__(self, spectrogram: Spectrogram):
        super().__init__()
        self.spectrogram = spectrogram
        self.register_buffer("hann", torch.from_numpy(spectrogram.hann), persistent=False)
        self.register_buffer("filters", torch.from_numpy(spectrogram.filters), persistent=False)

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Tensor:
        with torch.autocast(samples.device.type, enabled=False):
            return self.spectrogram(torch, samples.flatten(1), self.hann, self.filters).unsqueeze(1)
