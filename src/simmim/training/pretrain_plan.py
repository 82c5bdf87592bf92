"""Plan of a pretraining, for every engine: images, steps, learning rates and batches with masks.

Shapes: `B` images, `C` channels, `H W` pixels.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.config.field_types import Flip
from simmim.config.pretraining import PretrainConfig
from simmim.data.augment import RandomResizedCrop
from simmim.data.bad_images import BadImages
from simmim.data.decode import open_picture
from simmim.data.evaluation import eval_images
from simmim.data.picture import BadImage
from simmim.data.pipeline import Crop, Reading, stream_from_threads, train_batches
from simmim.data.readers.device_jpegs import Decode, device_batches
from simmim.data.readers.processes import stream_from_processes
from simmim.data.sound_augment import TimeCrop, sound_augment
from simmim.data.sources import read_raw
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD, measure_mean_std
from simmim.data.windows import RandomWindow
from simmim.errors import UserError
from simmim.hardware.host import reading_cores
from simmim.method.k_means import k_means
from simmim.method.objectives import Objective
from simmim.method.random_keys import sample_keys
from simmim.method.schedules import usual_lr
from simmim.method.targets import ClusterTarget, block_means
from simmim.method.views import View
from simmim.training.masks import draw_all_masks
from simmim.training.plan import Batch, TrainingPlan, drop_path_numbers, measured_once
from simmim.training.pretrain_images import Images
from simmim.training.resume import recall
from simmim.training.trainer import World

VIEW = "view_"
"""Prefix of a view's numbers in a batch."""

# On a tenth of ImageNet-1K (128,000 images) SimMIM fine-tunes to 83.60 after 250,000 steps, which at its batch of 2048
# are 4,000 views of each image, and only to 83.41 after more (Xie et al., arXiv 2206.04664).
_VIEWS_THAT_HURT = 4000


@dataclass(frozen=True)
class Plan(TrainingPlan):
    """A complete configuration with its images. `complete` makes one."""

    config: PretrainConfig
    images: Images

    @classmethod
    def complete(
        cls,
        config: PretrainConfig,
        images: Images,
        *,
        patch: int,
        width: int | None = None,
        world: World | None = None,
        **machine: Any,
    ) -> "Plan":
        """Decide whatever the configuration leaves open: from the images, and from what the engine says of the machine.

        `patch` is the side of the encoder's patches, in pixels, and `width` the number of features of its tokens, or
        `None` for a convolutional net; `machine` gives at least image_size, device, precision and compile. Raises
        `UserError` where settings contradict each other.
        """
        kind = "sounds" if images.sounds else "images"
        config = dataclasses.replace(config, channels=images.channels, input=kind)
        workers, mask = (
            config.workers or reading_cores(),
            config.mask.for_patch(patch, machine.get("image_size", config.image_size)),
        )
        changes = {"workers": workers, "mask": mask, **machine}
        begun = recall(config)
        if not (isinstance(config.mean, tuple) and isinstance(config.std, tuple)):
            old = begun and (begun.mean, begun.std)
            if config.mean == "measure" and old == (IMAGENET_MEAN, IMAGENET_STD):
                old = None  # the run did not measure: let it be compared
            sized = dataclasses.replace(config, image_size=machine.get("image_size", config.image_size))
            numbers = measured_once(old, lambda: _mean_std(sized, images), (2, config.channels), world)
            changes |= {name: tuple(row) for name, row in zip(("mean", "std"), numbers.tolist(), strict=True)}
        plan = cls(dataclasses.replace(config, **changes), images)
        crop = plan.crop
        if isinstance(crop, RandomResizedCrop):
            plan = plan.replace(flip=plan.flip, crop_scale=crop.scale, crop_ratio=crop.ratio)
        else:
            flip = "none" if images.sounds else plan.flip
            plan = plan.replace(flip=flip, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))  # neither is resized
        if config.lr is None:
            old = begun and begun.lr
            usual = usual_lr(config.batch_size, width) * min(each.usual_rate for each in config.objectives)
            plan = plan.replace(lr=usual if old is None else old)
        if config.warmup_epochs is None:
            old = begun and begun.warmup_epochs  # of a run whose images may have changed
            usual = min(10.0, plan.total_steps / plan.steps_per_epoch / 10)
            plan = plan.replace(warmup_epochs=usual if old is None else old)
        olds = {each.kind: getattr(each, "momentum_steps", None) for each in (begun.objectives if begun else ())}
        steps = [olds.get(each.kind) or plan.total_steps for each in config.objectives]
        plan = plan.replace(objectives=tuple(map(Objective.for_steps, config.objectives, steps)))
        steps = getattr(begun.mask, "steps", None) if begun else None
        plan = plan.replace(mask=plan.config.mask.for_steps(steps or plan.total_steps))
        target = config.target
        if isinstance(target, ClusterTarget) and target.centres is None:
            old = begun and getattr(begun.target, "centres", None)
            shape = (target.clusters, config.channels)
            centres = measured_once(old, lambda: plan.find_clusters(target), shape, world)
            plan = plan.replace(target=dataclasses.replace(target, centres=tuple(map(tuple, centres.tolist()))))
        assert plan.schedule
        return plan

    def replace(self, **changes: Any) -> "Plan":
        return Plan(dataclasses.replace(self.config, **changes), self.images)

    @property
    def train_images(self) -> int:
        return len(self.images.train)

    @property
    def total_images(self) -> int:
        return len(self.images.train) + len(self.images.val)

    @property
    def flip(self) -> Flip:
        """Random flips: as configured, as the source declares, or the default."""
        return self.config.flip or self.images.defaults.flip or ("none" if self.images.sounds else super().flip)

    @property
    def crop(self) -> Crop:
        """Random crop: as configured, as the source declares, as is usual for an objective, or the default.

        Of a sound it is a part of its time.
        """
        if self.images.sounds:
            return TimeCrop(size=self.config.read_size)
        if self.config.crop == "pixels":
            return RandomWindow(size=self.size)
        config, declared = self.config, self.images.defaults
        usual = next(filter(None, (each.usual_crop for each in config.objectives)), RandomResizedCrop.scale)
        scale = config.crop_scale or declared.crop_scale or usual
        ratio = config.crop_ratio or declared.crop_ratio or RandomResizedCrop.ratio
        return RandomResizedCrop(size=self.size, scale=scale, ratio=ratio)

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
        """Yield the batches of a reading: image (B, H, W, C) in 0..255, flip (B, axes), mask (B, H/p, W/p).

        Of sounds an image is samples, (B, n, 1, 1), and a mask hides patches of the spectrogram (frames, bands).
        With drop path there is drop_path (B, layers) too, uniform in [0, 1). `patch` is the unit p of masks in pixels.
        With `decode` images are what it returns, and are on its device. For each of the `further` views there is
        view_NAME (B, 5), as `View.draw` gives it. Guided masks have mask_order (B, rows, columns) too. With M masks an
        image, masks and orders are (B, M, …).
        """
        config = self.config
        views: dict[str, Any] = {"crop": self.crop, "channels": config.channels}
        if decode is None:
            views["augment"] = sound_augment(config.sound)
            views |= {"dtype": self.images.dtype, "antialias": config.antialias}
            stream = stream_from_processes if config.readers == "processes" else stream_from_threads
            batches = train_batches(self.images.train, reading, **views, stream=stream)
        else:
            batches = device_batches(self.images.train, reading, **views, decode=decode)
        for images in batches:
            epoch, index = images["epoch"], images["index"]
            batch: Batch = {"image": images["image"], "flip": images["flip"]}
            if config.masks_images:
                batch |= draw_all_masks(config, epoch, index, patch)
            if drop_path_layers:
                batch["drop_path"] = drop_path_numbers(config, epoch, index, drop_path_layers)
            batch |= {f"{VIEW}{view.name}": view.draw(config.seed, epoch, index) for view in further}
            yield batch

    def can_validate(self, bad_images: BadImages) -> bool:
        """Return whether any image kept aside can be read; those that cannot, up to the first that can, are listed."""
        for index in range(len(self.images.val)):
            try:
                open_picture(read_raw(self.images.val, index)).check(self.config.channels, self.images.dtype)
            except BadImage as error:
                bad_images.add(self.images.val.name(index), str(error))
            else:
                return True
        return False

    def val_pixels(self, bad_images: BadImages, most: int | None = None) -> NDArray[Any]:
        """Read the images kept aside: (B, H, W, C) in 0..255, whole, always the same. Unreadable ones are left out.

        With `most`, only so many of them are read at first, and more if none of these can be.
        """
        val, how = self.images.val, self._how_judged
        if most is not None and most < len(val):
            with contextlib.suppress(UserError):
                return eval_images(val, range(most), **how, bad_images=bad_images)
        return eval_images(val, range(len(val)), **how, bad_images=bad_images)[:most]

    @property
    def _how_judged(self) -> dict[str, Any]:
        """How images are read that are not trained on."""
        config, images = self.config, self.images
        return {
            "size": config.read_size, "channels": config.channels, "dtype": images.dtype, "fraction": images.fraction
        }  # fmt: skip

    def sample(self, count: int, *, part: int) -> Iterator[NDArray[Any]]:
        """Yield up to `count` training images drawn by the seed, whole: (B, H, W, C) in 0..255, `part` at a time.

        Unreadable ones are left out. Raises `UserError` if none can be read.
        """
        train, how = self.images.looked_at, self._how_judged
        order = np.argsort(sample_keys(self.config.seed, 0, np.arange(len(train)), stream="sample"))[:count]
        found, reason = False, None
        for first in range(0, len(order), part):
            try:
                images = eval_images(train, order[first : first + part], **how)
            except UserError as error:  # none of this part can be read
                reason = error
                continue
            found = True
            yield images
        if not found and reason is not None:
            raise reason

    def find_clusters(
        self, target: ClusterTarget, *, images: int = 500, colours: int = 100_000
    ) -> tuple[tuple[float, ...], ...]:
        """Find the target's colours, normalised, in some images drawn by the seed."""
        config, train = self.config, self.images.looked_at
        order = np.argsort(sample_keys(config.seed, 0, np.arange(len(train)), stream="cluster images"))
        pixels = eval_images(train, order[:images], **self._how_judged)
        normal = (pixels / np.float32(255) - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
        found = block_means(np, normal, target.block).reshape(-1, config.channels)
        order = np.argsort(sample_keys(config.seed, 0, np.arange(len(found)), stream="cluster colours"))
        kept = found[order[:colours]]
        centres = k_means(kept, clusters=target.clusters, seed=config.seed, stream="colour clusters")
        return tuple(map(tuple, centres.tolist()))

    def describe(self) -> list[str]:
        """Return lines that describe the training to a person, except for the model and the device."""
        config, masks = self.config, self.config.mask
        kinds = {objective.kind for objective in config.objectives}
        hidden = []
        if config.masks_images:
            cells = f"{masks.masked_cells(self.size)} of {math.prod(masks.grid(self.size))} cells"
            several = f", {config.masks_per_image} masks an image" if config.masks_per_image > 1 else ""
            hidden = [f"masks      {masks.kind}: {cells} of {masks.cell} pixels hidden{several}"]
        size = f"{self.size[0]}x{self.size[1]}"
        shown = f"{size} pixels, {config.channels} channels"
        if found := config.spectrogram:
            seconds = found.samples / found.rate
            shown = f"{seconds:.4g} s at {found.rate} Hz, spectrograms of {size} frames x mel bands"
        windows = " windows" if self.images.still else ""
        return [
            f"{config.input:10} {config.data}: {len(self.images.train)}{windows} to train on, {len(self.images.val)} "
            f"kept aside; {shown}",
            *hidden,
            *[f"target     {config.target.kind} by {config.loss.kind}"] * ("pixels" in kinds),
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
    how: dict[str, Any] = {"channels": config.channels, "dtype": images.dtype, "seed": config.seed}
    windows = config.image_size if images.still else None
    return measure_mean_std(images.looked_at, **how, spectrogram=config.spectrogram, windows=windows)
