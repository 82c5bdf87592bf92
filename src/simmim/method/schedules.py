"""Learning-rate schedules as pure functions of the step, equal to the official SimMIM code's and timm's."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass

from simmim.errors import UserError


def scale_lr(base_lr: float, global_batch: int) -> float:
    """Scale a learning rate for a batch of 512 to `global_batch` images (SimMIM's linear rule).

    Warm-up and minimum rates scale alike.
    """
    return base_lr * global_batch / 512


def usual_lr(global_batch: int, width: int | None) -> float:
    """Choose a peak learning rate, for a batch of 512 as `scale_lr` takes it, from batch and model.

    A transformer whose tokens have `width` features trains at 1e-3 · sqrt(batch / 64) · 128 / width. That is 1e-3 for a
    width of 128 at 64 images, where trainings of some thousand steps did best
    (benchmarks/results/pretraining_helps_search.md), and within an eighth of SimMIM's 8e-4 for 100 epochs of Swin-B
    (1,024 features) at 2048; its 800 epochs of ViT-B have 4e-4, this 9e-4. A convolutional net, of width `None`,
    trains at 1e-3 · sqrt(batch / 64), at most 2e-3. AdamW's rate grows with the root of the batch (arXiv 2205.10287).
    """
    peak = 1e-3 * math.sqrt(global_batch / 64)
    peak = min(peak, 2e-3) if width is None else peak * 128 / width
    return peak * 512 / global_batch


def finetune_lr(global_batch: int, width: int | None) -> float:
    """Choose the peak learning rate of a fine-tuning, for a batch of 512 as `scale_lr` takes it.

    The rate is 2e-3 · sqrt(batch / 64), for a transformer times sqrt(128 / width), where `width` is the number of
    features of its tokens, and at most the paper's 5e-3. That is within a tenth of the paper's for ViT-B at 2048
    (SimMIM, appendix A), and what small sets need at 64 (docs/finetuning.md); in proportion to the batch, the paper's
    would be 1.6e-4 there. A convolutional net has a width of `None`.
    """
    peak = 2e-3 * math.sqrt(global_batch / 64) * (1.0 if width is None else math.sqrt(128 / width))
    return min(peak, 5e-3) * 512 / global_batch


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Learning rate at a step (0, 1, …): linear warm-up, then the subclass's curve."""

    peak_lr: float
    warmup_lr: float
    warmup_steps: int

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """Return the learning rate at a step from `warmup_steps` on."""

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.warmup_lr + step * (self.peak_lr - self.warmup_lr) / self.warmup_steps
        return self.after_warmup(step)

    def at_update(self, update: int) -> float:
        """Return the learning rate of update 0, 1, … in the official training loop.

        That loop sets the rate after each update from the update's own number: updates 0 and 1 both use step 0's rate.
        """
        return self(max(update - 1, 0))


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Schedule):
    """Cosine from `peak_lr` at step 0 to `min_lr` at `total_steps`, and `min_lr` from then on.

    Warm-up replaces the start of the curve without shifting it: the rate drops a little where warm-up ends.
    """

    min_lr: float
    total_steps: int

    def __post_init__(self) -> None:
        if self.warmup_steps > self.total_steps:
            raise UserError(
                f"warm-up of {self.warmup_steps} steps is longer than the run of {self.total_steps}; "
                f"use at most {self.total_steps} warm-up steps"
            )

    def after_warmup(self, step: int) -> float:
        progress = min(step / self.total_steps, 1.0)
        return self.min_lr + 0.5 * (self.peak_lr - self.min_lr) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class MultiStepSchedule(Schedule):
    """`peak_lr`, multiplied by `gamma` at each of the `milestones` (steps, in ascending order)."""

    milestones: tuple[int, ...]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if list(self.milestones) != sorted(self.milestones):
            raise UserError(f"milestones {self.milestones} are not in ascending order; sort them")
        if self.milestones and self.warmup_steps > self.milestones[0]:
            raise UserError(
                f"warm-up of {self.warmup_steps} steps passes the first milestone {self.milestones[0]}; "
                f"use at most {self.milestones[0]} warm-up steps"
            )

    def after_warmup(self, step: int) -> float:
        return self.peak_lr * self.gamma ** bisect_right(self.milestones, step)
