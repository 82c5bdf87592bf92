"""Configurations of fine-tuning: what every task shares, and what each adds. Defaults are the paper's recipe."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from tyro.conf import Suppress, arg

from simmim.config.field_types import (
    HINT,
    NONE_WORD,
    Count,
    Flip,
    NotNegativeReal,
    Positive,
    PositiveReal,
    Share,
    Shares,
    Word,
    one_word,
)
from simmim.config.training import TrainingConfig
from simmim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Supervised training from a pretrained encoder (SimMIM, appendix A)."""

    task: Suppress[str]
    """The name in `TASK_CONFIGS`."""
    classes: Suppress[tuple[str, ...] | None] = None
    """Names of the data's classes in the order of their numbers, found when it is opened."""
    init: Annotated[str | None, one_word(str, "RUN|scratch|timm:NAME", nothing="none"), arg(name="from"), HINT] = None
    """Where the encoder's weights come from: a run, nowhere (scratch), or timm's own. Required."""
    flip: Flip = "horizontal"
    """How images are mirrored at random, with their labels; both is upside down too."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the images to evaluate on, where the data has no val or test folder."""
    layer_decay: Annotated[float | None, Field(gt=0, le=1), one_word(float, "FLOAT"), HINT] = None
    """Learning rate of a layer over that of the next (default: 0.65 for ViT and BEiT, 0.8 for Swin, 1 for others)."""
    eval_every_epochs: PositiveReal = 1.0
    """Epochs between evaluations."""

    lr: PositiveReal = 1.25e-3
    """Learning rate for a batch of 512; it is scaled by batch size / 512, as warm-up and minimum are."""
    warmup_lr: NotNegativeReal = 2.5e-7
    """Learning rate at the first step, for a batch of 512."""
    min_lr: NotNegativeReal = 2.5e-7
    """Learning rate at the end of the cosine, for a batch of 512."""
    warmup_epochs: Annotated[NotNegativeReal | None, one_word(float, "FLOAT"), HINT] = None
    """Epochs of linear warm-up (default: a fifth of the run, 20 of 100 epochs in the paper)."""
    drop_path: Share = 0.1
    """Stochastic depth of the last block."""


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(FinetuneConfig):
    """Image classification."""

    command: ClassVar[str] = "finetune classify"
    task: Suppress[Literal["classify"]] = "classify"
    data: Word = None
    """Labelled images: train/CLASS with val/CLASS or test/CLASS, one folder of classes, .csv, .npz, hf:NAME or demo."""
    labels_per_class: Count = None
    """Train on so many images of each class only."""
    label_seed: int = 0
    """Seed of the choice of those images."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weigh classes alike in the loss, however many images they have."""
    crop_scale: Shares = (0.08, 1.0)
    """Range of a random crop's share of the image; one number is the smallest share."""
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of the short side that evaluation crops: 224 of 256."""
    rand_augment: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Magnitude of RandAugment; 0 is off."""
    erase: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability that a random rectangle is replaced by noise."""
    mixup: NotNegativeReal = 0.8
    """Mixup's alpha; 0 is off."""
    cutmix: NotNegativeReal = 1.0
    """Cutmix's alpha; 0 is off."""
    smoothing: Share = 0.1
    """Label smoothing."""
    ema_decay: Annotated[Share | None, one_word(float, "FLOAT", nothing="none"), HINT] = None
    """Evaluate and keep an exponential average of the weights with this decay."""


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(FinetuneConfig):
    """Semantic segmentation: a class for every pixel."""

    command: ClassVar[str] = "finetune segment"
    task: Suppress[Literal["segment"]] = "segment"
    data: Word = None
    """Labelled images: train/images with train/masks (PNG of class numbers, 255 = none), and val/… or test/…."""
    batch_size: Positive = 16
    """Images of one optimiser step, over all processes and accumulation together."""
    lr: PositiveReal = 3.2e-3
    """Learning rate for a batch of 512 (1e-4 for one of 16); it is scaled by batch size / 512, as the others are."""
    evaluation: Literal["resize", "slide"] = "resize"
    """What the model sees of an image: all of it, resized, or windows of the image size that slide over it."""
    zoom: tuple[PositiveReal, PositiveReal] = (0.5, 2.0)
    """Range in which training magnifies what evaluation sees, as far as an image holds it."""
    jitter: Share = 0.5
    """Strength of the random changes of brightness, contrast, saturation and hue; 0 is off."""
    dice: NotNegativeReal = 0.0
    """Weight of the Dice loss beside cross-entropy (1 in nnU-Net): for classes that fill few of the pixels."""
    decoder_channels: Annotated[int, Field(ge=4)] = 512
    """Width of the UPerNet decoder."""


@dataclass(frozen=True, kw_only=True)
class DetectConfig(FinetuneConfig):
    """Object detection, and masks of the objects if asked for."""

    command: ClassVar[str] = "finetune detect"
    task: Suppress[Literal["detect"]] = "detect"
    data: Word = None
    """Images with boxes: train/images and train/annotations.json (COCO), and the same in val or test. Required."""
    detector: Literal["faster_rcnn", "mask_rcnn", "fcos", "retinanet"] = "faster_rcnn"
    """The detector on the encoder's feature pyramid; mask_rcnn finds masks too and needs them in the data."""
    pyramid_channels: Positive = 256
    """Width of the feature pyramid, and so of the detector's heads."""
    scale_jitter: tuple[PositiveReal, PositiveReal] = (0.1, 2.0)
    """Least and largest random size of an image in training, where 1 just fits the image size."""

    # Those of Swin's Mask R-CNN; in batches of 64, which ViTDet has, a few hundred images give too few steps.
    batch_size: Positive = 16
    """Images of one optimiser step, over all processes and accumulation together."""
    lr: PositiveReal = 3.2e-3
    """Learning rate for a batch of 512 (1e-4 for one of 16); it is scaled by batch size / 512, as the others are."""
    clip_grad: Annotated[PositiveReal | None, NONE_WORD, one_word(float, "FLOAT|none", nothing="none")] = 1.0
    """Largest gradient norm (ViTDet's); none is no limit."""


TASK_CONFIGS: dict[str, type[FinetuneConfig]] = {
    "classify": ClassifyConfig,
    "segment": SegmentConfig,
    "detect": DetectConfig,
}


def find_task(name: str | None = None) -> type[FinetuneConfig]:
    """The kind of a task's configuration; one-line `ValueError` for a name that is none."""
    if name not in TASK_CONFIGS:
        what = "the task is missing" if name is None else f"task {name!r} is not known"
        raise UserError(f"{what}; choose from {', '.join(TASK_CONFIGS)}")
    return TASK_CONFIGS[name]
