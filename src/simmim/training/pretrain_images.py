"""The images of a pretraining: found, cut into windows where asked, and some kept aside."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simmim.config.pretraining import PretrainConfig
from simmim.data.augment import CentreCrop
from simmim.data.sources import ImageSource, SourceDefaults, Subset, defaults_of, open_source, sniff
from simmim.data.windows import StillWindows, Windows
from simmim.errors import UserError
from simmim.method.random_keys import sample_keys
from simmim.training.sounds import as_input


@dataclass(frozen=True)
class Images:
    """The images of a run: those to train on, those kept aside, and the dtype in which they are read."""

    train: ImageSource
    val: ImageSource
    dtype: np.dtype[Any]
    channels: int = 3
    defaults: SourceDefaults = field(default_factory=SourceDefaults)
    sounds: bool = False
    still: ImageSource | None = None
    """The windows to train on, each at a place that stays; `None` where images are not trained on in windows."""

    @property
    def looked_at(self) -> ImageSource:
        """The images to train on, as they are for statistics."""
        return self.still or self.train

    @property
    def fraction(self) -> float:
        """Share of an image's sides that an evaluation sees: windows whole, of others the middle."""
        return 1.0 if self.still else CentreCrop.fraction

    @property
    def parts(self) -> dict[str, ImageSource]:
        return {"train": self.train, "val": self.val}


def open_images(config: PretrainConfig, usual_size: tuple[int, int] | None = None) -> Images:
    """Find the images, or their windows, and keep `val_images` of them aside, drawn by the seed. Raises `UserError`.

    `usual_size` is that of windows if the configuration has none.
    """
    assert config.data is not None
    source = open_source(config.data, config.frames)
    source, sounds = as_input(source, config)
    defaults, channels = defaults_of(source), 1 if sounds else config.channels
    if defaults.channels and defaults.channels not in (1, 3) and channels == type(config).channels:
        channels = defaults.channels  # the default number cannot be had
    windows = None
    if config.crop == "pixels":
        size = config.image_size or usual_size
        assert size is not None
        windows = Windows(source, size)
    still = None if windows is None else StillWindows(windows, config.seed)
    source = windows or source
    dtype = sniff(still or source, channels=channels)
    order = np.argsort(sample_keys(config.seed, 0, np.arange(len(source)), stream="split"))
    val, train = np.sort(order[: config.val_images]), np.sort(order[config.val_images :])
    counted = "images" if windows is None else "windows"
    if not len(train):
        raise UserError(
            f"val images {config.val_images} leaves none of the {len(source)} {counted} to train on; "
            f"use --val-images {len(source) // 10}"
        )
    if len(train) < config.batch_size:
        windows_of_it = ", or --crop pixels for windows of it" if len(source) == 1 and windows is None else ""
        raise UserError(
            f"batch size {config.batch_size} is more than the {len(train)} {counted} to train on "
            f"({len(val)} are kept aside); use --batch-size {len(train)} or less{windows_of_it}"
        )
    if windows is None or still is None:
        return Images(Subset(source, train), Subset(source, val), dtype, channels, defaults, sounds)
    windows.keep_apart(still, val)
    return Images(
        Subset(windows, train), Subset(still, val), dtype, channels, defaults, sounds, still=Subset(still, train)
    )
