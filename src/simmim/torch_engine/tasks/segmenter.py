"""The model of semantic segmentation, what one step trains, and its predictions on images of any size.

The decoder is UPerNet (arXiv 1807.10221), as in SimMIM, Swin, BEiT and MAE, in the implementation of Transformers.
That of segmentation_models_pytorch was compared: it wants two finer levels that no encoder here has, and leaves them
unused, normalises each level once more, and has no classifier; and Transformers is a dependency of export already.

Shapes: `B` images, `C` channels, `H W` pixels, `h w` cells of the finest feature map, `K` classes.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from simmim.config.tasks import SegmentConfig
from simmim.data.augment import crop_resize
from simmim.data.labelled.segmentation import IGNORE, Mask, Windows
from simmim.errors import UserError
from simmim.torch_engine.models.drop_path import route_drop_path
from simmim.torch_engine.models.evaluating import by_halves, evaluating
from simmim.torch_engine.models.masked_image_model import mirror
from simmim.torch_engine.tasks.base import Predictor, TaskStep
from simmim.torch_engine.tasks.pyramid import Pyramid, create_pyramid
from simmim.torch_engine.train.update import DTYPES
from simmim.training.pictures import lay_classes, to_rgb


class Segmenter(nn.Module):
    """Normalised images (B, C, H, W) → class scores (B, K, h, w)."""

    def __init__(self, pyramid: Pyramid, classes: int, channels: int):
        if importlib.util.find_spec("transformers") is None:
            raise UserError("segmentation needs the package transformers; pip install 'simmim[tasks]'")
        from transformers.models.upernet import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetHead

        super().__init__()
        self.pyramid = pyramid
        config: Any = UperNetConfig(hidden_size=channels)
        config.num_labels = classes
        self.decoder = UperNetHead(config, list(pyramid.channels))

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.pyramid(images))


class SegmentStep(TaskStep):
    """Cross-entropy of a batch's pixels, and the Dice loss of its images if asked for."""

    def __init__(self, model: Segmenter, config: SegmentConfig):
        assert isinstance(config.mean, tuple)
        assert isinstance(config.std, tuple)
        super().__init__(config.mean, config.std)
        self.draws = route_drop_path(model.pyramid.backbone)
        self.model = model
        self.dice = config.dice

    @property
    def backbone(self) -> nn.Module:
        return self.model.pyramid.backbone

    def forward(self, image: Tensor, flip: Tensor, label: Tensor, drop_path: Tensor | None = None) -> dict[str, Tensor]:
        self.draws.uniform = drop_path
        labels = mirror(label.long(), flip)  # (B, H, W)
        scores = _enlarge(self.model(self.prepare(image, flip)).float(), labels.shape[1:])
        # Over all pixels, those without a class too: so an image weighs the same whatever others are in its batch.
        loss = functional.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()
        if not self.dice:
            return {"loss": loss}
        dice = dice_loss(scores, labels)
        return {"loss": loss + self.dice * dice, "loss/cross_entropy": loss, "loss/dice": dice}


def dice_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute 1 - the soft Dice coefficient (arXiv 1606.04797), averaged over an image's classes, then over images.

    `scores` (B, K, H, W) before softmax, `labels` (B, H, W). Pixels without a class do not count, nor do classes that
    an image does not have: cross-entropy holds those down.
    """
    judged = (labels != IGNORE).flatten(1)  # (B, H W)
    places = labels.flatten(1).where(judged, 0)
    shares = scores.flatten(2).softmax(dim=1) * judged.unsqueeze(1)  # (B, K, H W)
    nothing = scores.new_zeros(scores.shape[:2])  # (B, K)
    sizes = nothing.scatter_add(1, places, judged.float())
    both = nothing.scatter_add(1, places, shares.gather(1, places.unsqueeze(1)).squeeze(1))
    there = sizes > 0
    lost = there * (1 - 2 * both / (shares.sum(dim=2) + sizes).clamp(min=1))
    return (lost.sum(dim=1) / there.sum(dim=1).clamp(min=1)).mean()


def _enlarge(scores: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


class SegmentPredictor(Predictor):
    """The classes of pixels of images of any size."""

    def __init__(self, step: SegmentStep, config: SegmentConfig, classes: tuple[str, ...], dtype: np.dtype[Any]):
        self.step, self.config, self.classes, self.dtype = step, config, classes, dtype
        self.channels = config.channels
        self.windows = windows(config)

    def predict(self, images: Sequence[NDArray[Any]]) -> list[dict[str, Any]]:
        """Predict the classes of images (H, W, C): "mask" (H, W), and "shares" of the pixels for each class found."""
        found = []
        for mask in self.masks(images):
            counts = np.bincount(mask.ravel(), minlength=len(self.classes)) / mask.size
            shares = {name: float(share) for name, share in zip(self.classes, counts, strict=True) if share}
            found.append({"mask": mask, "shares": shares})
        return found

    def draw(self, image: NDArray[Any], prediction: dict[str, Any]) -> NDArray[np.uint8]:
        return lay_classes(to_picture(image), prediction["mask"], len(self.classes))

    @torch.no_grad()
    def masks(self, images: Sequence[NDArray[Any]]) -> list[Mask]:
        """Predict the classes (H, W) of images (H, W, C): where windows overlap, the sum of their scores decides."""
        boxes = [self.windows.boxes(*image.shape[:2]) for image in images]
        crops = [
            crop_resize(image, box, self.windows.size)
            for image, covering in zip(images, boxes, strict=True)
            for box in covering
        ]
        scores, masks = self._scores(crops), []
        with evaluating(self.step):
            for image, covering in zip(images, boxes, strict=True):
                total = torch.zeros(len(self.classes), *image.shape[:2], device=self.step.mean.device)
                for (top, left, height, width), part in zip(covering, scores, strict=False):
                    total[:, top : top + height, left : left + width] += _enlarge(part[None], (height, width))[0]
                masks.append(total.argmax(dim=0).cpu().numpy().astype(_mask_dtype(len(self.classes))))
        return masks

    def _scores(self, crops: list[NDArray[Any]]) -> Iterator[Tensor]:
        """Yield the class scores (K, h, w) of each crop."""
        device, dtype = self.step.mean.device, DTYPES[self.config.precision]

        def score(part: slice) -> Tensor:
            pixels = torch.from_numpy(np.stack(crops[part])).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return self.step.model(self.step.normalize(pixels)).float()

        size = self.config.batch_size
        for scores in by_halves(score, (slice(at, min(at + size, len(crops))) for at in range(0, len(crops), size))):
            yield from scores


def build_segment_step(config: SegmentConfig, weights: dict[str, Tensor] | None, classes: int) -> SegmentStep:
    """Build the model of a complete configuration; the encoder has `weights` (timm's names), or random ones."""
    # ViTDet's pyramid has 256 channels where UPerNet has 512.
    pyramid = create_pyramid(config, weights, channels=config.decoder_channels // 2)
    return SegmentStep(Segmenter(pyramid, classes, config.decoder_channels), config)


def windows(config: SegmentConfig) -> Windows:
    assert config.image_size is not None
    return Windows(size=config.image_size, whole=config.evaluation == "resize", zoom=config.zoom)


def _mask_dtype(classes: int) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if classes <= IGNORE else np.uint16


def to_picture(image: NDArray[Any]) -> NDArray[np.uint8]:
    return to_rgb(image[None] / np.float32(255))[0]
