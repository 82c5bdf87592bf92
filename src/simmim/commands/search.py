"""`simmim search`: images that an encoder finds alike, and copies of one another.

Shapes: `N` images, `Q` queries, `D` features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tyro.conf import Positional, arg

from simmim.config.field_types import Device, Positive, Word
from simmim.config.frames import FRAMES, Frames
from simmim.config.validation import from_settings
from simmim.data.sources import ImageSource, Subset, check_files, open_files, open_source
from simmim.errors import UserError
from simmim.metrics.classification import unit_length
from simmim.output import say
from simmim.report.copies import duplicates, is_blank, small_copies
from simmim.report.gallery import thumbnail_batches, thumbnails_of
from simmim.training.origins import check_encoder
from simmim.training.pictures import enlarged, save_png

_PICTURED = 12  # rows
_BLOCK = 65_536  # features


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A search for images that are like others."""

    command: ClassVar[str] = "search"
    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """The --out directory of a run, an encoder directory, timm:NAME, or local-dir:PATH of a model that timm saved."""
    data: str
    """Images to search in, as pretraining's --data takes them."""
    frames: Frames = FRAMES
    """Frames of clips, as simmim pretrain takes them: Ns, N or key, with or without +distinct."""
    query: Annotated[tuple[str, ...], arg(metavar="IMAGE...")] = ()
    """Image files, or any value of --data, whose neighbours are wanted."""
    duplicates: bool = False
    """List pairs of images that are likely copies of one another, by their pixels."""
    count: Positive = 8
    """Neighbours of a query."""
    features: Word = None
    """File that simmim embed RUN --data DATA wrote (.npz or .parquet), so that they need not be embedded again."""
    out: Word = None
    """PNG file for a picture of the first rows."""
    device: Device = "auto"
    """Accelerator."""


def search(config: SearchConfig) -> list[dict[str, Any]]:
    """Find neighbours: of each query its "query" (a name) and "neighbours", each a "name" and a "similarity" (cosine).

    With `duplicates`: pairs, each with "names" and "correlation". Writes the picture, if there is an `out`. Raises
    `UserError` for images that cannot be read, or settings that do not fit.
    """
    config = from_settings(SearchConfig, vars(config))
    if config.duplicates == bool(config.query):
        raise UserError("simmim search needs --query IMAGE or --duplicates, and not both; give one")
    if config.out and Path(config.out).suffix.lower() != ".png":
        raise UserError(f"--out {config.out} is not a .png file; name one")
    check_encoder(config.run)
    if config.query:
        check_files(config.query)
    source = open_source(config.data, config.frames)
    return _pairs(config, source) if config.duplicates else _neighbours(config, source)


def _neighbours(config: SearchConfig, source: ImageSource) -> list[dict[str, Any]]:
    from simmim.torch_engine.tasks.embed import as_seen, embed_some, input_channels

    queries, how = open_files(config.query, config.frames), {}
    if config.features:
        source, indices, features, how = _stored(config, source)
    asked, wanted = embed_some(config.run, queries, device=config.device, **how)
    if unread := sorted({*range(len(queries))} - {*asked.tolist()}):
        raise UserError(f"{queries.name(unread[0])} cannot be read; give other images as --query")
    if not config.features:
        indices, features = embed_some(config.run, source, device=config.device)
    if features.shape[1] != wanted.shape[1]:
        raise UserError(
            f"{config.features} has {features.shape[1]} features an image and {config.run} {wanted.shape[1]}; "
            "embed the images by this run"
        )
    wanted = unit_length(wanted)
    blocks = [wanted @ unit_length(features[first : first + _BLOCK]).T for first in range(0, len(features), _BLOCK)]
    similarity = np.concatenate(blocks, axis=1)  # (Q, N)
    found, rows = [], []
    for query, values in zip(asked.tolist(), similarity, strict=True):
        name = queries.name(query)
        order = np.argsort(-values, kind="stable")[: config.count + 1].tolist()
        order = [place for place in order if not _same(source.name(int(indices[place])), name)][: config.count]
        near = [{"name": source.name(int(indices[place])), "similarity": float(values[place])} for place in order]
        found.append({"query": name, "neighbours": near})
        rows.append((np.array([query]), indices[order]))
    if config.out:
        channels = input_channels(config.run)
        grid = how.get("grid", False)
        queries, source = (as_seen(config.run, each, grid=grid) for each in (queries, source))
        parts = [
            np.concatenate(
                [thumbnails_of(part, channels)[1] for part in (Subset(queries, query), Subset(source, near))]
            )
            for query, near in rows[:_PICTURED]
        ]
        save_picture(parts, Path(config.out))
    return found


def _pairs(config: SearchConfig, source: ImageSource) -> list[dict[str, Any]]:
    from simmim.torch_engine.tasks.embed import as_seen, input_channels

    channels, source = input_channels(config.run), as_seen(config.run, source)
    batches = thumbnail_batches(source, channels)  # 64 at a time: small copies are kept
    copies = [(indices, small_copies(pictures), is_blank(pictures)) for indices, pictures in batches]
    read, small, blank = (np.concatenate(column) for column in zip(*copies, strict=True))
    del copies
    pairs = duplicates(small, blank)
    if config.out:
        shown = [thumbnails_of(Subset(source, read[list(pair[:2])]), channels)[1] for pair in pairs[:_PICTURED]]
        save_picture(shown, Path(config.out))
    return [
        {"names": [source.name(int(read[place])) for place in (first, second)], "correlation": correlation}
        for first, second, correlation in pairs
    ]


def _stored(
    config: SearchConfig, source: ImageSource
) -> tuple[ImageSource, NDArray[np.int64], NDArray[Any], dict[str, Any]]:
    """Read the features of a source's images, or of their windows, from what `simmim embed` wrote.

    Returns the images or windows, the numbers of those in the file, the features, and how they were taken.

    Raises `UserError` where another encoder made them, or the file does not fit.
    """
    from simmim.torch_engine.tasks.embed import as_grid, encoder_digest
    from simmim.torch_engine.tasks.feature_files import as_text, read_features
    from simmim.torch_engine.train.storage import load_encoder

    file = config.features
    assert file is not None
    names, features, facts = read_features(Path(file))
    if not facts:
        say(f"warning    {file} does not say which encoder made it; it is taken for that of {config.run}")
    elif facts["encoder"] != (digest := encoder_digest(load_encoder(config.run))):
        raise UserError(
            f"{file} was made by another encoder ({facts['encoder']}) than that of {config.run} ({digest}); "
            "give that run, or embed the images by this one"
        )
    if grid := facts.get("view") == "grid":
        source = as_grid(config.run, source)
    places = {as_text(source.name(index)): index for index in range(len(source))}
    if missing := [name for name in names if name not in places]:
        raise UserError(f"{file} has images that --data has not, such as {missing[0]}; give the data it was made of")
    if features.ndim != 2:
        raise UserError(f"{file} has features of patches; embed the images without --patches")
    return (
        source,
        np.array([places[name] for name in names]),
        features,
        {name: facts[name] for name in ("layer", "pool") if facts} | {"grid": grid},
    )


def save_picture(rows: list[NDArray[np.uint8]], path: Path) -> None:
    """Draw rows of pictures, each (n, H, W, 3), below one another."""
    drawn = []
    for pictures in map(enlarged, rows):
        gap = np.full((pictures.shape[1], 6, 3), 255, np.uint8)
        drawn.append(np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1))
    width = max((row.shape[1] for row in drawn), default=64)
    padded = [np.pad(row, ((0, 6), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in drawn]
    save_png(np.concatenate(padded) if padded else np.full((64, 64, 3), 255, np.uint8), path)


def describe(found: list[dict[str, Any]]) -> list[str]:
    """Format neighbours or pairs as lines."""
    lines = []
    for each in found:
        if "query" in each:
            lines.append(each["query"])
            lines += [f"  {near['similarity']:.3f}  {near['name']}" for near in each["neighbours"]]
        else:
            lines.append(f"{each['correlation']:.3f}  {each['names'][0]}  {each['names'][1]}")
    return lines or ["no likely duplicates"]


def _same(name: str, other: str) -> bool:
    """Tell whether two names are of one image: the same file, by whatever path, or the same name in a set."""
    return name == other or (Path(name).is_file() and Path(other).is_file() and Path(name).samefile(other))
