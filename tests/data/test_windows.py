"""Windows of large images: their pixels, their places, and what is read for them."""

import errno
import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from simmim.data import files, tiff_parts
from simmim.data.augment import RandomResizedCrop, load
from simmim.data.bad_images import BadImages
from simmim.data.decode import open_picture
from simmim.data.files import open_folder
from simmim.data.pages import say_pages
from simmim.data.picture import BadImage
from simmim.data.pipeline import Reading, train_batches
from simmim.data.readers.processes import stream_from_processes
from simmim.data.sources import ArrayImages, Subset, sniff
from simmim.data.statistics import measure_mean_std
from simmim.data.windows import MOST, RandomWindow, StillWindows, Windows, middle_window

RNG = np.random.default_rng(0)
SCENE = RNG.integers(0, 60_000, (300, 270, 5)).astype(np.uint16)
NODATA = 42113
LAYOUTS: dict[str, dict[str, Any]] = {
    "one strip": {},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "tiles": {"tile": (64, 48), "compression": "lzw", "predictor": True},
    "big-endian BigTIFF": {"tile": (32, 32), "compression": "zlib", "byteorder": ">", "bigtiff": True},
    "bands one after the other": {"planarconfig": "separate", "tile": (64, 64), "compression": "zlib"},
    "bands one after the other in strips": {"planarconfig": "separate", "rowsperstrip": 33},
    "JPEG": {"tile": (64, 64), "compression": "jpeg", "photometric": "ycbcr", "bands": 3, "dtype": "uint8"},
    "float": {"tile": (64, 64), "compression": "zlib", "dtype": "float32"},
    "grey": {"tile": (64, 64), "compression": "zlib", "bands": 1},
    "big-endian rows": {"rowsperstrip": 50, "byteorder": ">"},
    "turned by 6": {"tile": (64, 64), "compression": "zlib", "extratags": [(274, "H", 1, 6, True)]},
    "turned by 3": {"tile": (64, 64), "compression": "zlib", "extratags": [(274, "H", 1, 3, True)]},
}


def write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    pixels = pixels[..., : options.pop("bands", 5)].astype(options.pop("dtype", pixels.dtype))
    if pixels.dtype == np.uint8:
        pixels //= 2  # the low bytes are noise, which JPEG spoils: that does not matter here
    separate = options.setdefault("planarconfig", "contig") == "separate"
    options.setdefault("photometric", "minisblack")
    tifffile.imwrite(path, np.moveaxis(pixels, -1, 0) if separate else pixels.squeeze(), **options)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_window_is_the_slice_of_the_whole_file(layout: str, on_disk: bool, tmp_path: Path):
    path = write(tmp_path / "scene.tif", SCENE, **LAYOUTS[layout])
    whole = tifffile.imread(path)
    whole = np.moveaxis(whole, 0, -1) if "planarconfig" in LAYOUTS[layout] else whole
    whole = np.rot90(whole, {"turned by 6": -1, "turned by 3": 2}.get(layout, 0))
    picture = open_picture(path if on_disk else path.read_bytes())
    assert picture.part is not None and (picture.height, picture.width) == whole.shape[:2]
    for top, left, height, width in [(0, 0, *whole.shape[:2]), (3, 60, 64, 70), (201, 202, 64, 64)]:
        part = picture.cut((top, left, height, width)).read(1)
        assert part.dtype == whole.dtype
        np.testing.assert_array_equal(part.squeeze(), whole[top : top + height, left : left + width])


def test_a_window_of_a_cog_that_gdal_wrote_is_the_slice_of_it(tmp_path: Path):
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "cog.tif"
    facts = {"driver": "COG", "height": 1200, "width": 1100, "count": 4, "dtype": "uint16", "nodata": 0}
    pixels = RNG.integers(1, 60_000, (4, 1200, 1100)).astype(np.uint16)
    with rasterio.open(path, "w", **facts, compress="deflate", predictor=2, blocksize=256) as file:
        file.write(pixels)
    picture = open_picture(path)
    part = picture.cut((500, 700, 224, 224)).read(1)
    np.testing.assert_array_equal(part, np.moveaxis(pixels, 0, -1)[500:724, 700:924])
    with rasterio.open(path) as file:
        smaller = file.read(out_shape=(4, 600, 550))
    np.testing.assert_array_equal(picture.read(2), np.moveaxis(smaller, 0, -1))


@pytest.mark.parametrize(
    ("options", "most"),
    [({"tile": (64, 64), "compression": "zlib"}, 4), ({"rowsperstrip": 10, "compression": "zlib"}, 7), ({}, 1)],
)
def test_only_the_tiles_and_rows_of_a_window_are_read(
    options: dict[str, Any], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    picture = open_picture(write(tmp_path / "scene.tif", SCENE, **options))
    read: list[int] = []
    real = tiff_parts.read_part
    monkeypatch.setattr(tiff_parts, "read_part", lambda path, place, size: read.append(size) or real(path, place, size))
    picture.cut((100, 100, 60, 60))
    assert len(read) <= most
    assert sum(read) <= (60 * 270 * 5 * 2 if not options else SCENE.nbytes / 2)


def test_a_large_tiff_of_a_folder_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "scene.tif", SCENE, compression="zlib", tile=(64, 64))
    assert isinstance(open_folder(tmp_path).read(0), bytes)
    monkeypatch.setattr(files, "_LARGE", 1000)
    assert open_folder(tmp_path).read(0) == tmp_path / "scene.tif"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_window_of_another_format_has_its_pixels_at_full_size(kind: str):
    file = io.BytesIO()
    Image.fromarray((SCENE[..., :3] // 256).astype(np.uint8)).save(file, kind)
    window = RandomWindow(size=(64, 64))
    box, picture = window.draw(open_picture(file.getvalue()), 1)
    whole = np.asarray(Image.open(file).convert("RGB"))
    found = picture.decode(channels=3, dtype=np.uint8)
    np.testing.assert_array_equal(found, whole[box.top : box.top + 64, box.left : box.left + 64])


def test_places_are_uniform_over_the_image():
    picture = open_picture(np.zeros((70, 66, 3), np.uint8))
    window = RandomWindow(size=(64, 64))
    found = Counter((box.top, box.left) for box, _ in (window.draw(picture, key * 7919) for key in range(6300)))
    assert len(found) == 7 * 3
    assert max(abs(count - 300) for count in found.values()) < 5 * 300**0.5


@pytest.mark.parametrize(
    ("shape", "part"), [((40, 100), (40, 40)), ((200, 300), (64, 64)), ((64, 64), (64, 64)), ((100, 32), (32, 32))]
)
def test_a_small_image_is_enlarged_until_the_window_fits(shape: tuple[int, int], part: tuple[int, int]):
    pixels = np.zeros((*shape, 3), np.uint8)
    for picture in (RandomWindow(size=(64, 64)).cut(pixels, 5), middle_window(pixels, (64, 64))):
        assert (picture.height, picture.width) == part


def test_an_image_has_as_many_windows_as_its_area_holds(tmp_path: Path):
    for name, side in (("a.png", 40), ("b.png", 130), ("c.png", 64)):
        Image.new("L", (side, side)).save(tmp_path / name)
    (tmp_path / "d.png").write_bytes(b"broken")
    windows = Windows(open_folder(tmp_path), (64, 64))
    names = [Path(windows.name(index)).name for index in range(len(windows))]
    assert names == ["a.png#0", "b.png#0", "b.png#1", "b.png#2", "b.png#3", "c.png#0", "d.png#0"]
    assert len(Windows(ArrayImages(np.zeros((1, 300, 300)), "x"), (2, 2))) == MOST


def batches(source: Windows, **changes: Any) -> list[np.ndarray]:
    options: dict[str, Any] = {"batch_size": 8, "seed": 3, "start_step": 0, "total_steps": 8, "threads": 3} | changes
    stream = options.pop("stream", None)
    reading = Reading(**options, bad_images=BadImages(None, total=len(source)))
    how: dict[str, Any] = {"crop": RandomWindow(size=(64, 64)), "channels": 3, "dtype": np.uint8}
    return [batch["image"] for batch in train_batches(source, reading, **how, stream=stream)]


PHOTOS = Windows(ArrayImages(RNG.integers(0, 256, (5, 128, 192, 3), dtype=np.uint8), "photos"), (64, 64))


def test_windows_are_the_same_after_a_resume_and_on_any_number_of_processes():
    whole = batches(PHOTOS)
    np.testing.assert_array_equal(batches(PHOTOS, start_step=5, threads=1), whole[5:])
    ranks = [batches(PHOTOS, rank=rank, world=2) for rank in range(2)]
    np.testing.assert_array_equal([np.stack(pair, 1).reshape(8, 64, 64, 3) for pair in zip(*ranks, strict=True)], whole)


@pytest.mark.slow
def test_windows_are_the_same_by_worker_processes():
    np.testing.assert_array_equal(batches(PHOTOS, stream=stream_from_processes, threads=2), batches(PHOTOS))


def test_a_window_is_drawn_anew_in_each_epoch():
    one = Windows(ArrayImages(RNG.integers(0, 256, (2, 90, 90, 3), dtype=np.uint8), "photos"), (64, 64))
    first, second = (batch.reshape(2, -1) for batch in batches(one, batch_size=2, total_steps=2))
    assert not (first[:, None] == second[None]).all(-1).any()


def test_windows_kept_aside_stay_where_they_are_and_share_no_pixels_with_others():
    pixels = np.arange(400 * 400, dtype=np.int32).reshape(1, 400, 400)  # every pixel is told by its value
    windows = Windows(ArrayImages(pixels, "scene"), (64, 64))
    still = StillWindows(windows, seed=0)
    kept = np.array([3, 11, 20])
    windows.keep_apart(still, kept)
    aside = {int(index): still.read(int(index)).read(1) for index in kept}
    for key in range(400):
        window = RandomWindow(size=(64, 64)).cut(windows.read(0), key * 7919).read(1)
        assert not any(np.isin(window[[0, 0, -1, -1], [0, -1, 0, -1]], each).any() for each in aside.values())
    np.testing.assert_array_equal(StillWindows(windows, seed=0).read(11).read(1), aside[11])


def geotiff(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    tag = (NODATA, "s", 0, "-1", True)
    tifffile.imwrite(file, pixels.astype(np.int16), photometric="minisblack", tile=(64, 64), extratags=[tag])
    return file.getvalue()


def test_a_window_of_nothing_but_nodata_is_drawn_again_and_others_are_filled_by_their_own_mean():
    scene = np.full((400, 400), -1)
    scene[:, :200] = RNG.integers(0, 1000, (400, 200))
    raw = geotiff(scene)
    for key in range(50):
        box, picture = RandomWindow(size=(64, 64)).draw(open_picture(raw), key * 7919)
        there = scene[box.top : box.top + 64, box.left : box.left + 64]
        expected = np.where(there == -1, np.rint(there[there >= 0].mean()), there)
        np.testing.assert_array_equal(picture.read(1)[..., 0], expected)
        assert picture.missing is not None
        np.testing.assert_array_equal(picture.missing()[..., 0], there == -1)
    with pytest.raises(BadImage, match="20 windows drawn in it have a band of nothing but nodata"):
        RandomWindow(size=(64, 64)).cut(geotiff(np.full((400, 400), -1)), 1)


def test_mean_and_deviation_are_those_of_windows_at_full_resolution():
    pixels = (RNG.integers(0, 2, (4, 400, 400, 1)) * 255).astype(np.uint8)  # resizing would make it grey
    windows = StillWindows(Windows(ArrayImages(pixels, "noise"), (64, 64)), seed=0)
    mean, std = measure_mean_std(windows, channels=1, dtype=np.uint8, seed=0, windows=(64, 64))
    assert mean[0] == pytest.approx(0.5, abs=0.01) and std[0] == pytest.approx(0.5, abs=0.01)


def pyramid(path: Path, *, sub_ifds: bool) -> list[np.ndarray]:
    """Write three levels that differ in colour, and not only in size."""
    levels = [np.full((1024 >> step, 1536 >> step, 3), 50 * (step + 1), np.uint8) for step in range(3)]
    how: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
    with tifffile.TiffWriter(path) as file:
        file.write(levels[0], subifds=2 if sub_ifds else None, **how)
        for level in levels[1:]:
            file.write(level, subfiletype=1, **how)
    return levels


@pytest.mark.parametrize("sub_ifds", [True, False])
@pytest.mark.parametrize(("size", "level"), [(800, 0), (500, 1), (250, 2), (20, 2)])
def test_a_resized_crop_is_read_from_the_smallest_level_that_is_not_smaller(
    sub_ifds: bool, size: int, level: int, tmp_path: Path
):
    levels = pyramid(tmp_path / "slide.tif", sub_ifds=sub_ifds)
    crop = RandomResizedCrop(size=(size, size), scale=(1, 1), ratio=(1.5, 1.5))
    how: dict[str, Any] = {"size": (size, size), "channels": 3, "dtype": np.uint8}
    found = load(tmp_path / "slide.tif", lambda height, width: crop.box(1, height, width), **how)
    assert (found == levels[level][0, 0]).all()
    assert (middle_window(tmp_path / "slide.tif", (64, 64)).read(1) == levels[0][0, 0]).all()


def test_a_scene_beyond_the_limit_of_pixels_has_windows_and_no_whole(tmp_path: Path):
    path, zero = tmp_path / "scene.tif", np.zeros((4096, 4096), np.uint8)
    tiles = (zero if number in (0, 8) else None for number in range(16))
    tifffile.imwrite(path, tiles, shape=(16384, 16384), dtype=np.uint8, tile=(4096, 4096), compression="zlib")
    picture = open_picture(path)
    assert picture.cut((8200, 100, 224, 224)).read(1).shape == (224, 224, 1)
    with pytest.raises(BadImage, match="claims 16384 x 16384 pixels"):
        picture.check()


def test_a_damaged_tile_spoils_the_windows_that_touch_it_alone(tmp_path: Path):
    path = write(tmp_path / "scene.tif", SCENE, tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as file:
        place, count = (getattr(file.pages.first, name)[-1] for name in ("dataoffsets", "databytecounts"))
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(count))
    picture = open_picture(path)
    np.testing.assert_array_equal(picture.cut((0, 0, 64, 64)).read(1), SCENE[:64, :64])
    with pytest.raises(BadImage):
        picture.cut((230, 200, 64, 64))


def test_lzw_and_others_are_read_by_pillow_where_imagecodecs_is_missing(monkeypatch: pytest.MonkeyPatch):
    from simmim.data import tiff

    file, pixels = io.BytesIO(), (SCENE[..., :3] // 256).astype(np.uint8)
    tifffile.imwrite(file, pixels, photometric="rgb", compression="lzw")
    monkeypatch.setattr(tiff, "_has_imagecodecs", lambda: False)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    np.testing.assert_array_equal(open_picture(file.getvalue()).cut((9, 9, 64, 64)).read(1), pixels[9:73, 9:73])


def svs(path: Path, levels: list[np.ndarray]) -> None:
    """Write the pages of an Aperio slide: full size, a thumbnail, further levels."""
    how: dict[str, Any] = {"photometric": "rgb", "compression": "zlib", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(levels[0], tile=(128, 128), description="Aperio Image Library v10.0.51", **how)
        file.write(levels[0][::8, ::8], rowsperstrip=16, **how)
        for level in levels[1:]:
            file.write(level, tile=(128, 128), **how)


def ome_tiff(path: Path, levels: list[np.ndarray]) -> None:
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(levels[0], subifds=len(levels) - 1, tile=(128, 128), photometric="rgb", metadata={"axes": "YXS"})
        for level in levels[1:]:
            file.write(level, subfiletype=1, tile=(128, 128), photometric="rgb")


@pytest.mark.parametrize(("write_slide", "name"), [(svs, "a.svs"), (ome_tiff, "a.ome.tif")])
def test_levels_of_slides_are_read(write_slide: Any, name: str, tmp_path: Path):
    pixels = RNG.integers(0, 256, (512, 768, 3), dtype=np.uint8)
    write_slide(tmp_path / name, [pixels, pixels[::2, ::2], pixels[::4, ::4]])
    picture = open_picture(tmp_path / name)
    for reduction in (1, 2, 4):
        np.testing.assert_array_equal(picture.read(reduction), pixels[::reduction, ::reduction])


def test_rows_that_a_sparse_file_leaves_out_have_the_nodata_value(tmp_path: Path):
    rasterio = pytest.importorskip("rasterio")
    how: dict[str, Any] = {"driver": "GTiff", "width": 50, "height": 64, "count": 1, "dtype": "float32"}
    top = RNG.random((16, 50)).astype(np.float32)
    for nodata, left_out in ((None, 0), (-1, -1)):
        path = tmp_path / f"{nodata}.tif"
        with rasterio.open(path, "w", **how, SPARSE_OK=True, BLOCKYSIZE=16, nodata=nodata) as file:
            file.write(top, 1, window=((0, 16), (0, 50)))
        picture = open_picture(path)
        missing = picture.missing() if picture.missing else np.zeros((64, 50, 1), bool)
        found = np.where(missing, -1, picture.read(1))[..., 0]
        np.testing.assert_array_equal(found, np.vstack((top, np.full((48, 50), left_out, np.float32))))


def test_the_pages_of_a_stack_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for ome in (True, False):
        tifffile.imwrite(tmp_path / f"{ome}.tif", np.zeros((9, 32, 32), np.uint8), ome=ome, metadata={"axes": "ZYX"})
    monkeypatch.setattr(tifffile.TiffPages, "__len__", lambda _: pytest.fail("all pages are listed"))
    for ome in (True, False):
        assert open_picture(tmp_path / f"{ome}.tif").height == 32


def test_the_dtype_is_that_of_all_scenes_whatever_the_first_is(tmp_path: Path):
    write(tmp_path / "a.tif", SCENE, bands=3, dtype="uint8", photometric="rgb")
    write(tmp_path / "b.tif", SCENE, bands=3, photometric="rgb")
    still = StillWindows(Windows(open_folder(tmp_path), (32, 32)), seed=0)
    assert sniff(still, channels=3) == np.float32


def test_a_first_scene_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path):
    write(tmp_path / "a.tif", SCENE, bands=3, dtype="uint8", photometric="rgb", tile=(64, 64))
    write(tmp_path / "b.tif", SCENE, bands=3, dtype="uint8", photometric="rgb")
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:2000])
    still = StillWindows(Windows(open_folder(tmp_path), (16, 16)), seed=0)
    assert sniff(still, channels=3) == np.uint8


@pytest.mark.parametrize("aside", [0, 5])
def test_further_pages_of_scenes_are_told(aside: int, tmp_path: Path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 64, 64), np.uint8), photometric="minisblack", metadata=None)
    windows = Windows(open_folder(tmp_path), (16, 16))
    windows.keep_apart(StillWindows(windows, seed=0), np.arange(aside))
    assert f"{tmp_path}/a.tif has 5 (one file)" in (say_pages(Subset(windows, np.arange(16))) or "")


def test_windows_are_counted_though_the_disk_fails_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where a network file system loses its server."""
    write(tmp_path / "a.tif", SCENE, bands=3, dtype="uint8", photometric="rgb")
    Image.fromarray(SCENE[..., :3].astype(np.uint8)).save(tmp_path / "b.png")
    monkeypatch.setattr("time.sleep", lambda _: None)
    opened, failed = Path.open, set[Path]()

    def fail_once(path: Path, *how: Any, **more: Any) -> Any:
        if path not in failed:
            failed.add(path)
            raise OSError(errno.ESTALE, "stale")
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", fail_once)
    assert len(Windows(open_folder(tmp_path), (32, 32))) == 2 * (300 * 270 // 32**2)
    assert len(failed) == 2


def test_the_header_of_a_tiff_is_read_again_after_the_disk_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.tif", SCENE)
    monkeypatch.setattr("time.sleep", lambda _: None)
    fails, opened = [OSError(errno.EIO, "input/output error")], tifffile.TiffFile

    def fail_once(file: Any) -> Any:
        if fails:
            raise fails.pop()
        return opened(file)

    monkeypatch.setattr(tifffile, "TiffFile", fail_once)
    assert open_picture(path).height == 300


def test_jpegs_of_one_band_each_are_read(tmp_path: Path):
    rasterio = pytest.importorskip("rasterio")
    pixels = np.mgrid[0:100, 0:100].sum(0).astype(np.uint8)[None].repeat(3, 0)
    how: dict[str, Any] = {"driver": "GTiff", "width": 100, "height": 100, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", **how, compress="jpeg", interleave="band") as file:
        file.write(pixels)
    with rasterio.open(tmp_path / "a.tif") as file:
        expected = np.moveaxis(file.read(), 0, -1)
    np.testing.assert_array_equal(open_picture(tmp_path / "a.tif").read(1), expected)
