"""Configurations: frozen dataclasses, checked once where they enter, TOML in and out.

A configuration is complete: what it does not say is `None`, and `simmim.torch_engine.pretrain` resolves every `None`
before it writes `RUN/config.toml`, so that `simmim pretrain --config RUN/config.toml --out NEW` repeats the run.
"""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import tomli_w
from pydantic import BeforeValidator, Field
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from simmim.losses import LOSSES, check_pair
from simmim.masking import MASKS, MaskStrategy
from simmim.targets import TARGETS


def parse_image_size(value: Any) -> tuple[int, int] | None:
    """`224`, `"224"`, `"96x160"` or `(96, 160)` → (height, width) in pixels."""
    if value is None:
        return None
    parts = str(value).lower().split("x") if isinstance(value, (str, int)) else list(value)
    try:
        sides = [int(part) for part in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"image size {value!r} is not N or HxW in whole pixels; write 224 or 96x160")
    return (sides[0], sides[-1])


def parse_model_args(value: Any) -> dict[str, Any]:
    """`["depth=2", "embed_dims=[32,64]"]` → keyword arguments of the timm model; values are read as TOML."""
    if isinstance(value, Mapping):
        return dict(value)
    arguments = {}
    for item in value:
        name, equals, text = item.partition("=")
        if not name or not equals:
            raise ValueError(f"model argument {item!r} is not NAME=VALUE; write depth=4")
        try:
            arguments[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            arguments[name] = text
    return arguments


def _one_word(parse: Any, metavar: str, show: Any) -> PrimitiveConstructorSpec:
    """How tyro reads an optional value that is one word on the command line."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["auto" if value is None else show(value)],
    )


ImageSize = Annotated[
    tuple[int, int] | None,
    BeforeValidator(parse_image_size),
    _one_word(parse_image_size, "N|HxW", lambda size: f"{size[0]}x{size[1]}"),
]
# Shown as --compile; the command line turns --no-compile into `--compile no`.
_YES_NO = PrimitiveConstructorSpec(
    nargs=1,
    metavar="/ --no-compile",
    instance_from_str=lambda words: words[0] == "yes",
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: ["auto" if value is None else "yes" if value else "no"],
)
ModelArgs = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=parse_model_args,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={item}" for name, item in value.items()],
    ),
]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeReal = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training has: data, optimiser, accelerator, checkpoints."""

    data: str | None = None
    """Images: a folder of any depth, a text file of paths, hf:NAME_OR_PATH, or demo (the embedded emoji). Required."""
    out: str | None = None
    """The run directory to write. The same directory again resumes. Required."""
    model: str = "vit_small_patch16_224"
    """The encoder: any timm ViT, DeiT, BEiT, Swin, SwinV2, ResNet, RegNet or ConvNeXt, by its timm name."""
    model_args: ModelArgs = field(default_factory=dict)
    """Further arguments of the timm model, such as depth=4 embed_dim=192."""
    image_size: ImageSize = None
    """Pixels, N or HxW (default: the model's own)."""
    channels: Positive = 3
    """Channels of an image. 1 and 3 convert freely; other numbers must match the files."""
    mean: tuple[float, ...] | Literal["measure"] | None = None
    """Mean of each channel in units of 1 = white (default: ImageNet's for 8-bit RGB, else measured)."""
    std: tuple[PositiveReal, ...] | Literal["measure"] | None = None
    """Standard deviation of each channel (default: as for the mean)."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of images that may be unreadable before the run is failed."""
    workers: Positive | None = None
    """Threads that decode images (default: one a core)."""

    epochs: PositiveReal = 100.0
    """Passes over the data."""
    steps: Positive | None = None
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
    warmup_epochs: NotNegativeReal | None = None
    """Epochs of linear warm-up (default: 10, at most a tenth of the run)."""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """How the learning rate falls."""
    milestones: tuple[PositiveReal, ...] = ()
    """Epochs at which the multistep schedule divides the learning rate by 10."""
    weight_decay: NotNegativeReal = 0.05
    """AdamW's weight decay; biases, norms, tokens and position tables are exempt as in the paper."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's averages."""
    clip_grad: PositiveReal | None = 5.0
    """Largest gradient norm."""
    drop_path: Share = 0.0
    """Stochastic depth of the last block."""
    seed: int = 0
    """Seed of everything random."""

    device: Literal["auto", "cpu", "cuda", "tpu"] = "auto"
    """Accelerator."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass (auto: bf16 where the hardware has it, else fp32)."""
    compile: Annotated[bool | None, _YES_NO] = None
    """Compile the step with torch.compile (default: on CUDA and TPU only)."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    shard: bool = False
    """Shard parameters and optimiser over the processes (FSDP2) instead of copying them (DDP)."""

    save_every_steps: Positive | None = None
    """Steps between checkpoints (default: one epoch, at least 100 steps)."""
    keep: Positive = 2
    """Checkpoints to keep."""
    fresh: bool = False
    """Start again although the run directory holds a run: the old one is moved aside, not deleted."""
    log_every_steps: Positive = 10
    """Steps between lines of progress; metrics.jsonl has every step."""
    log: tuple[Literal["wandb", "trackio"], ...] = ()
    """Further trackers, which must be installed."""


Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Masked image modelling on unlabelled images (SimMIM, arXiv 2111.09886)."""

    mask: Annotated[str, arg(metavar="|".join(MASKS))] = "random"
    """How cells to hide are chosen."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of cells that is hidden."""
    mask_cell: Positive = 32
    """Side of a cell, in pixels."""
    target: Annotated[str, arg(metavar="|".join(TARGETS))] = "pixels"
    """What is predicted."""
    loss: Annotated[str, arg(metavar="|".join(LOSSES))] = "l1"
    """How a prediction is judged, on hidden pixels only."""
    clusters: Annotated[int, Field(ge=2)] = 128
    """Colours that target clusters tells apart."""
    cluster_centres: tuple[tuple[float, ...], ...] | None = None
    """Those colours, normalised (default: found by k-means over the images)."""
    head: Literal["linear", "mlp", "transformer"] = "linear"
    """The prediction head."""
    init_from: str | None = None
    """Start from the weights of this run or safetensors file."""
    val_images: NotNegative = 8
    """Images kept out of training for the reconstruction pictures and the validation loss."""
    picture_every_steps: Positive | None = None
    """Steps between reconstruction pictures (default: as checkpoints)."""
    probe: str | None = None
    """Labelled images (train/CLASS, val/CLASS, or demo) for a k-NN check as training goes."""
    probe_every_epochs: PositiveReal = 10.0
    """Epochs between k-NN checks."""

    def mask_strategy(self) -> MaskStrategy:
        return MASKS[self.mask](ratio=self.mask_ratio, cell=self.mask_cell)


# What may differ when a run is resumed: where and how it runs and is watched, never what is learned.
OPERATIONAL = {
    "out", "device", "compile", "workers", "max_bad_fraction", "accumulate_steps", "checkpoint_activations", "shard",
    "save_every_steps", "keep", "fresh", "log_every_steps", "log", "picture_every_steps", "probe", "probe_every_epochs",
}  # fmt: skip


def validated(config: Config) -> Config:
    """The configuration with types and ranges checked; one-line `ValueError` for what cannot be.

    Every entry (command line, TOML, Python) passes here, once.
    """
    config = from_settings(type(config), dataclasses.asdict(config))
    for name, remedy in (("data", "a folder, a text file of paths, hf:NAME or demo"), ("out", "a directory to write")):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing; give {remedy}")
    if (config.mean is None) != (config.std is None):
        raise ValueError("mean and std belong together; give both or neither")
    for name in ("mean", "std"):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != config.channels:
            raise ValueError(f"{name} has {len(value)} values for {config.channels} channels; give one a channel")
    if config.schedule == "multistep" and not config.milestones:
        raise ValueError("schedule multistep needs milestones; give the epochs, such as --milestones 700")
    if config.batch_size % config.accumulate_steps:
        raise ValueError(
            f"batch size {config.batch_size} is not a multiple of accumulate_steps {config.accumulate_steps}; "
            f"use {config.batch_size // config.accumulate_steps * config.accumulate_steps or config.accumulate_steps}"
        )
    if isinstance(config, PretrainConfig):
        for name, table in (("mask", MASKS), ("target", TARGETS), ("loss", LOSSES)):
            if (value := getattr(config, name)) not in table:
                raise ValueError(f"{name} {value!r} is not known; choose from {', '.join(table)}")
        check_pair(config.target, config.loss)
        config.mask_strategy()  # its own rules
    return config


def from_settings(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration from names and values, with types and ranges checked. One-line `ValueError` where they fail."""
    fields = {f.name for f in dataclasses.fields(kind)}
    if unknown := set(values) - fields:
        raise ValueError(
            f"configuration field {min(unknown)!r} is not known; see `simmim pretrain --help` for the names"
        )
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name, message = first["loc"][0], first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error":
            raise ValueError(message) from None
        message = message[0].lower() + message[1:]
        raise ValueError(f"{name} {values[str(name)]!r} is not possible: {message}") from None


def to_toml(config: TrainingConfig) -> str:
    """Every field that is set; `None` is left out, since TOML has no word for it."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    return tomli_w.dumps(values)


def read_toml(path: str | os.PathLike[str], kind: type[Config]) -> Config:
    """The configuration of a TOML file, not yet `validated` (data and out may follow on the command line)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"configuration {path} cannot be read: {error.strerror}; give a TOML file") from None
    try:
        return from_settings(kind, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"configuration {path} is not TOML: {error}") from None


def changed_fields(old: TrainingConfig, new: TrainingConfig) -> list[str]:
    """Names of the fields in which a resumed run would learn something else."""
    names = [f.name for f in dataclasses.fields(new) if f.name not in OPERATIONAL]
    return [name for name in names if getattr(old, name) != getattr(new, name)]
