"""Draw what masks hide and what targets are, for docs/method.md: python tools/draw_method.py.

All pictures are computed by the package's own code from its demo images, and always the same.

Shapes: `B` images, `H W` pixels, `C` channels.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from simmim.data.evaluation import eval_images
from simmim.data.sources import DemoImages
from simmim.method.k_means import k_means
from simmim.method.masks import (
    BlockMask,
    GridMask,
    InverseBlockMask,
    MaskStrategy,
    NoiseMask,
    RandomMask,
    SquareMask,
    UniformMask,
    upsample_mask,
)
from simmim.method.random_keys import sample_keys
from simmim.method.targets import (
    ClusterTarget,
    HogTarget,
    LocallyNormalizedTarget,
    NormalizedTarget,
    PixelTarget,
    block_means,
)

DOCS = Path(__file__).parents[1] / "docs"
SIDE = 192  # pixels of an image, as in the paper
STRIDE = 32  # of Swin's feature map, whose cells `normalized` looks at one by one
CELL = 16
"""Pixels of a cell; the paper has 32, with which an image has 6 × 6 cells and patterns are hard to see."""
NAMES = ("animals-nature/1f98b.webp", "food-drink/1f349.webp", "travel-places/1f3d4-fe0f.webp")
MASKS: Mapping[str, MaskStrategy] = {
    "random": RandomMask(cell=CELL),
    "block": BlockMask(cell=CELL),
    "inverse-block": InverseBlockMask(cell=CELL, ratio=0.8),
    "grid": GridMask(cell=CELL, ratio=0.5),
    "square": SquareMask(cell=CELL),
    "uniform": UniformMask(cell=CELL, ratio=0.75),
    "noise": NoiseMask(cell=CELL),
}
Pictures = NDArray[np.floating]


def read_images(names: tuple[str, ...]) -> Pictures:
    """Read demo images as (B, H, W, 3), 1 = white."""
    source = DemoImages()
    places = {source.name(index): index for index in range(len(source))}
    chosen = [places[name] for name in names]
    return eval_images(source, chosen, size=(SIDE, SIDE), channels=3, dtype=np.uint8).astype(np.float32) / 255


def masked_pictures(images: Pictures) -> dict[str, Pictures]:
    """Return the images with the cells of each mask in grey."""
    keys = sample_keys(0, 0, np.arange(len(images)), stream="mask")
    hidden = {name: upsample_mask(mask(keys, (SIDE, SIDE)), CELL)[..., None] for name, mask in MASKS.items()}
    return {"image": images} | {name: np.where(mask, np.float32(0.5), images) for name, mask in hidden.items()}


def target_pictures(images: Pictures) -> dict[str, Pictures]:
    """Return what each target is of the images, as pictures."""
    centres = k_means(block_means(np, images, 4).reshape(-1, 3), clusters=16)
    clusters = ClusterTarget(centres=tuple(tuple(float(value) for value in colour) for colour in centres))
    classes = clusters.encode(np, images, STRIDE)[..., 0]
    return {
        "pixels": PixelTarget().encode(np, images, STRIDE),
        "normalized": _spread(NormalizedTarget().encode(np, images, STRIDE)),
        "local_normalized": _spread(LocallyNormalizedTarget().encode(np, images, STRIDE)),
        "clusters": centres[classes].repeat(clusters.block, 1).repeat(clusters.block, 2),
        "hog": np.stack([_strokes(histogram) for histogram in HogTarget().encode(np, images, STRIDE)]),
    }


def _spread(values: Pictures) -> Pictures:
    """Show values of deviation 1: three deviations below 0 are black, three above are white."""
    return np.clip(values / 6 + 0.5, 0, 1)


def _strokes(histograms: Pictures) -> Pictures:
    """Draw histograms (h, w, 3·bins) as strokes along the edges that they stand for: (H, W, 3)."""
    cell, bins = HogTarget().cell, HogTarget().bins
    scale = 4  # drawn larger, then shrunk, for smooth strokes
    lengths = histograms.reshape(*histograms.shape[:2], 3, bins).mean(axis=2)
    canvas = Image.new("L", (SIDE * scale, SIDE * scale))
    draw = ImageDraw.Draw(canvas)
    for row, column in np.ndindex(lengths.shape[:2]):
        middle = np.array([column + 0.5, row + 0.5]) * cell * scale
        for number in np.argsort(lengths[row, column]):  # the strongest on top
            angle = np.pi * (number + 0.5) / bins  # of the gradient, from the vertical; an edge is across it
            along = np.array([np.cos(angle), -np.sin(angle)]) * cell * scale * 0.45
            ends = [*(middle - along), *(middle + along)]
            draw.line(ends, fill=round(255 * min(float(lengths[row, column, number]), 1)), width=scale)
    grey = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32) / 255
    return np.repeat(grey[..., None], 3, axis=-1)


def sheet(columns: Mapping[str, Pictures]) -> Image.Image:
    """Set columns of pictures (B, H, W, 3), 1 = white, side by side, each under its name."""
    gap, caption, size = 6, 18, 96
    count = len(next(iter(columns.values())))
    canvas = Image.new("RGB", (len(columns) * (size + gap) - gap, caption + count * (size + gap) - gap), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (name, pictures) in enumerate(columns.items()):
        left = place * (size + gap)
        draw.text((left, 2), name, fill="black", font_size=12)
        for row, picture in enumerate(pictures):
            image = Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))
            canvas.paste(image.resize((size, size), Image.Resampling.LANCZOS), (left, caption + row * (size + gap)))
    return canvas


def draw_all(folder: Path) -> None:
    """Write masks.png and targets.png into `folder`."""
    images = read_images(NAMES)
    sheet(masked_pictures(images)).save(folder / "masks.png", optimize=True)
    sheet(target_pictures(images)).save(folder / "targets.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write into (default: docs)")
    draw_all(parser.parse_args().out)
