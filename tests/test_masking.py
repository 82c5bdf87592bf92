import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from simmim.method.masks import (
    BlockMask,
    GridMask,
    InverseBlockMask,
    MaskStrategy,
    NoiseMask,
    RandomMask,
    SquareMask,
    StripMask,
    UniformMask,
    upsample_mask,
)
from simmim.method.random_keys import sample_keys

REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference" / "simmim_official"
EVERY_STRATEGY = pytest.mark.parametrize("strategy", MaskStrategy.kinds.values(), ids=MaskStrategy.kinds.keys())


def _keys(images: int, epoch: int = 0) -> NDArray[np.uint64]:
    return sample_keys(0, epoch, np.arange(images), stream="mask")


def _boundary(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many pairs of neighbouring cells have one hidden and one visible: (B, rows, columns) → (B,)."""
    between_rows = (mask[:, 1:] != mask[:, :-1]).sum(axis=(1, 2))
    return between_rows + (mask[:, :, 1:] != mask[:, :, :-1]).sum(axis=(1, 2))


def _per_2x2(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Hidden cells of each complete 2x2 from the upper left: (B, rows, columns) → (B, rows // 2, columns // 2)."""
    even = mask[:, : mask.shape[1] // 2 * 2, : mask.shape[2] // 2 * 2].astype(np.int64)
    return even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]


# Every strategy


@EVERY_STRATEGY
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    cell=st.integers(1, 40),
    ratio=st.floats(0.001, 0.999),
    images=st.integers(0, 4),
    epoch=st.integers(0, 2**40),
)
def test_every_mask_hides_the_same_number_of_cells_at_any_size_and_ratio(
    strategy: type[MaskStrategy], rows: int, columns: int, cell: int, ratio: float, images: int, epoch: int
) -> None:
    count = int(np.ceil(rows * columns * ratio))
    if count == rows * columns:
        return  # refused: tested below
    size = (rows * cell, columns * cell)
    mask = strategy(ratio=ratio, cell=cell)(_keys(images, epoch), size)
    assert mask.dtype == np.bool_
    assert mask.shape == (images, rows, columns)
    assert (mask.sum(axis=(1, 2)) == count).all()
    assert strategy(ratio=ratio, cell=cell).masked_cells(size) == count


@pytest.mark.parametrize(
    ("size", "cell", "ratio", "count"),
    [
        ((192, 192), 32, 0.6, 22),  # SimMIM's Swin recipe
        ((224, 224), 32, 0.6, 30),  # SimMIM's ViT recipe
        ((160, 224), 32, 0.6, 21),  # of 35: 0.6 is no binary fraction, but 0.6 * 35 is exactly 21
        ((160, 160), 16, 0.55, 56),  # of 100: the official code's rounding error, 55.00000000000001
    ],
)
def test_the_count_is_the_official_one(size: tuple[int, int], cell: int, ratio: float, count: int) -> None:
    assert RandomMask(ratio=ratio, cell=cell).masked_cells(size) == count


@pytest.mark.parametrize(("model", "size", "patches_per_cell"), [("vit", 96, 2), ("swin", 128, 8)])
def test_the_masks_of_the_official_code_have_our_count_and_cells(model: str, size: int, patches_per_cell: int) -> None:
    path = REFERENCE / model / "reference.npz"
    if not path.exists():
        pytest.skip("the masks of the official code (shared/reference) are not on this machine")
    official = np.load(path)["mask"].astype(bool)
    cells = official[:, ::patches_per_cell, ::patches_per_cell]
    assert (cells.sum(axis=(1, 2)) == RandomMask().masked_cells((size, size))).all()
    assert (upsample_mask(cells, patches_per_cell) == official).all()


@EVERY_STRATEGY
def test_a_mask_does_not_depend_on_its_batch(strategy: type[MaskStrategy]) -> None:
    keys, draw = _keys(32), strategy(cell=16, ratio=0.75)
    batch = draw(keys, (224, 160))
    alone = np.concatenate([draw(keys[i : i + 1], (224, 160)) for i in range(32)])
    assert (batch == alone).all()


@EVERY_STRATEGY
def test_images_and_epochs_get_different_masks(strategy: type[MaskStrategy]) -> None:
    first, second = (strategy(cell=16)(_keys(16, epoch), (224, 224)).reshape(16, -1) for epoch in (0, 1))
    assert len(np.unique(first, axis=0)) > 8  # few shapes of a grid or a square exist, so that some may agree
    assert (first != second).any(axis=1).sum() > 8


@EVERY_STRATEGY
def test_every_cell_is_hidden_in_some_image_and_visible_in_another(strategy: type[MaskStrategy]) -> None:
    masks = strategy(ratio=0.25)(_keys(500), (224, 224))
    assert masks.any(axis=0).all()
    assert not masks.all(axis=0).any()


@pytest.mark.parametrize(
    ("name", "checksum"),
    [
        ("random", 757543870),
        ("block", 2343331566),
        ("grid", 3099925588),
        ("square", 807878805),
        ("uniform", 2692619491),
        ("inverse-block", 1263146292),
        ("noise", 1252044756),
        ("strips", 2577410022),
    ],
)
def test_masks_never_change(name: str, checksum: int) -> None:
    # Pinned: a run that another version of the package resumes must see the masks that it would have seen.
    masks = [MaskStrategy.kinds[name](cell=16)(_keys(8), size) for size in ((224, 224), (112, 192))]
    assert zlib.crc32(b"".join(np.packbits(mask).tobytes() for mask in masks)) == checksum


# RandomMask


def test_random_mask_hides_every_cell_equally_often() -> None:
    images, cells, count = 20_000, 49, 30
    hidden = RandomMask()(_keys(images), (224, 224)).sum(axis=0)
    variance = images * count / cells * (1 - count / cells)
    # Each cell is a coin of the same bias; a fixed sum takes one degree of freedom: mean 48, standard deviation 9.8.
    chi_square = ((hidden - images * count / cells) ** 2).sum() / variance * (cells - 1) / cells
    assert 20 < chi_square < 90


def test_random_mask_hides_neighbours_independently() -> None:
    boundary = _boundary(RandomMask()(_keys(20_000), (224, 224)))
    # 84 pairs of neighbours in 7x7 cells; one of the pair is hidden (30 of 49), the other visible (19 of 48), two ways.
    expected = 84 * 2 * 30 * 19 / (49 * 48)
    assert abs(boundary.mean() - expected) < 5 * boundary.std() / np.sqrt(20_000)


# BlockMask


@pytest.mark.parametrize(
    # Means over 2,000 masks of BEiT's generator (transformers 5.23, FlavaMaskingGenerator(side, masked cells)): those
    # that reached the count, which are 70 to 80 %. Random masks have 175 and 29.
    ("side", "boundary_of_beit"),
    [(14, 43.4), (6, 11.6)],
)
def test_block_masks_are_as_compact_as_those_of_beit(side: int, boundary_of_beit: float) -> None:
    boundary = _boundary(BlockMask(cell=16)(_keys(2000), (side * 16, side * 16)))
    assert boundary.mean() == pytest.approx(boundary_of_beit, rel=0.07)


def test_smaller_blocks_make_a_more_broken_mask() -> None:
    large, small = (BlockMask(cell=16, min_cells=cells)(_keys(200), (224, 224)) for cells in (16, 1))
    assert _boundary(small).mean() > 1.1 * _boundary(large).mean()


def test_block_masks_favour_no_side_of_the_image() -> None:
    hidden = BlockMask(cell=16)(_keys(4000), (224, 224)).mean(axis=0)
    for mirrored in (hidden[::-1], hidden[:, ::-1], hidden.T):
        assert np.abs(hidden - mirrored).max() < 0.05


# InverseBlockMask


def test_one_inverse_block_that_needs_no_adjustment_is_a_visible_square() -> None:
    # 9 of 49 cells are visible: one block of 3x3. Those around the 25 inner cells are whole; others end at the border.
    visible = ~InverseBlockMask(ratio=0.81, adjust=0)(_keys(2000), (224, 224))
    lines, places = visible.any(axis=2).sum(axis=1), visible.any(axis=1).sum(axis=1)
    squares = (lines == 3) & (places == 3)
    assert (visible.sum(axis=(1, 2)) == 9).all()
    assert squares.mean() == pytest.approx(25 / 49, abs=0.05)


def test_inverse_blocks_have_compact_visible_parts() -> None:
    boundary = [
        _boundary(kind(cell=16, ratio=0.8)(_keys(500), (224, 224))).mean() for kind in (InverseBlockMask, RandomMask)
    ]
    assert boundary[0] < 0.6 * boundary[1]


# StripMask


@pytest.mark.parametrize(("along", "axis"), [("time", 2), ("frequency", 1)])
def test_strips_hide_whole_spans_of_time_or_bands_of_frequency(along: Literal["time", "frequency"], axis: int) -> None:
    masks = StripMask(along=along, ratio=0.5, cell=16)(_keys(200), (1024, 128))
    assert (masks.all(axis=axis) | ~masks.any(axis=axis)).all()
    cut = StripMask(along=along, ratio=0.53, cell=16)(_keys(200), (1024, 128))
    assert ((cut.any(axis=axis) & ~cut.all(axis=axis)).sum(axis=1) <= 1).all()


def test_strips_of_both_kinds_hide_some_of_each() -> None:
    masks = StripMask(along="both", ratio=0.8, cell=16)(_keys(500), (256, 256))
    assert 0.4 < masks.all(axis=2).mean() < 0.6
    assert 0.4 < masks.all(axis=1).mean() < 0.6


# NoiseMask


def _neighbours_agree(mask: NDArray[np.bool_]) -> float:
    """Correlation of neighbouring cells."""
    hidden = mask - mask.mean()
    along = (hidden[:, 1:] * hidden[:, :-1]).mean() + (hidden[:, :, 1:] * hidden[:, :, :-1]).mean()
    return float(along / 2 / hidden.var())


@pytest.mark.parametrize(
    ("colour", "low", "high"), [("red", 0.5, 0.9), ("green", 0.1, 0.5), ("purple", -0.5, -0.05), ("blue", -0.5, -0.1)]
)
def test_the_colour_of_noise_decides_how_neighbours_agree(colour, low: float, high: float) -> None:
    assert low < _neighbours_agree(NoiseMask(cell=16, colour=colour)(_keys(500), (224, 224))) < high


def test_the_spectrum_of_noise_masks_has_the_frequencies_of_their_colour() -> None:
    frequency = np.fft.fftfreq(20)
    radius = np.hypot(*np.meshgrid(frequency, frequency))
    low, band, high = (radius > 0) & (radius < 0.1), (radius > 0.15) & (radius < 0.25), radius > 0.45
    power = {}
    for colour in ("red", "green", "blue", "purple"):
        masks = NoiseMask(cell=16, colour=colour)(_keys(200), (320, 320))
        spectrum = (np.abs(np.fft.fft2(masks)) ** 2).mean(axis=0)
        power[colour] = [spectrum[part].mean() for part in (low, band, high)]
    assert power["red"][0] > 3 * power["red"][1] > 9 * power["red"][2]
    assert power["green"][1] > 2 * max(power["green"][0], power["green"][2])
    assert power["blue"][0] < 0.5 * power["blue"][2]
    assert power["purple"][1] < 0.7 * min(power["purple"][0], power["purple"][2])


@pytest.mark.parametrize("colour", ["red", "green", "blue", "purple"])
def test_noise_masks_hide_every_cell_almost_equally_often(colour) -> None:
    hidden = NoiseMask(colour=colour)(_keys(20_000), (224, 224)).mean(axis=0)
    assert np.abs(hidden - 30 / 49).max() < 0.06  # a corner of red noise has fewer neighbours that it goes with


# GridMask


def test_grid_mask_at_half_is_a_checkerboard() -> None:
    masks = GridMask(cell=16, ratio=0.5)(_keys(32), (224, 160))
    assert (_boundary(masks) == 13 * 10 + 14 * 9).all()  # every pair of neighbours differs
    assert set(masks[:, 0, 0].tolist()) == {True, False}


def test_grid_mask_at_three_quarters_keeps_the_same_corner_of_every_2x2() -> None:
    masks = GridMask(cell=16, ratio=0.75)(_keys(64), (224, 160))
    kept = [np.argwhere(~mask) % 2 for mask in masks]
    assert all(len(cells) == 7 * 5 and (cells == cells[0]).all() for cells in kept)
    assert {tuple(cells[0].tolist()) for cells in kept} == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.45, 0.6, 0.7, 0.9])
def test_grid_mask_is_even_at_any_ratio(ratio: float) -> None:
    masks = GridMask(cell=16, ratio=ratio)(_keys(32), (256, 256))
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):  # every 2x2, not only the aligned ones
        hidden = _per_2x2(masks[:, down:, right:])
        assert set(hidden.ravel().tolist()) <= {int(4 * ratio), int(4 * ratio) + 1}


# SquareMask


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), ratio=st.floats(0.001, 0.94), seed=st.integers(0, 99))
def test_square_mask_is_one_region_as_square_as_fits(rows: int, columns: int, ratio: float, seed: int) -> None:
    if int(np.ceil(rows * columns * ratio)) == rows * columns:
        return
    mask = SquareMask(cell=1, ratio=ratio)(_keys(1, seed), (rows, columns))[0]
    lines, places = mask.any(axis=1), mask.any(axis=0)
    height, width = int(lines.sum()), int(places.sum())
    region = mask[lines.argmax() : lines.argmax() + height, places.argmax() : places.argmax() + width]
    assert region.sum() == mask.sum()  # no hidden line or place apart from the region
    assert region.all(axis=0).sum() >= width - 1  # at most one column is incomplete
    assert region[:, 1:-1].all()  # and it is at an end
    assert abs(height - width) <= 1 or (height == rows if height < width else width == columns)


def test_square_mask_in_the_centre_is_in_the_centre() -> None:
    masks = SquareMask(cell=16, ratio=0.18, position="centre")(_keys(4), (224, 160))  # 26 cells: a little over 5x5
    for mask in masks:
        lines, places = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert abs(lines[0] - (13 - lines[-1])) <= 1
        assert abs(places[0] - (9 - places[-1])) <= 1


# UniformMask


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), ratio=st.floats(0.001, 0.999), seed=st.integers(0, 99))
def test_uniform_mask_hides_a_number_in_each_2x2_that_differs_by_one_at_most(
    rows: int, columns: int, ratio: float, seed: int
) -> None:
    if int(np.ceil(rows * columns * ratio)) == rows * columns:
        return
    hidden = _per_2x2(UniformMask(cell=1, ratio=ratio)(_keys(2, seed), (rows, columns)))
    assert set(hidden.ravel().tolist()) <= {int(4 * ratio), int(4 * ratio) + 1}


@pytest.mark.parametrize("size", [(224, 160), (112, 240)], ids=["even", "odd"])
@pytest.mark.parametrize(("ratio", "hidden"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_uniform_mask_hides_one_two_or_three_of_each_2x2(ratio: float, hidden: int, size: tuple[int, int]) -> None:
    assert (_per_2x2(UniformMask(cell=16, ratio=ratio)(_keys(16), size)) == hidden).all()


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_uniform_mask_hides_every_cell_equally_often(ratio: float) -> None:
    images = 20_000
    hidden = UniformMask(ratio=ratio)(_keys(images), (192, 192)).mean(axis=0)
    expected = np.ceil(36 * ratio) / 36
    assert np.abs(hidden - expected).max() < 4.5 * np.sqrt(expected * (1 - expected) / images)


# upsample_mask


def test_upsample_mask_repeats_each_cell() -> None:
    mask = RandomMask()(_keys(3), (96, 160))
    assert (upsample_mask(mask, 4) == np.kron(mask, np.ones((1, 4, 4), bool))).all()


# What is refused


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((200, 200), "image size 200 is not a multiple of the mask cell 32; use 192 or 224"),
        ((192, 250), "image size 192x250 is not a multiple of the mask cell 32; use 192x224 or 192x256"),
        ((20, 20), "image size 20 is not a multiple of the mask cell 32; use 32"),
        ((0, 64), "image size 0x64 is not a multiple of the mask cell 32; use 32x64"),
    ],
)
@EVERY_STRATEGY
def test_a_size_that_the_cell_does_not_divide_is_refused(
    strategy: type[MaskStrategy], size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        strategy()(_keys(1), size)
    assert str(error.value) == message


def test_a_mask_of_the_whole_image_is_refused() -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        RandomMask(ratio=0.98).masked_cells((192, 192))
    assert str(error.value) == (
        "mask ratio 0.98 hides all cells (36 of 36) of image size 192; use a mask cell smaller than 32 or a lower ratio"
    )


@pytest.mark.parametrize(
    ("strategy", "fields", "message"),
    [
        (RandomMask, {"ratio": 0.0}, "mask ratio 0.0 is not between 0 and 1; use for example 0.6"),
        (GridMask, {"ratio": 1.0}, "mask ratio 1.0 is not between 0 and 1; use for example 0.6"),
        (UniformMask, {"ratio": float("nan")}, "mask ratio nan is not between 0 and 1; use for example 0.6"),
        (BlockMask, {"cell": 0}, "mask cell 0 is less than 1 pixel; use for example 32"),
        (SquareMask, {"ratio": 60.0}, "mask ratio 60.0 is not between 0 and 1; use for example 0.6"),
        (BlockMask, {"min_cells": 0}, "smallest mask block 0 is less than 1 cell; use for example 16"),
        (InverseBlockMask, {"block": 0}, "visible mask block 0 is less than 1 cell; use for example 3"),
        (InverseBlockMask, {"adjust": -1}, "mask adjustment -1 is not between 0 and 1; use for example 0.07"),
        (StripMask, {"along": "space"}, "strips along 'space' are unknown; use time, frequency, both"),
        (NoiseMask, {"colour": "pink"}, "mask noise colour 'pink' is unknown; use green, red, blue, purple"),
        (
            NoiseMask,
            {"fine": 2.0},
            "mask noise blurs 2.0 and 1.5 are not 0 < fine < coarse; use 0.7 and 1.5",
        ),
        (SquareMask, {"position": "left"}, "square mask position 'left' is unknown; use 'random' or 'centre'"),
    ],
)
def test_a_field_outside_its_range_is_refused(strategy: type[MaskStrategy], fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        strategy(**fields)
    assert str(error.value) == message
