"""What TIFFs of satellites come out as: many bands, deep values, and pixels that are missing."""

import io
import sys
from typing import Any

import numpy as np
import pytest
import tifffile

from simmim.data.decode import decode, open_picture
from simmim.data.picture import BadImage
from simmim.data.sources import ArrayImages
from simmim.data.statistics import measure_mean_std

RNG = np.random.default_rng(0)
NODATA = 42113
VALUES = {
    "uint8": RNG.integers(1, 256, (224, 224, 5)),
    "uint16": RNG.integers(1, 65536, (224, 224, 5)),
    "int16": RNG.integers(-9000, 20_000, (224, 224, 5)),
    "float32": RNG.normal(0, 1000, (224, 224, 5)),
}


def geotiff(pixels: np.ndarray, nodata: str | None = None, **options: Any) -> bytes:
    """Write pixels (H, W, bands) in one page, with GDAL's tag."""
    tags = [] if nodata is None else [(NODATA, "s", 0, nodata, True)]
    planar = options.setdefault("planarconfig", "contig") == "separate"
    file = io.BytesIO()
    options.setdefault("photometric", "minisblack")
    tifffile.imwrite(file, np.moveaxis(pixels, -1, 0) if planar else pixels, extratags=tags, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("options", [{"planarconfig": "separate"}, {"tile": (64, 64), "compression": "lzw"}])
def test_bands_keep_every_value_in_either_layout(dtype: str, options: dict[str, Any]):
    pixels = VALUES[dtype].astype(dtype)
    raw = geotiff(pixels, **options)
    np.testing.assert_array_equal(open_picture(raw).read(1), pixels)
    shown = decode(raw, channels=5, dtype=np.float32)
    back = np.rint(shown.astype(np.float64) * 257) if dtype == "uint16" else shown
    np.testing.assert_array_equal(back, pixels)


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", "0"), ("uint16", "0"), ("int16", "-9999"), ("float32", "nan")])
def test_missing_values_become_the_mean_of_their_band(dtype: str, nodata: str):
    pixels = VALUES[dtype].astype(dtype)
    gone = RNG.random(pixels.shape) < [0.1, 0, 0.5, 0.9, 0.2]
    holed = np.where(gone, np.array(float(nodata)).astype(dtype), pixels)
    picture = open_picture(geotiff(holed, nodata))
    found = picture.read(1)
    np.testing.assert_array_equal(found[~gone], pixels[~gone])
    for band in range(5):
        mean = pixels[..., band][~gone[..., band]].mean(dtype=np.float64)
        np.testing.assert_allclose(found[..., band][gone[..., band]], mean, atol=1e-3 if dtype == "float32" else 0.5)
    assert picture.missing is not None and np.array_equal(picture.missing(), gone)


def test_the_least_float_as_text_marks_missing_values():
    pixels = VALUES["float32"].astype(np.float32)
    pixels[:9] = np.finfo(np.float32).min
    found = open_picture(geotiff(pixels, "-3.40282346638529e+38")).read(1)  # as GDAL writes it, which is a little less
    assert np.isfinite(found).all() and np.abs(found).max() < 1e5


class Files(ArrayImages):
    def __init__(self, files: list[bytes]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return f"{index}.tif"

    def read(self, index: int) -> Any:
        return self._files[index]


def test_statistics_leave_missing_values_out():
    pixels = VALUES["int16"].astype(np.int16)
    half, most = pixels.copy(), pixels.copy()
    half[:112], most[50:, :, 0] = -9999, -9999
    # Centre crops are 196 pixels, enlarged to 224: their known values, except for what is mixed with missing ones.
    known = [each[14:210, 14:210].astype(float) for each in (half, most)]
    values = [np.concatenate([each[..., band][each[..., band] != -9999] for each in known]) for band in range(5)]
    mean, std = measure_mean_std(
        Files([geotiff(each, "-9999") for each in (half, most)]), channels=5, dtype=np.float32, seed=0
    )
    np.testing.assert_allclose(mean, [each.mean() / 255 for each in values], atol=0.5)
    assert (np.array(std) < [each.std() / 255 for each in values]).all() and min(
        std
    ) > 15  # interpolation smooths noise


def test_statistics_without_missing_values_are_those_of_the_plain_file():
    pixels = VALUES["int16"].astype(np.int16)
    found, plain = (
        measure_mean_std(Files([geotiff(pixels, nodata)]), channels=5, dtype=np.float32, seed=0)
        for nodata in ("-9999", None)
    )
    assert found == plain


@pytest.mark.parametrize("nodata", ["-9999", "1e9", "nan", "0.5", "none"])
def test_a_value_that_no_pixel_can_have_changes_nothing(nodata: str):
    pixels = VALUES["uint16"].astype(np.uint16)
    np.testing.assert_array_equal(open_picture(geotiff(pixels, nodata)).read(1), pixels)


def test_transparency_is_not_missing():
    pixels = np.full((9, 7, 4), 200, np.uint8)
    pixels[:, :3, 3] = 0
    raw = geotiff(pixels, "0", photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(open_picture(raw).read(1), pixels)


def nothing_but_nodata() -> bytes:
    return geotiff(np.full((9, 7, 3), 7, np.uint16), "7", photometric="rgb")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (nothing_but_nodata(), "has a band of nothing but nodata"),
        (
            geotiff(VALUES["float32"].astype(np.float32), "nan", compression="lerc"),
            "LERC with NaN as nodata is not read, as tifffile drops its mask; compress with DEFLATE",
        ),
    ],
)
def test_what_cannot_be_filled_is_refused_in_one_line(raw: bytes, message: str):
    with pytest.raises(BadImage) as caught:
        open_picture(raw).read(1)
    assert str(caught.value) == message


def test_nodata_without_tifffile_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    raw = geotiff(VALUES["uint16"][..., 0].astype(np.uint16), "0", photometric="minisblack")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadImage, match=r"nodata needs tifffile; pip install simmim\[data\]"):
        open_picture(raw)


@pytest.mark.parametrize(("photometric", "shape"), [("rgb", (9, 7, 3)), ("miniswhite", (9, 7)), ("minisblack", (9, 7))])
def test_8_bit_pictures_stay_as_they_are_whatever_their_nodata_tag(photometric: str, shape: tuple[int, ...]):
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    tagged, plain = (geotiff(pixels, nodata, photometric=photometric) for nodata in ("0", "none"))
    np.testing.assert_array_equal(open_picture(tagged).read(1), open_picture(plain).read(1))
