"""Crops against torchvision's, resizing against Pillow's."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop as Torchvision
from torchvision.transforms.functional import resized_crop

from simmim.data.augment import (
    Box,
    CentreCrop,
    Letterbox,
    RandomResizedCrop,
    ScaleJitter,
    crop_resize,
    draw_flips,
    reduction,
    visible,
)
from simmim.method.random_keys import sample_key, sample_keys

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"


def boxes(crop: RandomResizedCrop, height: int, width: int, count: int) -> np.ndarray:
    return np.array(
        [crop.box(sample_key(0, 0, index, stream="crop"), height, width) for index in range(count)], dtype=float
    )


@pytest.mark.parametrize(("height", "width"), [(400, 640), (300, 300), (500, 310)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int):
    ours = boxes(RandomResizedCrop(size=(224, 224)), height, width, 3000)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = [Torchvision.get_params(image, [0.67, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    # Five standard errors of the difference of two means.
    errors = 5 * np.sqrt(2 / 3000) * np.std(theirs, axis=0)
    np.testing.assert_array_less(np.abs(ours.mean(axis=0) - np.mean(theirs, axis=0)), errors)
    np.testing.assert_allclose(ours.std(axis=0), np.std(theirs, axis=0), rtol=0.1)


@pytest.mark.parametrize(("height", "width"), [(100, 1000), (1000, 100)])
def test_an_image_that_no_crop_fits_gets_torchvisions_middle(height: int, width: int):
    theirs = Torchvision.get_params(torch.empty(1, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    ours = RandomResizedCrop(size=(224, 224), scale=(1.0, 1.0)).box(sample_key(0, 0, 0, stream="crop"), height, width)
    assert tuple(ours) == theirs


def test_a_crop_for_a_wide_output_is_wide():
    found = boxes(RandomResizedCrop(size=(96, 192), scale=(0.1, 0.3)), 400, 400, 500)
    ratio = found[:, 3] / found[:, 2]
    assert 2 * 0.74 < ratio.min() < 2 * 0.8
    assert 2 * 1.25 < ratio.max() < 2 * 1.35


def test_a_crop_lies_within_the_image():
    for height, width in [(1, 1), (1, 50), (7, 3), (224, 224)]:
        top, left, box_height, box_width = boxes(RandomResizedCrop(size=(224, 224)), height, width, 200).T
        assert min(top.min(), left.min()) >= 0
        assert min(box_height.min(), box_width.min()) >= 1
        assert (top + box_height).max() <= height
        assert (left + box_width).max() <= width


def test_a_crop_is_as_likely_at_the_edges_as_in_the_middle():
    found = boxes(RandomResizedCrop(size=(8, 8), scale=(0.25, 0.25), ratio=(1, 1)), 8, 8, 5000)
    for corner in found[:, :2].T:  # a box of 4 x 4 pixels has 5 places on either axis, about 1000 of the draws each
        np.testing.assert_allclose(np.bincount(corner.astype(int)), np.full(5, 1000), atol=150)


def test_the_centre_crop_is_that_of_resize_256_and_crop_224():
    assert CentreCrop(size=(224, 224)).box(256, 384) == Box(16, 80, 224, 224)


def test_the_centre_crop_for_a_wide_output_is_wide():
    assert CentreCrop(size=(96, 192), fraction=1.0).box(400, 400) == Box(100, 0, 200, 400)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop(size=(0, 224)), "image size 0x224 is not positive; use 224 or 160x224"),
        (lambda: RandomResizedCrop(size=(8, 8), scale=(0.5, 2)), r"crop scale \(0.5, 2\) is not a range within 0..1"),
        (lambda: RandomResizedCrop(size=(8, 8), ratio=(2, 1)), r"crop ratio \(2, 1\) is not a range of positive"),
        (lambda: CentreCrop(size=(8, 8), fraction=0), "crop fraction 0 is not within 0..1; use 0.875"),
    ],
)
def test_a_crop_that_cannot_be_is_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("height", "width"), [(400, 640), (640, 400), (31, 500), (33, 20)])
def test_a_letterbox_shows_the_whole_image_as_large_as_it_fits(height: int, width: int):
    part, (top, left, shown_height, shown_width) = visible(
        Letterbox(size=(128, 96)).box(height, width), height, width, (128, 96)
    )
    assert part == Box(0, 0, height, width)
    assert (top, left) == (0, 0)
    assert shown_height == 128 or shown_width == 96
    assert shown_height / height == pytest.approx(shown_width / width, abs=1 / min(height, width))


def test_what_a_box_has_beyond_the_image_is_filled():
    image = np.full((2, 4, 3), 200, np.uint8)
    pixels = crop_resize(image, Box(-1, 0, 4, 8), (8, 16), fill=(1, 2, 3))
    assert (pixels[2:6, :8] == 200).all()
    assert (pixels[[0, 1, 6, 7]] == (1, 2, 3)).all()
    assert (pixels[:, 8:] == (1, 2, 3)).all()


def test_jittered_scales_are_evenly_spread():
    jitter, nothing = ScaleJitter(size=(64, 64), scale=(0.5, 2.0)), np.zeros((0, 4))
    keys = [sample_keys(0, 0, index, stream="crop") for index in range(2000)]
    scales = np.array([640 / jitter.box(key, 640, 320, nothing).height for key in keys])
    assert scales.min() == pytest.approx(0.5, abs=0.01)
    assert scales.max() == pytest.approx(2.0, abs=0.01)
    np.testing.assert_allclose(np.quantile(scales, [0.25, 0.5, 0.75]), [0.875, 1.25, 1.625], atol=0.05)


def test_a_jittered_image_that_is_larger_than_its_box_shows_the_middle_of_an_object():
    jitter, objects = ScaleJitter(size=(64, 64), scale=(2.0, 2.0)), np.array([[90.0, 10.0, 100.0, 20.0]])
    boxes = [jitter.box(sample_keys(0, 0, index, stream="crop"), 100, 100, objects) for index in range(300)]
    assert {(box.height, box.width) for box in boxes} == {(50, 50)}
    assert {box.top for box in boxes} == set(range(16))  # the middle is at 15 from the top
    assert {box.left for box in boxes} == set(range(46, 51))  # … and at 95 from the left


def test_half_of_the_images_are_mirrored_anew_each_epoch():
    first, second = (draw_flips(0, epoch, np.arange(10_000), "horizontal") for epoch in range(2))
    assert abs(first.mean() - 0.5) < 0.025
    assert abs((first == second).mean() - 0.5) < 0.025


def test_both_flips_are_drawn_apart_and_horizontal_ones_as_without_vertical_ones():
    horizontal, both = (draw_flips(0, 0, np.arange(10_000), flip) for flip in ("horizontal", "both"))
    assert (both[:, :1] == horizontal).all()
    assert abs((both[:, 0] == both[:, 1]).mean() - 0.5) < 0.025
    assert draw_flips(0, 0, np.arange(10), "none").shape == (10, 0)


@pytest.mark.parametrize(
    ("side", "factor"), [(100, 1), (223, 1), (447, 1), (448, 2), (895, 2), (896, 4), (1792, 8), (9000, 32)]
)
def test_an_image_is_reduced_no_further_than_to_the_size_of_the_crop(side: int, factor: int):
    assert reduction(Box(0, 0, side, 9000), (224, 224)) == factor


@pytest.mark.parametrize(
    ("shrinking", "levels"),
    [(0.5, 0.5), (1.0, 0), (1.3, 1), (1.8, 1), (2.1, 1), (2.3, 2), (3.1, 2), (6.0, 2.5), (11.0, 3)],
)
def test_resizing_photographs_gives_what_torchvision_gives(shrinking: float, levels: float):
    if not PHOTOS.exists():
        pytest.skip(f"no photographs at {PHOTOS}")
    differences = []
    for path in sorted(PHOTOS.glob("??2_*.jpg")):
        image = Image.open(path).convert("RGB").resize((600, 400))
        box, size = Box(13, 57, 370, 410), (round(370 / shrinking), round(410 / shrinking))
        theirs = np.asarray(resized_crop(image, *box, list(size)), float)  # type: ignore[arg-type]
        differences.append(np.abs(crop_resize(np.asarray(image), box, size) - theirs).mean())
    assert len(differences) > 5
    assert np.mean(differences) <= levels


@pytest.mark.parametrize("shrinking", [1.2, 1.3, 1.5, 1.8, 2.1, 2.5, 3.5, 9.0])
def test_resizing_shows_no_more_aliasing_than_an_area_filter(shrinking: float):
    side = round(224 * shrinking)
    rows, columns = np.mgrid[:side, :side]
    board = ((rows + columns) % 2 * 255).astype(np.uint8)[..., None]
    grey = crop_resize(board, Box(0, 0, side, side), (224, 224))
    area = cv2.resize(board, (224, 224), interpolation=cv2.INTER_AREA)
    assert grey.std() <= area.std() + 0.5  # plain bilinear interpolation's is up to 127


@pytest.mark.parametrize("size", [(30, 20), (64, 64), (90, 10)])
@pytest.mark.parametrize("channels", [1, 3, 100])
@pytest.mark.parametrize("box", [Box(3, 2, 50, 40), Box(-5, -5, 90, 90)], ids=["within", "beyond"])
def test_a_result_is_written_in_place(box: Box, size: tuple[int, int], channels: int):
    image = np.random.default_rng(0).integers(0, 256, (60, 50, channels), dtype=np.uint8)
    rows = np.zeros((2, *size, channels), np.uint8)
    assert np.shares_memory(crop_resize(image, box, size, 7, rows[1]), rows)
    np.testing.assert_array_equal(rows[1], crop_resize(image, box, size, 7))
    assert not rows[0].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 5, 130, 600])
def test_any_number_of_channels_is_resized_each_as_if_alone(channels: int, dtype: Any):
    # uint8 is rounded at each step, at a tie up or down as OpenCV's code for that number of channels has it.
    image = np.random.default_rng(0).integers(0, 256, (60, 50, channels)).astype(dtype)
    box, size = Box(3, 2, 50, 40), (24, 32)
    resized = crop_resize(image, box, size)
    assert resized.dtype == dtype
    alone = [crop_resize(image[..., channel : channel + 1], box, size) for channel in (0, channels // 2, channels - 1)]
    np.testing.assert_allclose(
        resized[..., [0, channels // 2, channels - 1]],
        np.concatenate(alone, axis=-1),
        atol=1 if dtype == np.uint8 else 1e-3,
    )


def test_a_crop_of_the_size_that_is_asked_for_is_not_changed():
    image = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop_resize(image, Box(5, 7, 32, 24), (32, 24)), image[5:37, 7:31])


def test_without_antialiasing_an_image_is_only_interpolated():
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    found = crop_resize(image, Box(10, 20, 150, 180), (80, 100), antialias=False)
    np.testing.assert_array_equal(found, cv2.resize(image[10:160, 20:200], (100, 80), interpolation=cv2.INTER_LINEAR))
    beyond = crop_resize(image, Box(-10, 20, 150, 180), (75, 90), antialias=False)
    np.testing.assert_array_equal(beyond[5:], cv2.resize(image[:140, 20:200], (90, 70), interpolation=cv2.INTER_LINEAR))
