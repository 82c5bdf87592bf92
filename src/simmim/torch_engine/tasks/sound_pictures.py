"""Pictures of sounds, and what can be heard of a reconstruction.

Shapes: `B` sounds, `n` samples, `T` frames, `M` mel bands, `p` patch side.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simmim.config.pretraining import PretrainConfig
from simmim.data.sounds import write_wav
from simmim.method.griffin_lim import hear
from simmim.method.masks import upsample_mask
from simmim.method.spectrogram import FLOOR
from simmim.torch_engine.models.masked_image_model import PixelStep, PretrainStep
from simmim.training.masks import draw_masks
from simmim.training.pictures import reconstruction_panel, to_rgb
from simmim.training.spectrogram_pictures import in_colour, upright


@torch.no_grad()
def spectrograms(step: PixelStep, samples: NDArray[Any]) -> NDArray[np.float32]:
    """Return normalised spectrograms (B, T, M) of samples (B, n, 1, 1)."""
    return step.normalize(torch.from_numpy(samples).to(step.mean.device))[:, 0].cpu().numpy()


def picture_sounds(step: PixelStep, samples: NDArray[Any]) -> NDArray[np.uint8]:
    """Draw samples (B, n, 1, 1) as spectrograms (B, M, T, 3)."""
    return to_rgb(in_colour(spectrograms(step, samples)))


def picture_of(step: PixelStep, pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Draw one image (H, W, C) in 0..255, or the spectrogram of samples (n, 1, 1): (H, W, 3)."""
    if step.front_end is not None:
        return picture_sounds(step, pixels[None])[0]
    return to_rgb(pixels[None] / np.float32(255))[0]


def sound_panel(
    step: PretrainStep, samples: NDArray[Any], predicted: Tensor, masks: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Draw original, masked and reconstructed spectrograms.

    Of samples (B, n, 1, 1), predictions (B, T, M), normalised, and masks (B, T/p, M/p).
    """
    original = spectrograms(step, samples)
    shown = in_colour(predicted.float().cpu().numpy(), like=original)
    hidden: Any = upright(upsample_mask(masks, step.model.encoder.patch_size))
    return reconstruction_panel(in_colour(original), shown, hidden)


@torch.no_grad()
def write_wavs(step: PretrainStep, config: PretrainConfig, samples: NDArray[Any], seed: int, out: Path) -> None:
    """Write what can be heard of each sound (B, n, 1, 1) beside the picture `out`: `STEM-0-original.wav` and so on.

    The original is the samples themselves. The others are found by Griffin-Lim of the spectrogram without its hidden
    part, and with the prediction there.
    """
    found = config.spectrogram
    assert found is not None
    for number, one in enumerate(samples):
        images = step.normalize(torch.from_numpy(one[None]))
        mask = torch.from_numpy(draw_masks(config, seed, np.array([number]), step.model.encoder.patch_size))
        shown = step.model.show(step.model.predict(images, mask), images)
        assert shown is not None
        hidden = upsample_mask(mask.numpy(), step.model.encoder.patch_size)[0]
        original, predicted = (
            (values / step.scale.flatten() + step.mean.flatten()).cpu().numpy()
            for values in (images[0, 0], shown[0, ..., 0])
        )
        heard = {
            "original": one.ravel() / np.float32(32768) if one.dtype == np.int16 else one.ravel(),
            "masked": hear(found, np.where(hidden, np.log(FLOOR), original)),
            "reconstruction": hear(found, np.where(hidden, predicted, original)),
        }
        for name, values in heard.items():
            write_wav(out.with_name(f"{out.stem}-{number}-{name}.wav"), values, found.rate)
