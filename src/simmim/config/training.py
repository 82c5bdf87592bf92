"""Configurations: frozen dataclasses, checked once where they enter, TOML in and out.

A field that the user left open is `None`; the engine resolves every `None` before it writes `RUN/config.toml`, so that
`simmim pretrain --config RUN/config.toml --out NEW` repeats the run.
"""

import dataclasses
import difflib
import importlib.util
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import tomli_w
from pydantic import Field
from tyro.conf import Suppress, arg

from simmim.config.field_types import (
    HINT,
    NONE_WORD,
    Colour,
    Count,
    Flip,
    ImageSize,
    ModelArgs,
    NotNegative,
    NotNegativeReal,
    Positive,
    PositiveReal,
    RangeIfAny,
    Share,
    SharesIfAny,
    Word,
    YesNo,
    one_word,
)
from simmim.errors import UserError
from simmim.method.losses import LOSSES, check_pair
from simmim.method.masks import MASKS, MaskStrategy
from simmim.method.targets import TARGETS


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


Config = TypeVar("Config", bound=TrainingConfig)
Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Masked image modelling on unlabelled images (SimMIM, arXiv 2111.09886)."""

    crop_scale: SharesIfAny = None
    """Range of a random crop's share of the image (default: 0.67 1, or as the source declares)."""
    crop_ratio: RangeIfAny = None
    """Range of its width over its height, relative to the image size (default: 0.75 1.333, or as the source says)."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """What decodes JPEGs: the CPU's threads, or the GPU by nvJPEG, for few CPU cores beside it."""
    readers: Literal["threads", "processes"] = "threads"
    """What reads images: threads, or processes, which take more memory, for many images a second."""
    antialias: bool = True
    """Blur what is shrunk, as Pillow does; without it raw pixels are read faster, and fine patterns alias."""
    shard: bool = False
    """Shard parameters and optimiser over the processes (FSDP2) instead of copying them (DDP)."""

    mask: Annotated[str, arg(metavar="|".join(MASKS))] = "random"
    """How cells to hide are chosen."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of cells that is hidden."""
    mask_cell: Count = None
    """Side of a cell, in pixels (default: the paper's 32, or the whole number of the model's patches next to it)."""
    target: Annotated[str, arg(metavar="|".join(TARGETS))] = "pixels"
    """What is predicted."""
    loss: Annotated[str, arg(metavar="|".join(LOSSES))] = "l1"
    """How a prediction is judged, on hidden pixels only."""
    clusters: Annotated[int, Field(ge=2)] = 128
    """Colours that target clusters tells apart."""
    cluster_centres: Suppress[tuple[tuple[float, ...], ...] | None] = None
    """Those colours, normalised (default: found by k-means over the images)."""
    encode: Literal["all", "visible"] = "all"
    """Patches that the encoder sees: all, hidden ones as mask tokens, or visible only (MAE, UM-MAE: other methods)."""
    head: Literal["linear", "mlp", "transformer"] = "linear"
    """The prediction head."""
    decoder_depth: Positive = 2
    """Blocks of head transformer (MAE: 8)."""
    decoder_width: Positive = 256
    """Features of head transformer (MAE: 512)."""
    plain_step: bool = False
    """Compute also what the loss does not need, as the official code does: slower, equal but for rounding."""
    engine: Literal["torch", "keras"] = "torch"
    """What trains: PyTorch, or Keras on JAX or TensorFlow."""
    backend: Annotated[Literal["jax", "tensorflow"] | None, one_word(str, "jax|tensorflow"), HINT] = None
    """What the keras engine runs on (default: jax)."""
    init_from: Word = None
    """Start from the weights of this run or safetensors file."""
    val_images: NotNegative = 8
    """Images kept out of training for the reconstruction pictures and the validation loss."""
    picture_every_steps: Count = None
    """Steps between reconstruction pictures (default: as checkpoints)."""
    probe: Word = None
    """Labelled images (train/CLASS, val/CLASS, or demo) for a k-NN check as training goes."""
    probe_every_epochs: PositiveReal = 10.0
    """Epochs between k-NN checks."""

    def mask_strategy(self, patch: int = 1) -> MaskStrategy:
        """What draws the masks of an encoder whose patches have sides of `patch` pixels."""
        cell = self.mask_cell or max(round(MaskStrategy.cell / patch), 1) * patch
        return MASKS[self.mask](ratio=self.mask_ratio, cell=cell)


HEAD_FEATURES = 32
"""Features of each attention head in head transformer, as in MAE's decoder."""

# What may differ when a run is resumed: where and how it runs and is watched, never what is learned.
OPERATIONAL = {
    "out", "backend", "device", "compile", "workers", "max_bad_fraction", "accumulate_steps", "checkpoint_activations",
    "shard", "plain_step", "kernels", "decode", "readers", "save_every_steps", "keep", "fresh", "log_every_steps",
    "log", "picture_every_steps", "probe", "probe_every_epochs",
}  # fmt: skip


def validated(config: Config) -> Config:
    """The configuration with types and ranges checked; one-line `ValueError` for what cannot be.

    Every entry (command line, TOML, Python) passes here, once.
    """
    config = from_settings(type(config), dataclasses.asdict(config))
    for name, remedy in (("data", "a folder, a text file of paths, hf:NAME or demo"), ("out", "a directory to write")):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing; give {remedy}")
    if "://" in (config.out or ""):
        raise UserError(f"--out {config.out} is a URL; give a directory: mount the storage first (docs/tpu.md)")
    _check_colours(config)
    if config.schedule == "multistep" and not config.milestones:
        raise UserError("schedule multistep needs milestones; give the epochs, such as --milestones 700")
    if list(config.milestones) != sorted(config.milestones):
        raise UserError(f"milestones {config.milestones} are not in ascending order; sort them")
    for package in config.log:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"log {package!r} needs the package {package}; pip install {package}")
    if config.batch_size % config.accumulate_steps:
        raise UserError(
            f"batch size {config.batch_size} is not a multiple of accumulate steps {config.accumulate_steps}; "
            f"use {config.batch_size // config.accumulate_steps * config.accumulate_steps or config.accumulate_steps}"
        )
    if isinstance(config, PretrainConfig):
        if config.backend is not None and config.engine != "keras":
            raise UserError(f"--backend {config.backend} is for the keras engine; add --engine keras")
        for name, table in (("mask", MASKS), ("target", TARGETS), ("loss", LOSSES)):
            if (value := getattr(config, name)) not in table:
                raise UserError(f"{name} {value!r} is not known; choose from {', '.join(table)}")
        check_pair(config.target, config.loss)
        _check_head(config)
        if config.decode == "gpu" and config.channels not in (1, 3):
            raise UserError(
                f"--decode gpu is for JPEGs, which have 1 or 3 channels, not {config.channels}; use --decode cpu"
            )
        cpu_only = {"--readers processes": config.readers != "threads", "--no-antialias": not config.antialias}
        for option, given in cpu_only.items():
            if given and config.decode == "gpu":
                raise UserError(f"{option} is not for --decode gpu; leave one of them out")
        config.mask_strategy()  # its own rules
    return config


def _check_head(config: PretrainConfig) -> None:
    if config.decoder_width % HEAD_FEATURES:
        near = max(config.decoder_width // HEAD_FEATURES, 1) * HEAD_FEATURES
        raise UserError(
            f"decoder width {config.decoder_width} is not a multiple of {HEAD_FEATURES}; "
            f"use {near} or {near + HEAD_FEATURES}"
        )
    if config.head == "transformer":
        return
    if config.encode == "visible":
        raise UserError(
            f"--encode visible leaves hidden cells to the head, and head {config.head} sees one cell at a time; "
            "add --head transformer"
        )
    for name in ("decoder_depth", "decoder_width"):
        if (value := getattr(config, name)) != getattr(PretrainConfig, name):
            option = name.replace("_", "-")
            raise UserError(f"--{option} {value} is for head transformer; add --head transformer, or leave it out")


def _check_colours(config: TrainingConfig) -> None:
    if (config.mean is None) != (config.std is None):
        raise UserError("mean and std belong together; give both or neither")
    for name in ("mean", "std"):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != config.channels:
            raise UserError(f"{name} has {len(value)} values for {config.channels} channels; give one a channel")
    if isinstance(config.std, tuple) and min(config.std) <= 0:
        raise UserError(f"std {min(config.std)} is not above 0; give each channel's own, or measure")


# What is wrong with a value, by pydantic's name for it.
_RULES = {
    "greater_than": "is not above {gt}",
    "greater_than_equal": "is less than {ge}",
    "less_than": "is not below {lt}",
    "less_than_equal": "is more than {le}",
    "finite_number": "is not finite",
    "literal_error": "is not known",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "is not a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "is not a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "is neither true nor false"),
    "string_type": "is not a text",
}


def from_settings(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """A configuration, or any other dataclass of settings, from names and values, with types and ranges checked.

    One-line `ValueError` where they fail.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            remedy = f"did you mean {close[0]}?" if close else "see `simmim pretrain --help` for the names"
            raise UserError(f"configuration field {name!r} is not known; {remedy}")
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as failure:
        error = failure.errors()[0]
        name = str(error["loc"][0])
        raise UserError(f"{name.replace('_', ' ')} {_explain(error, fields[name].default)}") from None


def _explain(error: Mapping[str, Any], default: Any) -> str:
    """Value, rule and remedy of what pydantic found."""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    context = {k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()}
    rule = _RULES[error["type"]].format(**context) if error["type"] in _RULES else f"is not possible ({message})"
    remedy = "leave it out for the default" if default in (None, dataclasses.MISSING) else f"the default is {default}"
    if error["type"] == "literal_error":
        remedy = "choose from " + context["expected"].replace("'", "").replace(" or ", ", ")
    return f"{error['input']!r} {rule}; {remedy}"


def to_toml(config: TrainingConfig) -> str:
    """Every field that differs from `None`, for which TOML has no word, or from a default that is not `None`."""
    values = dataclasses.asdict(config)
    off = {f.name: "none" for f in dataclasses.fields(config) if f.default is not None and values[f.name] is None}
    return tomli_w.dumps({name: value for name, value in values.items() if value is not None} | off)


def read_toml(path: str | os.PathLike[str], kind: type[Config]) -> Config:
    """The configuration of a TOML file, not yet `validated` (data and out may follow on the command line)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}; give a TOML file") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"configuration {path} is not TOML: {error}; compare it with a RUN/config.toml") from None
    try:
        return from_settings(kind, values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def changed_fields(old: TrainingConfig, new: TrainingConfig) -> list[str]:
    """Names of the fields in which a resumed run would learn something else."""
    names = [f.name for f in dataclasses.fields(new) if f.name not in OPERATIONAL]
    return [name for name in names if getattr(old, name) != getattr(new, name)]
