"""The training step, compiled by the TPU compiler for chips that are not here. Nothing runs: no speed, no results."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import have, run_python

Report = Callable[..., Any]
JAX = [have("keras", "jax", "libtpu")]
TENSORFLOW = [have("keras", "tensorflow", "jax", "libtpu")]
# Quick ones, in one process; the rest take minutes on two cores. TensorFlow's step is lowered in fp32.
QUICK = {
    "jax": ("vit", "vit, sharded", "vit, too large", "vit, batch that does not divide", "vit in fp32"),
    "tensorflow": (),
}
SLOW = {
    "jax": ("vit in pieces, with drop path", "resnet", "swin"),
    "tensorflow": (
        "vit",
        "vit, sharded",
        "vit in fp32",
        "vit in pieces, with drop path",
        "vit, too large",
        "swin",
        "resnet",
    ),
}


@pytest.fixture
def compiled(report: Report) -> Callable[[str, str], dict[str, Any]]:
    def find(backend: str, case: str) -> dict[str, Any]:
        cases = (QUICK if case in QUICK[backend] else SLOW)[backend]
        return report("compile_tpu.py", backend, *cases, XLA_FLAGS="")[case]

    return find


def pairs(backend: str, *cases: str) -> list[Any]:
    marks = JAX if backend == "jax" else TENSORFLOW
    return [
        pytest.param(backend, case, marks=[*marks, *([pytest.mark.slow] if case in SLOW[backend] else [])])
        for case in cases
    ]


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        *pairs("jax", "vit", "vit, sharded", "swin", "vit in pieces, with drop path", "resnet"),
        *pairs("tensorflow", "vit", "resnet", "vit in pieces, with drop path", "swin"),
    ],
)
def test_the_step_compiles_and_the_new_state_takes_the_place_of_the_old(
    compiled: Callable[[str, str], dict[str, Any]], backend: str, case: str
) -> None:
    found = compiled(backend, case)
    assert (found["fits"], found["devices"], found["batch_size"]) == (True, 8, 32)
    hbm = found["hbm"]
    assert 0.9 * hbm["arguments"] < hbm["aliased"] <= hbm["outputs"] < hbm["aliased"] + 4096  # but for the figures
    assert found["flops"] > 5e7


@pytest.mark.parametrize(("backend", "case"), pairs("jax", "vit", "swin"))
def test_copies_of_the_state_exchange_gradients_only(
    compiled: Callable[[str, str], dict[str, Any]], backend: str, case: str
) -> None:
    exchanged = compiled(backend, case)["collectives"]
    assert 1 <= exchanged.pop("all-reduce") <= 6  # gradients, loss and mask count; XLA joins them
    assert set(exchanged.values()) == {0}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "case"), pairs("jax", "resnet"))
def test_batch_norms_see_the_images_of_all_devices(
    compiled: Callable[[str, str], dict[str, Any]], backend: str, case: str
) -> None:
    assert compiled(backend, case)["collectives"]["all-reduce"] > 20  # two of each norm, and two back


@pytest.mark.parametrize(("backend", "case"), pairs("jax", "vit, sharded"))
def test_sharded_state_takes_less_and_is_gathered(
    compiled: Callable[[str, str], dict[str, Any]], backend: str, case: str
) -> None:
    found, copied = compiled(backend, case), compiled(backend, "vit")
    assert found["hbm"]["arguments"] < 0.5 * copied["hbm"]["arguments"]  # of so small a model some does not divide
    assert found["collectives"]["all-gather"] >= 5


@pytest.mark.parametrize(("backend", "case"), pairs("tensorflow", "vit"))
def test_a_replica_of_tensorflows_step_is_as_large_as_jaxs_and_has_no_exchange(
    compiled: Callable[[str, str], dict[str, Any]], backend: str, case: str
) -> None:
    found, expected = compiled(backend, case), compiled("jax", case)
    assert found["hbm"]["arguments"] == expected["hbm"]["arguments"]
    assert found["flops"] == pytest.approx(expected["flops"], rel=0.02)
    assert set(found["collectives"].values()) == {0}
    assert "exchange of gradients" in found["notes"][0]
    assert expected["notes"] == []


@pytest.mark.parametrize(("backend", "case"), [*pairs("jax", "vit in fp32"), *pairs("tensorflow", "vit in fp32")])
def test_fp32_multiplies_in_fp32(compiled: Callable[[str, str], dict[str, Any]], backend: str, case: str) -> None:
    assert compiled(backend, case) == {"products": ["HIGHEST"]}


@pytest.mark.parametrize(("backend", "case"), [*pairs("jax", "vit, too large"), *pairs("tensorflow", "vit, too large")])
def test_a_step_that_does_not_fit_says_what_it_needs_of_what_there_is(
    compiled: Callable[[str, str], dict[str, Any]], backend: str, case: str
) -> None:
    found = compiled(backend, case)
    assert not found["fits"]
    assert found["needed"] > found["available"] == round(15.75 * 2**30)


@pytest.mark.parametrize(
    ("backend", "case", "line"),
    [
        pytest.param(
            "jax",
            "vit, batch that does not divide",
            "batch size 30 does not divide among 8 devices × 1 accumulation steps; use a multiple of 8",
            marks=JAX,
        ),
        pytest.param(
            "tensorflow",
            "vit, sharded",
            "--shard is not for --engine keras --backend tensorflow; use --backend jax",
            marks=[*TENSORFLOW, pytest.mark.slow],
        ),
    ],
)
def test_what_cannot_be_gets_one_line(
    compiled: Callable[[str, str], dict[str, Any]], backend: str, case: str, line: str
) -> None:
    assert compiled(backend, case) == {"error": line}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "topology", "batch", "gib"),
    [
        pytest.param("jax", "v5e:2x4", "1024", (8, 14), marks=JAX),
        pytest.param("tensorflow", "v5e:1x1", "128", (8, 14), marks=TENSORFLOW),
    ],
)
def test_vit_b_fits_a_v5e_at_128_images_as_the_command_says(
    backend: str, topology: str, batch: str, gib: tuple[int, int]
) -> None:
    command = ["-m", "simmim", "tpu-check", "--engine", "keras", "--model", "vit_base_patch16_224", "--json"]
    done = run_python(*command, "--backend", backend, "--topology", topology, "--batch-size", batch)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    assert gib[0] < found["hbm"]["total"] / 2**30 < gib[1]
    assert found["batch_a_device"] == 128
