"""Batches whose JPEGs a GPU decodes. Threads read files and headers, and decode all other formats.

Shapes: `B` images, `H W` pixels, `C` channels; a size is (H, W).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.augment import Box, RandomResizedCrop, reduction, show
from simmim.data.decode import open_picture
from simmim.data.picture import Picture, Raw
from simmim.data.pipeline import Batch, Reading, Rows, Sample, open_loader, read_ahead
from simmim.data.sources import ImageSource, read_raw
from simmim.method.random_keys import sample_key


@dataclass(frozen=True, kw_only=True)
class Jpeg:
    """A JPEG to decode, and the part of it to show."""

    raw: bytes
    height: int
    """Of the image when it is upright, as the width and the box are."""
    width: int
    orientation: int
    """The rotation (1..8) that EXIF names, to be undone."""
    box: Box

    @property
    def stored_size(self) -> tuple[int, int]:
        """(h, w) before it is turned."""
        return (self.height, self.width) if self.orientation < 5 else (self.width, self.height)


Decode = Callable[[NDArray[np.uint8], Sequence[Jpeg | None], Callable[[int], None]], Any]
"""Images (B, H, W, C) with rows left blank for JPEGs (B), and a call that fills in row `i` where its JPEG is refused →
all of them (B, H, W, C), where the device has them."""


def device_batches(
    source: ImageSource, reading: Reading, *, crop: RandomResizedCrop, channels: int, decode: Decode
) -> Iterator[Batch]:
    """Yield the batches of `train_batches` in uint8, with the output of `decode` as "image".

    Images, crops and flips are the same. The CPU decodes a JPEG that `decode` refuses; if it cannot either, the image
    is listed and replaced like any bad image.
    """

    def read(epoch: int, index: int, row: NDArray[Any] | None, *, all_here: bool) -> Sample:
        raw = read_raw(source, index)
        picture = open_picture(raw)
        box = crop.box(sample_key(reading.seed, epoch, index, stream="crop"), picture.height, picture.width)
        jpeg = None if all_here else _for_device(raw, picture, box, crop.size)
        if jpeg is None:
            show(picture, box, size=crop.size, channels=channels, dtype=np.uint8, out=row)
        return {"jpeg": jpeg}

    rows = Rows((reading.batch_size // reading.world, *crop.size, channels), np.uint8)
    loader = open_loader(source, reading, partial(read, all_here=False), rows)
    on_cpu = replace(loader, read=partial(read, all_here=True))

    def fill(batch: Batch, place: int) -> None:
        epoch, index = int(batch["epoch"][place]), int(batch["index"][place])
        batch["index"][place] = on_cpu.load(epoch, index, batch["image"][place]).index

    for batch in read_ahead(loader, reading):
        batch["image"] = decode(batch["image"], batch.pop("jpeg"), partial(fill, batch))
        batch["flip"] = reading.draw_flips(batch)  # anew: an image may have been replaced
        yield batch


def _for_device(raw: Raw, picture: Picture, box: Box, size: tuple[int, int]) -> Jpeg | None:
    """Return the JPEG for the device; `None` for an image that the CPU decodes.

    The CPU decodes JPEGs at an eighth of their size, and judges truncated ones, on which decoders disagree.
    """
    if not isinstance(raw, bytes) or picture.jpeg_orientation is None:
        return None
    if reduction(box, size) >= 8 or not _is_whole(raw):
        return None
    return Jpeg(raw=raw, height=picture.height, width=picture.width, orientation=picture.jpeg_orientation, box=box)


def _is_whole(jpeg: bytes) -> bool:
    """Return whether the last scan has an end. A preview in the header has its own, before the last scan begins."""
    end = jpeg.rfind(b"\xff\xd9")
    return end >= 0 and jpeg.find(b"\xff\xda", end) < 0
