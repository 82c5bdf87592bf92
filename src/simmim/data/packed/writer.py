"""Write images to shards (`simmim.data.packed.format`) and verify them.

Shapes: `H W` pixels, `C` channels.
"""

import hashlib
import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.data.augment import Box, crop_resize, reduction
from simmim.data.decode import open_picture
from simmim.data.packed.format import BLOCK, BLOCK_HEADER, Index, Storage, pieces
from simmim.data.picture import BadImage, Raw
from simmim.data.sounds import Clip

_CHUNK_HEADER = 40


class Packed(NamedTuple):
    """Stored image: the bytes of a file, or raw pixels and their shape (H, W, C)."""

    data: bytes
    shape: tuple[int, int, int] | None = None


class Form(Protocol):
    """Convert an image to its stored form. Raises `BadImage` if it cannot be read or has no such form."""

    def __call__(self, raw: Raw) -> Packed: ...


@dataclass(frozen=True)
class Original:
    """Keep the file byte for byte; arrays as `.npy`."""

    def __call__(self, raw: Raw) -> Packed:
        picture = open_picture(raw)
        picture.check()  # reads all of a JPEG at little cost
        return Packed(picture.raw() if isinstance(picture, Clip) else _file_bytes(raw))


@dataclass(frozen=True, kw_only=True)
class RawPixels:
    """Store uint8 pixels, which need no decoding."""

    short_side: int | None = None

    def __call__(self, raw: Raw) -> Packed:
        pixels = _small_pixels(raw, self.short_side)
        height, width, channels = pixels.shape
        return Packed(pixels.tobytes(), (height, width, channels))


@dataclass(frozen=True, kw_only=True)
class Jpeg:
    """Store JPEG with halved colour resolution. Small enough JPEGs are kept byte for byte."""

    short_side: int | None = None
    quality: int = 90

    def __call__(self, raw: Raw) -> Packed:
        import simplejpeg

        if isinstance(raw, bytes) and raw.startswith(b"\xff\xd8") and _is_small(raw, self.short_side):
            return Original()(raw)
        pixels = _small_pixels(raw, self.short_side)
        if pixels.shape[2] not in (1, 3):
            raise BadImage(f"has {pixels.shape[2]} channels, and JPEG holds 1 or 3")
        return Packed(
            simplejpeg.encode_jpeg(
                pixels,
                quality=self.quality,
                colorspace="RGB" if pixels.shape[2] == 3 else "GRAY",
                colorsubsampling="420" if pixels.shape[2] == 3 else "Gray",
            )
        )


@dataclass(frozen=True, kw_only=True)
class WebP:
    """Store lossy WebP: about a third smaller than JPEG, slower to read. Small enough WebPs are kept."""

    short_side: int | None = None
    quality: int = 90

    def __call__(self, raw: Raw) -> Packed:
        from PIL import Image

        if isinstance(raw, bytes) and raw[8:12] == b"WEBP" and _is_small(raw, self.short_side):
            return Original()(raw)
        pixels = _small_pixels(raw, self.short_side)
        if pixels.shape[2] not in (1, 3):
            raise BadImage(f"has {pixels.shape[2]} channels, and WebP holds 3")
        file = io.BytesIO()
        Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))).save(file, "WEBP", quality=self.quality)
        return Packed(file.getvalue())


def _file_bytes(raw: Raw) -> bytes:
    if isinstance(raw, bytes):
        return raw
    if isinstance(raw, Path):
        return raw.read_bytes()
    file = io.BytesIO()
    np.save(file, np.asarray(raw))
    return file.getvalue()


def _is_small(raw: bytes, short_side: int | None) -> bool:
    picture = open_picture(raw)
    return short_side is None or min(picture.height, picture.width) <= short_side


def _small_pixels(raw: Raw, short_side: int | None) -> NDArray[np.uint8]:
    """Return pixels (H, W, C), upright, without transparency, reduced to this shorter side, never enlarged."""
    picture = open_picture(raw)
    if picture.dtype not in (np.uint8, np.bool_):
        raise BadImage(f"has {picture.dtype} values, which only --form original keeps")
    height, width = picture.height, picture.width
    scale = 1.0 if short_side is None else min(1.0, short_side / min(height, width))
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    smaller = reduction(Box(0, 0, height, width), size)
    pixels = picture.decode(channels=picture.channels, dtype=np.uint8, reduction=smaller)
    if pixels.shape[:2] != size:
        pixels = crop_resize(pixels, Box(0, 0, *pixels.shape[:2]), size)
    return np.ascontiguousarray(pixels)


class Entry(NamedTuple):
    """Image of a shard; `packed` is `None` for a broken one, which keeps its number and has no bytes."""

    name: str
    packed: Packed | None


def write_shard(path: Path, entries: Iterable[Entry], *, raw: bool) -> Index:
    """Write images to a new ArrayRecord file. Returns its index."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(
        str(path), "group_size:1,uncompressed"
    )  # one image per group, since images are read one by one
    names: list[str] = []
    sizes: list[int] = []
    sums: list[int] = []
    shapes: list[tuple[int, int, int]] = []
    for name, packed in entries:
        data, shape = packed or Packed(b"")
        writer.write(data)
        names.append(name)
        sizes.append(len(data))
        sums.append(zlib.crc32(data))
        shapes.append(shape or (0, 0, 0))
    writer.close()
    begins = list(_record_begins(path, sizes))
    return Index(
        bytes=path.stat().st_size,
        sha256=_digest(path),
        names=names,
        begins=begins,
        sizes=sizes,
        crc32=sums,
        shapes=shapes if raw else None,
    )


def _record_begins(path: Path, sizes: list[int]) -> Iterator[int]:
    """Yield the offset of each record's bytes in a file of uncompressed records, one per chunk.

    A chunk is a header (its second number is the length of its data, its fourth begins with its type), then data that
    ends with the record. "Dense" positions exclude block headers.
    """

    def in_file(dense: int) -> int:
        block, offset = divmod(dense, BLOCK - BLOCK_HEADER)
        return block * BLOCK + BLOCK_HEADER + offset

    with path.open("rb") as file:

        def chunk_end(dense: int) -> tuple[int, bytes]:
            header = b""
            for offset, length in pieces(in_file(dense), _CHUNK_HEADER):
                file.seek(offset)
                header += file.read(length)
            _, length, _, kind = struct.unpack_from("<QQQc", header)
            return dense + _CHUNK_HEADER + length, kind

        end = 0
        for size in sizes:
            end, kind = chunk_end(end)
            while kind != b"r":  # the file's signature
                end, kind = chunk_end(end)
            yield in_file(end - size)


def find_damage(path: Path, storage: Storage, index: Index) -> str | None:
    """Describe damage to a shard: a wrong digest, or an image missing from its place; `None` if intact."""
    if _digest(path) != index.sha256:
        return "does not match its checksum"
    for image, begin, size, crc32 in zip(index.names, index.begins, index.sizes, index.crc32, strict=True):
        if zlib.crc32(storage.read_range(path.name, begin, size).data) != crc32:
            return f"does not hold {image} where its index says"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
