"""The request to `simmim advise`, and one option of its answer."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from simmim.config.field_types import HINT, Count, ImageSize, ModelArgs, Positive, PositiveReal, Word, one_word

Range = tuple[float, float, float]  # low, likely, high
Amount = Annotated[PositiveReal | None, one_word(float, "FLOAT", nothing="none"), HINT]
Names = Annotated[tuple[str, ...], arg(metavar="NAME..."), HINT]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The training to plan and its limits."""

    command: ClassVar[str] = "advise"
    model: str = "vit_base_patch16_224"
    """The encoder, by its timm name."""
    model_args: ModelArgs = field(default_factory=dict)
    """Further arguments of the timm model, such as depth=4 embed_dim=192."""
    image_size: ImageSize = None
    """Pixels, N or HxW (default: the model's own)."""
    channels: Positive = 3
    """Channels of an image."""
    head: Literal["linear", "mlp", "transformer"] = "linear"
    """The prediction head."""
    objective: Annotated[tuple[str, ...], arg(metavar="KIND[=WEIGHT] ..."), HINT] = ()
    """Terms of the loss (default: pixels); teachers and views are counted."""
    teacher: Word = None
    """The teacher of objective teacher: a run, timm:NAME or a file."""
    images: Positive = 1_281_167
    """Number of training images (default: ImageNet-1k's)."""
    epochs: PositiveReal = 100.0
    """Passes over the images."""
    batch_size: Count = None
    """Images of one optimiser step over all devices (default: a power of two for 100 steps an epoch, 64 to 2048)."""
    budget: Amount = None
    """Budget in USD."""
    deadline: Amount = None
    """Deadline in hours."""
    accelerator: Names = ()
    """Accelerators to consider, such as rtx-3060 (default: all)."""
    devices: Count = None
    """Number of devices (default: 1 to 8)."""
    cores: Count = None
    """CPU cores per device for reading images (default: those of the rented machine, else as many as needed)."""
    spot: bool = False
    """Use spot prices, for machines that may be pre-empted; training resumes."""
    price: Annotated[tuple[str, ...], arg(metavar="NAME=USD..."), HINT] = ()
    """NAME=USD per device and hour, instead of the known price."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic (auto: bf16 where the accelerator has it, else fp16)."""
    accelerators: Word = None
    """TOML file with further accelerators or corrected facts."""
    calibration: Word = None
    """Steps measured on this machine by simmim bench --save-calibration."""
    top: Positive = 5
    """Number of options to show."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run the training. Hours and USD are (low, likely, high)."""

    accelerator: str
    title: str
    devices: int
    images_at_a_time: int
    accumulate_steps: int
    precision: str
    checkpoint_activations: bool
    shard: bool
    memory_gib: float
    """Peak memory of a device."""
    memory_share: float
    images_per_second: float
    hours: Range
    usd: Range | None
    limit: str
    """What takes most of the time."""
    input_cores: float
    """CPU cores that keep up with the step."""
    price: str
    """Price per device and hour, with its source."""
    command: str
