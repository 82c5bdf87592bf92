"""Image files in memory, good and broken, for the tests of reading with a device's help."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from simmim.data.augment import RandomResizedCrop
from simmim.data.bad_images import BadImages
from simmim.data.pipeline import Batch, Reading, train_batches
from simmim.data.readers.device_jpegs import device_batches
from simmim.torch_engine.train.jpegs import JpegDecoder

SIZE = (64, 96)
"""For which the threads decode none of `jpegs` at a reduced size, in whose pixels they would round the crop."""


class Files:
    """A source of files' bytes."""

    def __init__(self, *files: bytes):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        return self.files[index]


def picture(seed: int, height: int = 120, width: int = 160) -> Image.Image:
    """Smooth colours with some texture, as photographs are."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    texture = draw.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse) + texture, 0, 255).astype(np.uint8))


def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def jpegs(count: int) -> list[bytes]:
    return [encode(picture(seed, 100 + 5 * seed, 170 - 3 * seed)) for seed in range(count)]


def without_tables(jpeg: bytes) -> bytes:
    """Of its quantisation tables: the header can be read, the pixels can't."""
    begin = jpeg.index(b"\xff\xdb")
    while jpeg[begin : begin + 2] == b"\xff\xdb":
        length = int.from_bytes(jpeg[begin + 2 : begin + 4], "big")
        jpeg = jpeg[:begin] + jpeg[begin + 2 + length :]
    return jpeg


def read(
    source: Files, folder: Path, device: str | None, *, channels: int = 3, decoder: Any = None, **changes: Any
) -> list[Batch]:
    """Batches whose JPEGs a device decodes, or (`None`) the threads."""
    bad_images = BadImages(folder / "bad_images.txt", total=len(source), max_fraction=0.5)
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "start_step": 0, "total_steps": 4, "threads": 2}
    reading = Reading(**options | {"bad_images": bad_images} | changes)
    views: dict[str, Any] = {"crop": RandomResizedCrop(size=SIZE), "channels": channels}
    if device is None:
        return list(train_batches(source, reading, **views, dtype=np.uint8))
    decoder = decoder or JpegDecoder(torch.device(device), size=SIZE, channels=channels)
    found = device_batches(source, reading, **views, decode=decoder)
    return [batch | {"image": batch["image"].cpu().numpy()} for batch in found]


def assert_alike(found: list[Batch], expected: list[Batch], *, levels: float) -> None:
    """The same images, crops and flips, and pixels that differ by so many levels of 255 at most, on average of each."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for field in ("flip", "index", "epoch"):
            np.testing.assert_array_equal(one[field], other[field])
        assert one["image"].dtype == other["image"].dtype
        difference = np.abs(one["image"].astype(float) - other["image"]).mean(axis=(1, 2, 3))
        assert difference.max() <= levels
