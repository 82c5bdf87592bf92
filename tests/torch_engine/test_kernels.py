"""CPU kernels: they change nothing but speed, and a run keeps those that it began with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simmim.config.pretraining import PretrainConfig
from simmim.config.toml import read_toml
from simmim.config.training import Kernels
from simmim.torch_engine.models.kernels import has_onednn
from simmim.torch_engine.models.savings import Savings
from simmim.torch_engine.perf import kernel_choice
from simmim.torch_engine.perf.kernel_choice import choose_kernels, faster, measure_kernels
from simmim.torch_engine.train.pretrain import pretrain

from . import tiny
from .test_savings import assert_equal_but_for_rounding, outcome

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")
USUAL = Kernels(linear="default", attention="fused", memory_format="channels_last")
Measured = dict[str, dict[str, float]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Times to be measured."""
    times: Measured = {}
    monkeypatch.setenv("SIMMIM_KERNELS", "measure")
    monkeypatch.setattr(kernel_choice, "measure_kernels", lambda *_: times)
    return times


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the cache, in a directory that does not exist yet."""
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_choice, "_SECONDS", 0.01)
    return tmp_path / "cache" / "kernels.json"


def main_says(number: int) -> int:
    return number


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        pytest.param("vit", {"linear": "onednn"}, marks=needs_onednn),
        pytest.param("swin", {"linear": "onednn"}, marks=needs_onednn),
        ("vit", {"attention": "products"}),
        ("beit", {"attention": "products"}),
    ],
)
def test_kernels_leave_loss_and_gradients(kind: str, kernels: dict[str, Any]) -> None:
    settings = tiny.config(kind, kernels=USUAL)
    other = dataclasses.replace(settings, kernels=dataclasses.replace(USUAL, **kernels))
    assert_equal_but_for_rounding(outcome(other, Savings()), outcome(settings, Savings()))


def test_the_memory_format_leaves_loss_and_gradients() -> None:
    settings = tiny.config("resnet18", kernels=USUAL)
    other = dataclasses.replace(settings, kernels=dataclasses.replace(USUAL, memory_format="contiguous"))
    mine, usual = outcome(other, Savings()), outcome(settings, Savings())
    for name, expected in usual.items():  # batch norms sum in another order, 1e-4 of the largest gradient apart
        torch.testing.assert_close(mine[name], expected, rtol=0, atol=1e-3 * float(expected.abs().max()), msg=name)


def calls(settings: PretrainConfig, operation: str) -> int:
    with torch.profiler.profile() as profile:
        outcome(settings, Savings())
    return sum(row.count for row in profile.key_averages() if row.key == operation)


@needs_onednn
def test_linear_layers_are_those_of_onednn_where_chosen() -> None:
    product, settings = "mkldnn::_linear_pointwise", tiny.config("vit", kernels=USUAL)
    chosen = dataclasses.replace(settings, kernels=dataclasses.replace(USUAL, linear="onednn"))
    assert calls(settings, product) == 0
    assert calls(chosen, product) > 4 * settings.model_args["depth"]  # forward, and the gradient of the input


def test_attention_is_not_fused_where_products_are_chosen() -> None:
    fused, settings = "aten::scaled_dot_product_attention", tiny.config("beit", kernels=USUAL)
    chosen = dataclasses.replace(settings, kernels=dataclasses.replace(USUAL, attention="products"))
    assert (calls(settings, fused), calls(chosen, fused)) == (settings.model_args["depth"], 0)


def test_convolutions_are_channels_last_where_chosen() -> None:
    settings = tiny.config("resnet18", kernels=USUAL)
    assert tiny.convolutions_not_channels_last(tiny.update(settings), tiny.batch(settings)) == []
    settings = dataclasses.replace(settings, kernels=dataclasses.replace(USUAL, memory_format="contiguous"))
    assert tiny.convolutions_not_channels_last(tiny.update(settings), tiny.batch(settings)) != []


def test_another_kernel_is_used_if_it_is_clearly_faster() -> None:
    assert faster({"default": 1.0, "onednn": 0.94}) == "onednn"
    assert faster({"default": 1.0, "onednn": 0.97}) == "default"
    assert faster({"default": 1.0, "onednn": 1.2}) == "default"


def test_a_new_run_takes_the_faster_kernels(measured: Measured) -> None:
    measured["attention"] = {"fused": 2.0, "products": 1.0}
    assert choose_kernels(tiny.config(), main_says).attention == "products"
    measured["attention"] = {"fused": 1.0, "products": 2.0}
    assert choose_kernels(tiny.config(), main_says) == USUAL


def test_kernels_that_the_user_names_are_used(measured: Measured) -> None:
    measured["attention"] = {"fused": 2.0, "products": 1.0}
    assert choose_kernels(tiny.config(kernels=Kernels(attention="fused")), main_says).attention == "fused"


def test_every_rank_takes_the_kernels_of_rank_0(measured: Measured) -> None:
    measured["attention"] = {"fused": 2.0, "products": 1.0}
    told: list[int] = []

    def rank_0(number: int) -> int:
        told.append(number)
        return number

    chosen = choose_kernels(tiny.config(), rank_0)
    measured["attention"] = {"fused": 1.0, "products": 2.0}
    assert choose_kernels(tiny.config(), lambda _number: told[0]) == chosen


def test_a_resumed_run_keeps_its_kernels(measured: Measured, tmp_path: Path) -> None:
    measured["attention"] = {"fused": 2.0, "products": 1.0}
    config = tiny.config(out=str(tmp_path / "run"), steps=1, val_images=0)
    pretrain(config)
    measured["attention"] = {"fused": 1.0, "products": 2.0}
    pretrain(config)
    assert read_toml(tmp_path / "run" / "config.toml", PretrainConfig).kernels.attention == "products"
    pretrain(dataclasses.replace(config, fresh=True))
    assert read_toml(tmp_path / "run" / "config.toml", PretrainConfig).kernels.attention == "fused"


@pytest.mark.parametrize(("cpu", "linear"), [("AMD EPYC", "onednn"), ("Intel Xeon", "default")])
@needs_onednn
def test_a_run_of_version_0_1_resumes_with_its_rules(
    measured: Measured, tmp_path: Path, cpu: str, linear: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured["linear"] = {"default": 1.0, "onednn": 1.0}
    monkeypatch.setattr("simmim.torch_engine.models.kernels.cpu_name", lambda: cpu)
    (tmp_path / "config.toml").write_text('model = "vit_tiny_patch16_224"\n')
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    assert choose_kernels(tiny.config(out=str(tmp_path)), main_says).linear == linear


@pytest.mark.parametrize(
    ("kind", "precision", "expected"),
    [
        pytest.param("vit", "fp32", {"linear", "attention"}, marks=needs_onednn),
        ("beit", "bf16", {"attention"}),
        ("resnet18", "fp32", {"memory_format"}),
        ("convnext", "bf16", {"memory_format"}),
    ],
)
@pytest.mark.usefixtures("cache")
def test_kernels_with_a_choice_are_timed(kind: str, precision: str, expected: set[str]) -> None:
    found = measure_kernels(tiny.config(kind, precision=precision))
    assert found.keys() == expected
    assert all(len(seconds) == 2 and min(seconds.values()) > 0 for seconds in found.values())


@needs_onednn
def test_linear_layers_of_a_head_alone_are_no_choice(cache: Path) -> None:
    arguments = tiny.KINDS["convnext"].arguments | {"head_hidden_size": 20}
    assert "linear" not in measure_kernels(tiny.config("convnext", model_args=arguments))


def test_a_measurement_draws_no_random_numbers_of_the_run(cache: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    measure_kernels(tiny.config())
    assert torch.equal(torch.get_rng_state(), before)


def test_times_are_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure_kernels(tiny.config())
    monkeypatch.delattr(kernel_choice, "_measure")
    assert measure_kernels(tiny.config()) == first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"b": "c"}}', "\udcff"])
def test_a_corrupt_cache_is_ignored_and_rewritten(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content.encode(errors="surrogateescape"))
    found = measure_kernels(tiny.config())
    assert list(json.loads(cache.read_text()).values()) == list(found.values())


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.write_text("a file where the directory should be")
    assert measure_kernels(tiny.config())
