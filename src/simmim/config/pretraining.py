"""Configuration of a pretraining (SimMIM, arXiv 2111.09886)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tyro.conf import Fixed, Suppress

from simmim.config.field_types import (
    HINT,
    Count,
    NotNegative,
    Positive,
    PositiveReal,
    RangeIfAny,
    SharesIfAny,
    Word,
    one_word,
)
from simmim.config.frames import FRAMES, Frames
from simmim.config.strategies import one_of, parse_words, several_of
from simmim.config.training import TrainingConfig
from simmim.errors import UserError
from simmim.method.heads import Head, LinearHead
from simmim.method.losses import L1Loss, Loss, check_pair
from simmim.method.masks import MaskStrategy, RandomMask
from simmim.method.objectives import FrozenTeacher, Objective, PixelReconstruction
from simmim.method.targets import PixelTarget, Target


def ask_objectives(words: Sequence[str], teacher: str | None) -> tuple[Objective, ...]:
    """Read objectives from words KIND[=WEIGHT] (none: pixels); a teacher that is named alone is the only one."""
    kinds = [word.partition("=")[0] for word in words]
    if teacher and "teacher" not in kinds:
        words = [*words, "teacher"]
    return parse_words(Objective, words or ["pixels"], [FrozenTeacher(source=teacher)] if teacher else [])


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Masked image modelling on unlabelled images (SimMIM, arXiv 2111.09886)."""

    command: ClassVar[str] = "pretrain"

    lr: Annotated[PositiveReal | None, one_word(float, "FLOAT"), HINT] = None
    """Peak learning rate for a batch of 512. It scales with batch size / 512, as do --warmup-lr and --min-lr (default:
    by batch size and model, see docs/pretraining.md)."""
    frames: Frames = FRAMES
    """Frames of clips: one every N seconds (Ns), every Nth (N) or key frames (key); +distinct drops those that hardly
    differ from the last kept one of their clip."""
    crop: Literal["resized", "pixels"] = "resized"
    """Random part of an image: a share of it, resized to the image size, or a window of it at full resolution."""
    crop_scale: SharesIfAny = None
    """Range of a random crop's area, as a share of the image (default: 0.67 1, with descriptor 0.6 1, or as the source
    declares)."""
    crop_ratio: RangeIfAny = None
    """Range of a crop's aspect ratio, relative to the image size (default: 0.75 1.333, or as the source declares)."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Decode JPEGs on the CPU, or on the GPU with nvJPEG, for machines with few CPU cores."""
    readers: Literal["threads", "processes"] = "threads"
    """Read images with threads, or with processes: faster on many cores, more memory."""
    antialias: bool = True
    """Blur before shrinking, as Pillow does. Without it, raw pixels load faster but fine patterns alias."""
    shard: bool = False
    """Shard parameters and optimiser state across ranks (FSDP2) instead of replicating them (DDP)."""

    mask: Annotated[MaskStrategy, one_of(MaskStrategy)] = RandomMask()
    """Masking strategy."""
    target: Annotated[Target, one_of(Target)] = PixelTarget()
    """Prediction target."""
    loss: Annotated[Loss, one_of(Loss)] = L1Loss()
    """Loss, on masked pixels only."""
    head: Annotated[Head, one_of(Head)] = LinearHead()
    """Prediction head."""
    objectives: Suppress[Fixed[Annotated[tuple[Objective, ...], several_of(Objective)]]] = (PixelReconstruction(),)
    """Terms of the loss, which is their weighted sum (pixels: that of target, loss and head). --objective sets them."""
    masks_per_image: Positive = 1
    """Masks of each image in a step, which share what an objective computes of the whole image (data2vec 2.0)."""
    positions: Literal["model", "sincos"] = "model"
    """Start of a ViT's position table: the model's small random numbers, or sines and cosines, for short trainings."""
    encode: Literal["all", "visible"] = "all"
    """Patches that the encoder sees: all, with mask tokens for masked ones (SimMIM), or visible only (MAE, UM-MAE)."""
    plain_step: bool = False
    """Also compute parts that the loss does not need, as the official code does: slower, equal up to rounding."""
    engine: Literal["torch", "keras"] = "torch"
    """Training engine: PyTorch, or Keras on JAX or TensorFlow."""
    backend: Annotated[Literal["jax", "tensorflow"] | None, one_word(str, "jax|tensorflow"), HINT] = None
    """Backend of the keras engine (default: jax)."""
    init_from: Word = None
    """Initial weights: a run, an encoder directory, timm:NAME, local-dir:PATH, or what simmim convert takes."""
    val_images: NotNegative = 8
    """Images held out for pictures and the validation loss."""
    picture_every_steps: Count = None
    """Steps between pictures of reconstructions and features (default: with every checkpoint)."""
    probe: Word = None
    """Labelled images (train/CLASS, val/CLASS, or demo) for a k-NN check during training."""
    probe_every_epochs: PositiveReal = 10.0
    """Epochs between k-NN checks."""

    def check(self) -> None:
        super().check()
        if self.backend is not None and self.engine != "keras":
            raise UserError(f"--backend {self.backend} is for the keras engine; add --engine keras")
        check_pair(self.target, self.loss)
        self._check_objectives()
        hidden = any(objective.predicts_hidden for objective in self.objectives)
        if self.encode == "visible" and hidden and self.head.cell_by_cell:
            raise UserError(
                f"--encode visible leaves masked cells to the head, but head {self.head.kind} sees one cell at a time; "
                "add --head transformer"
            )
        if self.decode == "gpu" and self.channels not in (1, 3):
            raise UserError(
                f"--decode gpu is for JPEGs, which have 1 or 3 channels, not {self.channels}; use --decode cpu"
            )
        if self.crop == "pixels":
            self._check_windows()
        cpu_only = {"--readers processes": self.readers != "threads", "--no-antialias": not self.antialias}
        for option, given in cpu_only.items():
            if given and self.decode == "gpu":
                raise UserError(f"{option} is not for --decode gpu; leave one of them out")

    def _check_windows(self) -> None:
        refused = {
            "--crop-scale": self.crop_scale not in (None, (1.0, 1.0)),
            "--crop-ratio": self.crop_ratio not in (None, (1.0, 1.0)),
            "--decode gpu": self.decode == "gpu",
            "--no-antialias": not self.antialias,
        }
        for option, given in refused.items():
            if given:
                raise UserError(f"{option} is not for --crop pixels; leave one of them out")

    @property
    def masks_images(self) -> bool:
        """Whether any objective needs masked images."""
        return any(objective.needs_masked for objective in self.objectives)

    @property
    def reconstructs(self) -> bool:
        """Whether pixels are predicted: if not, the head of the model is never trained."""
        return any(isinstance(objective, PixelReconstruction) for objective in self.objectives)

    def _check_objectives(self) -> None:
        kinds = [objective.kind for objective in self.objectives]
        if not kinds:
            raise UserError("objectives is empty; give one or more, such as pixels")
        if not self.masks_images:
            for option, given in {
                f"--masks-per-image {self.masks_per_image}": self.masks_per_image > 1,
                "--encode visible": self.encode == "visible",
            }.items():
                if given:
                    raise UserError(f"{option} has no effect, since objective {kinds[0]} masks nothing; leave it out")
        if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise UserError(f"objective {twice[0]} is given {kinds.count(twice[0])} times; give it once, with a weight")
