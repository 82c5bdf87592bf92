"""Objectives: the terms of a pretraining's loss. Engines build modules of them."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from tyro.conf import Suppress

from simmim.errors import UserError
from simmim.method.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Objective(Strategy, family="objective"):
    """A term of the loss, which is the sum of all terms, each times its `weight`."""

    predicts_hidden: ClassVar[bool] = True
    """Whether it predicts hidden cells, for which `encode = "visible"` needs a head that mixes cells."""
    reason: ClassVar[str] = ""
    """When to choose it, in a few words."""
    needs_masked: ClassVar[bool] = True
    """Whether it needs the encoder's features of masked images. Where no objective does, no masks are drawn."""
    usual_rate: ClassVar[float] = 1.0
    """Factor of the learning rate that `simmim.method.schedules.usual_lr` gives, alone or beside a larger one."""
    usual_crop: ClassVar[tuple[float, float] | None] = None
    """Share of the image that random crops keep, where neither the settings nor the images say (default: 0.67 to 1)."""
    weight: Suppress[float] = 1.0
    """Factor of the term, above 0."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight {self.weight} of objective {self.kind} is not above 0; use 1.0, or leave it out")

    def for_steps(self, steps: int) -> Self:
        """Decide what is left open until the length of the training is known."""
        if getattr(self, "momentum_steps", 0) is None:
            return replace(self, momentum_steps=steps)  # type: ignore[call-arg]
        return self

    def at_least(self, name: str, least: float) -> None:
        """Raise `UserError` if a setting is below `least`."""
        if (value := getattr(self, name)) is not None and not value >= least:
            raise UserError(f"{name} {value} of objective {self.kind} is below {least:g}; use {least:g} or more")

    def within(self, name: str, low: float, high: float) -> None:
        """Raise `UserError` unless a setting lies between `low` and `high`, both included."""
        if (value := getattr(self, name)) is not None and not low <= value <= high:
            raise UserError(f"{name} {value} of objective {self.kind} is not within {low:g}..{high:g}; leave it out")


@dataclass(frozen=True, kw_only=True)
class PixelReconstruction(Objective):
    """Predict the target of hidden pixels (SimMIM). The configuration's `target`, `loss` and `head` say how."""

    kind: ClassVar[str] = "pixels"
    reason: ClassVar[str] = "SimMIM, to be fine-tuned (--objective descriptor: features to use as they are)"


@dataclass(frozen=True, kw_only=True)
class DescriptorRegression(Objective):
    """Predict a fixed descriptor of the whole image from its visible patches.

    The descriptor holds histograms of oriented gradients (Dalal and Triggs, CVPR 2005), a small copy of the image, and
    how often it shows each of a number of typical patches, each projected on its principal axes in the training images.
    Unlike hidden pixels it asks for what the whole image
    shows, and unlike a trained target it cannot collapse.
    """

    kind: ClassVar[str] = "descriptor"
    predicts_hidden: ClassVar[bool] = False
    reason: ClassVar[str] = "useful frozen features from few images in little time (--objective pixels: SimMIM)"
    usual_rate: ClassVar[float] = 3.0  # benchmarks/results/features_search.md
    usual_crop: ClassVar[tuple[float, float] | None] = (0.6, 1.0)
    see: Literal["visible", "whole"] = "visible"
    """Encode the masked image and take its visible cells, or encode the whole image."""
    shape_values: int = 128
    """Principal axes of the gradient histograms."""
    colour_values: int = 64
    """Principal axes of the small image."""
    colour_scale: float = 0.7
    """Size of the colour values relative to the shape values."""
    words: int = 256
    """Typical patches (visual words), found in the training images."""
    texture_values: int = 128
    """Principal axes of the words' frequencies."""
    texture_scale: float = 1.0
    """Size of the texture values relative to the shape values."""

    @property
    def needs_masked(self) -> bool:  # type: ignore[override]
        return self.see == "visible"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("shape_values", 1)
        self.at_least("colour_values", 1)
        self.at_least("colour_scale", 0)
        self.at_least("words", 2)
        self.at_least("texture_values", 1)
        self.at_least("texture_scale", 0)


@dataclass(frozen=True, kw_only=True)
class FrozenTeacher(Objective):
    """Predict the features of a trained encoder (MaskDistill, arXiv 2210.10615; FD, 2205.14141; dBOT, 2209.03917).

    The target is the LayerNorm of the teacher's patch features, resampled to the student's grid.
    """

    kind: ClassVar[str] = "teacher"
    reason: ClassVar[str] = "a trained encoder of related images is at hand"
    source: str = ""
    """Teacher: a run, timm:NAME (its weights must be here) or a safetensors file. --teacher sets it."""
    layer: int = -1
    """Block or stage of the teacher; negative numbers count from the end."""
    on: Literal["masked", "all"] = "masked"
    """Patches to judge: masked ones, or all of the masked image (with on = all, FD)."""
    by: Literal["smooth-l1", "cosine"] = "smooth-l1"
    """Distance to the teacher's features."""


@dataclass(frozen=True, kw_only=True)
class EmaTeacher(Objective):
    """Predict the encoder's own averaged features (data2vec 2.0, arXiv 2212.07525; BootMAE, 2207.07116).

    The teacher is a moving average of the encoder and sees the whole image. The target is the mean of its top blocks,
    each normalised over the cells of its image.
    """

    kind: ClassVar[str] = "ema"
    reason: ClassVar[str] = "long trainings on many images, beside pixels"
    top: int | None = None
    """Blocks to average (default: all but the first two; of a net with stages, the last stage)."""
    momentum: float = 0.99
    """Momentum of the average at the start."""
    momentum_end: float = 0.9999
    """Momentum after `momentum_steps`."""
    momentum_steps: int | None = None
    """Steps over which the momentum rises (default: the whole run)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("top", 1)
        self.within("momentum", 0, 1)
        self.within("momentum_end", 0, 1)
        self.at_least("momentum_steps", 1)


@dataclass(frozen=True, kw_only=True)
class LatentClusters(Objective):
    """Predict the cluster of hidden patches (CAPI, arXiv 2502.08769; iBOT, 2111.07832).

    A moving average of the encoder sees the whole image; prototypes cluster its patch features online. Sinkhorn's
    algorithm balances the clusters at each position apart, so that clusters cannot encode positions.
    """

    kind: ClassVar[str] = "clusters"
    reason: ClassVar[str] = "patch features for segmentation, on many images"
    prototypes: int | None = None
    """Clusters (default: four for each image of a batch, 64 to 16384)."""
    temperature: float = 0.12
    """Temperature of the prediction."""
    target_temperature: float = 0.06
    """Temperature of the assignment."""
    iterations: int = 3
    """Rounds of Sinkhorn's algorithm."""
    momentum: float = 0.99
    """Momentum of the average at the start."""
    momentum_end: float = 0.9999
    """Momentum after `momentum_steps`."""
    momentum_steps: int | None = None
    """Steps over which the momentum rises (default: the whole run)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("prototypes", 2)
        self.at_least("temperature", 1e-3)
        self.at_least("target_temperature", 1e-3)
        self.at_least("iterations", 1)
        self.within("momentum", 0, 1)
        self.within("momentum_end", 0, 1)
        self.at_least("momentum_steps", 1)


@dataclass(frozen=True, kw_only=True)
class SigReg(Objective):
    """Make views of an image agree and the features of all images a Gaussian (LeJEPA, arXiv 2511.08544).

    Every view is pulled to the mean of the image's large views; SIGReg compares random projections of the projected
    features with a standard normal distribution, which forbids collapse without teacher or negatives.
    """

    kind: ClassVar[str] = "sigreg"
    predicts_hidden: ClassVar[bool] = False
    needs_masked: ClassVar[bool] = False
    reason: ClassVar[str] = "image features that ignore crop and colour"
    regularisation: float = 0.05
    """Share λ of SIGReg; agreement has 1 − λ."""
    local_views: int = 2
    """Small crops beside two large ones. ViT, DeiT and convolutional encoders see them at half the side."""
    slices: int = 256
    """Random directions that SIGReg tests at each step."""
    values: int = 64
    """Values of the projection."""
    jitter: float = 0.5
    """Strength of the views' colour jitter (SimCLR's), 0 to 1."""
    grey: float = 0.2
    """Share of the views without colour."""
    blur: float = 0.5
    """Share of the views that are blurred."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("regularisation", "jitter", "grey", "blur"):
            self.within(name, 0, 1)
        self.at_least("local_views", 0)
        self.at_least("slices", 1)
        self.at_least("values", 2)


@dataclass(frozen=True, kw_only=True)
class Contrast(Objective):
    """Recognise an image among the batch (InfoNCE, arXiv 1807.03748) by its visible patches (CMAE, 2207.13532).

    The masked image passes a projector and a predictor; a moving average of encoder and projector sees another crop.
    """

    kind: ClassVar[str] = "infonce"
    predicts_hidden: ClassVar[bool] = False
    reason: ClassVar[str] = "image features from large batches"
    temperature: float = 0.1
    """Temperature of the similarities."""
    values: int = 128
    """Values of the projection."""
    jitter: float = 0.5
    """Strength of the other crop's colour jitter (SimCLR's), 0 to 1."""
    momentum: float = 0.99
    """Momentum of the average at the start."""
    momentum_end: float = 1.0
    """Momentum after `momentum_steps`."""
    momentum_steps: int | None = None
    """Steps over which the momentum rises (default: the whole run)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("temperature", 1e-3)
        self.at_least("values", 2)
        self.within("jitter", 0, 1)
        self.within("momentum", 0, 1)
        self.within("momentum_end", 0, 1)
        self.at_least("momentum_steps", 1)
