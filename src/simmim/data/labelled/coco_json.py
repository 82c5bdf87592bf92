"""Read and validate COCO JSON; errors are one line that names the file and entry."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.picture import MAX_PIXELS
from simmim.errors import UserError

# Files round, and tools count pixels from 0 or 1. A box may exceed its image by this many pixels and is clipped.
_TOLERANCE = 1.0


@dataclass(frozen=True)
class CocoFile:
    """Images with their annotations, and category names by number.

    An image has `file` (its path), height and width. Annotations are COCO's, with `bbox` clipped to the image;
    `left_out` counts dropped annotations whose box has no area.
    """

    path: Path
    images: list[dict[str, Any]]
    annotations: list[list[dict[str, Any]]]
    categories: dict[int, str]
    left_out: int

    def select(self, indices: NDArray[np.integer]) -> "CocoFile":
        images = [self.images[index] for index in indices]
        return replace(self, images=images, annotations=[self.annotations[index] for index in indices])


def read_coco(folder: Path, *, masks: bool) -> CocoFile:
    """Read annotations.json of a folder. Image files are in its `images`, or at file_name relative to the folder.

    With `masks`, each annotation needs a segmentation. Raises `UserError`.
    """
    path = folder / "annotations.json"
    lists = _read_lists(path)
    categories: dict[int, str] = {}
    for number, category in enumerate(lists["categories"]):
        _need(category, ("id", "name"), f"category {number} (counted from 0) of {path}")
        if category["id"] in categories:
            raise UserError(f"category {category['id']} is listed twice in {path}; keep one")
        categories[category["id"]] = str(category["name"])
    images: dict[Any, dict[str, Any]] = {}
    names = set()
    for number, image in enumerate(lists["images"]):
        _need(image, ("id", "file_name", "height", "width"), f"image {number} (counted from 0) of {path}")
        sides = (image["width"], image["height"])
        if not all(isinstance(side, int) and 0 < side <= MAX_PIXELS for side in sides):
            raise UserError(
                f"image {number} (counted from 0) of {path} is {sides[0]!r}x{sides[1]!r} (W x H); give pixels as whole "
                "numbers"
            )
        name = str(image["file_name"])
        if image["id"] in images or name in names:
            what = f"image {name}" if name in names else f"image id {image['id']}"
            raise UserError(f"{what} is listed twice in {path}; keep one, with all its annotations")
        file = next((file for file in (folder / "images" / name, folder / name) if file.is_file()), None)
        if file is None:
            raise UserError(f"image {name} of {path} is not in {folder / 'images'}; put it there, or remove its entry")
        names.add(name)
        images[image["id"]] = {"file": str(file), "height": image["height"], "width": image["width"]}
    annotations: dict[Any, list[dict[str, Any]]] = {number: [] for number in images}
    left_out = 0
    for number, item in enumerate(lists["annotations"]):
        place = f"annotation {item.get('id', number) if isinstance(item, Mapping) else number} of {path}"
        _need(item, ("image_id", "category_id", "bbox"), place)
        if item["image_id"] not in images:
            raise UserError(f"{place} is of image {item['image_id']}, which is not listed; list it, or remove this")
        if item["category_id"] not in categories:
            raise UserError(
                f"{place} is of category {item['category_id']}, which is not listed; list it, or remove this"
            )
        image = images[item["image_id"]]
        box = _check_box(item["bbox"], image, place)
        if min(box[2:]) == 0:
            left_out += 1
            continue
        if masks:
            _check_segmentation(item.get("segmentation"), image, place)
        annotations[item["image_id"]].append({**item, "bbox": box, "iscrowd": int(bool(item.get("iscrowd", 0)))})
    return CocoFile(path, list(images.values()), list(annotations.values()), categories, left_out)


def _read_lists(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; write the boxes of {path.parent / 'images'} to it as COCO JSON")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}; write it again") from None
    names = ("images", "annotations", "categories")
    for name in names:
        if not isinstance(found, dict) or not isinstance(found.get(name), list):
            raise UserError(f"{path} has no list {name}; COCO's JSON has {', '.join(names)}")
    return found


def _need(entry: Any, keys: tuple[str, ...], place: str) -> None:
    for key in keys:
        if not isinstance(entry, Mapping) or key not in entry:
            raise UserError(f"{place} has no {key}; it needs {', '.join(keys)}")


def _check_box(box: Any, image: Mapping[str, Any], place: str) -> list[float]:
    """Validate a box (left, top, width, height) and clip it to the image."""
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(side) for side in box)):
        raise UserError(f"{place} has the box {box}; give [left, top, width, height] in pixels")
    left, top, width, height = box
    if min(width, height) < 0:
        raise UserError(f"{place} has the box {box}, whose sides are negative; boxes are [left, top, width, height]")
    right, bottom = min(left + width, image["width"]), min(top + height, image["height"])
    outside = max(-left, -top, left + width - right, top + height - bottom)
    left, top = max(left, 0), max(top, 0)
    if outside > _TOLERANCE or right < left or bottom < top:
        raise UserError(
            f"{place} has the box {box}, out of its image of {image['width']}x{image['height']} pixels (W x H); "
            "boxes are [left, top, width, height]"
        )
    return [left, top, right - left, bottom - top]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_segmentation(segmentation: Any, image: Mapping[str, Any], place: str) -> None:
    size = [image["height"], image["width"]]
    if not segmentation:
        raise UserError(f"{place} has no segmentation, which masks need; add it, or use --detector faster_rcnn")
    if isinstance(segmentation, Mapping):
        if segmentation.get("size") != size or not isinstance(segmentation.get("counts"), (list, str)):
            raise UserError(f"{place} has run lengths of size {segmentation.get('size')}; its image is {size} (H, W)")
    elif not (isinstance(segmentation, list) and all(_is_polygon(part) for part in segmentation)):
        raise UserError(f"{place} has a segmentation that is neither run lengths nor polygons of three points or more")
    else:  # to draw a polygon takes as long as it is
        far = next((x for part in segmentation for x in part if not -max(size) <= x <= 2 * max(size)), None)
        if far is not None:
            raise UserError(
                f"{place} has a polygon with the coordinate {far:g}, far out of its image of {size[1]}x{size[0]} "
                "pixels (W x H); coordinates are in pixels"
            )


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 and all(map(_is_number, part))
