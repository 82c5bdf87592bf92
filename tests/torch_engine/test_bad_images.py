"""Unreadable images of every set are left out, listed and counted, and too many of them are an error."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.cli import main
from simmim.training.pretrain_images import open_images

from . import tiny

TINY = [
    *("--model", "vit_tiny_patch16_224", "--model-args", "depth=1", "embed_dim=48", "--image-size", "64"),
    *("--batch-size", "4", "--workers", "1", "--device", "cpu", "--precision", "fp32", "--steps", "2"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images of two classes."""
    for number in range(20):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (70, 70, 3), np.uint8)).save(path)
    return tmp_path / "images"


def break_held_out(folder: Path, *, kept: int = 4, broken: int) -> list[str]:
    """Overwrite some of the images that a pretraining keeps aside; returns their names."""
    val = open_images(tiny.config(data=str(folder), val_images=kept)).val
    names = [val.name(index) for index in range(broken)]
    for name in names:
        Path(name).write_bytes(b"no image")
    return names


def pretrain(folder: Path, *options: str) -> int:
    out = ["--out", str(folder.parent / "run")]
    return main(
        ["pretrain", "--objective", "pixels", "--data", str(folder), *out, "--val-images", "4", *TINY, *options]
    )


def listed(run: Path) -> list[list[str]]:
    return sorted(line.split("\t") for line in (run / "bad_images.txt").read_text().splitlines())


def test_unreadable_images_kept_aside_are_left_out_and_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = break_held_out(folder, broken=2)
    assert pretrain(folder, "--max-bad-fraction", "0.1") == 0
    assert [line[0] for line in listed(folder.parent / "run")] == names
    assert f"2 images could not be read; {folder.parent}/run/bad_images.txt lists them" in capsys.readouterr().err
    assert '"val_loss"' in (folder.parent / "run" / "metrics.jsonl").read_text()


def test_too_many_unreadable_images_kept_aside_stop_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_held_out(folder, broken=2)
    assert pretrain(folder, "--max-bad-fraction", "0.05") == 2
    assert "2 of 20 images (10.0%) cannot be read, such as" in capsys.readouterr().err


def test_without_a_readable_image_kept_aside_a_run_goes_on_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = break_held_out(folder, broken=4)
    assert pretrain(folder, "--max-bad-fraction", "0.3") == 0
    assert "none of the 4 images kept aside can be read: no pictures, no val_loss" in capsys.readouterr().err
    assert [line[0] for line in listed(folder.parent / "run")] == names
    assert "val_loss" not in (folder.parent / "run" / "metrics.jsonl").read_text()


def classify(folder: Path, *options: str) -> int:
    split = folder.parent / "split"
    for part, numbers in (("train", range(14)), ("val", range(14, 20))):
        for number in numbers:
            path = split / part / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((folder / "ab"[number % 2] / path.name).read_bytes())
    (split / "val" / "a" / "14.png").write_bytes(b"no image")
    command = ["finetune", "classify", "--from", "scratch", "--data", str(split), "--out", str(folder.parent / "run")]
    return main([*command, *TINY, *options])


def test_unreadable_evaluation_images_are_listed_as_such(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(folder, "--max-bad-fraction", "0.2") == 0
    name = str(folder.parent / "split/val/a/14.png")
    assert listed(folder.parent / "run") == [[name, "not an image in a format that is read here", "val"]]
    assert "1 image could not be read" in capsys.readouterr().err


def test_too_many_unreadable_evaluation_images_stop_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(folder) == 1
    assert "1 of 6 images of val (16.7%) cannot be read, such as" in capsys.readouterr().err
