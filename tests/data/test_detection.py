"""Detection's data: COCO files in, joint views out, and a line for whatever is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference_rle

from simmim.data.augment import Letterbox, ScaleJitter, visible
from simmim.data.labelled.detection import DetectionReader, boxes_in_image, decode_masks, encode_mask, open_detection
from simmim.data.picture import BadImage
from simmim.data.sources import read_raw

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
GROUND, OBJECT = 0, 255
SIZE = (60, 80)  # (H, W)


def annotation(number: int, image: int, box: list[float], category: int = 7, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], **more}


def write(folder: Path, *, images: int = 4, annotations: list[dict[str, Any]] | None = None, **changes: Any) -> None:
    """Images with a white rectangle on black, 20 wide and 10 high, at (5, 20), (15, 20) …; the last has none."""
    (folder / "images").mkdir(parents=True)
    entries, found = [], []
    for number in range(images):
        pixels = np.full((*SIZE, 3), GROUND, np.uint8)
        if number < images - 1:
            left = 5 + 10 * (number % 5)
            pixels[20:30, left : left + 20] = OBJECT
            polygon = [left, 20, left + 20, 20, left + 20, 30, left, 30]
            found.append(annotation(number + 1, 10 * number, [left, 20, 20, 10], segmentation=[polygon]))
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        entries.append({"id": 10 * number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
    content = {"images": entries, "annotations": annotations or found, "categories": CATEGORIES}
    (folder / "annotations.json").write_text(json.dumps(content | changes))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "train")
    write(tmp_path / "test", images=2)
    return tmp_path


def test_images_boxes_and_classes_are_read_by_any_numbers(data: Path) -> None:
    found = open_detection(str(data))
    assert found.classes == ("cat", "dog")
    assert len(found.train) == 4
    assert len(found.val) == 2
    np.testing.assert_array_equal(found.train.objects[1].boxes, [[15, 20, 35, 30]])
    np.testing.assert_array_equal(found.train.objects[1].labels, [0])
    assert len(found.train.objects[3].boxes) == 0  # kept, for what is not there
    assert [item["image_id"] for item in found.truth["annotations"]] == [1]
    assert found.truth["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def test_crowds_are_not_trained_on_and_stay_in_the_truth(tmp_path: Path) -> None:
    crowd = [annotation(1, 0, [1, 1, 5, 5]), annotation(2, 0, [9, 9, 30, 30], iscrowd=1)]
    write(tmp_path / "train", annotations=crowd)
    write(tmp_path / "val", annotations=crowd)
    found = open_detection(str(tmp_path))
    assert len(found.train.objects[0].boxes) == 1
    assert [item["iscrowd"] for item in found.truth["annotations"]] == [0, 1]


def test_boxes_without_area_are_left_out_and_counted(tmp_path: Path) -> None:
    boxes = ([5.0, 5.0, 10.0, 10.0], [5.0, 5.0, 0.0, 9.0], [80.0, 5.0, 0.5, 9.0])
    for part in ("train", "val"):
        write(tmp_path / part, annotations=[annotation(n, 0, box) for n, box in enumerate(boxes)])
    found = open_detection(str(tmp_path))
    assert found.left_out == 4
    np.testing.assert_array_equal(found.train.objects[0].boxes, [[5, 5, 15, 15]])
    assert len(found.truth["annotations"]) == 1


def test_without_a_folder_to_evaluate_on_a_share_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "train", images=12)
    found = open_detection(str(tmp_path), val_fraction=0.25)
    names = [{part.name(index) for index in range(len(part))} for part in (found.train, found.val)]
    assert list(map(len, names)) == [9, 3]
    assert not names[0] & names[1]
    assert [image["id"] for image in found.truth["images"]] == [1, 2, 3]


def test_a_view_and_its_boxes_and_masks_fit_each_other(data: Path) -> None:
    reader = DetectionReader(
        images=open_detection(str(data), masks=True).train,
        jitter=ScaleJitter(size=(96, 64), scale=(0.5, 2.0)),
        channels=3,
        fill=(0, 0, 0),
        seed=0,
        masks=True,
    )
    for epoch in range(30):
        sample = reader(epoch, epoch % 3)
        white = sample["image"][..., 0] >= 128
        rows, columns = white.any(axis=1).nonzero()[0], white.any(axis=0).nonzero()[0]
        np.testing.assert_allclose(
            sample["boxes"], [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], rtol=0, atol=1.01
        )
        assert (sample["mask"][0] ^ white).mean() < 0.01
        np.testing.assert_array_equal(sample["label"], [1])


def test_a_view_of_an_image_without_boxes_has_none(data: Path) -> None:
    images = open_detection(str(data), masks=True).train
    jitter = ScaleJitter(size=(32, 32))
    sample = DetectionReader(images=images, jitter=jitter, channels=3, fill=(0, 0, 0), seed=0, masks=True)(0, 3)
    assert {name: array.shape for name, array in sample.items()} == {
        "image": (32, 32, 3),
        "boxes": (0, 4),
        "label": (0,),
        "mask": (0, 32, 32),
    }


def test_colours_change_in_the_image_and_not_around_it(data: Path) -> None:
    images = open_detection(str(data)).train
    settings: dict[str, Any] = {"channels": 3, "fill": (9, 9, 9), "seed": 0, "masks": False}
    jitter = ScaleJitter(size=(32, 32), scale=(0.5, 0.5))
    plain = DetectionReader(images=images, jitter=jitter, **settings)
    inverted = DetectionReader(images=images, jitter=jitter, recolour=lambda image, _key: 255 - image, **settings)
    for epoch in range(5):
        before, after = plain(epoch, 0), inverted(epoch, 0)
        ground = (before["image"] == 9).all(axis=2)
        assert ground.any()
        assert not ground.all()
        assert (after["image"][ground] == 9).all()
        assert (after["image"][~ground] == 255 - before["image"][~ground]).all()
        np.testing.assert_array_equal(after["boxes"], before["boxes"])


def test_objects_of_which_little_is_left_are_not_in_the_view(tmp_path: Path) -> None:
    write(tmp_path / "train", annotations=[annotation(1, 0, [0, 0, 70, 50]), annotation(2, 0, [20, 10, 8, 6])])
    write(tmp_path / "val")
    jitter = ScaleJitter(size=(60, 80), scale=(4.0, 4.0))
    images = open_detection(str(tmp_path)).train
    reader = DetectionReader(images=images, jitter=jitter, channels=3, fill=(0, 0, 0), seed=0, masks=False)
    counts = [len(reader(epoch, 0)["boxes"]) for epoch in range(40)]
    assert set(counts) == {0, 1}  # of the large one a view shows less than a tenth
    for epoch in range(40):
        boxes = reader(epoch, 0)["boxes"]
        assert (boxes >= 0).all()
        assert (boxes <= [80, 60, 80, 60]).all()


@pytest.mark.parametrize(("height", "width"), [(60, 80), (500, 333), (33, 20)])
def test_boxes_come_back_into_the_images_own_pixels(height: int, width: int) -> None:
    size = (128, 96)
    boxes = np.array([[1.0, 2.0, width / 2, height / 3], [0.0, 0.0, width, height]])
    _, place = visible(Letterbox(size=size).box(height, width), height, width, size)
    shown = boxes * np.tile([place.width / width, place.height / height], 2)
    np.testing.assert_allclose(boxes_in_image(shown, height, width, size), boxes)


def test_polygons_and_run_lengths_are_decoded_as_pycocotools_does() -> None:
    polygon = [[10.5, 5.0, 40.0, 8.5, 30.0, 44.0], [50.0, 50.0, 60.0, 50.0, 60.0, 58.0]]
    packed = reference_rle.merge(reference_rle.frPyObjects(polygon, *SIZE))
    mask = reference_rle.decode(packed)
    columns = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], columns, [1 - columns[-1]]])))
    plain = {"size": list(SIZE), "counts": np.diff(np.concatenate([[0], edges])).tolist()}
    text = {"size": list(SIZE), "counts": packed["counts"].decode()}
    found = decode_masks([polygon, plain, text], *SIZE)
    assert found.shape == (*SIZE, 3)
    for number in range(3):
        np.testing.assert_array_equal(found[..., number], mask)
    assert encode_mask(mask.astype(bool)) == text


def test_an_image_of_another_size_than_its_annotations_is_a_bad_image(data: Path) -> None:
    Image.fromarray(np.zeros((80, 60, 3), np.uint8)).save(data / "train/images/1.png")
    with pytest.raises(BadImage, match=r"is 60x80 pixels, and its annotations are of 80x60 \(W x H\)"):
        read_raw(open_detection(str(data)).train, 1)


def change(name: str, number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        content[name][number].update(values)

    return apply


def drop(name: str, number: int, key: str) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        del content[name][number][key]

    return apply


FILE = "train/annotations.json"
WRONG = {
    f"{FILE} has no list categories; COCO's JSON has images, annotations, categories": lambda c: c.pop("categories"),
    f"image 1.png is listed twice in {FILE}; keep one, with all its annotations": change(
        "images", 2, file_name="1.png"
    ),
    f"image id 10 is listed twice in {FILE}; keep one, with all its annotations": change("images", 2, id=10),
    f"image 9.png of {FILE} is not in train/images; put it there, or remove its entry": change(
        "images", 2, file_name="9.png"
    ),
    f"image 2 (counted from 0) of {FILE} has no height; it needs id, file_name, height, width": drop(
        "images", 2, "height"
    ),
    f"category 7 is listed twice in {FILE}; keep one": change("categories", 1, id=7),
    f"annotation 2 of {FILE} is of image 11, which is not listed; list it, or remove this": change(
        "annotations", 1, image_id=11
    ),
    f"annotation 2 of {FILE} is of category 1, which is not listed; list it, or remove this": change(
        "annotations", 1, category_id=1
    ),
    f"annotation 2 of {FILE} has no bbox; it needs image_id, category_id, bbox": drop("annotations", 1, "bbox"),
    f"annotation 2 of {FILE} has the box [1, 2, 3]; give [left, top, width, height] in pixels": change(
        "annotations", 1, bbox=[1, 2, 3]
    ),
    f"annotation 2 of {FILE} has the box [1, 2, 3, nan]; give [left, top, width, height] in pixels": change(
        "annotations", 1, bbox=[1, 2, 3, float("nan")]
    ),
    f"annotation 2 of {FILE} has the box [5, 5, -4, 9], whose sides are negative; boxes are "
    "[left, top, width, height]": change("annotations", 1, bbox=[5, 5, -4, 9]),
    f"annotation 2 of {FILE} has the box [60, 5, 30, 9], out of its image of 80x60 pixels (W x H); boxes are "
    "[left, top, width, height]": change("annotations", 1, bbox=[60, 5, 30, 9]),
    f"annotation 2 of {FILE} has no segmentation, which masks need; add it, or use --detector faster_rcnn": drop(
        "annotations", 1, "segmentation"
    ),
    f"annotation 2 of {FILE} has run lengths of size [80, 60]; its image is [60, 80] (H, W)": change(
        "annotations", 1, segmentation={"size": [80, 60], "counts": [4800]}
    ),
    f"annotation 2 of {FILE} has a segmentation that is neither run lengths nor polygons of three points or more": (
        change("annotations", 1, segmentation=[[1, 2, 3, 4]])
    ),
    f"image 1 (counted from 0) of {FILE} is 80x'60' (W x H); give pixels as whole numbers": change(
        "images", 1, height="60"
    ),
    f"annotation 2 of {FILE} has a polygon with the coordinate 1e+20, far out of its image of 80x60 pixels (W x H); "
    "coordinates are in pixels": (change("annotations", 1, segmentation=[[1, 2, 1e20, 4, 5, 6]])),
    f"none of the 4 images of {FILE} to train on has a box; add some": lambda c: c.update(annotations=[]),
    f"category 3 (dog) of test/annotations.json is not one of {FILE}; list the same in both": lambda c: c[
        "categories"
    ].pop(1),
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_in_a_file_gets_its_line(line: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    content = json.loads(Path(FILE).read_text())
    WRONG[line](content)
    Path(FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        open_detection(".", masks=True)
    assert str(raised.value) == line


def test_a_missing_or_broken_file_gets_its_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    Path(FILE).write_text("{")
    with pytest.raises(ValueError, match=r"train/annotations\.json is not JSON: Expecting property name"):
        open_detection(".")
    Path(FILE).unlink()
    with pytest.raises(ValueError, match=r"train/annotations\.json does not exist; write the boxes of train/images"):
        open_detection(".")
    with pytest.raises(ValueError, match="images has no folder train; give one with train/images and train/annot"):
        open_detection("images")


def test_a_box_that_rounding_carries_out_of_its_image_is_cut(tmp_path: Path) -> None:
    write(tmp_path / "train", annotations=[annotation(1, 0, [-0.4, 10, 80.9, 50.3])])
    write(tmp_path / "val")
    np.testing.assert_allclose(open_detection(str(tmp_path)).train.objects[0].boxes, [[0, 10, 80, 60]])
