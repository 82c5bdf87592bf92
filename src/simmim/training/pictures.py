"""Pictures: reconstructions and features beside their originals, classes of pixels laid over an image, captions.

Shapes: `B` images, `H W` pixels, `C` channels, `K` classes.
"""

import base64
import colorsys
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simmim.training.whole_files import written_whole

if TYPE_CHECKING:
    from PIL.Image import Image

_HIDDEN = 0.5  # grey of a hidden pixel
_GAP = 4  # pixels between pictures
_CAPTION = 16
_HIGH = 128  # the least height of a picture
_WIDE = 2  # width over height of pictures that are not put side by side
PICTURED = 16
"""Images kept aside that a panel of reconstructions or features shows at most."""


def save_png(picture: NDArray[np.uint8], path: Path) -> None:
    """Write a picture (H, W, 3) as PNG, whole or not at all."""
    from PIL import Image

    with written_whole(path) as aside:
        Image.fromarray(picture).save(aside, format="PNG")


def data_uri(picture: "Image", quality: int = 80) -> str:
    """Encode a picture as a JPEG in a data URI."""
    held = io.BytesIO()
    picture.convert("RGB").save(held, format="JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


def to_rgb(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Convert (B, H, W, C), 1 = white, to (B, H, W, 3) bytes. One channel is grey; of more than three, three show."""
    if images.shape[-1] < 3:
        images = np.repeat(images[..., :1], 3, axis=-1)
    return (np.clip(images[..., :3], 0, 1) * 255 + 0.5).astype(np.uint8)


def reconstruction_panel(
    original: NDArray[np.floating], predicted: NDArray[np.floating], hidden: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Draw a picture (rows, columns, 3) with one row an image: original, masked, reconstruction.

    `original` and `predicted` (B, H, W, C) in units of 1 = white, `hidden` (B, H, W). The reconstruction shows the
    prediction where pixels were hidden and the original elsewhere. Small images are enlarged.
    """
    mask = hidden[..., None]
    columns = (
        ("original", to_rgb(original)),
        ("masked", to_rgb(np.where(mask, _HIDDEN, original))),
        ("reconstruction", to_rgb(np.where(mask, predicted, original))),
    )
    return _in_columns(columns)


def feature_panel(original: NDArray[np.floating], colours: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Draw a picture (rows, columns, 3) of images, each with its features at its right, two of them in a row.

    `original` (B, H, W, C) and the `colours` of its feature-map cells (B, h, w, 3), 1 = white.
    """
    sides = [whole // cells for whole, cells in zip(original.shape[1:3], colours.shape[1:3], strict=True)]
    pictures = {"image": to_rgb(original), "features": to_rgb(colours).repeat(sides[0], 1).repeat(sides[1], 2)}
    half = -(-len(original) // 2)
    parts = [slice(half), slice(half, None)][: len(original)]  # a single image is one part
    return _in_columns([(name, picture[part]) for part in parts for name, picture in pictures.items()])


def _in_columns(columns: Sequence[tuple[str, NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """Draw pictures of one size, each column (B, H, W, 3) below its name; none is longer than the first.

    Wide ones lie below one another instead.
    """
    pictures = [enlarged(column) for _, column in columns]
    B, height, width, _ = pictures[0].shape
    if width > _WIDE * height:
        return _in_rows([name for name, _ in columns], pictures)
    canvas = np.full((B * (height + _GAP) + _CAPTION, len(columns) * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for column, picture in enumerate(pictures):
        left = column * (width + _GAP)
        canvas[:_CAPTION, left : left + width] = _caption(columns[column][0], width)
        for row in range(len(picture)):
            top = _CAPTION + row * (height + _GAP)
            canvas[top : top + height, left : left + width] = picture[row]
    return canvas[:-_GAP]


def _in_rows(names: Sequence[str], pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Draw pictures (B, H, W, 3) below one another, each below its name: all of the first image, then of the next."""
    width = pictures[0].shape[2]
    gap = np.full((_GAP, width, 3), 255, np.uint8)
    rows = []
    for number in range(len(pictures[0])):
        for name, picture in zip(names, pictures, strict=True):
            if number < len(picture):
                rows += [_caption(name, width), picture[number], gap]
    return np.concatenate(rows[:-1])


def class_colours(count: int) -> NDArray[np.uint8]:
    """Return colours (K, 3) that tell classes apart; the first is grey, since class 0 is often the background."""
    golden = (5**0.5 - 1) / 2  # hues that are never near those just before
    hues = [colorsys.hsv_to_rgb(k * golden % 1, 0.9, 1 - 0.35 * (k % 3 == 0)) for k in range(1, count)]
    return np.rint(255 * np.array([(0.5, 0.5, 0.5), *hues])).astype(np.uint8)


def lay_classes(image: NDArray[np.uint8], mask: NDArray[np.integer], count: int) -> NDArray[np.uint8]:
    """Half cover an image (H, W, 3) with the colours of its pixels' classes (H, W), black where there is none."""
    colours = np.zeros((max(count, int(mask.max(initial=0)) + 1), 3), np.uint8)
    colours[:count] = class_colours(count)
    return (image // 2) + colours[mask] // 2


def class_panel(
    image: NDArray[np.uint8], true: NDArray[np.integer], predicted: NDArray[np.integer], count: int
) -> NDArray[np.uint8]:
    """Draw a picture (rows, columns, 3): image (H, W, 3), true classes (H, W) and predicted ones, side by side."""
    pictures = {
        "image": image,
        "true": lay_classes(image, true, count),
        "predicted": lay_classes(image, predicted, count),
    }
    height, width, _ = image.shape
    gap = np.full((height + _CAPTION, _GAP, 3), 255, np.uint8)
    columns = [np.concatenate((_caption(name, width), picture)) for name, picture in pictures.items()]
    return np.concatenate((columns[0], gap, columns[1], gap, columns[2]), axis=1)


def enlarged(pictures: NDArray[np.uint8], high: int = _HIGH) -> NDArray[np.uint8]:
    """Enlarge pictures (B, H, W, 3) by a whole number, to at least `high` pixels of height."""
    zoom = max(1, math.ceil(high / pictures.shape[1]))
    return np.repeat(np.repeat(pictures, zoom, 1), zoom, 2)


def captioned(picture: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """Add a line of text below a picture (H, W, 3), in proportion to it; enlarge a small picture."""
    from PIL import Image, ImageDraw, ImageFont

    picture = enlarged(picture[None])[0]
    height, width, _ = picture.shape
    size = max(_CAPTION - 4, round(0.04 * max(height, width)))
    font = ImageFont.load_default(size)
    canvas = Image.new("RGB", (max(width, math.ceil(font.getlength(text)) + size), height + 2 * size), "white")
    canvas.paste(Image.fromarray(picture), ((canvas.width - width) // 2, 0))
    ImageDraw.Draw(canvas).text((canvas.width // 2, height + size), text, fill="black", font=font, anchor="mm")
    return np.asarray(canvas)


def _caption(text: str, width: int) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, _CAPTION), "white")
    ImageDraw.Draw(strip).text((width // 2, 2), text, fill="black", anchor="ma")
    return np.asarray(strip)
