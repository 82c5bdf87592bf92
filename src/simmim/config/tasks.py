"""Fine-tuning configurations: shared fields and those of each task. Defaults follow the paper, but for the rate."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from tyro.conf import Suppress, arg

from simmim.config.field_types import (
    HINT,
    NONE_WORD,
    Count,
    Flip,
    NotNegative,
    NotNegativeReal,
    Positive,
    PositiveReal,
    Share,
    Shares,
    Word,
    one_word,
)
from simmim.config.frames import FRAMES, Frames
from simmim.config.training import TrainingConfig
from simmim.errors import UserError
from simmim.method.schedules import scale_lr


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Supervised training from a pretrained encoder (SimMIM, appendix A)."""

    task: Suppress[str]
    """Name of the task."""
    classes: Suppress[tuple[str, ...] | None] = None
    """Class names in the order of their numbers, read from the data."""
    model: Annotated[str, one_word(str, "STR", nothing=""), HINT] = "auto"
    """The encoder's timm name (default: that of --from, or vit_small_patch16_224 from scratch)."""
    channels: NotNegative = 0
    """Channels of an image (0: the encoder's, 3 from scratch). The first layer is adapted to another number."""
    init: Annotated[str | None, one_word(str, "RUN|scratch|timm:NAME", nothing="none"), arg(name="from"), HINT] = None
    """Initial weights: a run, also a detector for detect or a segmenter for segment; an encoder directory, scratch
    (random), timm:NAME or local-dir:PATH. Required."""
    flip: Flip = "horizontal"
    """Random flips of images and labels; both means left-right and upside down."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of images held out for evaluation if the data has no val or test folder."""
    layer_decay: Annotated[float | None, Field(gt=0, le=1), one_word(float, "FLOAT"), HINT] = None
    """Learning-rate ratio of a layer to the next one (default: 0.65 for ViT and BEiT, 0.8 for Swin, 1 for others)."""
    eval_every_epochs: PositiveReal = 1.0
    """Epochs between evaluations."""

    lr: Annotated[PositiveReal | None, one_word(float, "FLOAT"), HINT] = None
    """Peak learning rate for a batch of 512. It scales with batch size / 512, as do --warmup-lr and --min-lr (default:
    by batch size and model, see docs/finetuning.md)."""
    warmup_lr: NotNegativeReal = 2.5e-7
    """Learning rate of the first step, for a batch of 512."""
    min_lr: NotNegativeReal = 2.5e-7
    """Final learning rate of the cosine schedule, for a batch of 512."""
    warmup_epochs: Annotated[NotNegativeReal | None, one_word(float, "FLOAT"), HINT] = None
    """Epochs of linear warm-up (default: a fifth of the run; paper: 20 of 100 epochs)."""
    drop_path: Share = 0.1
    """Stochastic depth rate of the last block."""

    @property
    def batch_lr(self) -> float:
        """Peak learning rate of a batch, once it is decided."""
        assert self.lr is not None
        return scale_lr(self.lr, self.batch_size)

    def check(self) -> None:
        super().check()
        if self.init is None:
            raise UserError("--from is missing; give the --out directory of a run, scratch or timm:NAME")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(FinetuneConfig):
    """Image classification."""

    command: ClassVar[str] = "finetune classify"
    task: Suppress[Literal["classify"]] = "classify"
    data_forms: ClassVar[str] = "a folder of classes, a .csv, an .npz, hf:NAME or demo"
    data: Word = None
    """Labelled images: train/CLASS and val/CLASS or test/CLASS, or CLASS alone, .zip, .tar, .csv, .npz, hf:NAME."""
    frames: Frames = FRAMES
    """Frames of clips, as simmim pretrain takes them: Ns, N or key, with or without +distinct."""
    labels_per_class: Count = None
    """Train on this many images of each class only."""
    label_seed: int = 0
    """Seed for choosing these images."""
    class_weights: Literal["none", "balanced"] = "none"
    """Class weights in the loss; balanced gives every class the same total weight."""
    crop_scale: Shares = (0.08, 1.0)
    """Range of a random crop's area, as a share of the image; a single number is the minimum."""
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Centre crop at evaluation, as a share of the short side (0.875 is 224 of 256)."""
    rand_augment: Annotated[float, Field(ge=0, le=10)] = 9.0
    """RandAugment magnitude; 0 turns it off."""
    erase: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability of random erasing."""
    mixup: NotNegativeReal = 0.8
    """Mixup alpha; 0 turns it off."""
    cutmix: NotNegativeReal = 1.0
    """CutMix alpha; 0 turns it off."""
    time_mask: NotNegative = 0
    """SpecAugment of sounds: most frames of a random span that is hidden in training; 0 turns it off."""
    band_mask: NotNegative = 0
    """SpecAugment of sounds: most mel bands of a random range that is hidden in training; 0 turns it off."""
    smoothing: Share = 0.1
    """Label smoothing."""
    ema_decay: Annotated[Share | None, one_word(float, "FLOAT", nothing="none"), HINT] = None
    """Evaluate and save an exponential moving average of the weights with this decay."""


@dataclass(frozen=True, kw_only=True)
class _DenseConfig(FinetuneConfig):
    """Fine-tuning on the encoder's feature pyramid, with the batch of Swin's Mask R-CNN."""

    unlisted: ClassVar[frozenset[str]] = frozenset({"sound"})
    # With ViTDet's batches of 64, a few hundred images give too few steps.
    batch_size: Positive = 16
    """Images per optimiser step, over all ranks and accumulation steps."""


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(_DenseConfig):
    """Semantic segmentation: a class for every pixel."""

    command: ClassVar[str] = "finetune segment"
    task: Suppress[Literal["segment"]] = "segment"
    data_forms: ClassVar[str] = "a folder with train/images and train/masks"
    data: Word = None
    """Labelled images: train/images with train/masks (PNG of class numbers, 255 = none), and val/… or test/…."""
    evaluation: Literal["resize", "slide"] = "resize"
    """Evaluate on the whole image, resized, or on sliding windows of the image size."""
    zoom: tuple[PositiveReal, PositiveReal] = (0.5, 2.0)
    """Range of random magnification in training, relative to evaluation and limited by the image."""
    jitter: Share = 0.5
    """Strength of random changes to brightness, contrast, saturation and hue; 0 turns them off."""
    dice: NotNegativeReal = 0.0
    """Weight of the Dice loss added to cross-entropy (nnU-Net: 1). Helps classes with few pixels."""
    decoder_channels: Annotated[int, Field(ge=4)] = 512
    """Width of the UPerNet decoder."""


@dataclass(frozen=True, kw_only=True)
class DetectConfig(_DenseConfig):
    """Object detection, optionally with instance masks."""

    command: ClassVar[str] = "finetune detect"
    task: Suppress[Literal["detect"]] = "detect"
    data_forms: ClassVar[str] = "a folder with train/images and train/annotations.json"
    data: Word = None
    """Images with boxes: train/images and train/annotations.json (COCO), and the same in val or test. Required."""
    detector: Literal["faster_rcnn", "mask_rcnn", "fcos", "retinanet"] = "faster_rcnn"
    """Detector on the encoder's feature pyramid; mask_rcnn also predicts masks and needs them in the data."""
    pyramid_channels: Positive = 256
    """Width of the feature pyramid and of the detector's heads."""
    scale_jitter: tuple[PositiveReal, PositiveReal] = (0.1, 2.0)
    """Range of random image scales in training; at 1 the image just fits the image size."""
    jitter: Share = 0.0
    """Strength of random changes to brightness, contrast, saturation and hue; 0 turns them off."""

    clip_grad: Annotated[PositiveReal | None, NONE_WORD, one_word(float, "FLOAT|none", nothing="none")] = 1.0
    """Maximum gradient norm (as in ViTDet); none turns clipping off."""


# By name. `simmim.torch_engine.tasks` has a module of each name; `simmim.register_task` adds a user's own.
TASK_CONFIGS: dict[str, type[FinetuneConfig]] = {
    kind.task: kind for kind in (ClassifyConfig, SegmentConfig, DetectConfig)
}

OWN_TASKS = frozenset(TASK_CONFIGS)
"""Those of this package."""


def find_task(name: str | None = None) -> type[FinetuneConfig]:
    """Return the configuration class of a task. Raises `UserError` for an unknown name."""
    if name not in TASK_CONFIGS:
        what = "the task is missing" if name is None else f"task {name!r} is not known"
        raise UserError(f"{what}; choose from {', '.join(TASK_CONFIGS)}")
    return TASK_CONFIGS[name]
