"""Files of several pages: the first is read, and the user is told."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from simmim.cli import main
from simmim.data.pages import say_pages
from simmim.data.sources import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of one page, of each suffix that may have several."""
    for suffix in ("tif", "gif", "webp", "png"):
        Image.fromarray(PIXELS[0]).save(tmp_path / f"one.{suffix}")
    return tmp_path


def said(folder: Path) -> str | None:
    return say_pages(open_source(str(folder)))


def test_nothing_is_said_of_images_of_one_page(folder: Path):
    assert said(folder) is None


@pytest.mark.parametrize("suffix", ["tif", "gif", "webp"])
def test_the_number_of_pages_is_told(folder: Path, suffix: str):
    first, *more = map(Image.fromarray, PIXELS)
    first.save(folder / f"stack.{suffix}", save_all=True, append_images=more)
    assert f"{folder}/stack.{suffix} has 3 (1 of 4 such files looked at)" in (said(folder) or "")


def test_pages_of_many_bands_are_counted(folder: Path):
    with tifffile.TiffWriter(folder / "bands.tif") as file:
        for _ in range(3):
            file.write(np.zeros((16, 16, 7), np.uint16), photometric="minisblack", planarconfig="contig")
    assert "bands.tif has 3 " in (said(folder) or "")


def test_the_smaller_copies_of_a_pyramid_are_no_pages(folder: Path):
    with tifffile.TiffWriter(folder / "pyramid.tif") as file:
        file.write(PIXELS[0], photometric="rgb")
        file.write(PIXELS[0, ::2, ::2], photometric="rgb", subfiletype=1)
    assert said(folder) is None


def test_a_stack_among_many_files_is_found_in_the_middle(folder: Path):
    for number in range(40):
        (folder / f"{number}.tif").write_bytes((folder / "one.tif").read_bytes())
    first, *more = map(Image.fromarray, PIXELS)
    first.save(folder / "zzz.tif", save_all=True, append_images=more)  # the last is always looked at
    (folder / "broken.tif").write_bytes(b"II*")
    assert "zzz.tif has 3 (1 of 16" in (said(folder) or "")


def test_packing_says_so(folder: Path, capsys: pytest.CaptureFixture[str]):
    first, *more = map(Image.fromarray, PIXELS)
    first.save(folder / "stack.tif", save_all=True, append_images=more)
    assert main(["pack", str(folder), "--out", str(folder / "shards")]) == 0
    assert "stack.tif has 3" in capsys.readouterr().out
