"""The image classifier: what one step trains, and its predictions.

Shapes: `B` images, `C` channels, `H W` pixels, `K` classes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simmim.config.tasks import ClassifyConfig
from simmim.data.augment import CentreCrop, load
from simmim.data.picture import Raw
from simmim.torch_engine.models.drop_path import route_drop_path
from simmim.torch_engine.models.evaluating import by_halves
from simmim.torch_engine.models.masked_image_model import PixelStep
from simmim.torch_engine.tasks.augment import mix_images, soft_labels
from simmim.torch_engine.tasks.base import Predictor, TaskStep
from simmim.torch_engine.tasks.sound_pictures import picture_of
from simmim.torch_engine.tasks.spec_augment import hide_strips
from simmim.training.pictures import captioned


class ClassifyStep(TaskStep):
    """Compute the cross-entropy of a batch whose images and labels may be mixed."""

    def __init__(self, backbone: nn.Module, config: ClassifyConfig, weights: NDArray[np.float32]):
        assert isinstance(config.mean, tuple)
        assert isinstance(config.std, tuple)
        super().__init__(config.mean, config.std, config.spectrogram)
        self.draws = route_drop_path(backbone)
        self.backbone = backbone
        self.smoothing = config.smoothing
        self.decay = config.ema_decay
        # Part of the module, so that checkpoints hold it.
        self.average = copy.deepcopy(backbone).requires_grad_(False) if config.ema_decay else None
        self.register_buffer("class_weights", torch.from_numpy(weights), persistent=False)
        self.class_weights: Tensor

    def forward(
        self,
        image: Tensor,
        flip: Tensor,
        label: Tensor,
        mix: Tensor | None = None,
        drop_path: Tensor | None = None,
        strips: Tensor | None = None,
    ) -> dict[str, Tensor]:
        self.draws.uniform = drop_path
        images = self.prepare(image, flip)
        if strips is not None:
            images = hide_strips(images, strips)
        if mix is not None:
            images = mix_images(images, mix)
        logits = self.backbone(images).float()
        shares = soft_labels(label, logits.shape[1], self.smoothing, mix) * self.class_weights
        return {"loss": -(shares * logits.log_softmax(dim=1)).sum(dim=1).mean()}

    @torch.no_grad()
    def after_update(self, finite: Tensor) -> None:
        if self.average is None or self.decay is None:
            return
        weight = finite.float() * (1 - self.decay)
        for average, now in zip(self.average.state_dict().values(), self.backbone.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(now, weight)
            else:
                average.copy_(now)

    @property
    def evaluated(self) -> nn.Module:
        """The module that is evaluated and saved: the average if there is one."""
        return self.backbone if self.average is None else self.average


@dataclass(frozen=True, kw_only=True)
class ClassifyPredictor(Predictor):
    """A classifier that prepares images as its evaluation did: the same crop, colours and precision."""

    backbone: nn.Module
    pixels: PixelStep
    crop: CentreCrop
    channels: int
    classes: tuple[str, ...]
    dtype: np.dtype[Any]
    rate: int | None = None

    def whole(self, raw: Raw) -> NDArray[Any]:
        return super().whole(raw) if self.rate is None else self.read(raw)

    def read(self, raw: Raw) -> NDArray[Any]:
        """Decode the crop that evaluation sees; of a large JPEG, no more than it needs."""
        return load(raw, self.crop.box, size=self.crop.size, channels=self.channels, dtype=self.dtype)

    @torch.no_grad()
    def predict(self, images: Sequence[NDArray[Any]]) -> list[dict[str, Any]]:
        """Return "label", "probability" and "top" of each image; "top" lists [label, probability], best first."""
        return [self._name(row) for row in classify(self.backbone, self.pixels, np.stack(images))]

    def _name(self, probabilities: NDArray[np.float32]) -> dict[str, Any]:
        order = np.argsort(-probabilities, kind="stable")
        top = [[self.classes[k], float(probabilities[k])] for k in order]
        return {"label": top[0][0], "probability": top[0][1], "top": top}

    def draw(self, image: NDArray[Any], prediction: dict[str, Any]) -> NDArray[np.uint8]:
        return captioned(picture_of(self.pixels, image), f"{prediction['label']} {prediction['probability']:.3f}")


def classify(backbone: nn.Module, pixels: PixelStep, images: NDArray[Any]) -> NDArray[np.float32]:
    """Return class probabilities (B, K) of cropped images (B, H, W, C) in 0..255."""

    def judge(part: slice) -> NDArray[np.float32]:
        logits = backbone(pixels.normalize(torch.from_numpy(images[part]).to(pixels.mean.device)))
        return logits.float().softmax(dim=1).cpu().numpy()

    return np.concatenate(list(by_halves(judge, [slice(0, len(images))])))
