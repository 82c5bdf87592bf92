"""Images composed of pieces of other images, whose boxes, masks and kinds are known (docs/detection.md).

Shapes: `N` pieces, `C` channels, `h w` pixels of a piece, `S` pixels of a side of an image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from simmim.data.augment import Box, load, show
from simmim.data.bad_images import BadImages
from simmim.data.decode import open_picture
from simmim.data.picture import BadImage
from simmim.data.sources import ImageSource, read_raw

_AREAS = (0.04, 0.5)  # of a piece, as a share of the image that it is cut from
_SHAPES = (0.6, 1.7)  # width over height of a piece
_SIDES = (0.15, 0.57)  # of a piece that is pasted, as a share of the image that it is pasted on
_GROUNDS = (0.35, 1.0)  # of the square that becomes an image, as a share of the area of the largest
_MOST = 5  # pieces of an image
_LEAST_SHOWN = 0.1  # a piece that others hide further is no object
_LEAST_SIDE = 4  # pixels, of a piece that is pasted
_CORNERS = 60  # of an outline

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
        canvas = Image.fromarray(plain(self._try(lambda: self._ground(rng))))
        owner = np.zeros((self.side, self.side), np.uint8)
        kinds, sizes = [], []
        for count in range(1, int(rng.integers(1, _MOST + 1)) + 1):
            kind, pixels = self._try(lambda: self._piece(rng))
            height, width = pixels.shape[:2]
            outline = draw_outline(rng, height, width)
            top, left = (int(rng.integers(self.side - length + 1)) for length in (height, width))
            canvas.paste(Image.fromarray(plain(pixels)), (left, top), outline)
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


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


def plain(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Drop the axis of a single channel, as Pillow wants it."""
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
