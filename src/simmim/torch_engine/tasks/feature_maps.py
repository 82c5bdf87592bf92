"""Features of every feature-map cell of some images, for pictures of them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.torch_engine.models.evaluating import by_halves, evaluating
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.train.update import DTYPES
from simmim.training.session import parts


@torch.no_grad()
def feature_maps(step: PretrainStep, config: PretrainConfig, pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Encode whole images (B, H, W, C) in 0..255, part by part: (B, h, w, D). Draws no random number."""
    device, dtype = step.mean.device, DTYPES[config.precision]

    def encode(part: slice) -> NDArray[np.float32]:
        images = step.normalize(torch.from_numpy(pixels[part]).to(device))
        return step.model.encoder(images).float().cpu().numpy()

    with evaluating(step), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return np.concatenate(list(by_halves(encode, parts(len(pixels), config))))
