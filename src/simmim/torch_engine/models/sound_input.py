"""Front end of a saved encoder of sounds.

Shapes: `B` sounds, `n` samples, `T` frames, `M` mel bands.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmim.config.sound import Sound
from simmim.data.augment import CentreCrop, load
from simmim.data.sounds import open_clip
from simmim.torch_engine.models.masked_image_model import PixelStep


class SoundInput(PixelStep):
    """Samples (B, n) within -1..1, or int16, at `rate` → what the encoder takes: (B, 1, T, M), normalised.

    `simmim.load_encoder` returns an encoder of sounds with one as its attribute `front_end`. It takes `samples` samples
    of a sound, no more and no fewer, which `read` gives of a file.
    """

    def __init__(self, settings: dict[str, Any]):
        """`settings` are those of a saved encoder's config.json."""
        facts = settings["pretrained_cfg"]
        _, frames, bands = facts["input_size"]
        self.sound = Sound(**settings["sound"])
        spectrogram = self.sound.spectrogram((frames, bands))
        super().__init__(tuple(facts["mean"]), tuple(facts["std"]), spectrogram)
        self.rate, self.samples = spectrogram.rate, spectrogram.samples

    def forward(self, samples: Tensor) -> Tensor:
        return self.normalize(samples)

    def read(self, file: str | Path) -> Tensor:
        """Read the middle of a sound file, filled up with silence if it is short: (1, n). Raises `UserError`."""
        crop = CentreCrop(size=(self.samples, 1))
        clip = open_clip(str(file), self.rate)
        samples = load(clip, crop.box, size=crop.size, channels=1, dtype=np.float32)
        return torch.from_numpy(samples.reshape(1, -1)).to(self.mean.device)
