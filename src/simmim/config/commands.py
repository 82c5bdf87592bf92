"""Settings of the commands that train nothing. They load nothing heavy, so that mistakes are told at once."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from tyro.conf import Positional, arg

from simmim.config.field_types import (
    HINT,
    Compile,
    Count,
    Device,
    ImageSize,
    ModelArgs,
    NotNegative,
    Positive,
    PositiveReal,
    Word,
)
from simmim.config.frames import FRAMES, Frames

Pool = Literal["auto", "avg", "token", "own"]
Method = Literal["knn", "linear"]

NEIGHBOURS = 20


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A probe of an encoder's frozen features."""

    command: ClassVar[str] = "probe"
    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The --out directory of a run, an encoder directory, timm:NAME, or local-dir:PATH of a model that timm saved."""
    data: str
    """Labelled images: train/CLASS and val/CLASS or test/CLASS, or CLASS alone, .zip, .tar, .csv, .npz, hf:NAME."""
    frames: Frames = FRAMES
    """Frames of clips, as simmim pretrain takes them: Ns, N or key, with or without +distinct."""
    method: Method = "knn"
    """A vote of the nearest training images, or a linear classifier."""
    layer: int = -1
    """Block of a ViT, or stage of another net, to take features from; negative numbers count from the end."""
    pool: Pool = "auto"
    """Mean over the image (avg), a ViT's class token, which SimMIM does not train, or the model's own (own: as timm's
    model(images); auto: that of timm: and local-dir:, else avg)."""
    k: Positive = NEIGHBOURS
    """Neighbours that vote."""
    temperature: PositiveReal = 0.07
    """A neighbour's vote weighs exp(cosine / temperature)."""
    labels_per_class: Count = None
    """Learn from so many images of each class only."""
    label_seed: int = 0
    """Seed of the choice of those images."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the images to judge by, where the data has no val or test part."""
    seed: int = 0
    """Seed of that split, and of what the linear probe holds out to choose its penalty."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of images that may be unreadable."""
    batch_size: Positive = 64
    """Images that are encoded at a time."""
    device: Device = "auto"
    """Accelerator."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the encoder (auto: bf16 where the hardware has it, else fp32; with --out fp32, as predict has)."""
    workers: Count = None
    """Threads that decode images (default: one a core)."""
    baselines: bool = True
    """Also judge raw pixels and the same encoder with random weights, which useful features must beat."""
    out: Word = None
    """A new directory for the linear classifier on its encoder: a model for simmim predict and export."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """A fine-tuning, and how to train its baselines."""

    command: ClassVar[str] = "baseline"
    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The --out directory of a finished fine-tuning."""
    rates: Annotated[tuple[PositiveReal, ...], Field(min_length=1)] = (1.0, 2.0, 4.0)
    """Learning rates, as multiples of RUN's."""
    longer: Annotated[float, Field(ge=1)] = 1.0
    """Number of steps, as a multiple of RUN's."""


@dataclass(frozen=True, kw_only=True)
class PasteConfig:
    """A set of pasted pieces."""

    command: ClassVar[str] = "paste"
    images: Positional[Annotated[str, arg(metavar="IMAGES")]]
    """Unlabelled images, as pretraining's --data takes them."""
    run: Annotated[str, arg(name="from", metavar="RUN")]
    """Encoder by which pieces are sorted into kinds: a run, an encoder directory, timm:NAME or local-dir:PATH."""
    out: str
    """Directory to write, for --data of simmim finetune detect and segment. The same again writes what is missing."""
    frames: Frames = FRAMES
    """Frames of clips, as simmim pretrain takes them: Ns, N or key, with or without +distinct."""
    count: Positive = 4800
    """Images to write for training; a hundredth as many, 16 or more, are for evaluation."""
    image_size: Annotated[int, Field(ge=32)] = 192
    """Pixels of a side. Give about 1.5 times the --image-size of the detector."""
    kinds: Annotated[int, Field(ge=1, le=254)] = 24
    """Kinds of pieces, which are the classes."""
    pieces: Positive = 6000
    """Pieces to cut out."""
    seed: NotNegative = 0
    """Seed of what is cut out and where it is pasted."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of images that may be unreadable."""
    device: Device = "auto"
    """Accelerator, for the features."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """An encoder, images, and which of their features to write."""

    command: ClassVar[str] = "embed"
    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The --out directory of a run, an encoder directory, timm:NAME, or local-dir:PATH of a model that timm saved."""
    data: str
    """Images as simmim pretrain takes them: a folder, an image, .zip, .tar, list of paths, shards, .npz, hf:, demo."""
    frames: Frames = FRAMES
    """Frames of clips, as simmim pretrain takes them: Ns, N or key, with or without +distinct."""
    labels: bool = False
    """Write each image's label too: its class folder, or that of .csv (path,label), .npz (y_train), hf:NAME or demo."""
    out: Word = None
    """File to write: .parquet, .npz or .csv. The same command again resumes where it was killed."""
    layer: int = -1
    """Block of a ViT, or stage of another net, to take features from; negative numbers count from the end."""
    pool: Pool = "auto"
    """Mean over the image (avg), a ViT's class token, which SimMIM does not train, or the model's own (own: as timm's
    model(images); auto: that of timm: and local-dir:, else avg)."""
    patches: bool = False
    """Write a vector for each feature-map cell, row by row, in place of one for the image."""
    grid: bool = False
    """Embed windows of the encoder's image size, side by side over each image at full resolution: one vector each, of
    the name NAME@ROW,COLUMN, the window's first pixel."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of the numbers that are written."""
    batch_size: Positive = 64
    """Images that are encoded at a time."""
    device: Device = "auto"
    """Accelerator."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the encoder (auto: bf16 where the hardware has it, else fp32)."""
    workers: Count = None
    """Threads that decode images (default: one a core)."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of images that may be unreadable."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """A fine-tuned model and new images."""

    command: ClassVar[str] = "predict"
    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The --out directory of a fine-tuning, or its model directory."""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE...")]]
    """Image files, or one folder, list, .npz, hf:NAME or demo."""
    frames: Frames = FRAMES
    """Frames of clips, as simmim pretrain takes them: Ns, N or key, with or without +distinct."""
    out: Word = None
    """A new directory for predictions.json and a picture of each image."""
    batch_size: Positive = 64
    """Images in one forward pass."""
    device: Device = "auto"
    """Accelerator."""
    top: Count = None
    """Classes that a classifier names for each image (default: 5)."""
    workers: Count = None
    """Threads that decode images (default: one a core)."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of a conversion."""

    command: ClassVar[str] = "convert"
    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """A file or directory: official SimMIM, MAE, Swin or BEiT, Transformers', or timm's."""
    out: str
    """The run directory to write."""
    image_size: ImageSize = None
    """Image size of the run in pixels, N or HxW (default: the checkpoint's)."""
    window: Count = None
    """Window of a Swin, in cells (default: the checkpoint's)."""
    channels: Count = None
    """Channels of the run's images (default: the checkpoint's)."""
    model: Word = None
    """timm model of the checkpoint, if it cannot be inferred."""
    model_args: ModelArgs = field(default_factory=dict)
    """Arguments of that timm model, such as depth=4 embed_dim=192."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of a measurement."""

    command: ClassVar[str] = "bench"
    model: str = "vit_base_patch16_224"
    """Encoder, by its timm name."""
    batch_size: Positive = 8
    """Images of a step."""
    image_size: ImageSize = None
    """Pixels, N or HxW (default: the model's own)."""
    objective: Annotated[tuple[str, ...], arg(metavar="KIND[=WEIGHT] ..."), HINT] = ()
    """Terms of the loss (default: pixels; give --objective descriptor for a run of default-small)."""
    teacher: Word = None
    """Teacher of objective teacher: a run, timm:NAME or a file."""
    data: str = "demo"
    """Images to read; pass your own to find your run's limit."""
    frames: Frames = FRAMES
    """Frames of clips, as simmim pretrain takes them: Ns, N or key, with or without +distinct."""
    workers: Count = None
    """Threads or processes that read images (default: one a core)."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Decode JPEGs on the CPU, or on the GPU with nvJPEG."""
    readers: Literal["threads", "processes"] = "threads"
    """Read images with threads, or with processes."""
    antialias: bool = True
    """Blur before shrinking, as Pillow does."""
    device: Device = "auto"
    """Accelerator."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass."""
    compile: Compile = None
    """Compile the step with torch.compile (default: on CUDA and TPU only, as in training)."""
    seconds: PositiveReal = 10.0
    """Seconds to measure each figure, after a warm-up."""
    profile: Word = None
    """Write a trace of a few steps to this JSON file, for ui.perfetto.dev, and show the costliest operators."""
    save_calibration: Word = None
    """Append the figures to this JSON file for simmim advise --calibration."""
