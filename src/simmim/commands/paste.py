"""`simmim paste`: pieces of unlabelled images on one another, with their boxes and masks, to pretrain a detector on.

What is pasted has a place that is known, and a kind: the cluster of the features that a pretrained encoder has of it.
So the whole detector is pretrained and not its encoder alone, as with the random patches of UP-DETR (arXiv 2011.09094)
and the pasted crops of InsLoc (arXiv 2102.08318).

Shapes: `N` pieces, `D` features, `h w` pixels of a piece, `S` pixels of a side of an image.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simmim.commands.search import save_picture
from simmim.config.commands import PasteConfig
from simmim.config.validation import from_settings
from simmim.data.bad_images import BadImages
from simmim.data.labelled.detection import encode_mask, import_rle
from simmim.data.pages import say_pages
from simmim.data.pasting import Paster, Pieces, draw_pieces, plain
from simmim.data.picture import BadImage
from simmim.data.sounds import holds_sounds
from simmim.data.sources import ImageSource, open_source, sniff
from simmim.data.video.notes import warn_of_clips
from simmim.disk import writing
from simmim.errors import UserError
from simmim.hardware.host import cpu_cores
from simmim.method.k_means import k_means, nearest_centre
from simmim.metrics.classification import unit_length
from simmim.training.origins import check_encoder
from simmim.training.pictures import to_rgb
from simmim.training.run_lock import LOCK, locked
from simmim.training.tracking import progress
from simmim.training.whole_files import read_json, write_json, written_whole

SETTINGS, ANNOTATIONS, BAD_IMAGES = "paste.json", "annotations.json", "bad_images.txt"
_SETTLED = ("images", "run", "frames", "count", "image_size", "kinds", "pieces", "seed")
_SQUARE = 64  # pixels of a side of a piece that is embedded
_PICTURED = 8  # pieces of a kind
_QUALITY = 92  # of JPEGs


def sort_into_kinds(features: NDArray[np.float32], kinds: int, seed: int) -> NDArray[np.int64]:
    """Cluster features (N, D), standardised and of unit length, by k-means; return the kind of each (N,), from 0 on.

    There may be fewer kinds than asked for. Raises `UserError` if there are fewer distinct features.
    """
    features = unit_length((features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-6))
    if (distinct := len(np.unique(features, axis=0))) < kinds:
        raise UserError(f"{distinct} pieces that differ are fewer than {kinds} kinds; use fewer --kinds or more images")
    centres = k_means(features, clusters=kinds, seed=seed, stream="kinds of pieces")
    return np.unique(nearest_centre(features, centres), return_inverse=True)[1]


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
        _save(plain(pasted.pixels), folder / "images" / f"{name}.jpg", "JPEG", quality=_QUALITY)
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
