"""What files of every kind come out as, against Pillow, tifffile and arithmetic."""

import io
import logging
import struct
import sys
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from simmim.data.decode import decode, open_picture
from simmim.data.picture import BadImage

RNG = np.random.default_rng(0)
# A smooth picture that JPEG keeps well, taller than wide so that a wrong rotation shows.
PHOTO = Image.fromarray(RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)).resize((64, 96), Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def npy(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels, **options)
    return file.getvalue()


def decode_as_stored(raw: bytes) -> np.ndarray:
    picture = open_picture(raw)
    return picture.decode(channels=picture.channels, dtype=np.float32)


def pillow(raw: bytes, mode: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(raw)).convert(mode))


def distance(pixels: np.ndarray, reference: np.ndarray) -> float:
    assert pixels.shape == reference.shape
    return np.abs(pixels.astype(float) - reference.astype(float)).max()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_a_jpeg_has_the_pixels_that_pillow_reads(options: dict[str, Any]):
    raw = saved(PHOTO, "JPEG", **options)
    np.testing.assert_array_equal(decode(raw, channels=3, dtype=np.uint8), pillow(raw, "RGB"))


def test_a_grey_jpeg_has_the_pixels_that_pillow_reads():
    raw = saved(PHOTO.convert("L"), "JPEG")
    np.testing.assert_array_equal(decode(raw, channels=1, dtype=np.uint8)[..., 0], pillow(raw, "L"))


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_jpeg_has_the_pixels_of_pillows_draft(reduction: int):
    raw = saved(PHOTO.resize((203, 301)), "JPEG")
    image = Image.open(io.BytesIO(raw))
    image.draft("RGB", (203 // reduction, 301 // reduction))
    pixels = open_picture(raw).decode(channels=3, dtype=np.uint8, reduction=reduction)
    np.testing.assert_array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_turns_into_colour(form: str):
    raw = saved(PHOTO.convert("CMYK"), form)
    np.testing.assert_array_equal(decode(raw, channels=3, dtype=np.uint8), pillow(raw, "RGB"))


def test_a_palette_turns_into_its_colours():
    raw = saved(PHOTO.quantize(16), "PNG")
    np.testing.assert_array_equal(decode(raw, channels=3, dtype=np.uint8), pillow(raw, "RGB"))


def test_a_transparent_palette_entry_turns_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    pixels = decode(saved(image, "PNG", transparency=0), channels=3, dtype=np.uint8)
    assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_a_transparent_colour_turns_white():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    pixels = decode(saved(image, "PNG", transparency=(1, 2, 3)), channels=3, dtype=np.uint8)
    assert pixels.tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode: str):
    raw = saved(Image.fromarray(RNG.integers(0, 256, (9, 7, 4), dtype=np.uint8)).convert(mode), "PNG")
    image = Image.open(io.BytesIO(raw)).convert("RGBA")
    reference = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert distance(decode(raw, channels=3, dtype=np.uint8), np.asarray(reference)) <= 1


def test_four_channels_that_are_asked_for_keep_transparency():
    stored = RNG.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(stored), "PNG"), channels=4, dtype=np.uint8), stored)


def test_one_bit_is_black_or_white():
    image = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    assert decode(saved(image, "PNG"), channels=1, dtype=np.uint8).ravel().tolist() == [0, 255, 0]


def test_grey_turns_into_three_equal_channels():
    grey = RNG.integers(0, 256, (9, 7), dtype=np.uint8)
    pixels = decode(saved(Image.fromarray(grey), "PNG"), channels=3, dtype=np.uint8)
    np.testing.assert_array_equal(pixels, np.stack([grey] * 3, axis=-1))


def test_colour_turns_into_the_grey_that_pillow_makes():
    raw = saved(PHOTO, "PNG")
    assert distance(decode(raw, channels=1, dtype=np.uint8)[..., 0], pillow(raw, "L")) <= 1


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped(form: str):
    stored = np.array([[0, 257, 1000, 65535]], np.uint16)
    pixels = decode(saved(Image.fromarray(stored), form), channels=1, dtype=np.float32)
    np.testing.assert_allclose(pixels[..., 0], stored / 257, rtol=1e-6)


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_grey_is_scaled_whatever_its_byte_order(order: Any):
    stored = np.array([[0, 257, 1000, 65535]], np.uint16)
    for raw in (tiff(stored, byteorder=order), npy(stored.astype(f"{order}u2"))):
        np.testing.assert_allclose(decode(raw, channels=1, dtype=np.float32)[..., 0], stored / 257, rtol=1e-6)


def test_a_16_bit_image_among_8_bit_ones_is_rounded():
    stored = np.array([[0, 257 * 3 - 100, 65535]], np.uint16)
    assert decode(saved(Image.fromarray(stored), "PNG"), channels=1, dtype=np.uint8).ravel().tolist() == [0, 3, 255]


def test_an_8_bit_image_among_deep_ones_keeps_its_values():
    raw = saved(PHOTO, "PNG")
    pixels = decode(raw, channels=3, dtype=np.float32)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, pillow(raw, "RGB"))


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"planarconfig": "separate"}])
def test_16_bit_colour_tiff_keeps_every_bit(options: dict[str, Any]):
    stored = RNG.integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    arranged = np.moveaxis(stored, -1, 0) if "planarconfig" in options else stored
    pixels = decode(tiff(arranged, photometric="rgb", **options), channels=3, dtype=np.float32)
    np.testing.assert_allclose(pixels, stored / 257, rtol=1e-6)


def test_16_bit_tiff_with_transparency_is_laid_on_white():
    stored = np.array([[[65535, 0, 0, 0], [0, 0, 0, 65535]]], np.uint16)
    pixels = decode(tiff(stored, photometric="rgb", extrasamples=["unassalpha"]), channels=3, dtype=np.float32)
    assert pixels.tolist() == [[[255, 255, 255], [0, 0, 0]]]


@pytest.mark.parametrize("bands", [2, 4, 5, 13])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_tiff_of_many_bands_keeps_them_all(bands: int, planar: str, caplog: pytest.LogCaptureFixture):
    stored = RNG.integers(0, 256, (9, 7, bands), dtype=np.uint8)
    arranged = np.moveaxis(stored, -1, 0) if planar == "separate" else stored
    raw = tiff(arranged, photometric="minisblack", planarconfig=planar, extrasamples=["unspecified"] * (bands - 1))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(decode(raw, channels=bands, dtype=np.uint8), stored)
    assert not caplog.records


def test_float_values_stay_as_they_are():
    stored = RNG.normal(size=(9, 7)).astype(np.float32)
    for raw in (tiff(stored), npy(stored), npy(stored.astype(np.float64))):
        np.testing.assert_array_equal(decode(raw, channels=1, dtype=np.float32)[..., 0], stored)


def test_signed_values_stay_as_they_are():
    stored = np.array([[-1024, 3000]], np.int16)
    assert decode(tiff(stored), channels=1, dtype=np.float32).ravel().tolist() == [-1024, 3000]


@pytest.mark.parametrize("orientation", range(10))  # there is no 0 and no 9
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation_is_undone(form: str, orientation: int):
    exif = Image.Exif()
    exif[274] = orientation
    raw = saved(PHOTO, form, exif=exif)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    picture = open_picture(raw)
    assert (picture.width, picture.height) == reference.size
    np.testing.assert_array_equal(picture.decode(channels=3, dtype=np.uint8), np.asarray(reference))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_of_a_tiff_of_many_bands_is_undone(orientation: int):
    rgb = np.asarray(PHOTO)
    exif = Image.Exif()
    exif[274] = orientation
    reference = decode(saved(PHOTO, "TIFF", exif=exif), channels=3, dtype=np.uint8)
    raw = tiff(
        np.concatenate([rgb, rgb[..., :2]], axis=-1),
        photometric="minisblack",
        planarconfig="contig",
        extratags=[(274, "H", 1, orientation, True)],
    )
    picture = open_picture(raw)
    pixels = picture.decode(channels=5, dtype=np.uint8)
    assert pixels.shape[:2] == (picture.height, picture.width)
    np.testing.assert_array_equal(pixels[..., :3], reference)


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_an_animation_shows_its_first_frame(form: str):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    raw = saved(frames[0], form, save_all=True, append_images=frames[1:])
    assert distance(decode(raw, channels=3, dtype=np.uint8), np.full((6, 8, 3), (255, 0, 0))) <= 3


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 6)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_file_has_its_values(shape: tuple[int, ...], order: Any):
    stored = np.asarray(RNG.integers(0, 256, shape, dtype=np.uint8), order=order)
    channels = shape[2] if len(shape) == 3 else 1
    np.testing.assert_array_equal(
        decode(npy(stored), channels=channels, dtype=np.uint8), stored.reshape(5, 4, channels)
    )


@pytest.mark.parametrize(("dtype", "stored", "shown"), [(np.uint16, 25700, 100), (np.bool_, True, 255)])
def test_an_array_file_of_another_depth_is_scaled(dtype: Any, stored: Any, shown: int):
    assert decode(npy(np.full((2, 2), stored, dtype)), channels=1, dtype=np.uint8).max() == shown


def test_a_pillow_image_is_taken_as_it_is():
    np.testing.assert_array_equal(decode(PHOTO, channels=3, dtype=np.uint8), np.asarray(PHOTO))


@pytest.mark.parametrize(
    ("raw", "channels", "message"),
    [
        (
            tiff(np.zeros((9, 7, 5), np.uint8), photometric="minisblack", planarconfig="contig"),
            3,
            "has 5 channels, not 3",
        ),
        (saved(PHOTO, "JPEG"), 5, "has 3 channels, not 5"),
        (npy(np.zeros((9, 7, 4), np.uint8)), 3, "has 4 channels, not 3"),
    ],
)
def test_another_number_of_channels_is_a_bad_image(raw: bytes, channels: int, message: str):
    with pytest.raises(BadImage, match=f"^{message}$"):
        decode(raw, channels=channels, dtype=np.uint8)


def test_a_float_image_among_8_bit_ones_is_a_bad_image():
    with pytest.raises(BadImage, match="has float32 values, but earlier images have 8 bits"):
        decode(npy(np.zeros((9, 7), np.float32)), channels=1, dtype=np.uint8)


def huge_png() -> bytes:
    raw = bytearray(saved(PHOTO, "PNG"))
    raw[16:24] = struct.pack(">II", 100_000, 100_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    return bytes(raw)


def huge_npy() -> bytes:
    return npy(np.zeros((9, 7), np.uint8)).replace(b"(9, 7), }      ", b"(900000, 7000)}")


def huge_tiff() -> bytes:
    file = io.BytesIO(tiff(np.zeros((9, 7, 5), np.uint8), photometric="minisblack", planarconfig="contig"))
    with tifffile.TiffFile(file, mode="r+b") as opened:
        for tag in ("ImageWidth", "ImageLength"):
            opened.pages[0].tags[tag].overwrite(100_000)
    return file.getvalue()


@pytest.mark.parametrize(
    ("bomb", "channels", "message"),
    [
        (huge_png, 3, "exceeds limit"),
        (huge_npy, 3, "the file ends before"),
        (huge_tiff, 5, "claims 100000 x 100000 pixels"),
    ],
)
def test_a_decompression_bomb_is_refused_before_memory_is_taken(bomb: Any, channels: int, message: str):
    raw = bomb()
    tracemalloc.start()
    with pytest.raises(BadImage, match=message):
        decode(raw, channels=channels, dtype=np.uint8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


BANDS = RNG.integers(0, 256, (90, 70, 5), dtype=np.uint8)
PROGRAM = io.BytesIO()
np.save(PROGRAM, np.array([["code"]], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the file is empty"),
        (b"this is no picture\n", "not an image in a format that is read here"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a format that is read here"),
        (saved(PHOTO, "JPEG")[:-200], "truncated"),
        (saved(PHOTO, "PNG")[:-2000], "truncated"),
        (saved(PHOTO, "WEBP")[:-200], "could not create decoder"),
        (saved(PHOTO, "TIFF")[:-2000], "truncated"),
        (
            tiff(BANDS, photometric="minisblack", planarconfig="contig", compression="zlib")[:-2000],
            "truncated|BAD_DATA",
        ),
        (npy(BANDS)[:-1], "the file ends before the 31500 values of shape"),
        (npy(BANDS)[:40], "EOF"),
        (PROGRAM.getvalue(), "an array of Python objects is not read"),
        (npy(np.zeros((3, 4, 5, 6), np.uint8)), "neither .H, W. nor .H, W, C."),
        (npy(np.zeros((0, 4), np.uint8)), "neither .H, W. nor .H, W, C."),
        (npy(np.zeros((4, 4), np.complex64)), "holds no pixels"),
        (npy(np.full((4, 4), np.nan, np.float32)), "not finite"),
        (tiff(np.full((4, 4), np.inf, np.float32)), "not finite"),
        (npy(np.full((4, 4), 1e300)), "not finite"),
    ],
)
def test_a_damaged_or_foreign_file_is_a_bad_image_with_a_one_line_reason(raw: bytes, message: str):
    with pytest.raises(BadImage, match=message) as caught:
        decode_as_stored(raw)
    assert len(str(caught.value).splitlines()) == 1


def test_a_jpeg_that_pillow_reads_in_spite_of_damage_is_read():
    raw = bytearray(saved(PHOTO.resize((640, 960)), "JPEG"))
    raw[len(raw) // 2 : len(raw) // 2 + 20] = b"\xff\xd7" * 10
    np.testing.assert_array_equal(decode(bytes(raw), channels=3, dtype=np.uint8), pillow(bytes(raw), "RGB"))


def test_without_tifffile_a_plain_tiff_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    np.testing.assert_array_equal(decode(saved(PHOTO, "TIFF"), channels=3, dtype=np.uint8), np.asarray(PHOTO))


def test_without_tifffile_a_deep_tiff_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    raw = tiff(np.zeros((9, 7, 3), np.uint16), photometric="rgb")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadImage, match=r"needs tifffile; pip install simmim\[data\]"):
        decode(raw, channels=3, dtype=np.float32)
