"""Images with boxes and optional masks for detection: folders of images with COCO JSON.

Shapes: `N` images, `n` objects of an image, `H W` pixels, `K` classes. A box is (left, top, right, bottom) in pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.augment import Letterbox, ScaleJitter, crop_resize, load, visible
from simmim.data.decode import open_picture
from simmim.data.files import PathList
from simmim.data.labelled.classes import evaluation_folder, hold_out
from simmim.data.labelled.coco_json import CocoFile, read_coco
from simmim.data.picture import BadImage, Raw
from simmim.data.pipeline import Sample
from simmim.data.sources import read_raw, refuse_archive
from simmim.errors import UserError
from simmim.method.random_keys import sample_keys

Boxes = NDArray[np.float64]

# Objects of which a crop shows a smaller share are dropped: the rest says little about their class.
_LEAST_SHOWN = 0.1


@dataclass(frozen=True)
class Objects:
    """Objects of an image, without crowds."""

    boxes: Boxes
    """(n, 4)."""
    labels: NDArray[np.int64]
    """(n,), from 0 on."""
    segmentations: Sequence[Any]
    """(n,): polygons or run lengths as COCO writes them, or `None`."""


class AnnotatedImages:
    """`ImageSource` of files with known sizes (N, 2) and objects. A file of another size is a bad image."""

    def __init__(self, files: Sequence[str], sizes: NDArray[np.int64], objects: Sequence[Objects]):
        self._files = PathList(files)
        self.sizes, self.objects = sizes, objects

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files.name(index)

    def read(self, index: int) -> Raw:
        raw = self._files.read(index)
        picture = open_picture(raw)
        height, width = self.sizes[index]
        if (picture.height, picture.width) != (height, width):
            raise BadImage(
                f"is {picture.width}x{picture.height} pixels, and its annotations are of {width}x{height} (W x H)"
            )
        return raw


@dataclass(frozen=True)
class DetectionData:
    """Training and evaluation images, class names (K,) and ground truth of the evaluation images.

    `left_out` counts dropped boxes without area, which COCO's own files contain. `truth` is the input of COCO's
    evaluation: image, annotation and category numbers start at 1, with images and classes in the order of `val` and
    `classes`.
    """

    train: AnnotatedImages
    val: AnnotatedImages
    classes: tuple[str, ...]
    truth: dict[str, Any]
    left_out: int


def open_detection(data: str, *, val_fraction: float = 0.2, seed: int = 0, masks: bool = False) -> DetectionData:
    """Open `train/images` with `train/annotations.json` (COCO), and the same in `val` or `test`.

    Without an evaluation folder, `val_fraction` of the images is held out, drawn by `seed`. With `masks`, each object
    needs one. Raises `UserError` that names the file and the entry.
    """
    refuse_archive(data)
    root = Path(data).expanduser()
    if not (root / "train").is_dir():
        raise UserError(f"{data} has no folder train; give one with train/images and train/annotations.json")
    train = read_coco(root / "train", masks=masks)
    left_out = train.left_out
    if folder := evaluation_folder(root):
        val = read_coco(folder, masks=masks)
        left_out += val.left_out
        for number, name in val.categories.items():
            if train.categories.get(number) != name:
                raise UserError(
                    f"category {number} ({name}) of {val.path} is not one of {train.path}; list the same in both"
                )
    else:
        held = hold_out(np.zeros(len(train.images), np.int64), val_fraction, seed)
        train, val = train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held))
    for part, file in (("train", train), ("evaluate", val)):
        if not any(not crowd for found in file.annotations for crowd in (item["iscrowd"] for item in found)):
            raise UserError(f"none of the {len(file.images)} images of {file.path} to {part} on has a box; add some")
    numbers = {category: label for label, category in enumerate(train.categories)}
    return DetectionData(
        train=_annotated(train, numbers),
        val=_annotated(val, numbers),
        classes=tuple(train.categories.values()),
        truth=_truth(val, numbers),
        left_out=left_out,
    )


def _annotated(file: CocoFile, numbers: Mapping[int, int]) -> AnnotatedImages:
    objects = []
    for annotations in file.annotations:
        kept = [item for item in annotations if not item["iscrowd"]]
        boxes = np.array([item["bbox"] for item in kept], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([numbers[item["category_id"]] for item in kept], np.int64)
        objects.append(Objects(boxes, labels, [item.get("segmentation") for item in kept]))
    sizes = np.array([(image["height"], image["width"]) for image in file.images], np.int64).reshape(-1, 2)
    return AnnotatedImages([image["file"] for image in file.images], sizes, objects)


def _truth(file: CocoFile, numbers: Mapping[int, int]) -> dict[str, Any]:
    annotations = []
    for image, found in enumerate(file.annotations, 1):
        for item in found:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": numbers[item["category_id"]] + 1,
                    "bbox": item["bbox"],
                    "area": item.get("area", item["bbox"][2] * item["bbox"][3]),
                    "iscrowd": item["iscrowd"],
                    "segmentation": item.get("segmentation") or [],
                }
            )
    images = [
        {"id": number, "height": image["height"], "width": image["width"]}
        for number, image in enumerate(file.images, 1)
    ]
    categories = [{"id": label + 1, "name": file.categories.get(number, "")} for number, label in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


@dataclass(frozen=True, kw_only=True)
class DetectionReader:
    """Read a jittered training view of an image and its objects, deterministic by seed and epoch.

    Returns image (H, W, C) uint8; boxes (n, 4) float32 in its pixels; label (n,) from 1 on, since 0 is the background;
    mask (n, H, W) bool if `masks`. `recolour` changes what is seen of the image, by a key. Raises `BadImage`.
    """

    images: AnnotatedImages
    jitter: ScaleJitter
    channels: int
    fill: tuple[int, ...]
    seed: int
    masks: bool
    recolour: Callable[[NDArray[np.uint8], NDArray[np.uint64]], NDArray[np.uint8]] | None = None

    def __call__(self, epoch: int, index: int) -> Sample:
        objects, size = self.images.objects[index], self.jitter.size
        height, width = map(int, self.images.sizes[index])
        key = sample_keys(self.seed, epoch, index, stream="crop")
        box = self.jitter.box(key, height, width, objects.boxes)
        image = load(
            read_raw(self.images, index),
            lambda *_: box,
            size=size,
            channels=self.channels,
            dtype=np.uint8,
            fill=self.fill,
        )
        part, place = visible(box, height, width, size)
        if self.recolour:
            image = image.copy()
            seen = image[place.top : place.top + place.height, place.left : place.left + place.width]
            if seen.size:
                seen[:] = self.recolour(seen, sample_keys(self.seed, epoch, index, stream="augment"))
        scale = np.array([place.width / part.width, place.height / part.height] * 2)
        whole = (objects.boxes - [part.left, part.top] * 2) * scale + [place.left, place.top] * 2
        low, high = [place.left, place.top] * 2, [place.left + place.width, place.top + place.height] * 2
        boxes = whole.clip(low, high)
        kept = (_areas(boxes) >= _LEAST_SHOWN * _areas(whole)) & ((boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= 1)
        sample = {"image": image, "boxes": boxes[kept].astype(np.float32), "label": objects.labels[kept] + 1}
        if self.masks:
            shapes = [shape for shape, there in zip(objects.segmentations, kept, strict=True) if there]
            sample["mask"] = np.zeros((0, *size), np.bool_)
            if shapes:
                pixels = crop_resize(decode_masks(shapes, height, width) * np.uint8(255), box, size)
                sample["mask"] = np.moveaxis(pixels >= 128, 2, 0)
        return sample


def _areas(boxes: Boxes) -> NDArray[np.float64]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def boxes_in_image(boxes: NDArray[np.floating], height: int, width: int, size: tuple[int, int]) -> Boxes:
    """Convert boxes (n, 4) from an image's letterbox of `size` to its own pixels; they may exceed the image."""
    part, place = visible(Letterbox(size=size).box(height, width), height, width, size)
    scale = np.array([part.width / place.width, part.height / place.height] * 2)
    return boxes.astype(np.float64) * scale


def decode_masks(segmentations: Sequence[Any], height: int, width: int) -> NDArray[np.uint8]:
    """Decode COCO polygons or run lengths to (H, W, n) of 0 and 1. Raises `BadImage` for damaged ones."""
    rle = import_rle()
    try:
        return rle.decode([rle.segmToRle(shape, width, height) for shape in segmentations])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadImage(f"has a damaged mask: {' '.join(str(error).split())}") from error


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encode a mask (H, W) as COCO's compressed run lengths, ready for JSON."""
    found = import_rle().encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"].decode()}


def import_rle() -> Any:
    """Import faster-coco-eval's run-length module. Raises `UserError` if it is missing."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise UserError("detection needs faster-coco-eval; pip install 'simmim[tasks]'") from error
    return mask
