"""The training step, compiled by the TPU compiler for chips that are not here. Nothing runs: no speed, no results."""

from collections.abc import Callable
from typing import Any

import pytest

from .conftest import have

Report = Callable[..., Any]
ARGUMENTS = ("v5e:2x4", "vit_tiny_patch16_224", "64")
FAST = {"JAX_OPTIMIZATION_LEVEL": "O1", "XLA_FLAGS": ""}
STATE_BYTES = 3 * 4 * 6.1e6  # parameters and AdamW's two averages of ViT-Ti with its head, in fp32


@pytest.mark.slow
@have("keras", "jax", "libtpu")
def test_the_step_fits_eight_chips_with_a_copy_on_each(report: Report) -> None:
    found = report("compile_tpu.py", *ARGUMENTS, **FAST)
    assert (found["device"], found["devices"]) == ("tpu", 8)
    assert found["arguments"] == pytest.approx(STATE_BYTES, rel=0.05)
    assert found["hbm"] < 1e9
    assert 1 <= found["collectives"]["all-reduce"] <= 6  # gradients, loss and mask count; XLA joins them
    assert found["collectives"]["all-gather"] == 0


@pytest.mark.slow
@have("keras", "jax", "libtpu")
def test_sharded_state_takes_an_eighth_and_is_gathered(report: Report) -> None:
    found = report("compile_tpu.py", *ARGUMENTS, "shard", **FAST)
    assert found["arguments"] < STATE_BYTES / 5
    assert found["collectives"]["all-gather"] > 20
