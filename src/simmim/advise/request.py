"""What `simmim advise` is asked, and one way to do it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from simmim.config.field_types import HINT, Count, ImageSize, ModelArgs, Positive, PositiveReal, Word, one_word

Range = tuple[float, float, float]  # low, likely, high
Amount = Annotated[PositiveReal | None, one_word(float, "FLOAT", nothing="none"), HINT]
Names = Annotated[tuple[str, ...], arg(metavar="NAME..."), HINT]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be trained, and what it may take."""

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
    images: Positive = 1_281_167
    """Images to train on (the default is ImageNet-1k's number)."""
    epochs: PositiveReal = 100.0
    """Passes over them."""
    batch_size: Count = None
    """Images of one optimiser step over all devices (default: a power of two for 100 steps an epoch, 64 to 2048)."""
    budget: Amount = None
    """USD that it may cost."""
    deadline: Amount = None
    """Hours that it may take."""
    accelerator: Names = ()
    """Only these accelerators, such as rtx-3060 (default: all that are known)."""
    devices: Count = None
    """Exactly so many of them (default: 1 to 8)."""
    cores: Count = None
    """CPU cores for each device, to read images with (default: as come with a rented one, else as it takes)."""
    spot: bool = False
    """Reckon with spot prices, of machines that may be taken away; training resumes."""
    price: Annotated[tuple[str, ...], arg(metavar="NAME=USD..."), HINT] = ()
    """NAME=USD an hour for one device, in place of the known price."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic (auto: bf16 where the accelerator has it, else fp16)."""
    accelerators: Word = None
    """A TOML file with more accelerators, or other facts about them."""
    calibration: Word = None
    """Measured steps of this machine, from simmim bench --save-calibration."""
    top: Positive = 5
    """Options to show."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to do it. Times in hours and prices in USD are low, likely, high."""

    accelerator: str
    title: str
    devices: int
    images_at_a_time: int
    accumulate_steps: int
    precision: str
    checkpoint_activations: bool
    shard: bool
    memory_gib: float
    """Most that a device holds."""
    memory_share: float
    images_per_second: float
    hours: Range
    usd: Range | None
    limit: str
    """What most of the time goes to."""
    input_cores: float
    """CPU cores that keep up with it."""
    price: str
    """Per device and hour, and whose it is."""
    command: str
