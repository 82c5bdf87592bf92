"""Packed images: ArrayRecord files whose index says where each image's bytes lie.

`DIRECTORY/pack.json` says what was packed and how; `00000.array_record` holds images, and `00000.json` is its index.
Any reader of ArrayRecord reads the shards. Here an image is one positional read instead, of a local file or of a range
in object storage: the records are not compressed, and ArrayRecord's own reader copies pixels four times.
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

from simmim.data.decode import BadImage
from simmim.data.names import Names
from simmim.errors import UserError

MANIFEST = "pack.json"
UNFINISHED = "packing.json"
"""In the place of `MANIFEST` as long as the shards are being written."""
VERSION = 1
FORMS = ("original", "jpeg", "webp", "raw")

# ArrayRecord's files are Riegeli's: every 64 KiB there are 24 bytes that belong to no record
# (github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md).
BLOCK, BLOCK_HEADER = 1 << 16, 24
_MOST_PARTS = 1024  # that one call of preadv fills, on Linux and macOS
_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a shard holds, image by image; a broken image has no bytes."""

    bytes: int
    """Of the shard's file."""
    sha256: str
    """Of the shard's file."""
    names: list[str]
    begins: list[int]
    """Where in the file the bytes of an image begin."""
    sizes: list[int]
    """How many there are, without the block headers among them."""
    crc32: list[int]
    shapes: list[tuple[int, int, int]] | None
    """(H, W, C) of raw pixels; `None` where the bytes are those of an image file."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """Which images are packed, and how."""

    version: int = VERSION
    form: str
    short_side: int | None
    """Pixels of the shorter side, to which larger images were reduced."""
    quality: int | None
    shard_size: int
    """Images of a shard; the last one may have fewer."""
    images: int
    names_sha256: str
    """Of their names, a line each."""


@dataclass(frozen=True, kw_only=True)
class Manifest(PackSettings):
    """What a directory of shards holds: `pack.json`."""

    bad_images: int
    bytes: int
    shards: list[dict[str, Any]]
    """`images`, `bytes` and `sha256` of each, and `index_sha256` of its index."""


class Storage(Protocol):
    """Files of one directory, wherever it is."""

    def read(self, name: str) -> bytes: ...

    def size(self, name: str) -> int: ...

    def read_range(self, name: str, begin: int, size: int) -> NDArray[np.uint8]:
        """`size` bytes of records from `begin` on, without block headers. Called from several threads at once."""
        ...


def shard_name(number: int) -> str:
    return f"{number:05d}.array_record"


def index_name(number: int) -> str:
    return f"{number:05d}.json"


def pieces(begin: int, size: int) -> Iterator[tuple[int, int]]:
    """Where `size` bytes of records from `begin` on lie in the file: (offset, length) between block headers."""
    while size > 0:
        length = min(size, BLOCK - begin % BLOCK)
        yield begin, length
        begin += length + BLOCK_HEADER
        size -= length


class LocalStorage:
    """A directory of this machine; shards stay open."""

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
        if file is None:  # two threads may both open it; one of the two is closed again
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
    """A directory in object storage, through fsspec: an image is one request for a range of bytes."""

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
        """A network fails now and then; what is not there stays away."""
        for trial in range(_TRIES):
            try:
                return request()
            except FileNotFoundError:
                raise
            except Exception as error:  # each storage raises errors of its own
                if trial == _TRIES - 1:
                    raise OSError(f"{type(error).__name__}: {error}") from error
                time.sleep(0.1 * 4**trial)
        raise AssertionError


class Shard:
    """What reading needs of an `Index`, in little memory."""

    def __init__(self, index: Index):
        self.names = Names(index.names)
        self.begins, self.sizes = np.array(index.begins, np.int64), np.array(index.sizes, np.int64)
        self.shapes = None if index.shapes is None else np.array(index.shapes, np.int32)


class PackedImages:
    """The images of a directory of shards, under the names and in the order that they had when they were packed."""

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
        """Of all images, relative to the folder that was packed."""
        return [name for shard in self._shards for name in shard.names]

    def is_broken(self, index: int) -> bool:
        shard, place = divmod(index, self.manifest.shard_size)
        return not self._shards[shard].sizes[place]

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        number, place = divmod(index, self.manifest.shard_size)
        shard = self._shards[number]
        size = int(shard.sizes[place])
        if not size:
            raise BadImage("could not be read when it was packed")
        data = self._storage.read_range(shard_name(number), int(shard.begins[place]), size)
        return data.tobytes() if shard.shapes is None else data.reshape(shard.shapes[place])


def is_packed(path: Path) -> bool:
    return (path / MANIFEST).is_file() or (path / UNFINISHED).is_file()


def open_packed(data: str) -> PackedImages:
    """The packed images of a directory, or of a URL that fsspec opens. One-line `ValueError`s for what is damaged."""
    storage = RemoteStorage(data) if "://" in data else LocalStorage(Path(data).expanduser())
    manifest = read_manifest(storage, data)
    _check_open_files(data, len(manifest.shards))
    with ThreadPoolExecutor(16) as pool:  # for object storage, which answers slowly but many at once
        shards = pool.map(lambda number: _open_shard(storage, manifest, number, data), range(len(manifest.shards)))
        return PackedImages(storage, manifest, list(shards))


def read_manifest(storage: Storage, data: str) -> Manifest:
    try:
        found = json.loads(storage.read(MANIFEST))
        manifest = Manifest(**found)
    except FileNotFoundError:
        raise UserError(
            f"{data} has no {MANIFEST}, so it is no finished set of shards; run simmim pack (again) with it as --out"
        ) from None
    except OSError as error:
        raise UserError(f"{data}/{MANIFEST} cannot be read: {error}; check the storage and its permissions") from error
    except (ValueError, TypeError) as error:
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
    """The index of a shard, checked against its digest. A `ValueError` says what is wrong with it."""
    if sha256 is not None and hashlib.sha256(text).hexdigest() != sha256:
        raise UserError("does not match its checksum")
    return Index(**json.loads(text))


def _check_open_files(data: str, shards: int) -> None:
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if "://" not in data and shards > most - 200:
        raise UserError(
            f"{data} has {shards} shards, and this process may open {most} files; "
            f"raise that by ulimit -n {shards + 1000}, or pack with a larger --shard-size"
        )
