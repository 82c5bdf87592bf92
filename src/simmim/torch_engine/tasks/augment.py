"""Augmentations of supervised fine-tuning: of single images on the CPU, mixup and cutmix on the device.

The operations are timm's and torchvision's; the numbers are drawn from an image's key, so that an image looks the same
after a resume and on any number of processes.

Shapes: `B` images, `H W` pixels, `C` channels, `K` classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import auto_augment as ops
from torch import Tensor
from torchvision.transforms import functional as transforms

from simmim.method.random_keys import sample_keys, uniforms

# The 15 operations of timm's "inc1" set, with their argument for a strength in 0..1 and a sign.
_OPERATIONS: tuple[tuple[Callable[..., Image.Image], Callable[[float, int], tuple[Any, ...]]], ...] = (
    (ops.auto_contrast, lambda strength, sign: ()),
    (ops.equalize, lambda strength, sign: ()),
    (ops.invert, lambda strength, sign: ()),
    (ops.rotate, lambda strength, sign: (sign * 30 * strength,)),
    (ops.posterize, lambda strength, sign: (max(1, 4 - int(4 * strength)),)),
    (ops.solarize, lambda strength, sign: (256 - min(256, int(256 * strength)),)),
    (ops.solarize_add, lambda strength, sign: (min(128, int(110 * strength)),)),
    (ops.color, lambda strength, sign: (max(0.1, 1 + sign * 0.9 * strength),)),
    (ops.contrast, lambda strength, sign: (max(0.1, 1 + sign * 0.9 * strength),)),
    (ops.brightness, lambda strength, sign: (max(0.1, 1 + sign * 0.9 * strength),)),
    (ops.sharpness, lambda strength, sign: (max(0.1, 1 + sign * 0.9 * strength),)),
    (ops.shear_x, lambda strength, sign: (sign * 0.3 * strength,)),
    (ops.shear_y, lambda strength, sign: (sign * 0.3 * strength,)),
    (ops.translate_x_rel, lambda strength, sign: (sign * 0.45 * strength,)),
    (ops.translate_y_rel, lambda strength, sign: (sign * 0.45 * strength,)),
)


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment (arXiv 1909.13719) as timm's rand-m9-mstd0.5-inc1: two operations, each with probability 1/2.

    `magnitude` is 0..10, drawn anew for each with standard deviation 0.5. uint8 images (H, W, C) of 1 or 3 channels.
    """

    magnitude: float = 9.0
    fill: tuple[int, ...] = (124, 116, 104)

    def __call__(self, image: NDArray[np.uint8], key: NDArray[np.uint64]) -> NDArray[np.uint8]:
        draws = uniforms(key, 10)[0].reshape(2, 5)
        grey = image.shape[-1] == 1
        picture = Image.fromarray(image[..., 0] if grey else image)
        fill = self.fill[0] if grey else self.fill
        for use, which, side, first, second in draws:
            if use > 0.5:
                continue
            # Box-Muller: two uniform numbers make a normal one.
            normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
            strength = float(np.clip(self.magnitude + 0.5 * normal, 0, 10)) / 10
            operation, argument = _OPERATIONS[int(which * len(_OPERATIONS))]
            picture = operation(
                picture, *argument(strength, 1 if side < 0.5 else -1), fillcolor=fill, resample=Image.Resampling.BICUBIC
            )
        return np.asarray(picture).reshape(image.shape)


@dataclass(frozen=True, kw_only=True)
class ColourJitter:
    """Random brightness, contrast, saturation and hue, each with probability 1/2, as the segmentation of Swin has them.

    A factor is 1 ± `strength` (0..1), and the hue is turned by a fifth of that at most. uint8 images (H, W, C) of 1 or
    3 channels.
    """

    strength: float = 0.5

    def __call__(self, image: NDArray[np.uint8], key: NDArray[np.uint64]) -> NDArray[np.uint8]:
        draws = uniforms(key, 8)[0].reshape(4, 2)
        grey = image.shape[-1] == 1
        picture: Any = Image.fromarray(image[..., 0] if grey else image)
        changes = [transforms.adjust_brightness, transforms.adjust_contrast]
        if not grey:
            changes += [transforms.adjust_saturation, transforms.adjust_hue]
        for change, (use, amount) in zip(changes, draws, strict=False):
            if use < 0.5:
                shift = self.strength * (2 * amount - 1)
                picture = change(picture, shift / 5 if change is transforms.adjust_hue else 1 + shift)
        return np.asarray(picture).reshape(image.shape)


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """Noise over a random rectangle, with probability `probability` (arXiv 1708.04896; timm's mode "pixel").

    The rectangle takes 2 % to a third of the area; the noise has the mean and deviation of the data, clipped to pixels.
    """

    probability: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: NDArray[Any], key: NDArray[np.uint64]) -> NDArray[Any]:
        height, width, channels = image.shape
        draws = uniforms(key + np.uint64(1), 41)[0]
        if draws[0] >= self.probability:
            return image
        for area_draw, shape_draw, top, left in draws[1:].reshape(10, 4):
            area = (0.02 + (1 / 3 - 0.02) * area_draw) * height * width
            ratio = np.exp(np.log(0.3) + (np.log(1 / 0.3) - np.log(0.3)) * shape_draw)
            h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if h < height and w < width:
                y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
                noise = np.random.Generator(np.random.Philox(key=int(key[0]))).standard_normal((h, w, channels))
                pixels = 255 * (np.array(self.mean) + np.array(self.std) * noise)
                image = image.copy()
                image[y : y + h, x : x + w] = np.clip(pixels, 0, 255).astype(image.dtype)
                return image
        return image


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixup (arXiv 1710.09412) or cutmix (1905.04899), one of them a step, with timm's even chance.

    An image is mixed with the one at the mirrored place of its (micro-)batch.
    """

    mixup: float = 0.8
    cutmix: float = 1.0

    def draw(self, seed: int, step: int, size: int, height: int, width: int) -> NDArray[np.float32]:
        """Draw what `mix_images` needs of a step, equal for all its images: (B, 5), the image's own share and a box."""
        key = sample_keys(seed, step, 0, stream="mix")
        rng = np.random.Generator(np.random.Philox(key=int(key[0])))
        row = np.zeros(5, np.float32)
        use_cutmix = self.cutmix > 0 and (self.mixup <= 0 or rng.random() < 0.5)
        share = rng.beta(self.cutmix, self.cutmix) if use_cutmix else rng.beta(self.mixup, self.mixup)
        if use_cutmix:
            side = np.sqrt(1 - share)
            y, x = rng.integers(height), rng.integers(width)
            half_h, half_w = int(height * side) // 2, int(width * side) // 2
            top, bottom = np.clip((y - half_h, y + half_h), 0, height)
            left, right = np.clip((x - half_w, x + half_w), 0, width)
            share = 1 - (bottom - top) * (right - left) / (height * width)
            row[1:] = top, bottom, left, right
        row[0] = share
        return np.tile(row, (size, 1))


def mix_images(images: Tensor, mix: Tensor) -> Tensor:
    """Mix images (B, C, H, W) with their mirrored batch as `mix` (B, 5) says: in its box, or all over without one."""
    other = images.flip(0)
    share, top, bottom, left, right = (column.view(-1, 1, 1, 1) for column in mix.unbind(1))
    rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    blended = images * share + other * (1 - share)
    return torch.where(bottom > top, torch.where(inside, other, images), blended)


def soft_labels(labels: Tensor, classes: int, smoothing: float, mix: Tensor | None) -> Tensor:
    """Compute class shares (B, K) of labels (B,): smoothed, and mixed as the images were."""
    low = smoothing / classes
    shares = torch.full((len(labels), classes), low, device=labels.device)
    shares.scatter_(1, labels.unsqueeze(1), 1 - smoothing + low)
    if mix is None:
        return shares
    share = mix[:, :1]
    return shares * share + shares.flip(0) * (1 - share)
