"""Configuration shared by all trainings: a frozen dataclass, validated once on entry.

Unset fields are `None`. The engine resolves every `None` before it writes `RUN/config.toml`, so that
`simmim pretrain --config RUN/config.toml --out NEW` repeats the run.
"""

import importlib.util
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from tyro.conf import Suppress

from simmim.config.field_types import (
    HINT,
    NONE_WORD,
    AsyncSave,
    Colour,
    Compile,
    Count,
    CountOrAuto,
    Device,
    Flip,
    ImageSize,
    ModelArgs,
    NotNegativeReal,
    Positive,
    PositiveReal,
    Share,
    Word,
    one_word,
)
from simmim.config.sound import Sound
from simmim.errors import UserError
from simmim.method.spectrogram import Spectrogram


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """CPU kernels with equal results and different speed. `auto` measures which is faster."""

    linear: Literal["auto", "default", "onednn"] = "auto"
    """Library for fp32 linear layers: PyTorch's default, or oneDNN."""
    attention: Literal["auto", "fused", "products"] = "auto"
    """Attention kernel: PyTorch's fused one, or two matrix products and a softmax."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Memory layout of convolutional networks."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Choices on an NVIDIA GPU, with results that are equal but for rounding."""

    attention: Literal["auto", "efficient", "flash", "cudnn", "products"] = "auto"
    """Attention kernel. auto: PyTorch's choice without cuDNN's, and products in Swin's windows."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings shared by all trainings: data, optimiser, accelerator, checkpoints."""

    command: ClassVar[str]
    """The words after `simmim` of the command with these settings."""
    unlisted: ClassVar[frozenset[str]] = frozenset()
    """Fields that have no effect in this command, which its `--help` leaves out."""

    data_forms: ClassVar[str] = "a folder, a text file of paths, hf:NAME or demo"
    """What --data takes, for messages."""
    data: Word = None
    """Images, clips or sounds: a folder (searched recursively), an image, .zip, .tar or list of paths, hf:NAME_OR_PATH
    or demo; clips and sounds of any names as video:DATA and audio:DATA. Required."""
    out: Word = None
    """Run directory. An existing run resumes. Required."""
    model: str = "vit_small_patch16_224"
    """timm name of the encoder: any ViT, DeiT, BEiT, Swin, SwinV2, ResNet, RegNet or ConvNeXt."""
    model_args: ModelArgs = field(default_factory=dict)
    """Extra arguments of the timm model, such as depth=4 embed_dim=192."""
    image_size: ImageSize = None
    """Image size in pixels, N or HxW; of sounds frames x mel bands (default: the model's, of sounds 1024x128)."""
    channels: Positive = 3
    """Image channels. Grey (1) and RGB (3) convert freely; other numbers must match the files."""
    mean: Colour = None
    """Mean of each channel, where 1 is white (default: ImageNet's for 8-bit RGB, else measured)."""
    std: Colour = None
    """Standard deviation of each channel (default: as for --mean)."""
    input: Suppress[Literal["images", "sounds"]] = "images"
    """What the files are; their names decide where it is left alone."""
    sound: Sound = Sound()
    """Front end of sounds."""
    flip: Annotated[Flip | None, one_word(str, "none|horizontal|both"), HINT] = None
    """Random flips; both means left-right and upside down (default: horizontal, or as the source declares)."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of unreadable images above which the run fails."""
    workers: Count = None
    """Threads or processes that read images (default: one per core, divided among local ranks)."""

    epochs: PositiveReal = 100.0
    """Passes over the data set."""
    steps: Count = None
    """Number of optimiser steps; overrides epochs."""
    batch_size: Positive = 64
    """Images per optimiser step, over all ranks and accumulation steps."""
    accumulate_steps: CountOrAuto = 1
    """Forward and backward passes per optimiser step; more passes use less memory. auto: the fewest that fit a GPU."""
    lr: PositiveReal | None = 2e-4
    """Peak learning rate for a batch of 512. It scales with batch size / 512, as do --warmup-lr and --min-lr."""
    warmup_lr: NotNegativeReal = 5e-7
    """Learning rate of the first step, for a batch of 512."""
    min_lr: NotNegativeReal = 1e-6
    """Final learning rate of the cosine schedule, for a batch of 512."""
    warmup_epochs: Annotated[NotNegativeReal | None, one_word(float, "FLOAT"), HINT] = None
    """Epochs of linear warm-up (default: 10, at most a tenth of the run)."""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """Learning-rate schedule after warm-up."""
    milestones: Annotated[tuple[PositiveReal, ...], HINT] = ()
    """Epochs at which the multistep schedule divides the learning rate by 10."""
    weight_decay: NotNegativeReal = 0.05
    """AdamW weight decay. Biases, norms, tokens and position tables are exempt, as in the paper."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW betas."""
    clip_grad: Annotated[PositiveReal | None, NONE_WORD, one_word(float, "FLOAT|none", nothing="none")] = 5.0
    """Maximum gradient norm; none turns clipping off."""
    drop_path: Share = 0.0
    """Stochastic depth rate of the last block."""
    seed: int = 0
    """Random seed."""

    device: Device = "auto"
    """Device to train on."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the forward pass (auto: bf16 if the hardware supports it, else fp32)."""
    compile: Compile = None
    """Compile the step with torch.compile (default: on cuda and tpu only)."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    kernels: Kernels = Kernels()
    """CPU kernels (default: the fastest in a short measurement; a resumed run keeps its choice)."""
    gpu: Gpu = Gpu()
    """Choices on an NVIDIA GPU (a resumed run keeps its own)."""

    save_every_steps: Count = None
    """Steps between checkpoints (default: one epoch, at least 100 steps)."""
    keep: Positive = 2
    """Number of latest checkpoints to keep."""
    async_save: AsyncSave = None
    """Write checkpoints while training goes on, from a copy in the host's memory (default: on cuda only)."""
    max_hours: Annotated[PositiveReal | None, one_word(float, "FLOAT"), HINT] = None
    """Hours from the first step, after which the run saves and ends with code 75, to be resumed (default: no limit)."""
    extend: bool = False
    """Resume with other --steps or --epochs: the schedule then spans them, and the rate jumps where a run had ended."""
    fresh: bool = False
    """Start a new run even if the run directory holds one. The old run is moved aside, not deleted."""
    accept_changed_data: bool = False
    """Resume although images were added, removed or renamed since the run began."""
    log_every_steps: Positive = 10
    """Steps between progress lines; metrics.jsonl records every step."""
    log: Annotated[tuple[Literal["wandb", "trackio"], ...], HINT] = ()
    """Additional trackers, which must be installed."""

    @property
    def read_size(self) -> tuple[int, int]:
        """Size in which the files are read: (H, W) of images, (samples, 1) of sounds."""
        assert self.image_size is not None
        return (self.spectrogram.samples, 1) if self.spectrogram else self.image_size

    @property
    def spectrogram(self) -> Spectrogram | None:
        """Front end of sounds; `None` for images."""
        if self.input == "images":
            return None
        assert self.image_size is not None
        return self.sound.spectrogram(self.image_size)

    @property
    def pieces(self) -> int:
        """Accumulation steps; 1 where `auto` is not resolved, or not on a GPU."""
        return self.accumulate_steps or 1

    def check(self) -> None:
        """Raise `UserError` for inconsistent settings."""
        for name, remedy in (
            ("data", self.data_forms),
            ("out", "a directory to write"),
        ):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; give {remedy}")
        if "://" in (self.out or ""):
            raise UserError(f"--out {self.out} is a URL; give a directory: mount the storage first (docs/data.md)")
        self.check_colours()
        if self.schedule == "multistep" and not self.milestones:
            raise UserError("schedule multistep needs milestones; give the epochs, such as --milestones 700")
        if list(self.milestones) != sorted(self.milestones):
            raise UserError(f"milestones {self.milestones} are not in ascending order; sort them")
        for package in self.log:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"log {package!r} needs the package {package}; pip install {package}")
        if self.batch_size % self.pieces:
            nearest = self.batch_size // self.pieces * self.pieces or self.pieces
            raise UserError(
                f"batch size {self.batch_size} is not a multiple of accumulate steps {self.pieces}; use {nearest}"
            )

    def check_colours(self) -> None:
        """Raise `UserError` unless mean and std fit each other, and the number of channels if it is decided."""
        if (self.mean is None) != (self.std is None):
            raise UserError("mean and std belong together; give both or neither")
        if isinstance(self.mean, str) != isinstance(self.std, str):
            raise UserError("mean and std mix measure and numbers; give numbers for both, or measure for both")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, tuple) and self.channels and len(value) != self.channels:
                raise UserError(f"{name} has {len(value)} values for {self.channels} channels; give one per channel")
        if isinstance(self.std, tuple) and min(self.std) <= 0:
            raise UserError(f"std {min(self.std)} is not above 0; give each channel's own, or measure")
