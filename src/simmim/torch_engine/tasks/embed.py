"""`simmim embed`: write the features of many images to a file, part by part.

Shapes: `N` images, `n` images of a part, `h w` feature-map cells, `D` features.
"""

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from simmim.config.commands import EmbedConfig, Pool
from simmim.config.validation import from_settings
from simmim.data.bad_images import BadImages, count_listed
from simmim.data.labelled.every import ClassLabels, open_with_labels
from simmim.data.pages import say_pages
from simmim.data.sounds import read_as
from simmim.data.sources import ImageSource, Subset, open_source
from simmim.data.video.notes import describe_frames, warn_of_clips
from simmim.data.windows import GridWindows, MiddleWindows
from simmim.errors import UserError
from simmim.hardware.host import reading_cores
from simmim.output import say
from simmim.torch_engine.accelerators import choose_device, choose_precision
from simmim.torch_engine.tasks.feature_files import FeatureFile, Part, check_format
from simmim.torch_engine.tasks.features import FeatureReader, PatchFeatures, PooledFeatures, choose_pool
from simmim.torch_engine.train import distributed
from simmim.torch_engine.train.storage import load_encoder
from simmim.training.origins import is_timms
from simmim.training.tracking import progress

Result = TypeVar("Result")

PART_IMAGES = 4096
PART_IMAGES_OF_PATCHES = 256  # as many bytes: each image has some hundred vectors


def embed(config: EmbedConfig) -> tuple[Any, ...]:
    """Return the features of images, and write them if there is an `out`; see `simmim.embed`."""

    def read(file: FeatureFile, world: distributed.World) -> tuple[Any, ...]:
        columns = [file.names()] if file.labels is None else [file.names(), file.label_names()]
        names, *labels = [[each for part in column for each in part] for column in columns]
        return names, np.concatenate(list(file.features())), *labels

    with tempfile.TemporaryDirectory() as folder:
        return _embed(config, Path(config.out or f"{folder}/features.npz"), read)


def embed_to_file(config: EmbedConfig) -> list[str]:
    """Write the features of images to `out` in flat memory; say what was written, line by line.

    The lines are those of the main process only: torchrun may start several, and each embeds its share of the parts.
    Raises `UserError` for an `out` that exists or was begun with other settings, settings that do not fit the encoder,
    and unreadable images.
    """
    if config.out is None:
        raise UserError("--out is missing; give a .parquet, .npz or .csv file")
    return _embed(config, Path(config.out), _describe)


def _embed(config: EmbedConfig, out: Path, read: Callable[[FeatureFile, distributed.World], Result]) -> Result:
    """Write the parts of a file, and join them; returns what `read` finds in the parts."""
    config = from_settings(EmbedConfig, vars(config))
    pool = choose_pool(config.pool, config.run, layer=config.layer, patches=config.patches)
    config = replace(config, pool=pool)
    if config.patches and config.pool != "avg":
        raise UserError(f"--pool {config.pool} makes one vector an image, and --patches many; leave one of them out")
    check_format(str(out), patches=config.patches)
    device = choose_device(config.device)
    config = replace(config, precision=choose_precision(config.precision, device))
    images, labels = _open(config)
    source = as_grid(config.run, images) if config.grid else images
    file = FeatureFile(out, source, PART_IMAGES_OF_PATCHES if config.patches else PART_IMAGES, labels)
    with distributed.join(device, config.precision) as world, file.hold(is_main=world.is_main):
        if config.out is None and world.size > 1:
            raise UserError(f"without --out features stay in one process, and there are {world.size}; give a file")
        backbone = load_encoder(config.run)
        digest = encoder_digest(backbone)
        read_features = _reader(config, source, backbone, world.device)
        settings = _settings(config, source, digest) if world.is_main else {}
        if world.is_main and (done := file.begin(settings)):
            say(f"resumes after {done} of {len(file)} parts")
        for warning in filter(None, (say_pages(images), warn_of_clips(images))) if world.is_main else ():
            say(f"warning    {warning}")
        if world.is_main and (frames := describe_frames(images)):
            say(f"frames     {frames}")
        world.main_says(0)  # no process goes on before the directory is there
        missing = [number for number in range(world.rank, len(file), world.size) if not file.has(number)]
        batches = _write_parts(config, file, read_features, missing)
        count = sum(math.ceil(len(file.images(number)) / config.batch_size) for number in missing)
        for _ in progress(batches, count, "batches embedded") if world.is_main else batches:
            pass
        while not all(map(file.has, range(len(file)))):  # a barrier would give up after 10 or 30 minutes
            time.sleep(1)
        if not any(file.names()):
            raise BadImages(file.bad_images, total=len(source)).none_readable()
        found = read(file, world)
        world.barrier()  # the parts are removed now
        if world.is_main:
            file.join()
    return found


def embed_some(
    run: str, source: ImageSource, *, device: str = "auto", layer: int = -1, pool: Pool = "auto", grid: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the features (N, D) of a source's readable images, and the images' numbers (N,): for a few thousand.

    With `grid`, those of the window in the middle of each, as one of a grid is seen.
    """
    chosen, pool = choose_device(device), choose_pool(pool, run, layer=layer)
    config = EmbedConfig(run=run, data="", max_bad_fraction=1.0, layer=layer, pool=pool, grid=grid)
    config = replace(config, precision=choose_precision(config.precision, chosen))
    return _reader(config, source, load_encoder(run), torch.device(chosen))(source)


def input_channels(run: str) -> int:
    """Return the channels of the images that a run's encoder takes."""
    return load_encoder(run).pretrained_cfg["input_size"][0]  # type: ignore[index]


def as_seen(run: str, source: ImageSource, *, grid: bool = False) -> ImageSource:
    """Return a source as a run's encoder sees it: the windows in the middle, if trained on windows, or for a grid."""
    backbone: Any = load_encoder(run)
    height, width = backbone.pretrained_cfg["input_size"][1:]
    return MiddleWindows(source, (height, width)) if grid or getattr(backbone, "sees_windows", False) else source


def as_grid(run: str, source: ImageSource) -> GridWindows:
    """Return the windows of an encoder's image size that cover each image. Raises `UserError` for one of sounds."""
    backbone: Any = load_encoder(run)
    if hasattr(backbone, "front_end"):
        raise UserError(f"--grid is for images, and {run} was trained on sounds; leave it out")
    height, width = backbone.pretrained_cfg["input_size"][1:]
    return GridWindows(read_as(source, None, run), (height, width))


def _reader(config: EmbedConfig, source: ImageSource, backbone: Any, device: torch.device) -> FeatureReader:
    model = (PatchFeatures if config.patches else PooledFeatures)(backbone, layer=config.layer, pool=config.pool)
    distributed.place(model, device)
    reader = FeatureReader.of_encoder(
        config.run,
        backbone,
        model,
        source,
        precision=config.precision,
        batch_size=config.batch_size,
        workers=config.workers or reading_cores(),
        max_bad_fraction=config.max_bad_fraction,
    )
    distributed.place(reader.pixels, device)
    return replace(reader, windows=True, view=None) if config.grid else reader


def encoder_digest(backbone: nn.Module) -> str:
    """Return a digest of an encoder on the CPU: of its weights, and of how it wants its images."""
    encoder = hashlib.sha256(repr(backbone.pretrained_cfg).encode())
    if hears := getattr(backbone, "front_end", None):
        encoder.update(repr(hears.sound).encode())
    if getattr(backbone, "sees_windows", False):
        encoder.update(b"windows")
    for name, tensor in backbone.state_dict().items():
        encoder.update(name.encode())
        encoder.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256 {encoder.hexdigest()[:16]}"


def _open(config: EmbedConfig) -> tuple[ImageSource, ClassLabels | None]:
    if config.labels and config.grid:
        raise UserError("--grid makes many vectors of an image, and --labels one label; leave one of them out")
    if config.labels:
        return open_with_labels(config.data, config.frames)
    return open_source(config.data, config.frames), None


def _settings(config: EmbedConfig, source: ImageSource, digest: str) -> dict[str, Any]:
    """Return what the numbers depend on: parts of different settings do not belong together."""
    images = hashlib.sha256()
    for index in range(len(source)):
        images.update(source.name(index).encode(errors="surrogateescape") + b"\0")
    options = ("layer", "pool", "patches", "dtype", "batch_size", "precision")
    return {
        "encoder": digest,
        "view": "grid" if config.grid else "timm" if is_timms(config.run) else "middle",
        "images": f"{len(source)} (names' sha256 {images.hexdigest()[:16]})",
        **{name: getattr(config, name) for name in options},
    }


def _write_parts(config: EmbedConfig, file: FeatureFile, read: FeatureReader, numbers: list[int]) -> Iterator[None]:
    """Write the parts `numbers`; yield after every batch. A part has batches of its own, so that it can be repeated."""
    bad_images = _NotedBadImages(
        file.bad_images if config.out else None, total=len(file.source), max_fraction=config.max_bad_fraction
    )
    for number in numbers:
        images = file.images(number)
        indices, features = [np.zeros(0, np.int64)], []
        for index, values in read.batches(Subset(file.source, np.array(images)), bad_images):
            indices.append(index + images.start)
            features.append(_rounded(values, config.dtype))
            yield
        found = np.concatenate(indices)
        unread = [file.source.name(index) for index in sorted({*images} - {*found.tolist()})]
        reasons = {name: bad_images.reasons[name] for name in unread}
        file.write(number, Part(found, np.concatenate(features) if features else np.zeros(0), reasons))


class _NotedBadImages(BadImages):
    """Unreadable images of which the reasons are kept, by name."""

    def __init__(self, path: Path | None, *, total: int, max_fraction: float):
        super().__init__(path, total=total, max_fraction=max_fraction)
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        self.reasons[name] = reason
        super().add(name, reason)


def _rounded(features: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Round features to the precision that is written. Raises `UserError` for numbers beyond it."""
    with np.errstate(over="ignore"):
        rounded = features.astype(dtype)
    if (np.isinf(rounded) & np.isfinite(features)).any():
        raise UserError(f"feature {np.abs(features).max():.3g} is beyond {dtype}; use --dtype float32")
    return rounded


def _describe(file: FeatureFile, world: distributed.World) -> list[str]:
    """Say what the file holds; only the main process does."""
    if not world.is_main:
        return []
    count, first = sum(map(len, file.names())), next(file.features())
    shape = ", ".join(map(str, (count, *first.shape[1:])))
    labels = "" if file.labels is None else f" and labels of {len(file.labels.classes)} classes"
    counted = "windows" if isinstance(file.source, GridWindows) else "images"
    lines = [f"{count} {counted}, features ({shape}) {first.dtype}{labels}, are in {file.out}"]
    if bad := count_listed(file.bad_images):
        lines.append(f"{bad} image{'s' * (bad > 1)} could not be read; {file.bad_images} lists them")
    return lines
