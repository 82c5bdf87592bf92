"""Configuration of every training: a frozen dataclass, checked once where it enters.

A field that the user left open is `None`; the engine resolves every `None` before it writes `RUN/config.toml`, so that
`simmim pretrain --config RUN/config.toml --out NEW` repeats the run.
"""

import importlib.util
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from simmim.config.field_types import (
    HINT,
    NONE_WORD,
    Colour,
    Count,
    Flip,
    ImageSize,
    ModelArgs,
    NotNegativeReal,
    Positive,
    PositiveReal,
    Share,
    Word,
    YesNo,
    one_word,
)
from simmim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """CPU kernels that compute the same result in different ways. `auto` measures which is faster here."""

    linear: Literal["auto", "default", "onednn"] = "auto"
    """Linear layers in fp32: PyTorch's default library, or oneDNN."""
    attention: Literal["auto", "fused", "products"] = "auto"
    """Attention: PyTorch's fused kernel, or two matrix products and a softmax."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Images of convolutional nets in memory: by pixels, or by channels."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training has: data, optimiser, accelerator, checkpoints."""

    command: ClassVar[str]
    """The words after `simmim` of the command with these settings."""
    unlisted: ClassVar[frozenset[str]] = frozenset()
    """Fields that have no effect in this command, which its `--help` leaves out."""

    data: Word = None
    """Images: a folder of any depth, a text file of paths, hf:NAME_OR_PATH, or demo (the embedded emoji). Required."""
    out: Word = None
    """The run directory to write. The same directory again resumes. Required."""
    model: str = "vit_small_patch16_224"
    """The encoder: any timm ViT, DeiT, BEiT, Swin, SwinV2, ResNet, RegNet or ConvNeXt, by its timm name."""
    model_args: ModelArgs = field(default_factory=dict)
    """Further arguments of the timm model, such as depth=4 embed_dim=192."""
    image_size: ImageSize = None
    """Pixels, N or HxW (default: the model's own)."""
    channels: Positive = 3
    """Channels of an image. 1 and 3 convert freely; other numbers must match the files."""
    mean: Colour = None
    """Mean of each channel in units of 1 = white (default: ImageNet's for 8-bit RGB, else measured)."""
    std: Colour = None
    """Standard deviation of each channel (default: as for the mean)."""
    flip: Annotated[Flip | None, one_word(str, "none|horizontal|both"), HINT] = None
    """How images are mirrored at random; both is upside down too (default: horizontal, or as the source declares)."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of images that may be unreadable before the run is failed."""
    workers: Count = None
    """Threads or processes that read images (default: one a core, shared out among processes of torchrun)."""

    epochs: PositiveReal = 100.0
    """Passes over the data."""
    steps: Count = None
    """Optimiser steps, instead of epochs."""
    batch_size: Positive = 64
    """Images of one optimiser step, over all processes and accumulation together."""
    accumulate_steps: Positive = 1
    """Split each step into so many smaller forward and backward passes, to save memory."""
    lr: PositiveReal = 2e-4
    """Learning rate for a batch of 512; it is scaled by batch size / 512, as warm-up and minimum are."""
    warmup_lr: NotNegativeReal = 5e-7
    """Learning rate at the first step, for a batch of 512."""
    min_lr: NotNegativeReal = 1e-6
    """Learning rate at the end of the cosine, for a batch of 512."""
    warmup_epochs: Annotated[NotNegativeReal | None, one_word(float, "FLOAT"), HINT] = None
    """Epochs of linear warm-up (default: 10, at most a tenth of the run)."""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """How the learning rate falls."""
    milestones: Annotated[tuple[PositiveReal, ...], HINT] = ()
    """Epochs at which the multistep schedule divides the learning rate by 10."""
    weight_decay: NotNegativeReal = 0.05
    """AdamW's weight decay; biases, norms, tokens and position tables are exempt as in the paper."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's averages."""
    clip_grad: Annotated[PositiveReal | None, NONE_WORD, one_word(float, "FLOAT|none", nothing="none")] = 5.0
    """Largest gradient norm; none is no limit."""
    drop_path: Share = 0.0
    """Stochastic depth of the last block."""
    seed: int = 0
    """Seed of everything random."""

    device: Literal["auto", "cpu", "cuda", "tpu"] = "auto"
    """Accelerator."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass (auto: bf16 where the hardware has it, else fp32)."""
    compile: YesNo = None
    """Compile the step with torch.compile (default: on CUDA and TPU only)."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    kernels: Kernels = Kernels()
    """CPU kernels (default: the faster ones, by a short measurement; a resumed run keeps its own)."""

    save_every_steps: Count = None
    """Steps between checkpoints (default: one epoch, at least 100 steps)."""
    keep: Positive = 2
    """Checkpoints to keep."""
    fresh: bool = False
    """Start again although the run directory holds a run: the old one is moved aside, not deleted."""
    log_every_steps: Positive = 10
    """Steps between lines of progress; metrics.jsonl has every step."""
    log: Annotated[tuple[Literal["wandb", "trackio"], ...], HINT] = ()
    """Further trackers, which must be installed."""

    def check(self) -> None:
        """Raise `UserError` for settings that do not fit each other."""
        for name, remedy in (
            ("data", "a folder, a text file of paths, hf:NAME or demo"),
            ("out", "a directory to write"),
        ):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; give {remedy}")
        if "://" in (self.out or ""):
            raise UserError(f"--out {self.out} is a URL; give a directory: mount the storage first (docs/tpu.md)")
        self._check_colours()
        if self.schedule == "multistep" and not self.milestones:
            raise UserError("schedule multistep needs milestones; give the epochs, such as --milestones 700")
        if list(self.milestones) != sorted(self.milestones):
            raise UserError(f"milestones {self.milestones} are not in ascending order; sort them")
        for package in self.log:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"log {package!r} needs the package {package}; pip install {package}")
        if self.batch_size % self.accumulate_steps:
            nearest = self.batch_size // self.accumulate_steps * self.accumulate_steps or self.accumulate_steps
            raise UserError(
                f"batch size {self.batch_size} is not a multiple of accumulate steps {self.accumulate_steps}; "
                f"use {nearest}"
            )

    def _check_colours(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise UserError("mean and std belong together; give both or neither")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.channels:
                raise UserError(f"{name} has {len(value)} values for {self.channels} channels; give one a channel")
        if isinstance(self.std, tuple) and min(self.std) <= 0:
            raise UserError(f"std {min(self.std)} is not above 0; give each channel's own, or measure")
