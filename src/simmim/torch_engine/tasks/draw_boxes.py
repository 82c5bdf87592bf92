"""Pictures of images with boxes, names and masks.

Shapes: `H W` pixels, `C` channels, `n` objects.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from simmim.data.augment import Letterbox, crop_resize
from simmim.training.pictures import class_colours, enlarged, to_rgb

_HIGH = 256  # the least height of a picture, at which names can be read
_TILE, _GAP, _CAPTION = 384, 6, 18


def draw_objects(
    image: NDArray[Any],
    boxes: NDArray[np.floating],
    labels: NDArray[np.integer],
    texts: Sequence[str],
    masks: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Draw boxes (n, 4), texts and masks (n, H, W) on an image (H, W, C) in 0..255, coloured by labels (n,)."""
    pixels = enlarged(to_rgb(image[None] / np.float32(255)), _HIGH)[0]
    if not len(boxes):
        return pixels
    zoom = len(pixels) // len(image)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)
    colours: Any = [tuple(colour) for colour in class_colours(int(labels.max()) + 2)[labels + 1].tolist()]
    if masks is not None:
        large = torch.from_numpy(masks.repeat(zoom, 1).repeat(zoom, 2))
        picture = draw_segmentation_masks(picture, large, alpha=0.5, colors=colours)
    picture = draw_bounding_boxes(
        picture,
        torch.from_numpy(boxes * zoom),
        list(texts),
        colors=colours,
        width=2,
        label_colors="white",
        label_background_colors=colours,
        fill_labels=True,
    )
    return picture.permute(1, 2, 0).numpy()


def side_by_side(
    pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], captions: tuple[str, str]
) -> NDArray[np.uint8]:
    """Lay out pairs of pictures in rows, two pairs a row, each picture in a tile of one size: (rows, columns, 3)."""
    letterbox = Letterbox(size=(_TILE, _TILE))
    step, rows = _TILE + _GAP, math.ceil(len(pairs) / 2)
    canvas = Image.new("RGB", (4 * step - _GAP, _CAPTION + rows * step - _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for column in range(4):
        draw.text((column * step + _TILE // 2, 2), captions[column % 2], fill="black", anchor="ma")
    for number, pictures in enumerate(pairs):
        for side, picture in enumerate(pictures):
            tile = crop_resize(picture, letterbox.box(picture.shape[0], picture.shape[1]), letterbox.size, 255)
            place = ((2 * (number % 2) + side) * step, _CAPTION + number // 2 * step)
            canvas.paste(Image.fromarray(tile), place)
    return np.asarray(canvas)
