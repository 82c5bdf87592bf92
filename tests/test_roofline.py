import numpy as np
import pytest

from simmim.hardware.roofline import Rates, StepWork, fit_rates

MEMORY = 1000.0


def work(*, flops=(1e9, 0.0, 0.0), traffic=(1e3, 1e9, 1e6), live=((100, 100, 300), (10, 20, 0))) -> StepWork:
    """Three operations: a product and a pointwise one, whose work grows with the images, and the optimiser's."""
    scale = np.array([1.0, 1.0, 0.0])
    return StepWork(
        forward_flops=int(flops[0]),
        parameters=25,
        trained=25,
        largest_block=5,
        update_starts=2,
        flops=np.stack((np.array(flops) * (1 - scale), np.array(flops) * scale)),
        traffic=np.stack((np.array(traffic) * (1 - scale), np.array(traffic) * scale)),
        live=np.array(live, float),
        gradients=np.array([0.0, 50.0, 100.0]),
    )


RATES = Rates(flops=1e9, bandwidth=1e9)


def test_an_operation_takes_the_longer_of_arithmetic_and_traffic():
    assert work().seconds(1, RATES) == pytest.approx(1 + 1 + 1e-3)


def test_accumulation_repeats_all_but_the_optimiser():
    assert work().seconds(1, RATES, pieces=4) == pytest.approx(4 * 2 + 1e-3)


def test_an_operation_takes_at_least_its_launch():
    assert work().seconds(1, Rates(flops=1e15, bandwidth=1e15, launch=2.0)) == pytest.approx(6)


def test_the_peak_is_the_fullest_moment():
    assert work().peak_bytes(1) == 300
    assert work().peak_bytes(50) == 1100


def test_kept_gradients_are_counted_once():
    assert work().peak_bytes(50, kept_gradients=True) == 100 + 20 * 50 - 50 + 100


def test_sharding_divides_states_and_gradients_and_gathers_two_blocks():
    states = 4 * 25 + 8 * 25
    assert work().peak_bytes(50, shards=4) == 1100 - (states + 50) * 3 / 4 + 2 * 4 * 5


def test_the_largest_batch_fits_and_one_more_does_not():
    most = work().largest_batch(MEMORY)
    assert work().peak_bytes(most) <= MEMORY < work().peak_bytes(most + 1)


def test_no_batch_fits_where_the_states_do_not():
    assert work().largest_batch(200) == 0


def test_calibration_finds_the_rates_that_made_the_times():
    true = Rates(flops=3e9, bandwidth=2e8)
    works = [work(), work(flops=(5e9, 0, 0)), work(traffic=(1e3, 4e9, 1e6))]
    found = fit_rates([(each, 8, each.seconds(8, true)) for each in works])
    assert [found.flops, found.bandwidth] == pytest.approx([3e9, 2e8], rel=0.03)


def test_one_step_is_too_little_to_calibrate_with():
    with pytest.raises(ValueError, match="1 measured steps cannot tell"):
        fit_rates([(work(), 8, 1.0)])
