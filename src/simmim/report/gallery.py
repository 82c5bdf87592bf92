"""What an encoder makes of a set of images: neighbours, a map, and images worth a second look.

Shapes: `N` images, `D` features.
"""

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.config.frames import FRAMES
from simmim.config.sound import Sound
from simmim.data.augment import CentreCrop
from simmim.data.bad_images import BadImages
from simmim.data.decode import open_picture
from simmim.data.evaluation import eval_batches
from simmim.data.picture import BadImage, Picture
from simmim.data.sounds import as_sounds, holds_sounds
from simmim.data.sources import ImageSource, Subset, open_files, read_raw, sniff
from simmim.errors import UserError
from simmim.hardware.host import reading_cores
from simmim.method.random_keys import sample_keys
from simmim.metrics.classification import unit_length
from simmim.report.copies import duplicates, is_blank, small_copies
from simmim.training.pictures import data_uri, to_rgb
from simmim.training.spectrogram_pictures import in_colour

_MEASURED = 16  # sounds whose lengths decide how much time a thumbnail shows
_SIDE = 64  # pixels of a thumbnail among neighbours
_DOT = 32  # pixels of a thumbnail in the map
_QUERIES, _NEAREST = 12, 6
_POINT, _STRIP, _LEAST = 60, 30_000, 150  # bytes in the page: of a dot, a row of neighbours, a small thumbnail
_LISTED = 30
_BLURRED = 0.1  # of the median sharpness
_GROUPS = 7
_FEW = 20  # images, too few for UMAP


@dataclass(frozen=True)
class Strip:
    """An image and its nearest neighbours, side by side."""

    names: list[str]
    similarities: list[float]
    uri: str


@dataclass(frozen=True)
class Map:
    """Places of images in the plane, and their thumbnails in one picture, `columns` of them in a row."""

    method: str
    points: list[tuple[float, float, int]]
    """x and y in 0..1, and the number of the group."""
    names: list[str]
    groups: list[str]
    uri: str
    columns: int
    side: int


@dataclass(frozen=True)
class Gallery:
    """Pictures and lists of a sample of images."""

    count: int
    total: int
    unreadable: int
    strips: list[Strip]
    map: Map
    lists: dict[str, list[str]]
    """Names of images by what is remarkable about them; duplicates are pairs, a tab between the names."""


def make_gallery(run: str, data: str, *, most: int, most_bytes: int = 5_000_000, frames: str = FRAMES) -> Gallery:
    """Embed up to `most` images by a run's encoder; thumbnails shrink so that all takes at most about `most_bytes`.

    Of clips, `frames` chooses the images. Raises `UserError` where none can be read, and, before any is, where names
    alone would take that.
    """
    from jinja2.utils import htmlsafe_json_dumps

    from simmim.torch_engine.tasks.embed import as_seen, embed_some, input_channels

    whole = open_files([data], frames)
    order = np.argsort(sample_keys(0, 0, np.arange(len(whole)), stream="sample"))
    source: ImageSource = Subset(whole, np.sort(order[:most]))
    sizes = [len(htmlsafe_json_dumps(source.name(index))) for index in range(len(source))]
    text = sum(sizes) + _POINT * len(sizes) + 5 * _LISTED * max(sizes)
    spare = most_bytes - text - _QUERIES * _STRIP
    if spare < len(source) * _LEAST:
        raise UserError(
            f"a report of {len(source):,} images would take over {most_bytes:,} bytes for each run; "
            "lower --images, or give fewer runs"
        )
    read, features = embed_some(run, source)
    kept, thumbnails = thumbnails_of(as_seen(run, Subset(source, read)), channels=input_channels(run))
    finite = np.isfinite(features[kept]).all(axis=1)
    read, features, thumbnails = read[kept][finite], features[kept][finite], thumbnails[finite]
    if len(read) < 2:
        if len(kept) < 2:
            raise UserError(f"a comparison needs two images, and {len(kept)} of {data} can be read; give more")
        raise UserError(f"features of {run} are not finite, so that nothing can be compared; train it anew")
    names = [source.name(int(index)) for index in read]
    unit = unit_length(features)
    near = nearest(unit, min(10, len(names) - 1))
    return Gallery(
        count=len(names),
        total=len(whole),
        unreadable=len(source) - len(names),
        strips=strips(near, unit, names, thumbnails),
        map=draw_map(features, names, thumbnails, spare),
        lists=remarkable(near, unit, names, thumbnails, sounds=holds_sounds(source)),
    )


def thumbnails_of(source: ImageSource, channels: int = 3) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Read the middles of images at 64 pixels: numbers of the readable ones (N,), and pixels (N, 64, 64, 3)."""
    indices, pictures = zip(*thumbnail_batches(source, channels), strict=True)
    return np.concatenate(indices), np.concatenate(pictures)


def thumbnail_batches(source: ImageSource, channels: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Yield the same in batches. Of sounds, up to 5 s in the middle are drawn as a spectrogram."""
    if holds_sounds(source):
        yield from _sound_thumbnails(source)
        return
    dtype = sniff(source, channels=channels)
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1.0
    for index, images in eval_batches(
        source,
        crop=CentreCrop(size=(_SIDE, _SIDE)),
        channels=channels,
        dtype=dtype,
        batch_size=64,
        threads=reading_cores(),
        bad_images=BadImages(None, total=len(source), max_fraction=1.0),
    ):
        yield index, to_rgb(images / np.float32(top))


def _sound_thumbnails(source: ImageSource) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    source = as_sounds(source, Sound.rate)
    lengths = [clip.height for clip in map(_header, [source] * _MEASURED, range(min(len(source), _MEASURED))) if clip]
    together = min(max(1, round(max(lengths, default=0) / 160 / _SIDE)), 8)  # frames of a column, of 10 ms each
    found = Sound().spectrogram((together * _SIDE, _SIDE))
    for index, samples in eval_batches(
        source,
        crop=CentreCrop(size=(found.samples, 1)),
        channels=1,
        dtype=np.float32,
        batch_size=64,
        threads=reading_cores(),
        bad_images=BadImages(None, total=len(source), max_fraction=1.0),
    ):
        values = found(np, samples[..., 0, 0])  # (B, together · 64, 64)
        yield index, to_rgb(in_colour(values.reshape(-1, _SIDE, together, _SIDE).mean(axis=2)))


def _header(source: ImageSource, index: int) -> Picture | None:
    try:
        return open_picture(read_raw(source, index))
    except BadImage:
        return None


def nearest(unit: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the nearest other images by cosine, the nearest first: features of length 1 (N, D) → (N, count)."""
    found = []
    for first in range(0, len(unit), 1024):
        similarity = unit[first : first + 1024] @ unit.T
        rows = np.arange(len(similarity))
        similarity[rows, first + rows] = -np.inf
        found.append(np.argsort(-similarity, axis=1, kind="stable")[:, :count])
    return np.concatenate(found)


def strips(
    near: NDArray[np.int64], unit: NDArray[np.float32], names: list[str], pictures: NDArray[np.uint8]
) -> list[Strip]:
    from PIL import Image

    found = []
    for query in np.unique(np.linspace(0, len(names) - 1, _QUERIES).astype(int)):
        shown = [int(query), *near[query, :_NEAREST].tolist()]
        gap = np.full((_SIDE, 4, 3), 255, np.uint8)
        picture = np.concatenate([part for number in shown for part in (pictures[number], gap)][:-1], axis=1)
        similar = [float(unit[query] @ unit[number]) for number in shown[1:]]
        found.append(Strip([names[number] for number in shown], similar, data_uri(Image.fromarray(picture))))
    return found


def draw_map(features: NDArray[np.float32], names: list[str], pictures: NDArray[np.uint8], most_bytes: int) -> Map:
    """Place images by UMAP (arXiv 1802.03426) where it is installed, else by two principal components."""
    from PIL import Image

    try:
        if len(names) < _FEW:
            raise ImportError
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it imports TensorFlow, where that is installed
        umap: Any = importlib.import_module("umap")
        method, places = "UMAP", umap.UMAP(random_state=0, n_jobs=1, metric="cosine").fit_transform(features)
    except ImportError:
        method, places = "two principal components (UMAP where umap-learn is installed)", principal(features)
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.maximum(high - low, 1e-12)
    folders = [os.path.basename(os.path.dirname(name)) for name in names]  # noqa: PTH119, PTH120  # a name may be no path
    common = sorted(set(folders), key=lambda folder: (-folders.count(folder), folder))[:_GROUPS]
    groups = common if len(set(folders)) <= _GROUPS else [*common, "others"]
    columns = int(np.ceil(np.sqrt(len(names))))
    for side, quality in ((_DOT, 70), (_DOT // 2, 70), (_DOT // 2, 40), (_DOT // 4, 40)):
        uri = data_uri(Image.fromarray(contact_sheet(pictures, columns, side)), quality=quality)
        if len(uri) <= most_bytes:
            break
    points = [
        (round(float(x), 4), round(float(y), 4), groups.index(folder) if folder in groups else len(groups) - 1)
        for (x, y), folder in zip(places, folders, strict=True)
    ]
    return Map(method, points, names, groups, uri, columns, side)


def contact_sheet(pictures: NDArray[np.uint8], columns: int, side: int) -> NDArray[np.uint8]:
    """Lay pictures (N, 64, 64, 3), shrunk to `side`, row by row into one of `columns` by `columns`."""
    sheet = np.full((columns * columns, side, side, 3), 255, np.uint8)
    part = _SIDE // side
    sheet[: len(pictures)] = pictures.reshape(-1, side, part, side, part, 3).mean(axis=(2, 4))
    return sheet.reshape(columns, columns, side, side, 3).swapaxes(1, 2).reshape(columns * side, columns * side, 3)


def principal(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Project features (N, D) on their first two principal components: (N, 2)."""
    data = features.astype(np.float64) - features.mean(axis=0)
    _, _, axes = np.linalg.svd(data, full_matrices=False)
    found = data @ axes[:2].T
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def remarkable(
    near: NDArray[np.int64],
    unit: NDArray[np.float32],
    names: list[str],
    pictures: NDArray[np.uint8],
    *,
    sounds: bool = False,
) -> dict[str, list[str]]:
    """List likely duplicates, outliers, blank and blurred images, at most 30 of each; of sounds no blurred ones."""
    small = small_copies(pictures)
    grey = pictures.astype(np.float32).mean(axis=-1) / 255  # (N, 64, 64)
    blank = is_blank(pictures)
    found = {
        "Likely duplicates": [f"{names[i]}\t{names[j]}" for i, j, _ in duplicates(small, blank)],
        "Outliers: far from all others": [],
        "Blank": [names[number] for number in np.flatnonzero(blank)],
    }
    if near.shape[1]:
        closeness = np.einsum("nd,nkd->n", unit, unit[near]) / near.shape[1]
        limit = closeness.mean() - 3 * closeness.std()
        found["Outliers: far from all others"] = [
            names[number] for number in np.argsort(closeness) if closeness[number] < limit
        ]
    if not sounds:
        sharp = laplacian(grey).var(axis=(1, 2))
        limit = _BLURRED * np.median(sharp)
        order = np.argsort(sharp)
        found["Blurred"] = [names[number] for number in order if sharp[number] < limit and not blank[number]]
    return {what: listed[:_LISTED] for what, listed in found.items()}


def laplacian(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the Laplacian of images (N, H, W) inside their borders; its variance is small where they are blurred."""
    inner = grey[:, 1:-1, 1:-1]
    return grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
