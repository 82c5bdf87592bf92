"""`simmim paste`: pieces of unlabelled images on one another, with their boxes and masks, to pretrain a detector on.

What is pasted has a place that is known, and a kind: the cluster of the features that a pretrained encoder has of it.
So the whole detector is pretrained and not its encoder alone, as with the random patches of UP-DETR (arXiv 2011.09094)
and the pasted crops of InsLoc (arXiv 2102.08318).

Shapes: `N` pieces, `D` features, `h w` pixels of a piece, `S` pixels of a side of an image.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from simmim.commands.search import save_picture
from simmim.config.commands import PasteConfig
from simmim.config.validation import from_settings
from simmim.data.augment import Box, load, show
from simmim.data.bad_images import BadImages
from simmim.data.decode import open_picture
from simmim.data.labelled.detection import encode_mask, import_rle
from simmim.data.pages import say_pages
from simmim.data.picture import BadImage
from simmim.data.sounds import holds_sounds
from simmim.data.sources import ImageSource, open_source, read_raw, sniff
from simmim.data.video.notes import warn_of_clips
from simmim.disk import writing
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.method.k_means import k_means
from simmim.metrics.classification import unit_length
from simmim.training.origins import check_encoder
from simmim.training.pictures import to_rgb
from simmim.training.run_lock import LOCK, locked
from simmim.training.tracking import progress
from simmim.training.whole_files import read_json, write_json, written_whole

SETTINGS, ANNOTATIONS, BAD_IMAGES = "paste.json", "annotations.json", "bad_images.txt"
_SETTLED = ("images", "run", "frames", "count", "image_size", "kinds", "pieces", "seed")
_SQUARE = 64  # pixels of a side of a piece that is embedded
_AREAS = (0.04, 0.5)  # of a piece, as a share of the image that it is cut from
_SHAPES = (0.6, 1.7)  # width over height of a piece
_SIDES = (0.15, 0.57)  # of a piece that is pasted, as a share of the image that it is pasted on
_GROUNDS = (0.35, 1.0)  # of the square that becomes an image, as a share of the area of the largest
_MOST = 5  # pieces of an image
_LEAST_SHOWN = 0.1  # a piece that others hide further is no object
_LEAST_SIDE = 4  # pixels, of a piece that is pasted
_CORNERS = 60  # of an outline
_PICTURED = 8  # pieces of a kind
_QUALITY = 92  # of JPEGs
Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Piece:
    """A part of an image, by its number and shares in [0, 1]."""

    image: int
    area: float
    shape: float
    """Width over height, in pixels."""
    down: float
    right: float

    def box(self, height: int, width: int) -> Box:
        """Place it in an image; one that is too long or too high becomes narrower."""
        area = self.area * height * width
        across = min(width, max(1, round(math.sqrt(area * self.shape))))
        along = min(height, max(1, round(math.sqrt(area / self.shape))))
        return Box(round(self.down * (height - along)), round(self.right * (width - across)), along, across)


class Pieces:
    """`ImageSource` of pieces as squares of `side` pixels."""

    def __init__(self, source: ImageSource, pieces: Sequence[Piece], side: int, channels: int):
        self._source, self._pieces, self._side, self._channels = source, pieces, side, channels

    def __len__(self) -> int:
        return len(self._pieces)

    def name(self, index: int) -> str:
        return f"{self.name_of_image(index)}#{index}"

    def name_of_image(self, index: int) -> str:
        return self._source.name(self._pieces[index].image)

    def read(self, index: int) -> NDArray[np.uint8]:
        piece, size = self._pieces[index], (self._side, self._side)
        return load(read_raw(self._source, piece.image), piece.box, size=size, channels=self._channels, dtype=np.uint8)


@dataclass(frozen=True)
class Pasted:
    """An image (S, S, C), and which piece is on top at each pixel (S, S): 0 for the ground, the first is 1.

    `kinds` are those of the pieces, in that order.
    """

    pixels: NDArray[np.uint8]
    owner: NDArray[np.uint8]
    kinds: list[int]
    sizes: list[int]
    """Pixels of each piece before others were pasted on it."""

    def objects(self) -> list[tuple[int, NDArray[np.bool_]]]:
        """Return the kind and the mask (S, S) of each piece that can still be seen."""
        masks = [self.owner == number for number in range(1, len(self.kinds) + 1)]
        return [
            (kind, mask)
            for kind, mask, size in zip(self.kinds, masks, self.sizes, strict=True)
            if mask.sum() >= max(1, _LEAST_SHOWN * size)
        ]


@dataclass(frozen=True)
class Paster:
    """Composes images from pieces, each by its number and the seed."""

    source: ImageSource
    pieces: Sequence[Piece]
    kinds: NDArray[np.int64]
    """(N,); -1 for a piece that cannot be read."""
    side: int
    channels: int
    seed: int
    bad_images: BadImages

    def compose(self, number: int) -> Pasted:
        """Paste pieces on a part of an image. Images that cannot be read are listed, and others taken instead."""
        rng = np.random.default_rng([self.seed, 1, number])
        canvas = Image.fromarray(_plain(self._try(lambda: self._ground(rng))))
        owner = np.zeros((self.side, self.side), np.uint8)
        kinds, sizes = [], []
        for count in range(1, int(rng.integers(1, _MOST + 1)) + 1):
            kind, pixels = self._try(lambda: self._piece(rng))
            height, width = pixels.shape[:2]
            outline = draw_outline(rng, height, width)
            top, left = (int(rng.integers(self.side - length + 1)) for length in (height, width))
            canvas.paste(Image.fromarray(_plain(pixels)), (left, top), outline)
            shown = np.asarray(outline) > 127
            owner[top : top + height, left : left + width][shown] = count
            kinds.append(kind)
            sizes.append(int(shown.sum()))
        return Pasted(np.atleast_3d(np.asarray(canvas)), owner, kinds, sizes)

    def _try(self, draw: Callable[[], Drawn]) -> Drawn:
        while True:
            try:
                return draw()
            except _Unreadable as error:
                self.bad_images.add(self.source.name(error.image), error.reason)

    def _ground(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        image, area, down, right = int(rng.integers(len(self.source))), rng.uniform(*_GROUNDS), *rng.random(2)

        def square(height: int, width: int) -> Box:
            side = max(1, round(min(height, width) * math.sqrt(area)))
            return Box(round(down * (height - side)), round(right * (width - side)), side, side)

        return self._show(image, square, lambda _box: (self.side, self.side))

    def _piece(self, rng: np.random.Generator) -> tuple[int, NDArray[np.uint8]]:
        """Read a piece at a size that is drawn: its kind, and its pixels (h, w, C)."""
        chosen = int(rng.choice(np.flatnonzero(self.kinds >= 0)))
        length = _log_uniform(rng, _SIDES) * self.side  # of a square of its area

        def size(box: Box) -> tuple[int, int]:
            shape = box.width / box.height
            height, width = (max(_LEAST_SIDE, min(self.side, round(length * shape**power))) for power in (-0.5, 0.5))
            return height, width

        piece = self.pieces[chosen]
        return int(self.kinds[chosen]), self._show(piece.image, piece.box, size)

    def _show(
        self, image: int, place: Callable[[int, int], Box], size: Callable[[Box], tuple[int, int]]
    ) -> NDArray[np.uint8]:
        try:
            picture = open_picture(read_raw(self.source, image))
            box = place(picture.height, picture.width)
            return show(picture, box, size=size(box), channels=self.channels, dtype=np.uint8)
        except BadImage as error:
            raise _Unreadable(image, str(error)) from error


class _Unreadable(Exception):
    """An image, by its number, that cannot be read."""

    def __init__(self, image: int, reason: str):
        super().__init__(image, reason)
        self.image, self.reason = image, reason


def draw_outline(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Draw the outline of a piece that fills (height, width): from a star to nearly a rectangle, with waves.

    Half of them have soft edges, so that an edge is not what a detector learns to find.
    """
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    power = rng.choice([1.0, 1.5, 2.5, 6.0])  # of a superellipse
    radius = (np.abs(np.cos(angles)) ** power + np.abs(np.sin(angles)) ** power) ** (-1 / power)
    for waves in range(2, 6):
        radius = radius * (1 + rng.normal(0, 0.25 / waves) * np.cos(waves * angles + rng.uniform(0, 2 * np.pi)))
    places = []
    for places_of_axis, length in ((radius * np.cos(angles), width), (radius * np.sin(angles), height)):
        least, most = places_of_axis.min(), places_of_axis.max()
        places.append((places_of_axis - least) / (most - least) * (length - 1))
    outline = Image.new("L", (width, height))
    ImageDraw.Draw(outline).polygon([(float(x), float(y)) for x, y in zip(*places, strict=True)], fill=255)
    return outline.filter(ImageFilter.GaussianBlur(0.7)) if rng.random() < 0.5 else outline


def draw_pieces(images: int, count: int, seed: int) -> list[Piece]:
    """Draw pieces of images at random."""
    rng = np.random.default_rng([seed, 0])
    return [
        Piece(int(rng.integers(images)), _log_uniform(rng, _AREAS), _log_uniform(rng, _SHAPES), *rng.random(2).tolist())
        for _ in range(count)
    ]


def sort_into_kinds(features: NDArray[np.float32], kinds: int, seed: int) -> NDArray[np.int64]:
    """Cluster features (N, D), standardised and of unit length, by k-means; return the kind of each (N,), from 0 on.

    There may be fewer kinds than asked for. Raises `UserError` if there are fewer distinct features.
    """
    features = unit_length((features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-6))
    if (distinct := len(np.unique(features, axis=0))) < kinds:
        raise UserError(f"{distinct} pieces that differ are fewer than {kinds} kinds; use fewer --kinds or more images")
    centres = k_means(features, clusters=kinds, seed=seed, stream="kinds of pieces")
    nearest = ((centres**2).sum(axis=1) - 2 * features @ centres.T).argmin(axis=1)
    return np.unique(nearest, return_inverse=True)[1]


def paste(config: PasteConfig) -> list[str]:
    """Write the set, or what a killed call left out; return what was done, line by line.

    `out` gets train/ and val/, each with images/, masks/ and annotations.json, classes.txt, kinds.png with pieces of
    each kind, and paste.json with the settings and the kinds. Raises `UserError` for settings that do not fit, images
    that cannot be read, and an `out` that holds something else.
    """
    config = from_settings(PasteConfig, vars(config))
    check_encoder(config.run, "--from", scratch=False)
    import_rle()
    out = Path(config.out)
    if out.resolve().is_relative_to(Path(config.images).resolve()):
        raise UserError(f"--out {out} lies within {config.images}, which would then hold what is pasted; give another")
    source = open_source(config.images, config.frames)
    if holds_sounds(source):
        raise UserError(f"{config.images} holds sounds, and simmim paste is for images; give images")
    settings = {name: getattr(config, name) for name in _SETTLED} | {"number of images": len(source)}
    with writing(out), locked(out):
        pieces = draw_pieces(len(source), config.pieces, config.seed)
        channels = _channels(config, source)
        squares = Pieces(source, pieces, _SQUARE, channels)
        bad_images = BadImages(out / BAD_IMAGES, total=len(source), max_fraction=config.max_bad_fraction)
        kinds = _begin(out, settings)
        if kinds is None:
            kinds = _sort(config, squares, bad_images)
            write_json(out / SETTINGS, {"settings": settings, "kinds": kinds.tolist()})
        paster = Paster(source, pieces, kinds, config.image_size, channels, config.seed, bad_images)
        images, objects = _write(paster, config, out, squares)
    lines = [
        f"{config.images} is pasted in {out}: {images} images with {objects} objects of {kinds.max() + 1} kinds",
        f"the kinds are drawn in {out / 'kinds.png'}",
        f"next: simmim finetune detect --data {out} --from {config.run} --out RUN2, then --from RUN2 with your labels",
    ]
    lines += [f"warning: {text}" for text in (say_pages(source), warn_of_clips(source)) if text]
    if count := len(bad_images):
        lines.append(f"{count} images cannot be read; {bad_images.path} lists them")
    return lines


def _begin(out: Path, settings: dict[str, Any]) -> NDArray[np.int64] | None:
    """Return the kinds of the pieces if the same set was begun in a directory. Raises `UserError` for another one."""
    if (out / SETTINGS).is_file():
        known = read_json(out / SETTINGS)
        begun = known["settings"]
        for name, new in settings.items():
            if begun.get(name) != new:
                told = {"run": "--from", "number of images": name}.get(name, f"--{name.replace('_', '-')}")
                raise UserError(f"{out} was begun with {told} {begun.get(name)}, not {new}; give another --out")
        return np.array(known["kinds"])
    if {path.name for path in out.iterdir() if path.suffix != ".part"} - {LOCK, BAD_IMAGES}:
        raise UserError(f"--out {out} holds other files; give a new directory")
    return None


def _channels(config: PasteConfig, source: ImageSource) -> int:
    """Return the channels of the encoder's images. Raises `UserError` for images that a detector does not take."""
    from simmim.torch_engine.tasks.embed import input_channels

    channels = input_channels(config.run)
    if channels not in (1, 3):
        raise UserError(f"--from {config.run} takes images of {channels} channels, and JPEGs have 1 or 3; give another")
    if sniff(source, channels=channels, trained=True) != np.uint8:
        raise UserError(f"{config.images} has images of more than 8 bits, which detection does not take; convert them")
    return channels


def _sort(config: PasteConfig, squares: Pieces, bad_images: BadImages) -> NDArray[np.int64]:
    """Return the kind of each piece (N,), -1 for one that cannot be read."""
    from simmim.torch_engine.tasks.embed import embed_some

    read, features = embed_some(config.run, squares, device=config.device)
    for number in sorted({*range(len(squares))} - {*read.tolist()}):
        try:
            squares.read(number)
        except BadImage as error:
            bad_images.add(squares.name_of_image(number), str(error))
    kinds = np.full(len(squares), -1)
    kinds[read] = sort_into_kinds(features, config.kinds, config.seed)
    return kinds


def _write(paster: Paster, config: PasteConfig, out: Path, squares: Pieces) -> tuple[int, int]:
    """Write what is not there yet; return how many images and objects there are."""
    count = int(paster.kinds.max()) + 1
    if not (out / "kinds.png").exists():
        shown = [np.flatnonzero(paster.kinds == kind)[:_PICTURED].tolist() for kind in range(count)]
        save_picture([to_rgb(np.stack([*map(squares.read, row)]) / 255) for row in shown], out / "kinds.png")
    names = [f"kind {kind}" for kind in range(1, count + 1)]
    with written_whole(out / "classes.txt") as path:
        path.write_text("\n".join(["background", *names]) + "\n", encoding="utf-8")
    first, objects = 0, 0
    for part, images in (("train", config.count), ("val", max(16, config.count // 100))):
        if not (out / part / ANNOTATIONS).exists():
            _write_part(paster, out / part, range(first, first + images), names)
        objects += len(read_json(out / part / ANNOTATIONS)["annotations"])
        first += images
    return first, objects


def _write_part(paster: Paster, folder: Path, numbers: range, names: Sequence[str]) -> None:
    """Write images, masks and annotations, the last of them at the end."""
    for place in ("images", "masks"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    found: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}

    def write(number: int) -> list[dict[str, Any]]:
        pasted = paster.compose(number)
        objects = pasted.objects()
        classes = np.zeros(pasted.owner.shape, np.uint8)
        for kind, mask in objects:
            classes[mask] = kind + 1
        name = f"{number:06d}"
        _save(_plain(pasted.pixels), folder / "images" / f"{name}.jpg", "JPEG", quality=_QUALITY)
        _save(classes, folder / "masks" / f"{name}.png", "PNG")
        return [_annotate(number, kind, mask) for kind, mask in objects]

    threads = cpu_cores()
    with ThreadPoolExecutor(threads) as pool:
        batches = [numbers[start : start + 8 * threads] for start in range(0, len(numbers), 8 * threads)]
        for batch in progress(batches, len(batches), f"parts of {folder.name}"):  # few at a time wait in memory
            for number, objects in zip(batch, pool.map(write, batch), strict=True):
                size = {"width": paster.side, "height": paster.side}
                found["images"].append({"id": number + 1, "file_name": f"{number:06d}.jpg", **size})
                for each in objects:
                    found["annotations"].append({"id": len(found["annotations"]) + 1, **each})
    write_json(folder / ANNOTATIONS, found, indent=None)


def _save(pixels: NDArray[np.uint8], path: Path, form: str, **options: Any) -> None:
    if not path.exists():
        with written_whole(path) as whole:
            Image.fromarray(pixels).save(whole, form, **options)


def _annotate(number: int, kind: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Describe an object as COCO does."""
    place = {"bbox": _box_of(mask), "area": int(mask.sum()), "segmentation": encode_mask(mask)}
    return {"image_id": number + 1, "category_id": kind + 1, "iscrowd": 0, **place}


def _box_of(mask: NDArray[np.bool_]) -> list[int]:
    """Return COCO's left, top, width, height of a mask."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


def _plain(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Drop the axis of a single channel, as Pillow wants it."""
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
