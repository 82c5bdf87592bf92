"""Rows of capabilities: a new row is used everywhere, and what the rows of GPUs set is undone."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from simmim.errors import UserError
from simmim.torch_engine.accelerators import ACCELERATORS, Accelerator, choose_device, choose_precision, describe_gpus
from simmim.torch_engine.perf.bench import device_memory
from simmim.torch_engine.perf.measure import Trial, peak_memory
from simmim.torch_engine.train.distributed import World, join, place

from . import tiny


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A row for PyTorch's meta device, ahead of the others. Returns the calls of its functions, as they happen."""
    calls: list[str] = []

    @contextlib.contextmanager
    def arithmetic(precision: str) -> Iterator[None]:
        calls.append(f"arithmetic {precision}")
        yield
        calls.append("restored")

    row = Accelerator(
        name="meta",
        find=lambda: None,
        has_bf16=lambda: True,
        autocasts=("bf16",),
        automatic=True,
        pins=True,
        device_name=lambda device: "Abacus 3000",
        total_memory=lambda device: 123,
        peak_memory=lambda device: 45,
        synchronize=lambda: calls.append("synchronize"),
        arithmetic=arithmetic,
        fit=lambda module: calls.append("fit"),
    )
    rows = {"meta": row, **ACCELERATORS}
    monkeypatch.setattr("simmim.torch_engine.accelerators.ACCELERATORS", rows)
    return calls


def test_auto_takes_the_first_automatic_row_that_is_found(fake: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto") == "meta"
    rows = {"meta": dataclasses.replace(Accelerator(name="meta", find=lambda: "is broken")), **ACCELERATORS}
    monkeypatch.setattr("simmim.torch_engine.accelerators.ACCELERATORS", rows)
    assert choose_device("auto") != "meta"
    with pytest.raises(UserError, match="device 'meta' is broken"):
        choose_device("meta")


def test_precision_is_that_of_the_row(fake: list[str]) -> None:
    assert choose_precision("auto", "meta") == "bf16"
    with pytest.raises(UserError, match="--precision fp16 is not for --device meta; use bf16 or fp32"):
        choose_precision("fp16", "meta")


def test_a_training_joins_and_leaves_by_the_row(fake: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with join("meta", "bf16") as world:
        place(torch.nn.Linear(2, 2), world.device)
    assert fake == ["arithmetic bf16", "fit", "restored"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device meta trains in one process, not 2"), join("meta"):
        pass


def test_measuring_asks_the_row(fake: list[str]) -> None:
    trial = Trial.__new__(Trial)
    trial.world = World(device=torch.device("meta"))
    trial.wait()
    assert fake == ["synchronize"]
    assert device_memory("meta") == 123
    assert peak_memory(torch.device("meta")) == 45


@pytest.mark.parametrize("pins", [True, False])
def test_a_batch_is_pinned_where_the_row_says_so(pins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(ACCELERATORS["cpu"], pins=pins)
    monkeypatch.setitem(ACCELERATORS, "cpu", row)
    update, pinned = tiny.update(tiny.config()), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(1) or tensor)
    update._to_device({"image": np.zeros((2, 3))})
    assert bool(pinned) == pins


def test_a_gpu_row_is_described_with_what_pytorch_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dataclasses.replace(
        ACCELERATORS["cuda"], find=lambda: None, device_name=lambda _: "RTX", built_for=lambda: "X 1"
    )
    missing = dataclasses.replace(ACCELERATORS["xpu"], find=lambda: "is not here", built_for=lambda: "Y 2")
    unbuilt = dataclasses.replace(ACCELERATORS["mps"], built_for=lambda: None)
    for row in (found, missing, unbuilt):
        monkeypatch.setitem(ACCELERATORS, row.name, row)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert describe_gpus() == {"cuda": "2 × RTX, X 1", "xpu": "none seen (torch is built for Y 2)"}


@pytest.mark.parametrize(("precision", "convolutions"), [("fp32", False), ("bf16", True)])
@pytest.mark.filterwarnings("error")
def test_fp32_on_cuda_has_no_tf32_in_products_and_convolutions(precision: str, convolutions: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        with ACCELERATORS["cuda"].arithmetic(precision):
            assert not matmul.allow_tf32
            assert cudnn.allow_tf32 == convolutions
        assert matmul.allow_tf32 and cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_a_tpu_multiplies_fp32_exactly_until_the_training_ends() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with ACCELERATORS["tpu"].arithmetic("bf16"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(torch, device)
    monkeypatch.setattr(module, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_precision("auto", device) == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_joining_on_cuda_sets_the_arithmetic_of_the_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.backends.cudnn.allow_tf32
    with join("cuda", precision) as world:
        assert world.device == torch.device("cuda", 0)
        assert torch.backends.cudnn.allow_tf32 == (before and precision != "fp32")
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(("device", "pinned", "numbered"), [("mps", False, False), ("xpu", True, True)])
def test_a_step_follows_the_rows_that_have_not_been_run(
    device: str, pinned: bool, numbered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's meta device takes the place of the hardware: shapes and calls are real, numbers are not."""
    calls: list[str] = []
    row = dataclasses.replace(ACCELERATORS[device], name="meta", find=lambda: None)
    monkeypatch.setattr("simmim.torch_engine.accelerators.ACCELERATORS", {"meta": row})
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none for meta
    optimizer = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: calls.append(str(place)))
    settings = tiny.config("vit", precision=choose_precision("fp32", choose_device("auto")), device="cpu")
    with join("meta", settings.precision) as world:
        step = tiny.update(settings, world=world)
        place(step.model, world.device)
        _, figures = step(0, tiny.batch(settings))
    assert (figures.device.type, figures.shape) == ("meta", (3,))
    assert ("pin" in calls, "meta:0" in calls) == (pinned, numbered)
    for precision in row.autocasts:
        assert choose_precision(precision, "meta") == precision
    assert not row.compiles and not row.decodes_jpegs
