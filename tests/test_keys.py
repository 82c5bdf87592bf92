import numpy as np
import pytest

from simmim.method.random_keys import draws, random_bits, sample_key, sample_keys, uniforms


def _bits(keys: np.ndarray) -> np.ndarray:
    """The 64 bits of each key: (B,) → (B, 64)."""
    return np.unpackbits(keys.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1)


@pytest.mark.parametrize(
    (
        "seed",
        "outputs",
    ),  # outputs 2, 3, ... of Vigna's splitmix64.c, as Rosetta Code and Java's SplittableRandom give them
    [
        (0, [0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]),
    ],
)
def test_random_bits_are_splitmix64(seed: int, outputs: list[int]) -> None:
    assert random_bits(np.array([seed], np.uint64), len(outputs))[0].tolist() == outputs


def test_keys_never_change() -> None:
    # Pinned: a run that another version of the package resumes must draw the same masks and crops.
    keys = sample_keys(1, 2, [0, 1, 2], stream="mask")
    assert keys.tolist() == [2077154653877032689, 3367036204792139354, 6375785355946186969]


def test_the_same_image_has_the_same_key_in_any_batch() -> None:
    index = np.array([7, 3, 1000, 3])
    keys = sample_keys(0, 5, index, stream="crop")
    alone = [sample_keys(0, 5, [i], stream="crop")[0] for i in index]
    assert keys.tolist() == alone


@pytest.mark.parametrize(("seed", "epoch", "index"), [(0, 0, 0), (-1, 7, 10**9), (2**63, 3, 12)])
def test_one_key_alone_has_the_bits_and_the_numbers_that_it_has_in_an_array(seed: int, epoch: int, index: int) -> None:
    key, keys = sample_key(seed, epoch, index, stream="crop"), sample_keys(seed, epoch, [index], stream="crop")
    assert [key] == keys.tolist()
    assert draws(key, 0, 50) == uniforms(keys, 50)[0].tolist()
    assert draws(key, 30, 4) == uniforms(keys, 50)[0, 30:34].tolist()


def test_one_epoch_for_all_equals_one_epoch_each() -> None:
    index = np.arange(4)
    one, each = (sample_keys(0, epoch, index, stream="mask") for epoch in (3, np.full(4, 3)))
    assert one.tolist() == each.tolist()


def test_more_numbers_leave_the_first_ones_as_they_are() -> None:
    keys = sample_keys(0, 0, np.arange(3), stream="mask")
    assert (random_bits(keys, 9)[:, :4] == random_bits(keys, 4)).all()


def test_keys_differ_between_seeds_epochs_images_and_streams() -> None:
    index = np.arange(1000)
    keys = [
        sample_keys(seed, epoch, index, stream=stream)
        for seed in (-1, 0, 1, 2**63)
        for epoch in range(5)
        for stream in ("mask", "crop", "flip")
    ]
    assert len(np.unique(keys)) == 4 * 5 * 3 * 1000


@pytest.mark.parametrize(
    ("seed", "epoch", "stream"), [(0, 0, "crop"), (0, 1, "mask"), (1, 0, "mask")], ids=["stream", "epoch", "seed"]
)
def test_a_change_of_stream_epoch_or_seed_flips_half_of_the_bits(seed: int, epoch: int, stream: str) -> None:
    index = np.arange(10_000)
    flipped = _bits(sample_keys(0, 0, index, stream="mask")) ^ _bits(sample_keys(seed, epoch, index, stream=stream))
    # A share of 10,000 fair coins has a standard deviation of 0.005; the widest of 64 stays within 5 of them.
    assert np.abs(flipped.mean(axis=0) - 0.5).max() < 0.025


def test_two_streams_are_uncorrelated() -> None:
    index = np.arange(100_000)
    a, b = (uniforms(sample_keys(0, 0, index, stream=stream), 1)[:, 0] for stream in ("mask", "crop"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(index))


def test_the_numbers_of_one_image_are_uncorrelated() -> None:
    numbers = uniforms(sample_keys(0, 0, np.arange(100_000), stream="mask"), 4)
    correlation = np.corrcoef(numbers, rowvar=False)
    assert np.abs(correlation - np.eye(4)).max() < 5 / np.sqrt(len(numbers))


def test_uniforms_are_uniform() -> None:
    numbers = uniforms(sample_keys(0, 0, np.arange(2000), stream="mask"), 50)
    observed = np.histogram(numbers, bins=256, range=(0, 1))[0]
    assert observed.sum() == numbers.size  # none outside [0, 1)
    expected = numbers.size / 256
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert 190 < chi_square < 331  # 255 degrees of freedom: the 0.1 % and 99.9 % points
