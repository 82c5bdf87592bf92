"""`simmim pack`: images into shards that read at full speed, once for all runs."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from tyro.conf import Positional, arg

from simmim.config.field_types import HINT, Count, Positive, one_word
from simmim.config.frames import FRAMES, Frames
from simmim.config.validation import from_settings
from simmim.data.archives import ArchiveImages
from simmim.data.bad_images import BadImages, TooManyBadImages
from simmim.data.decode import open_picture
from simmim.data.files import PathList
from simmim.data.packed.format import (
    MANIFEST,
    UNFINISHED,
    LocalStorage,
    Manifest,
    PackedImages,
    PackSettings,
    index_name,
    open_packed,
    read_index,
    shard_name,
)
from simmim.data.packed.upload import Bucket
from simmim.data.packed.writer import Entry, Form, Jpeg, Original, RawPixels, WebP, find_damage, write_shard
from simmim.data.pages import say_pages
from simmim.data.picture import BadImage
from simmim.data.sounds import Sounds, as_sounds, holds_sounds
from simmim.data.sources import ImageSource, open_source, read_raw
from simmim.data.video.notes import describe_frames, warn_of_clips
from simmim.data.video.source import Clips, clips_of
from simmim.data.volumes import Slices
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.training.run_lock import LOCK, locked
from simmim.training.tracking import progress
from simmim.training.whole_files import write_json, written_whole

BAD_IMAGES = "bad_images.txt"


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """A packing."""

    command: ClassVar[str] = "pack"
    images: Positional[Annotated[str, arg(metavar="IMAGES")]]
    """Images as --data takes them: a folder, .zip or .tar (names and classes stay), a list, .npz, hf:NAME or demo."""
    out: str
    """The directory of shards to write, or a URL such as s3://BUCKET/NAME. The same again resumes, or verifies."""
    frames: Frames = FRAMES
    """Frames of clips, as simmim pretrain takes them: Ns, N or key, with or without +distinct."""
    form: Annotated[
        Literal["original", "jpeg", "webp", "raw"] | None, one_word(str, "original|jpeg|webp|raw"), HINT
    ] = None
    """Form to store: the files byte for byte, smaller files, or uint8 pixels that need no decoding (default: original,
    of clips jpeg)."""
    short_side: Count = None
    """Pixels of the shorter side, to which larger images are reduced (default: as they are)."""
    quality: Annotated[Annotated[int, Field(ge=1, le=100)] | None, one_word(int, "INT"), HINT] = None
    """Quality of jpeg and webp, 1 to 100 (default: 90)."""
    shard_size: Positive = 4096
    """Images of a shard."""
    workers: Count = None
    """Threads (default: one a core)."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of images that may be unreadable before packing is given up."""

    def build_form(self) -> Form:
        if self.form == "original" and self.short_side is not None:
            raise UserError(f"--short-side {self.short_side} makes images smaller; choose --form jpeg, webp or raw")
        if self.form in ("original", "raw") and self.quality is not None:
            raise UserError(f"--quality {self.quality} is for --form jpeg and webp; leave it out for {self.form}")
        if self.form == "original":
            return Original()
        if self.form == "raw":
            return RawPixels(short_side=self.short_side)
        return (Jpeg if self.form == "jpeg" else WebP)(short_side=self.short_side, quality=self.quality or 90)


def pack(config: PackConfig) -> list[str]:
    """Write the shards, or those that a killed packing left out, and verify all; says what was done, line by line.

    Into a URL each shard is written to a temporary directory, verified, and copied; `pack.json` comes last. Raises
    `UserError` for options that do not fit, no images, an `out` that holds something else or is being written, too many
    broken images, shards that are damaged, and storage that does not take them.
    """
    config = from_settings(PackConfig, vars(config))
    if config.form:
        config.build_form()  # tells mistakes before the images are looked for
    source = open_source(config.images, config.frames)
    config = dataclasses.replace(config, form=config.form or ("jpeg" if clips_of(source) else "original"))
    assert config.form
    form = config.build_form()
    if holds_sounds(source):
        if config.form != "original":
            raise UserError(f"--form {config.form} is for images, and {config.images} holds sounds; leave it out")
        source = as_sounds(source, None)
    names = _names(source, config.images)
    settings = PackSettings(
        form=config.form,
        short_side=config.short_side,
        quality=getattr(form, "quality", None),
        shard_size=config.shard_size,
        images=len(names),
        names_sha256=hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest(),
    )
    shards = Shards(config, form, source, names)
    finished, written, manifest = (_pack_away if "://" in config.out else _pack_here)(shards, settings)
    decoded = _decode_some(open_packed(config.out), sounds=isinstance(source, Sounds))
    done = "was packed already" if finished and not written else "is packed"
    lines = [
        f"{config.images} {done} in {config.out}: {manifest.images} images in {len(shards)} shards, form "
        f"{manifest.form}, {manifest.bytes / 1e6:.1f} MB",
        f"verified: the digest of every shard, the checksum of every image, and {decoded} images decoded",
    ]
    if finished and written:
        lines.insert(0, f"{written} shards were damaged and are written again")
    if frames := describe_frames(source):
        lines.append(f"frames: {frames}")
    lines += [f"warning: {text}" for text in (say_pages(source), warn_of_clips(source)) if text]
    if manifest.bad_images:
        lines.append(f"{manifest.bad_images} images cannot be read; {config.out.rstrip('/')}/{BAD_IMAGES} lists them")
    return lines


def _pack_here(shards: "Shards", settings: PackSettings) -> tuple[bool, int, Manifest]:
    """Pack into a directory; return whether it was finished, how many shards were written, and the description."""
    out = Path(shards.config.out)
    _find(out, str(out))
    with locked(out):
        finished = _begin(out, settings, str(out))
        numbers = progress(range(len(shards)), len(shards), "shards looked at")
        missing = [number for number in numbers if _problem(out, number)]
        shards.write(out, missing)
        for number in progress(missing, len(missing), "shards verified"):
            _check_written(out, number)
        manifest = _describe(out, settings, len(shards))
        write_json(out / MANIFEST, dataclasses.asdict(manifest))
        (out / UNFINISHED).unlink(missing_ok=True)
    return finished, len(missing), manifest


def _pack_away(shards: "Shards", settings: PackSettings) -> tuple[bool, int, Manifest]:
    """The same into a URL. A shard counts as there once its index is; each index comes after its shard."""
    bucket = Bucket(shards.config.out)
    with tempfile.TemporaryDirectory(prefix="simmim-pack-") as name:
        folder = Path(name)
        begun = any([bucket.fetch(folder / MANIFEST), bucket.fetch(folder / UNFINISHED)])
        if not begun and not bucket.is_empty():
            raise _holds_something_else(shards.config.out)
        finished = _begin(folder, settings, shards.config.out)
        bucket.fetch(folder / BAD_IMAGES)
        if not finished:
            bucket.send(folder / UNFINISHED)

        def is_there(number: int) -> bool:
            path, index = folder / shard_name(number), folder / index_name(number)
            if not (begun and bucket.fetch(index)):
                return False
            if not finished:  # it was verified before it was sent
                try:
                    return bucket.holds(path.name, read_index(index.read_bytes()).bytes)
                except (ValueError, TypeError):
                    return False
            problem = not bucket.fetch(path) or _problem(folder, number)
            path.unlink(missing_ok=True)
            return not problem

        def send(number: int) -> None:
            _check_written(folder, number)
            bad_images = [folder / BAD_IMAGES] if (folder / BAD_IMAGES).exists() else []
            for path in (*bad_images, folder / shard_name(number), folder / index_name(number)):
                bucket.send(path)
            (folder / shard_name(number)).unlink()

        numbers = progress(range(len(shards)), len(shards), "shards looked at")
        missing = [number for number in numbers if not is_there(number)]
        try:
            shards.write(folder, missing, send)
        except TooManyBadImages as error:
            bucket.send(folder / BAD_IMAGES)
            raise TooManyBadImages(str(error).replace(name, shards.config.out.rstrip("/"))) from None
        manifest = _describe(folder, settings, len(shards))
        write_json(folder / MANIFEST, dataclasses.asdict(manifest))
        bucket.send(folder / MANIFEST)
        bucket.remove(UNFINISHED)
    return finished, len(missing), manifest


def _names(source: ImageSource, data: str) -> list[str]:
    """List the images' names, relative to the folder that holds them all, if there is one."""
    source = source.source if isinstance(source, Sounds) else source
    names = [source.name(index) for index in range(len(source))]
    if isinstance(source, ArchiveImages) and len(set(source.names())) == len(source):
        return list(source.names())
    folder = data.removeprefix("video:")
    if isinstance(source, PathList | Slices | Clips) and Path(folder).is_dir():
        return [os.path.relpath(name, folder) for name in names]
    return names


def _find(out: Path, told: str) -> Path | None:
    """Find the description of the shards in a directory. Raises `UserError` for one that holds something else.

    `told` is the directory's name in messages.
    """
    found = next((path for name in (MANIFEST, UNFINISHED) if (path := out / name).is_file()), None)
    empty = not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= {LOCK})
    if found is None and not empty:
        raise _holds_something_else(told)
    return found


def _holds_something_else(out: str) -> UserError:
    return UserError(f"{out} exists and holds no packed images; give a new directory as --out")


def _begin(out: Path, settings: PackSettings, told: str) -> bool:
    """Make or recognise the directory; return whether it is finished. Raises `UserError` for another directory."""
    found = _find(out, told)
    if found is None:
        write_json(out / UNFINISHED, dataclasses.asdict(settings))
        return False
    try:
        old = json.loads(found.read_text(encoding="utf-8"))
        new = dataclasses.asdict(settings)
        changed = [f"{name} {old[name]} → {value}" for name, value in new.items() if old[name] != value]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{told}/{found.name} is not what simmim pack wrote; give a new directory as --out") from None
    if changed:
        raise UserError(
            f"{told} holds another set ({', '.join(changed)}); repeat its command to resume it, or give another --out"
        )
    return found.name == MANIFEST


@dataclass(frozen=True)
class Shards:
    """What to pack: images, how, and into how many shards."""

    config: PackConfig
    form: Form
    source: ImageSource
    names: Sequence[str]

    def __len__(self) -> int:
        return math.ceil(len(self.names) / self.config.shard_size)

    def write(self, out: Path, numbers: Sequence[int], written: Callable[[int], None] = lambda number: None) -> None:
        """Write the shards of these numbers: first the shard, then its index, each whole or not at all.

        `written` is called after each of them.
        """
        config, names = self.config, self.names
        workers, size = config.workers or cpu_cores(), config.shard_size
        bad_images = BadImages(out / BAD_IMAGES, total=len(names), max_fraction=config.max_bad_fraction)

        def entry(index: int) -> Entry:
            try:
                return Entry(names[index], self.form(read_raw(self.source, index)))
            except BadImage as error:
                bad_images.add(names[index], str(error))
                return Entry(names[index], None)

        def entries(indices: Sequence[int]) -> Iterator[Entry]:
            some = 16 * workers  # at a time, so that memory holds few
            for first in range(0, len(indices), some):
                yield from pool.map(entry, indices[first : first + some])

        shards = {number: range(number * size, min((number + 1) * size, len(names))) for number in numbers}
        indices = [index for held in shards.values() for index in held]
        with ThreadPoolExecutor(workers) as pool:
            found = progress(entries(indices), len(indices), "images packed")
            for number, held in shards.items():
                with written_whole(out / shard_name(number)) as path:
                    index = write_shard(path, itertools.islice(found, len(held)), raw=config.form == "raw")
                write_json(out / index_name(number), dataclasses.asdict(index), indent=None)
                written(number)


def _check_written(out: Path, number: int) -> None:
    if problem := _problem(out, number):
        raise UserError(f"{out / shard_name(number)} {problem} though it was just written; check the disk")


def _problem(out: Path, number: int) -> str | None:
    """Return what is wrong with a shard, such as that it is missing; `None` if it is as written."""
    storage = LocalStorage(out)
    try:
        return find_damage(out / shard_name(number), storage, read_index(storage.read(index_name(number))))
    except (OSError, ValueError, TypeError) as error:
        return f"cannot be read: {error}"


def _describe(out: Path, settings: PackSettings, shards: int) -> Manifest:
    found, broken = [], 0
    for number in range(shards):
        text = (out / index_name(number)).read_bytes()
        index = read_index(text)
        found.append(
            {
                "images": len(index.names),
                "bytes": index.bytes,
                "sha256": index.sha256,
                "index_sha256": hashlib.sha256(text).hexdigest(),
            }
        )
        broken += index.sizes.count(0)
    assert sum(shard["images"] for shard in found) == settings.images
    size = sum(shard["bytes"] for shard in found)
    return Manifest(**dataclasses.asdict(settings), bad_images=broken, bytes=size, shards=found)


def _decode_some(packed: PackedImages, most: int = 100, *, sounds: bool = False) -> int:
    """Decode images spread over the whole set, and say how many; `BadImage` for one that is broken now."""
    decoded = 0
    for index in np.unique(np.linspace(0, len(packed) - 1, most).astype(int)).tolist():
        if packed.is_broken(index):
            continue
        open_picture(as_sounds(packed, None).read(index) if sounds else packed.read(index)).check()
        decoded += 1
    return decoded
