"""The keras engine against the torch engine, which another suite compares with official SimMIM."""

from collections.abc import Callable
from typing import Any

import pytest

from .conftest import have

# Quick ones; the rest take minutes on two cores.
QUICK = [("jax", "vit"), ("tensorflow", "vit")]
REST = ["vit in pieces", "vit with hog", "beit, shared bias", "beit, own biases", "swin, padded windows"]
REST += ["resnet, bottlenecks"]
SLOW = [(backend, case) for backend in ("jax", "tensorflow") for case in REST]
SLOW += [("jax", "vit, activations recomputed"), ("jax", "swin, activations recomputed")]
SLOW += [("jax", "swin"), ("jax", "resnet"), ("tensorflow", "swin"), ("tensorflow", "resnet")]
PAIRS = [pytest.param(*pair, marks=have("keras", pair[0])) for pair in QUICK]
PAIRS += [pytest.param(*pair, marks=[have("keras", pair[0]), pytest.mark.slow]) for pair in SLOW]

Report = Callable[..., Any]


@pytest.fixture
def distances(report: Report, request: pytest.FixtureRequest, backend: str, case: str) -> dict[str, Any]:
    """One process for all quick cases of a backend, one for all slow ones."""
    group = QUICK if (backend, case) in QUICK else SLOW
    return report("parity.py", backend, *(name for other, name in group if other == backend))[case]


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_weights_have_the_torch_engines_names(distances: dict[str, Any]) -> None:
    assert distances["names"] == []


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_patch_stride_and_drop_path_layers_are_the_torch_engines(distances: dict[str, Any]) -> None:
    assert distances["sizes"]


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_the_loss_is_the_torch_engines(distances: dict[str, Any]) -> None:
    assert distances["loss"] < 1e-5


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_gradients_of_every_parameter_are_the_torch_engines(distances: dict[str, Any]) -> None:
    assert distances["gradients"] < 1e-4
    assert distances["grad_norm"] < 1e-4


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_twenty_steps_follow_the_torch_engines_curve(distances: dict[str, Any]) -> None:
    assert distances["curve"] < 1e-4
    assert distances["fell"] > 0.01  # a flat curve would be followed by anything


@pytest.mark.parametrize(("backend", "case"), PAIRS)
def test_running_statistics_are_the_torch_engines(distances: dict[str, Any]) -> None:
    assert distances["statistics"] < 1e-4
