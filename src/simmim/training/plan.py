"""What a pretraining will do, whichever engine does it: its images, steps, learning rates and batches with their masks.

Shapes: `B` images, `C` channels, `H W` pixels.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmim.config.pretraining import PretrainConfig
from simmim.config.training import TrainingConfig
from simmim.data.augment import RandomResizedCrop
from simmim.data.bad_images import BadImages
from simmim.data.decode import BadImage, decode
from simmim.data.evaluation import eval_images
from simmim.data.pipeline import Reading, stream_from_threads, train_batches
from simmim.data.readers.device_jpegs import Decode, device_batches
from simmim.data.readers.processes import stream_from_processes
from simmim.data.sources import ImageSource, SourceDefaults, Subset, defaults_of, open_source, read_raw, sniff
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD, measure_mean_std
from simmim.errors import UserError
from simmim.hardware.host import reading_cores
from simmim.method.colour_clusters import fit_colour_clusters
from simmim.method.masks import upsample_mask
from simmim.method.objectives import Objective
from simmim.method.random_keys import sample_keys, uniforms
from simmim.method.schedules import CosineSchedule, MultiStepSchedule, Schedule, scale_lr
from simmim.method.targets import ClusterTarget, block_means
from simmim.method.views import View
from simmim.training.run_directory import Run, recall
from simmim.training.trainer import World

Batch = dict[str, NDArray[Any]]

VIEW = "view_"
"""Prefix of a view's numbers in a batch."""

# On a tenth of ImageNet-1K (128,000 images) SimMIM fine-tunes to 83.60 after 250,000 steps, which at its batch of 2048
# are 4,000 views of each image, and only to 83.41 after more (Xie et al., arXiv 2206.04664).
_VIEWS_THAT_HURT = 4000


@dataclass(frozen=True)
class Images:
    """The images of a run: those to train on, those kept aside, and the dtype in which they are read."""

    train: ImageSource
    val: ImageSource
    dtype: np.dtype[Any]
    channels: int = 3
    defaults: SourceDefaults = field(default_factory=SourceDefaults)

    @property
    def parts(self) -> dict[str, ImageSource]:
        return {"train": self.train, "val": self.val}


def open_images(config: PretrainConfig) -> Images:
    """Find the images and keep `val_images` of them aside, drawn by the seed. Raises `UserError`."""
    assert config.data is not None
    source = open_source(config.data)
    defaults, channels = defaults_of(source), config.channels
    if defaults.channels and defaults.channels not in (1, 3) and channels == type(config).channels:
        channels = defaults.channels  # the default number cannot be had
    dtype = sniff(source, channels=channels)
    order = np.argsort(sample_keys(config.seed, 0, np.arange(len(source)), stream="split"))
    val, train = np.sort(order[: config.val_images]), np.sort(order[config.val_images :])
    if not len(train):
        raise UserError(
            f"val images {config.val_images} leaves none of the {len(source)} images to train on; "
            f"use --val-images {len(source) // 10}"
        )
    if len(train) < config.batch_size:
        raise UserError(
            f"batch size {config.batch_size} is more than the {len(train)} images to train on "
            f"({len(val)} are kept aside); use --batch-size {len(train)} or less"
        )
    return Images(Subset(source, train), Subset(source, val), dtype, channels, defaults)


@dataclass(frozen=True)
class TrainingPlan:
    """Steps and learning rates of any training."""

    config: TrainingConfig

    @property
    def train_images(self) -> int:
        raise AssertionError

    @property
    def total_images(self) -> int:
        """Images of which `max_bad_fraction` may be unreadable."""
        return self.train_images

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        assert self.config.image_size is not None
        return self.config.image_size

    @property
    def steps_per_epoch(self) -> int:
        return self.train_images // self.config.batch_size

    @property
    def total_steps(self) -> int:
        return self.config.steps or math.ceil(self.config.epochs * self.steps_per_epoch)

    @property
    def save_every_steps(self) -> int:
        return self.config.save_every_steps or max(self.steps_per_epoch, 100)

    @cached_property
    def schedule(self) -> Schedule:
        config = self.config
        assert config.warmup_epochs is not None
        length = self.total_steps / self.steps_per_epoch
        if config.warmup_epochs > length:
            raise UserError(
                f"warm-up of {config.warmup_epochs:g} epochs is longer than the run of {length:.3g}; "
                f"use --warmup-epochs {length / 10:.3g}"
            )
        common = {
            "peak_lr": scale_lr(config.lr, config.batch_size),
            "warmup_lr": scale_lr(config.warmup_lr, config.batch_size),
            "warmup_steps": round(config.warmup_epochs * self.steps_per_epoch),
        }
        if config.schedule == "cosine":
            min_lr = scale_lr(config.min_lr, config.batch_size)
            return CosineSchedule(**common, min_lr=min_lr, total_steps=self.total_steps)
        milestones = tuple(round(epoch * self.steps_per_epoch) for epoch in config.milestones)
        return MultiStepSchedule(**common, milestones=milestones)

    def describe(self) -> list[str]:
        """What will be done, for a person."""
        config = self.config
        return [
            f"learning   rate {scale_lr(config.lr, config.batch_size):.2e}, {config.schedule}",
            f"steps      {self.total_steps} of {config.batch_size} images, {self.steps_per_epoch} an epoch",
            f"writes     {config.out}",
        ]

    def bad_images(self, run: Run) -> BadImages:
        return BadImages(run.bad_images, total=self.total_images, max_fraction=self.config.max_bad_fraction)

    def reading(self, bad_images: BadImages, *, start_step: int, rank: int, world: int) -> Reading:
        """What the process `rank` of `world` reads from `start_step` on."""
        return Reading(
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            total_steps=self.total_steps,
            rank=rank,
            world=world,
            threads=self.config.workers or reading_cores(),
            bad_images=bad_images,
            flip=self.config.flip or "horizontal",
        )


@dataclass(frozen=True)
class Plan(TrainingPlan):
    """A complete configuration with its images. `complete` makes one and raises `UserError` for what cannot be."""

    config: PretrainConfig
    images: Images

    @classmethod
    def complete(
        cls, config: PretrainConfig, images: Images, *, patch: int, world: World | None = None, **machine: Any
    ) -> "Plan":
        """Decide whatever the configuration leaves open: from the images, and from what the engine says of the machine.

        `patch` is the side of the encoder's patches, in pixels; `machine` gives at least image_size, device, precision
        and compile.
        """
        config = dataclasses.replace(config, channels=images.channels)
        declared = images.defaults
        changes = {
            "flip": config.flip or declared.flip or "horizontal",
            "crop_scale": config.crop_scale or declared.crop_scale or RandomResizedCrop.scale,
            "crop_ratio": config.crop_ratio or declared.crop_ratio or RandomResizedCrop.ratio,
            "workers": config.workers or reading_cores(),
            "mask": config.mask.for_patch(patch),
            **machine,
        }
        begun = recall(config)
        if not (isinstance(config.mean, tuple) and isinstance(config.std, tuple)):
            old = begun and (begun.mean, begun.std)
            if config.mean == "measure" and old == (IMAGENET_MEAN, IMAGENET_STD):
                old = None  # the run did not measure: let it be compared
            numbers = measured_once(old, lambda: _mean_std(config, images), (2, config.channels), world)
            changes |= {name: tuple(row) for name, row in zip(("mean", "std"), numbers.tolist(), strict=True)}
        plan = cls(dataclasses.replace(config, **changes), images)
        if config.warmup_epochs is None:
            old = begun and begun.warmup_epochs  # of a run whose images may have changed
            usual = min(10.0, plan.total_steps / plan.steps_per_epoch / 10)
            plan = plan.replace(warmup_epochs=usual if old is None else old)
        target = config.target
        if isinstance(target, ClusterTarget) and target.centres is None:
            old = begun and getattr(begun.target, "centres", None)
            shape = (target.clusters, config.channels)
            centres = measured_once(old, lambda: plan.find_clusters(target), shape, world)
            plan = plan.replace(target=dataclasses.replace(target, centres=tuple(map(tuple, centres.tolist()))))
        assert plan.schedule
        return plan.replace(objectives=_with_momentum_steps(config.objectives, begun, plan.total_steps))

    def replace(self, **changes: Any) -> "Plan":
        return Plan(dataclasses.replace(self.config, **changes), self.images)

    @property
    def train_images(self) -> int:
        return len(self.images.train)

    @property
    def total_images(self) -> int:
        return len(self.images.train) + len(self.images.val)

    @property
    def picture_every_steps(self) -> int:
        return self.config.picture_every_steps or self.save_every_steps

    def batches(
        self,
        reading: Reading,
        *,
        patch: int,
        drop_path_layers: int,
        decode: Decode | None = None,
        further: Iterable[View] = (),
    ) -> Iterator[Batch]:
        """The batches of a reading: image (B, H, W, C) in 0..255, flip (B, axes), mask (B, H/p, W/p).

        With drop path there is drop_path (B, layers) too, uniform in [0, 1). `patch` is the unit p of masks in pixels.
        With `decode` images are what it returns, and are on its device. For each of the `further` views there is
        view_NAME (B, 5 or 11), as `View.draw` gives it.
        """
        config = self.config
        crop = RandomResizedCrop(
            size=self.size,
            scale=config.crop_scale or RandomResizedCrop.scale,
            ratio=config.crop_ratio or RandomResizedCrop.ratio,
        )
        views: dict[str, Any] = {"crop": crop, "channels": config.channels}
        if decode is None:
            views |= {"dtype": self.images.dtype, "antialias": config.antialias}
            stream = stream_from_processes if config.readers == "processes" else stream_from_threads
            batches = train_batches(self.images.train, reading, **views, stream=stream)
        else:
            batches = device_batches(self.images.train, reading, **views, decode=decode)
        for images in batches:
            epoch, index = images["epoch"], images["index"]
            batch: Batch = {
                "image": images["image"],
                "flip": images["flip"],
                "mask": draw_all_masks(config, epoch, index, patch),
            }
            if drop_path_layers:
                batch["drop_path"] = drop_path_numbers(config, epoch, index, drop_path_layers)
            batch |= {f"{VIEW}{view.name}": view.draw(config.seed, epoch, index) for view in further}
            yield batch

    def can_validate(self, bad_images: BadImages) -> bool:
        """Return whether any image kept aside can be read; those that cannot, up to the first that can, are listed."""
        for index in range(len(self.images.val)):
            try:
                decode(read_raw(self.images.val, index), channels=self.config.channels, dtype=self.images.dtype)
            except BadImage as error:
                bad_images.add(self.images.val.name(index), str(error))
            else:
                return True
        return False

    def val_pixels(self, bad_images: BadImages) -> NDArray[Any]:
        """Read the images kept aside: (B, H, W, C) in 0..255, whole, always the same. Unreadable ones are left out."""
        val = self.images.val
        how: dict[str, Any] = {"size": self.size, "channels": self.config.channels, "dtype": self.images.dtype}
        return eval_images(val, range(len(val)), **how, bad_images=bad_images)

    def sample(self, count: int, *, part: int) -> Iterator[NDArray[Any]]:
        """Yield up to `count` training images drawn by the seed, whole: (B, H, W, C) in 0..255, `part` at a time.

        Unreadable ones are left out. Raises `UserError` if none of a part can be read.
        """
        train = self.images.train
        how: dict[str, Any] = {"size": self.size, "channels": self.config.channels, "dtype": self.images.dtype}
        order = np.argsort(sample_keys(self.config.seed, 0, np.arange(len(train)), stream="sample"))[:count]
        for first in range(0, len(order), part):
            yield eval_images(train, order[first : first + part], **how)

    def find_clusters(
        self, target: ClusterTarget, *, images: int = 500, colours: int = 100_000
    ) -> tuple[tuple[float, ...], ...]:
        """Find the target's colours, normalised, in some images drawn by the seed."""
        config, train = self.config, self.images.train
        order = np.argsort(sample_keys(config.seed, 0, np.arange(len(train)), stream="cluster images"))
        pixels = eval_images(train, order[:images], size=self.size, channels=config.channels, dtype=self.images.dtype)
        normal = (pixels / np.float32(255) - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
        found = block_means(np, normal, target.block).reshape(-1, config.channels)
        order = np.argsort(sample_keys(config.seed, 0, np.arange(len(found)), stream="cluster colours"))
        return fit_colour_clusters(found[order[:colours]], clusters=target.clusters, seed=config.seed)

    def describe(self) -> list[str]:
        """What will be done, for a person, but for the model and the device."""
        config, masks = self.config, self.config.mask
        rows, columns = masks.grid(self.size)
        return [
            f"images     {config.data}: {len(self.images.train)} to train on, {len(self.images.val)} kept aside; "
            f"{self.size[0]}x{self.size[1]} pixels, {config.channels} channels",
            f"masks      {masks.kind}: {masks.masked_cells(self.size)} of {rows * columns} cells of "
            f"{masks.cell} pixels hidden",
            f"target     {config.target.kind} by {config.loss.kind}",
            *super().describe(),
            *self._warnings(),
        ]

    def _warnings(self) -> list[str]:
        views = self.total_steps / self.steps_per_epoch
        if views <= _VIEWS_THAT_HURT:
            return []
        return [
            f"warning    each image is seen {views:.0f} times; from about {_VIEWS_THAT_HURT} on, more training made "
            "SimMIM worse: add images or train for less, and watch val_loss"
        ]


def _mean_std(config: PretrainConfig, images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ImageNet's mean and deviation for 8-bit RGB, unless asked to measure; else measure them."""
    if config.mean is None and config.channels == 3 and images.dtype == np.uint8:
        return IMAGENET_MEAN, IMAGENET_STD
    return measure_mean_std(images.train, channels=config.channels, dtype=images.dtype, seed=config.seed)


def measured_once(
    begun: Any, find: Callable[[], Any], shape: tuple[int, ...], world: World | None
) -> NDArray[np.float64]:
    """Return numbers that the configuration leaves open, the same on every rank.

    They are those that the run began with, if it has such, or else found by rank 0: measured twice, on two ranks or for
    a resume on another machine, they could differ in the last bit.
    """
    if world is not None and world.rank:
        return world.share(np.zeros(shape))
    numbers = np.array(begun, np.float64) if np.shape(begun) == shape else np.array(find(), np.float64)
    return numbers if world is None else world.share(numbers)


def _with_momentum_steps(
    objectives: tuple[Objective, ...], begun: PretrainConfig | None, steps: int
) -> tuple[Objective, ...]:
    """Let the momentum of moving averages rise over the whole run, unless the user or the run begun says otherwise."""
    before = {each.kind: getattr(each, "momentum_steps", None) for each in (begun.objectives if begun else ())}
    undecided = [each.kind for each in objectives if getattr(each, "momentum_steps", steps) is None]
    return tuple(
        dataclasses.replace(
            each, **{"momentum_steps": before.get(each.kind) or steps} if each.kind in undecided else {}
        )
        for each in objectives
    )


def draw_masks(
    config: PretrainConfig, epoch: ArrayLike, index: ArrayLike, patch: int, *, number: int = 0
) -> NDArray[np.bool_]:
    """Draw masks (B, H/patch, W/patch) of images (B,) in epochs (B,) or one epoch; `number` tells those of one apart."""
    assert config.image_size is not None
    masks = config.mask.for_patch(patch)
    assert masks.cell is not None
    cells = masks(
        sample_keys(config.seed, epoch, index, stream=f"mask {number}" if number else "mask"), config.image_size
    )
    return upsample_mask(cells, masks.cell // patch)


def draw_all_masks(config: PretrainConfig, epoch: ArrayLike, index: ArrayLike, patch: int) -> NDArray[np.bool_]:
    """Draw what a step takes: masks (B, H/patch, W/patch), or (B, M, H/patch, W/patch) for M masks an image."""
    if config.masks_per_image == 1:
        return draw_masks(config, epoch, index, patch)
    drawn = [draw_masks(config, epoch, index, patch, number=number) for number in range(config.masks_per_image)]
    return np.stack(drawn, axis=1)


def drop_path_numbers(config: TrainingConfig, epoch: ArrayLike, index: ArrayLike, layers: int) -> NDArray[np.float32]:
    """What decides which layers an image skips: (B, layers), uniform in [0, 1)."""
    return uniforms(sample_keys(config.seed, epoch, index, stream="drop_path"), layers).astype(np.float32)


class Sized(Protocol):
    """What an encoder of any engine knows of its sizes, in pixels."""

    @property
    def patch_size(self) -> int: ...
    @property
    def stride(self) -> int: ...


def check_sizes(config: PretrainConfig, encoder: Sized) -> None:
    """Raises `UserError` where image, cell, patch and stride do not fit each other."""
    assert config.image_size is not None
    patch, stride, masks = encoder.patch_size, encoder.stride, config.mask.for_patch(encoder.patch_size)
    masks.grid(config.image_size)
    cell = masks.cell
    assert cell is not None
    if cell % patch:
        raise UserError(
            f"mask cell {cell} is not a multiple of the patch {patch} of {config.model}; "
            f"use --mask.cell {max(cell // patch, 1) * patch} or {(cell // patch + 1) * patch}"
        )
    check_stride(config.image_size, stride, config.model)


def check_stride(image_size: tuple[int, int], stride: int, model: str) -> None:
    """Raises `UserError` where a model's feature map does not cover the image."""
    for side in image_size:
        if side % stride:
            near = max(side // stride, 1) * stride
            raise UserError(
                f"image size {side} is not a multiple of the stride {stride} of {model}; use {near} or {near + stride}"
            )
