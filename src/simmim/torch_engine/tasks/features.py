"""Frozen features of images: one vector each, from any layer of any encoder.

Shapes: `B` images of a batch, `N` images, `C` channels, `H W` pixels, `h w` feature-map cells, `D` features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simmim.config.commands import Pool
from simmim.data.augment import CentreCrop, load, whole_box
from simmim.data.bad_images import BadImages
from simmim.data.decode import decode
from simmim.data.evaluation import readable_batches
from simmim.data.picture import Raw
from simmim.data.sounds import as_sounds, read_as
from simmim.data.sources import ImageSource, sniff
from simmim.data.windows import middle_window
from simmim.errors import UserError
from simmim.torch_engine.models.evaluating import by_halves
from simmim.torch_engine.models.masked_image_model import PixelStep
from simmim.torch_engine.models.sound_input import SoundInput
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.update import DTYPES
from simmim.training.origins import is_timms


def choose_pool(pool: Pool, run: str, *, layer: int = -1, patches: bool = False) -> Pool:
    """Resolve auto: the model's own pooling for one that timm describes, else the mean."""
    if pool != "auto":
        return pool
    return "own" if is_timms(run) and layer == -1 and not patches else "avg"


class PooledFeatures(nn.Module):
    """Normalised images (B, C, H, W) → features (B, D) of one layer of a timm encoder.

    `layer` is a block of a ViT or BEiT, or a stage of a Swin or a convolutional net (a ResNet's stem counts), from 0 on
    or, if negative, from the end. A ViT's final norm acts on whichever block is taken. `pool` takes the mean over the
    feature map without class and register tokens, the class token, or what the model itself returns (own). Raises
    `UserError` for what the encoder has not.
    """

    def __init__(self, backbone: nn.Module, *, layer: int = -1, pool: Pool = "avg"):
        super().__init__()
        self.backbone: Any = backbone
        self.layer = layer
        self.pool = pool
        if pool == "own":
            if layer != -1:
                raise UserError(f"pool own is that of the last layer, and layer is {layer}; use avg")
            return
        if not hasattr(backbone, "forward_intermediates"):
            raise UserError(f"{type(backbone).__name__} of timm does not show its feature maps; use --pool own")
        layers = len(self.backbone.feature_info)
        if not -layers <= layer < layers:
            raise UserError(f"layer {layer} is not among the encoder's {layers} layers; use {-layers} to {layers - 1}")
        if pool == "token" and getattr(backbone, "cls_token", None) is None:
            raise UserError(f"pool token needs a class token, and {type(backbone).__name__} has none; use avg")

    def forward(self, images: Tensor) -> Tensor:
        if self.pool == "own":
            return self.backbone(images)
        wanted: dict[str, Any] = {"indices": [self.layer], "norm": True, "stop_early": True, "intermediates_only": True}
        if self.pool == "token":
            [(_, prefix)] = self.backbone.forward_intermediates(images, return_prefix_tokens=True, **wanted)
            return prefix[:, 0]
        [cells] = self.backbone.forward_intermediates(images, **wanted)  # (B, D, h, w)
        return self.reduce(cells.float())

    def reduce(self, cells: Tensor) -> Tensor:
        """Take the mean over the feature map: (B, D, h, w) → (B, D)."""
        return cells.mean(dim=(2, 3))


class LastFeatures(nn.Module):
    """Normalised images (B, C, H, W) → what the last layer of a timm classifier with this encoder takes (B, D).

    They are the mean over the feature map, after a norm (ConvNeXt, `fc_norm`) or a hidden layer if the model has such.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone: Any = backbone
        self.backbone.reset_classifier(0, global_pool="avg")

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.forward_head(self.backbone.forward_features(images).float(), pre_logits=True)


class PatchFeatures(PooledFeatures):
    """Normalised images (B, C, H, W) → features (B, h·w, D) of every feature-map cell of one layer, row by row."""

    def reduce(self, cells: Tensor) -> Tensor:
        """List the cells row by row: (B, D, h, w) → (B, h·w, D)."""
        return cells.flatten(2).transpose(1, 2)


def timms_view(backbone: nn.Module) -> Callable[[Raw], NDArray[np.uint8]]:
    """Return timm's own way to read an image for a model: its size, crop and interpolation; pixels (H, W, C).

    Pixels are those of timm's transform, but for EXIF rotations, which are undone, and transparency, which is laid on
    white. Raises `UserError` for a model that does not take grey or colour images.
    """
    from PIL import Image
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    facts = resolve_model_data_config(backbone)
    channels = facts["input_size"][0]
    if channels not in (1, 3):
        raise UserError(f"timm reads images of 1 or 3 channels, and this model takes {channels}; train a run on yours")
    transform: Any = create_transform(**facts, normalize=False)

    def read(raw: Raw) -> NDArray[np.uint8]:
        pixels = decode(raw, channels=channels, dtype=np.uint8)
        return transform(Image.fromarray(pixels[..., 0] if channels == 1 else pixels)).permute(1, 2, 0).numpy()

    return read


@dataclass(frozen=True, kw_only=True)
class FeatureReader:
    """Read the images of a source in evaluation's crops, and compute their features.

    `model` turns normalised images (B, C, H, W) into features (B, D) or (B, h·w, D); it is in evaluation mode, like
    `pixels` (which normalises) on the device. `size` is (H, W), or (samples, 1); images are read as
    `dtype` in `workers` threads, by `view` if there is one; with `windows` no more is read than the window in the
    middle. Unreadable ones are listed in the file `listed_in`, if any.
    """

    model: Callable[[Tensor], Tensor]
    pixels: PixelStep
    size: tuple[int, int]
    channels: int
    dtype: np.dtype[Any]
    precision: str
    batch_size: int
    workers: int
    max_bad_fraction: float
    listed_in: Path | None = None
    windows: bool = False
    view: Callable[[Raw], NDArray[np.uint8]] | None = None

    @classmethod
    def of_encoder(cls, run: str, backbone: Any, model: nn.Module, images: ImageSource, **machine: Any) -> Self:
        """Return a reader of images such as `images` for the encoder that `run` names, on the encoder's device."""
        facts = backbone.pretrained_cfg
        channels, height, width = facts["input_size"]
        device = next(backbone.parameters()).device
        hears: SoundInput | None = getattr(backbone, "front_end", None)
        images = read_as(images, hears.rate if hears else None, run)
        return cls(
            model=model,
            pixels=(hears or PixelStep(facts["mean"], facts["std"])).to(device),
            size=(hears.samples, 1) if hears else (height, width),
            channels=channels,
            dtype=sniff(images, channels=channels, trained=True),
            windows=getattr(backbone, "sees_windows", False),
            view=timms_view(backbone) if is_timms(run) else None,
            **machine,
        )

    def __call__(
        self, source: ImageSource, part: str = "val", world: World | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the indices (N,) of the readable images, in order, and their features (N, D).

        `part` names the set in messages. The processes of a `world` call it together: each reads a share of the images,
        and all get the features of all. Raises `TooManyBadImages`.
        """
        world = world or World(device=self.pixels.mean.device)
        bad_images = BadImages(self.listed_in, total=len(source), max_fraction=self.max_bad_fraction, part=part)
        share = range(world.rank, len(source), world.size)
        batches = [batch for batches in world.collect(lambda: [*self.batches(source, bad_images, share)])
                   for batch in batches]  # fmt: skip
        if not batches:
            raise bad_images.none_readable()
        indices = np.concatenate([found for found, _ in batches])
        order = np.argsort(indices)
        return indices[order], np.concatenate([features for _, features in batches])[order]

    def batches(
        self, source: ImageSource, bad_images: BadImages, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield the same of all images, or of `indices`, in batches: indices (B,) and features (B, D).

        Unreadable images are listed in `bad_images`.
        """
        device, dtype = self.pixels.mean.device, DTYPES[self.precision]
        crop = CentreCrop(size=self.size)
        if self.pixels.front_end is not None:
            source = as_sounds(source, self.pixels.front_end.spectrogram.rate)

        def read(raw: Raw) -> NDArray[Any]:
            how: dict[str, Any] = {"size": self.size, "channels": self.channels, "dtype": self.dtype}
            return load(middle_window(raw, self.size), whole_box, **how) if self.windows else load(raw, crop.box, **how)

        def encode(pixels: list[NDArray[Any]], part: slice) -> NDArray[np.float32]:
            images = self.pixels.normalize(torch.from_numpy(np.stack(pixels[part])).to(device))
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return self.model(images).float().cpu().numpy()

        for index, pixels in readable_batches(
            source, self.view or read, indices, batch_size=self.batch_size, threads=self.workers, bad_images=bad_images
        ):
            features = by_halves(partial(encode, pixels), [slice(0, len(pixels))])
            yield np.array(index, np.int64), np.concatenate(list(features))
