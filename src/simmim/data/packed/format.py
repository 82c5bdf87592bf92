"""Packed images: ArrayRecord files with an index of each image's bytes.

`DIRECTORY/pack.json` records the source and the settings; `00000.array_record` holds images, and `00000.json` is its
index. Any ArrayRecord reader reads the shards. This module reads an image in one positional read of a local file or one
range request, since records are not compressed and ArrayRecord's own reader copies pixels four times.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simmim.data.names import Names
from simmim.data.picture import BadImage
from simmim.errors import UserError

MANIFEST = "pack.json"
UNFINISHED = "packing.json"
"""Takes the place of `MANIFEST` while shards are being written."""
VERSION = 1
FORMS = ("original", "jpeg", "webp", "raw")

# ArrayRecord files are Riegeli files: every 64 KiB begins with a block header of 24 bytes
# (github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md).
BLOCK, BLOCK_HEADER = 1 << 16, 24
_MOST_PARTS = 1024  # buffers per call of preadv, on Linux and macOS
_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class Index:
    """Index of a shard, image by image; a broken image has no bytes."""

    bytes: int
    """Size of the shard file."""
    sha256: str
    """Digest of the shard file."""
    names: list[str]
    begins: list[int]
    """Offset of each image's bytes in the file."""
    sizes: list[int]
    """Number of bytes, without block headers."""
    crc32: list[int]
    shapes: list[tuple[int, int, int]] | None
    """(H, W, C) of raw pixels; `None` for image files."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """Packed images and packing settings."""

    version: int = VERSION
    form: str
    short_side: int | None
    """Pixels of the shorter side to which larger images were reduced."""
    quality: int | None
    shard_size: int
    """Images per shard; the last one may have fewer."""
    images: int
    names_sha256: str
    """Digest of the images' names, one per line."""


@dataclass(frozen=True, kw_only=True)
class Manifest(PackSettings):
    """Contents of a directory of shards: `pack.json`."""

    bad_images: int
    bytes: int
    shards: list[dict[str, Any]]
    """`images`, `bytes` and `sha256` of each shard, and `index_sha256` of its index."""


class Storage(Protocol):
    """Files of one directory, local or remote."""

    def read(self, name: str) -> bytes: ...

    def size(self, name: str) -> int: ...

    def read_range(self, name: str, begin: int, size: int) -> NDArray[np.uint8]:
        """Read `size` bytes of records from `begin` on, without block headers. Called concurrently."""
        ...


def shard_name(number: int) -> str:
    return f"{number:05d}.array_record"


def index_name(number: int) -> str:
    return f"{number:05d}.json"


def pieces(begin: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) in the file of `size` bytes of records from `begin` on, between block headers."""
    while size > 0:
        length = min(size, BLOCK - begin % BLOCK)
        yield begin, length
        begin += length + BLOCK_HEADER
        size -= length


class LocalStorage:
    """Local directory; shards stay open."""

    def __init__(self, root: Path):
        self._root = root
        self._files: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStorage, (self._root,)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def size(self, name: str) -> int:
        return (self._root / name).stat().st_size

    def read_range(self, name: str, begin: int, size: int) -> NDArray[np.uint8]:
        file = self._files.get(name)
        if file is None:  # two threads may both open it; the extra one is closed
            file = self._files.setdefault(name, (self._root / name).open("rb", buffering=0))
        found = np.empty(size, np.uint8)
        between = np.empty(BLOCK_HEADER, np.uint8)
        parts, filled = [], 0
        for _, length in pieces(begin, size):
            parts += [between, found[filled : filled + length]]
            filled += length
        for first in range(1, len(parts), _MOST_PARTS):
            some = parts[first : first + _MOST_PARTS]
            if (length := os.preadv(file.fileno(), some, begin)) != sum(map(len, some)):
                raise OSError(f"shard {name} is shorter than its index says")
            begin += length
        return found


class RemoteStorage:
    """Directory in object storage, through fsspec; one range request per image."""

    def __init__(self, url: str):
        import fsspec

        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{url} cannot be opened: {reason}; install the fsspec package for that storage") from None

    def read(self, name: str) -> bytes:
        return self._again(lambda: self._files.cat_file(f"{self._root}/{name}"))

    def size(self, name: str) -> int:
        return self._again(lambda: self._files.size(f"{self._root}/{name}"))

    def read_range(self, name: str, begin: int, size: int) -> NDArray[np.uint8]:
        found, filled = np.empty(size, np.uint8), 0
        parts = list(pieces(begin, size))
        end = sum(parts[-1])
        stored = self._again(lambda: self._files.cat_file(f"{self._root}/{name}", start=begin, end=end))
        if len(stored) != end - begin:
            raise OSError(f"shard {name} is shorter than its index says")
        for offset, length in parts:
            found[filled : filled + length] = np.frombuffer(stored, np.uint8, length, offset - begin)
            filled += length
        return found

    def _again(self, request: Any) -> Any:
        """Retry a request, as networks fail at times; a missing file is not retried."""
        for trial in range(_TRIES):
            try:
                return request()
            except FileNotFoundError:
                raise
            except Exception as error:  # each storage raises its own errors
                if trial == _TRIES - 1:
                    raise OSError(f"{type(error).__name__}: {error}") from error
                time.sleep(0.1 * 4**trial)
        raise AssertionError


class Shard:
    """Compact form of an `Index`, for reading."""

    def __init__(self, index: Index):
        self.names = Names(index.names)
        self.begins, self.sizes = np.array(index.begins, np.int64), np.array(index.sizes, np.int64)
        self.shapes = None if index.shapes is None else np.array(index.shapes, np.int32)


class PackedImages:
    """Images of a directory of shards, with the names and order that they had when packed."""

    def __init__(self, storage: Storage, manifest: Manifest, shards: list[Shard]):
        self.manifest = manifest
        self._storage = storage
        self._shards = shards

    def __len__(self) -> int:
        return self.manifest.images

    def name(self, index: int) -> str:
        shard, place = divmod(index, self.manifest.shard_size)
        return self._shards[shard].names[place]

    def names(self) -> list[str]:
        """Return the names of all images, relative to the packed folder."""
        return [name for shard in self._shards for name in shard.names]

    def is_broken(self, index: int) -> bool:
        shard, place = divmod(index, self.manifest.shard_size)
        return not self._shards[shard].sizes[place]

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        number, place = divmod(index, self.manifest.shard_size)
        shard = self._shards[number]
        size = int(shard.sizes[place])
        if not size:
            raise BadImage("could not be read when packed")
        data = self._storage.read_range(shard_name(number), int(shard.begins[place]), size)
        return data.tobytes() if shard.shapes is None else data.reshape(shard.shapes[place])


def is_packed(path: Path) -> bool:
    try:
        return (path / MANIFEST).is_file() or (path / UNFINISHED).is_file()
    except PermissionError:  # a closed folder, of which who opens it says so
        return False


def open_packed(data: str) -> PackedImages:
    """Open packed images of a directory or an fsspec URL. Raises `UserError` for damaged ones."""
    storage = RemoteStorage(data) if "://" in data else LocalStorage(Path(data).expanduser())
    manifest = read_manifest(storage, data)
    _check_open_files(data, len(manifest.shards))
    with ThreadPoolExecutor(16) as pool:  # object storage is slow per request but serves many at once
        shards = pool.map(lambda number: _open_shard(storage, manifest, number, data), range(len(manifest.shards)))
        return PackedImages(storage, manifest, list(shards))


def read_manifest(storage: Storage, data: str) -> Manifest:
    try:
        found = json.loads(storage.read(MANIFEST))
        manifest = Manifest(**found)
        if any({"images", "bytes", "sha256", "index_sha256"} - shard.keys() for shard in manifest.shards):
            raise ValueError("a shard lacks a field")
    except FileNotFoundError:
        raise UserError(
            f"{data} has no {MANIFEST}, so it is no finished set of shards; run simmim pack (again) with it as --out"
        ) from None
    except OSError as error:
        raise UserError(f"{data}/{MANIFEST} cannot be read: {error}; check the storage and its permissions") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{data}/{MANIFEST} is not what simmim pack wrote ({error}); pack again") from None
    if manifest.version != VERSION or manifest.form not in FORMS:
        raise UserError(
            f"{data} is version {manifest.version}, form {manifest.form}; this simmim reads version {VERSION} and "
            f"the forms {', '.join(FORMS)}: pack again"
        )
    return manifest


def _open_shard(storage: Storage, manifest: Manifest, number: int, data: str) -> Shard:
    name, expected = shard_name(number), manifest.shards[number]
    try:
        size = storage.size(name)
        index = read_index(storage.read(index_name(number)), expected["index_sha256"])
    except OSError as error:
        raise UserError(f"shard {number} of {data} cannot be read: {error}; copy it again or pack again") from None
    except ValueError as error:
        raise UserError(f"{data}/{index_name(number)} {error}; copy it again or pack again") from None
    if size != expected["bytes"]:
        raise UserError(f"{data}/{name} has {size} bytes, not {expected['bytes']}; copy it again or pack again")
    return Shard(index)


def read_index(text: bytes, sha256: str | None = None) -> Index:
    """Read a shard's index and check its digest. Raises `UserError`."""
    if sha256 is not None and hashlib.sha256(text).hexdigest() != sha256:
        raise UserError("does not match its checksum")
    return Index(**json.loads(text))


def _check_open_files(data: str, shards: int) -> None:
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if "://" not in data and shards > most - 200:
        raise UserError(
            f"{data} has {shards} shards, and this process may open {most} files; "
            f"raise the limit with ulimit -n {shards + 1000}, or pack with a larger --shard-size"
        )
