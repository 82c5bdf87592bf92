"""Steps, learning rates and size checks of any training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simmim.config.field_types import Flip
from simmim.config.pretraining import PretrainConfig
from simmim.config.training import TrainingConfig
from simmim.data.bad_images import BadImages
from simmim.data.pipeline import Reading
from simmim.errors import UserError
from simmim.hardware.host import reading_cores
from simmim.method.random_keys import sample_keys, uniforms
from simmim.method.schedules import CosineSchedule, MultiStepSchedule, Schedule, scale_lr
from simmim.training.run_directory import Run
from simmim.training.trainer import World

Batch = dict[str, NDArray[Any]]
"""Arrays of one training step on one rank, by name."""


@dataclass(frozen=True)
class TrainingPlan(ABC):
    """Steps and learning rates of any training."""

    config: TrainingConfig

    @property
    @abstractmethod
    def train_images(self) -> int:
        """Number of images in an epoch."""

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
    def flip(self) -> Flip:
        """Random flips: as configured, or the default."""
        return self.config.flip or Reading.flip

    @property
    def steps_per_epoch(self) -> int:
        return self.train_images // self.config.batch_size

    @property
    def total_steps(self) -> int:
        return self.config.steps or math.ceil(self.config.epochs * self.steps_per_epoch)

    @property
    def save_every_steps(self) -> int:
        return self.config.save_every_steps or max(self.steps_per_epoch, 100)

    @property
    def lr(self) -> float:
        """Peak learning rate for a batch of 512."""
        assert self.config.lr is not None
        return self.config.lr

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
            "peak_lr": scale_lr(self.lr, config.batch_size),
            "warmup_lr": scale_lr(config.warmup_lr, config.batch_size),
            "warmup_steps": round(config.warmup_epochs * self.steps_per_epoch),
        }
        if config.schedule == "cosine":
            min_lr = scale_lr(config.min_lr, config.batch_size)
            return CosineSchedule(**common, min_lr=min_lr, total_steps=self.total_steps)
        milestones = tuple(round(epoch * self.steps_per_epoch) for epoch in config.milestones)
        return MultiStepSchedule(**common, milestones=milestones)

    def describe(self) -> list[str]:
        """Return lines that describe the training to a person."""
        config = self.config
        return [
            f"learning   rate {scale_lr(self.lr, config.batch_size):.2e}, {config.schedule}",
            f"steps      {self.total_steps} of {config.batch_size} images, {self.steps_per_epoch} an epoch",
            f"writes     {config.out}",
        ]

    def bad_images(self, run: Run) -> BadImages:
        return BadImages(run.bad_images, total=self.total_images, max_fraction=self.config.max_bad_fraction)

    def reading(self, bad_images: BadImages, *, start_step: int, rank: int, world: int) -> Reading:
        """Return what the process `rank` of `world` reads from `start_step` on."""
        return Reading(
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            total_steps=self.total_steps,
            rank=rank,
            world=world,
            threads=self.config.workers or reading_cores(),
            bad_images=bad_images,
            flip=self.flip,
        )


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


def drop_path_numbers(config: TrainingConfig, epoch: ArrayLike, index: ArrayLike, layers: int) -> NDArray[np.float32]:
    """Draw the numbers that decide which layers an image skips: (B, layers), uniform in [0, 1)."""
    return uniforms(sample_keys(config.seed, epoch, index, stream="drop_path"), layers).astype(np.float32)


class Sized(Protocol):
    """Sizes of an encoder of any engine, in pixels."""

    @property
    def patch_size(self) -> int: ...
    @property
    def stride(self) -> int: ...


def check_sizes(config: PretrainConfig, encoder: Sized) -> None:
    """Check that image, cell, patch and stride fit each other. Raises `UserError`."""
    assert config.image_size is not None
    patch, stride, masks = encoder.patch_size, encoder.stride, config.mask.for_patch(encoder.patch_size)
    cell = masks.cell
    assert cell is not None
    if config.masks_images:
        masks.grid(config.image_size)
    if config.masks_images and cell % patch:
        raise UserError(
            f"mask cell {cell} is not a multiple of the patch {patch} of {config.model}; "
            f"use --mask.cell {max(cell // patch, 1) * patch} or {(cell // patch + 1) * patch}"
        )
    check_stride(config.image_size, stride, config.model)


def check_stride(image_size: tuple[int, int], stride: int, model: str) -> None:
    """Check that a model's feature map covers the image. Raises `UserError`."""
    for side in image_size:
        if side % stride:
            near = max(side // stride, 1) * stride
            raise UserError(
                f"image size {side} is not a multiple of the stride {stride} of {model}; use {near} or {near + stride}"
            )
