"""`simmim paste`: what is pasted has the boxes, masks and kinds that are written of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from simmim.cli import main
from simmim.commands.paste import paste, sort_into_kinds
from simmim.config.commands import PasteConfig
from simmim.data.labelled.detection import decode_masks, open_detection
from simmim.data.labelled.segmentation import IGNORE, open_segmentation
from simmim.data.pasting import Pasted, Piece, draw_outline, draw_pieces
from simmim.errors import UserError
from simmim.torch_engine.train.storage import save_hub

from . import tiny

COLOURS = np.array([(230, 40, 40), (40, 200, 40), (40, 40, 230), (240, 240, 240)], np.uint8)
OPTIONS = ["--count", "24", "--pieces", "80", "--kinds", "4", "--image-size", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one colour each, so that what is pasted tells where it is from."""
    folder = tmp_path_factory.mktemp("plain")
    for number in range(12):
        size = (60 + 7 * number, 90 - 3 * number)
        Image.new("RGB", size, tuple(COLOURS[number % 4].tolist())).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = tiny.config("resnet18")
    backbone = timm.create_model(config.model, **config.model_args, num_classes=0)
    save_hub(folder, backbone, backbone.state_dict(), config)
    return folder


@pytest.fixture(scope="module")
def pasted(images: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pasted") / "set"
    assert main(["paste", str(images), "--from", str(encoder), "--out", str(out), *OPTIONS]) == 0
    return out


def test_each_object_is_a_piece_of_one_image_and_its_kind_is_of_its_looks(pasted: Path) -> None:
    data = open_detection(str(pasted))
    colours: dict[int, set[int]] = {}
    seen = 0
    for index in range(len(data.train)):
        objects = data.train.objects[index]
        masks = np.moveaxis(decode_masks(objects.segmentations, 64, 64), -1, 0).astype(bool)
        pixels = np.asarray(Image.open(data.train.name(index)), np.int64)
        for box, label, mask in zip(objects.boxes, objects.labels.tolist(), masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            inner = np.pad(mask, 2)  # where a JPEG has no edge
            inside = mask & inner[:-4, 2:-2] & inner[4:, 2:-2] & inner[2:-2, :-4] & inner[2:-2, 4:]
            if inside.sum() < 9:
                continue
            nearest = np.abs(COLOURS.astype(np.int64) - np.median(pixels[inside], axis=0)).sum(axis=1)
            assert nearest.min() < 30
            colours.setdefault(label, set()).add(int(nearest.argmin()))
            seen += 1
    assert seen > 30
    assert len(colours) == 4 and all(len(each) == 1 for each in colours.values())


def test_masks_of_classes_show_the_piece_on_top(pasted: Path) -> None:
    data, boxes = open_segmentation(str(pasted), val_fraction=0.2, seed=0), open_detection(str(pasted))
    assert data.classes == ("background", *boxes.classes) and boxes.classes == tuple(f"kind {k}" for k in (1, 2, 3, 4))
    for index in range(len(boxes.train)):
        classes = np.asarray(data.train_mask(index))
        objects = boxes.train.objects[index]
        expected = np.zeros_like(classes)
        masks = np.moveaxis(decode_masks(objects.segmentations, 64, 64), -1, 0).astype(bool)
        for label, mask in zip(objects.labels, masks, strict=True):
            assert not expected[mask].any()  # each pixel is of one piece
            expected[mask] = label + 1
        assert np.array_equal(classes, expected)


def test_the_same_again_is_there_already_and_goes_on_after_a_kill(
    images: Path, encoder: Path, pasted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    shutil.copytree(pasted, out)
    command = ["paste", str(images), "--from", str(encoder), "--out", str(out)]
    assert main([*command, *OPTIONS]) == 0
    assert f"is pasted in {out}: 40 images with" in capsys.readouterr().out
    for lost in ("val/annotations.json", "train/annotations.json", "train/images/000003.jpg", "kinds.png"):
        (out / lost).unlink()
    assert main([*command, *OPTIONS]) == 0
    for path in pasted.rglob("*.*"):
        if path.is_file() and path.suffix != ".lock":
            assert (out / path.relative_to(pasted)).read_bytes() == path.read_bytes(), path
    capsys.readouterr()
    assert main([*command, *OPTIONS, "--seed", "1"]) == 2
    assert capsys.readouterr().err == f"simmim: {out} was begun with --seed 0, not 1; give another --out\n"


def test_what_was_killed_while_pieces_were_sorted_goes_on(images: Path, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    for left in (".lock", "bad_images.txt", ".paste.json.part"):
        (out / left).write_text("")
    assert main(["paste", str(images), "--from", str(encoder), "--out", str(out), *OPTIONS]) == 0


def test_images_that_cannot_be_read_are_listed_and_others_taken(
    images: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    command = ["paste", str(tmp_path / "images"), "--from", str(encoder), "--out", str(tmp_path / "set"), *OPTIONS]
    assert main(command) == 2
    assert "more than --max-bad-fraction 0.01" in capsys.readouterr().err
    assert main([*command, "--max-bad-fraction", "0.1"]) == 0  # the corrected command writes there
    name, reason = (tmp_path / "set" / "bad_images.txt").read_text().rstrip().split("\t")
    assert Path(name).name == "broken.png" and reason == "not an image in a format that is read here"
    found = json.loads((tmp_path / "set" / "train" / "annotations.json").read_text())
    assert len(found["images"]) == 24


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--kinds 0", "kinds 0 is less than 1; the default is 24"),
        ("--kinds 90", "4 pieces that differ are fewer than 90 kinds; use fewer --kinds or more images"),
        ("--image-size 16", "image size 16 is less than 32; the default is 192"),
        ("--seed -1", "seed -1 is less than 0; the default is 0"),
        (
            "--from nothing",
            "--from nothing has no encoder; give the --out directory of a run that has saved, timm:NAME",
        ),
        ("--out IMAGES/pasted", "lies within"),
        ("--out s3://bucket/set", "is a URL; give a path on a disk"),
        ("--out IMAGES/00.png/set", "IMAGES"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    images: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, line: str
) -> None:
    command = ["paste", str(images), "--from", str(encoder), "--out", str(tmp_path / "set"), *OPTIONS]
    assert main([*command, *options.replace("IMAGES", str(images)).split()]) == 2
    [said] = capsys.readouterr().err.strip().splitlines()
    assert line.replace("IMAGES", str(images)) in said
    assert not (tmp_path / "set").exists()
    assert main(command) == 0  # the corrected command


def test_the_last_kind_that_there_may_be_is_no_pixel_without_class(images: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kinds 255 is more than 254"):
        paste(PasteConfig(images=str(images), run=str(encoder), out=str(tmp_path / "set"), kinds=IGNORE))


def test_fewer_kinds_than_asked_for_are_numbered_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    centres = np.array([[9, 9, 9], [1, 0, 0], [8, 8, 8], [-1, 0, 0]], np.float32)
    monkeypatch.setattr("simmim.commands.paste.k_means", lambda *_args, **_settings: centres)
    assert set(sort_into_kinds(features, 4, 0).tolist()) == {0, 1}


def test_a_piece_that_others_hide_is_no_object() -> None:
    owner = np.zeros((20, 20), np.uint8)
    owner[:10] = 2
    owner[10, :9] = 1
    found = Pasted(np.zeros((20, 20, 3), np.uint8), owner, kinds=[5, 6, 7], sizes=[100, 200, 50]).objects()
    assert [kind for kind, _ in found] == [6]


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (480, 640)])
def test_pieces_lie_within_any_image(size: tuple[int, int]) -> None:
    for piece in draw_pieces(5, 500, seed=0):
        box = piece.box(*size)
        assert box.top >= 0 and box.left >= 0 and box.height >= 1 and box.width >= 1
        assert box.top + box.height <= size[0] and box.left + box.width <= size[1]


def test_a_piece_has_its_area_and_shape() -> None:
    box = Piece(0, area=0.25, shape=2.0, down=0.5, right=1.0).box(400, 400)
    assert (box.height, box.width) == (141, 283)
    assert (box.top, box.left) == (130, 117)


def test_an_outline_fills_its_box() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        outline = np.asarray(draw_outline(rng, 31, 57))
        rows, columns = np.nonzero(outline)
        assert outline.shape == (31, 57)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 30, 0, 56)
        assert 0.2 < (outline > 127).mean() < 1
