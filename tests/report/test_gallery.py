"""Neighbours, map and lists of a report, on images that are known to be alike, blank or blurred."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2.utils import htmlsafe_json_dumps
from PIL import Image, ImageFilter

import simmim
from simmim.errors import UserError
from simmim.report.copies import duplicates, is_blank, small_copies
from simmim.report.gallery import laplacian, make_gallery, nearest, principal
from simmim.report.page import ReportConfig, report

from .test_report import TINY

ODD = "a<b>&\"c'.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("gallery") / "run"
    return str(simmim.pretrain(**TINY | {"val_images": 0}, out=str(out), steps=1).path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in two folders, and a copy, a blank, a blurred and a broken one."""
    found = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(12):
        part = found / ("one" if number % 2 else "two")
        part.mkdir(exist_ok=True)
        noise = rng.integers(0, 256, (12, 12, 3), np.uint8)
        picture = Image.fromarray(noise).resize((96, 96), Image.Resampling.NEAREST)
        picture.save(part / f"{number:02}.png")
    Image.open(found / "one" / "01.png").save(found / "one" / "copy.jpg", quality=85)
    Image.new("RGB", (96, 96), (90, 90, 90)).save(found / "one" / "blank.png")
    Image.open(found / "two" / "02.png").filter(ImageFilter.GaussianBlur(3)).save(found / "two" / "blurred.png")
    Image.open(found / "two" / "04.png").rotate(90).save(found / "two" / ODD)
    (found / "two" / "broken.png").write_bytes(b"broken")
    return found


def test_images_worth_a_second_look_are_listed(run: str, folder: Path) -> None:
    gallery = make_gallery(run, str(folder), most=100)
    lists = {what: [[Path(name).name for name in line.split("\t")] for line in lines]
             for what, lines in gallery.lists.items()}  # fmt: skip
    assert lists["Likely duplicates"] == [["01.png", "copy.jpg"]]
    assert lists["Blank"] == [["blank.png"]]
    assert ["blurred.png"] in lists["Blurred"] and ["blank.png"] not in lists["Blurred"]
    assert (gallery.count, gallery.total, gallery.unreadable) == (16, 17, 1)


def test_the_copy_of_an_image_is_its_nearest_neighbour(run: str, folder: Path) -> None:
    gallery = make_gallery(run, str(folder), most=100)
    for strip in gallery.strips:
        names = [Path(name).name for name in strip.names]
        assert len(names) == 7 == len(set(names)) and strip.similarities == sorted(strip.similarities, reverse=True)
        if names[0] in ("01.png", "copy.jpg"):
            assert names[1] in ("01.png", "copy.jpg")
    assert sorted(gallery.map.groups) == ["one", "two"]
    assert len(gallery.map.points) == len(gallery.map.names) == 16


def test_a_sample_is_taken_of_many_images(run: str, folder: Path) -> None:
    gallery = make_gallery(run, str(folder), most=5)
    assert 4 <= gallery.count <= 5 and gallery.total == 17


def test_odd_names_are_shown_as_text(run: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    page = report(ReportConfig(runs=(run,), data=str(folder), out=str(out))).read_text(encoding="utf-8")
    assert "a<b>" not in page and "a&lt;b&gt;" in page and "a\\u003cb\\u003e" in page


def test_a_name_that_is_not_utf8_is_escaped(run: str, folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate((b"a\xff.png", b"b.png")):
        (images / os.fsdecode(name)).write_bytes((folder / "one" / f"{2 * number + 1:02}.png").read_bytes())
    page = report(ReportConfig(runs=(run,), data=str(images), out=str(tmp_path / "r.html")))
    assert "a\\udcff.png" in page.read_text(encoding="utf-8")


def test_features_that_are_not_finite_are_left_out(run: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: str, source: Any, **_: Any) -> Any:
        return np.arange(len(source)), np.full((len(source), 4), np.nan, np.float32)

    monkeypatch.setattr("simmim.torch_engine.tasks.embed.embed_some", broken)
    with pytest.raises(UserError, match="are not finite, so that nothing can be compared"):
        make_gallery(run, str(folder), most=5)


def test_a_single_image_has_nothing_to_be_compared_with(run: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "one" / "01.png", tmp_path)
    with pytest.raises(UserError, match=r"a comparison needs two images, and 1 of .* can be read; give more"):
        make_gallery(run, str(tmp_path), most=5)


def test_mistakes_are_told(run: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"images 1 .* 2"):
        report(ReportConfig(runs=(run,), data=str(folder), images=1))
    with pytest.raises(UserError, match="nowhere"):
        report(ReportConfig(runs=(run,), data="nowhere"))


def test_nearest_is_that_of_a_full_sort() -> None:
    features = np.random.default_rng(0).normal(size=(1500, 5)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected: Any = unit @ unit.T - 2 * np.eye(1500)
    found = nearest(unit, 3)
    rows = np.arange(1500)[:, None]
    np.testing.assert_allclose(expected[rows, found], -np.sort(-expected, axis=1)[:, :3], atol=1e-6)
    assert not (found == rows).any()


def test_places_are_the_principal_components() -> None:
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(50, 6)) * [9, 3, 1, 1, 1, 1]).astype(np.float32)
    variances = np.linalg.eigvalsh(np.cov(data.T, bias=True))[::-1][:2]
    np.testing.assert_allclose(principal(data).var(axis=0), variances, rtol=1e-4)
    assert principal(data[:, :1]).shape == (50, 2)


def test_colour_tells_duplicates_apart_and_sharpness_is_a_laplacian() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 64, 1), np.uint8) // 2
    red, green = picture * np.uint8([2, 0, 0]), picture * np.uint8([0, 2, 0])
    pictures = np.stack([red, green, red])
    assert [pair[:2] for pair in duplicates(small_copies(pictures), is_blank(pictures))] == [(0, 2)]
    grey = np.full((2, 64, 64, 3), 90, np.uint8)
    assert duplicates(small_copies(grey), is_blank(grey)) == []
    ramp = np.arange(25, dtype=np.float32).reshape(1, 5, 5)
    assert not laplacian(ramp).any()
    np.testing.assert_allclose(laplacian(ramp**2)[0, 1, 1], 2 + 2 * 25)


def test_duplicates_are_those_of_all_correlations() -> None:
    """On 3,000 smooth pictures, some near copies of others, in several blocks."""
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(40, 768)) * 0.85 ** np.arange(40)[:, None] * 20
    small = rng.normal(size=(3000, 40)) @ axes
    small[2000:] = small[:1000] + rng.normal(size=(1000, 768)) * rng.uniform(0, 30, (1000, 1))
    small = np.clip(small + 128, 0, 255).astype(np.uint8)
    correlation = np.corrcoef(small)
    expected = {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(correlation, 1) > 0.98), strict=True)}
    found = duplicates(small, np.zeros(3000, np.bool_))
    assert 100 < len(expected) < 1000 and {pair[:2] for pair in found} == expected
    assert [pair[2] for pair in found] == pytest.approx([correlation[i, j] for i, j, _ in found], abs=1e-5)


def test_thumbnails_shrink_to_fit_and_names_that_cannot_are_refused_first(
    run: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = make_gallery(run, str(folder), most=100)
    sizes = [len(htmlsafe_json_dumps(str(path))) for path in folder.rglob("*.*")]  # as the page holds names
    text = sum(sizes) + 60 * len(sizes) + 5 * 30 * max(sizes)
    small = make_gallery(run, str(folder), most=100, most_bytes=text + 12 * 30_000 + 3000)
    assert large.map.side == 32 > small.map.side and len(small.map.uri) < min(3000, len(large.map.uri))
    monkeypatch.setattr("simmim.torch_engine.tasks.embed.embed_some", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="a report of 17 images would take over 100,000 bytes for each run; lower"):
        make_gallery(run, str(folder), most=100, most_bytes=100_000)
