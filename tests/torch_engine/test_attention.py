"""Attention kernels of GPUs: equal results on the CPU; what cannot be honoured is refused. See tests/nullgpu too."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from simmim.config.toml import read_toml, to_toml
from simmim.config.training import Gpu
from simmim.errors import UserError
from simmim.torch_engine.models.attention import (
    asked_gpu,
    attention_kernels,
    attention_layers,
    check_attention,
    set_attention,
)
from simmim.torch_engine.train import storage

from . import tiny
from .test_savings import Savings, assert_equal_but_for_rounding, outcome


@pytest.mark.parametrize("kind", ["vit", "beit", "swin"])
def test_fused_attention_and_products_give_the_same_loss_and_gradients(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, found = storage.build_model, {}
    for way in ("efficient", "products"):

        def built(settings: Any, way: str = way) -> Any:
            model = build(settings)
            set_attention(model.encoder.backbone, way)
            assert {layer.fused_attn for layer in attention_layers(model.encoder.backbone)} == {way == "efficient"}
            return model

        monkeypatch.setattr(storage, "build_model", built)
        found[way] = outcome(tiny.config(kind), Savings())
    assert_equal_but_for_rounding(found["efficient"], found["products"])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("vit", {"device": "cpu"}, "--gpu.attention flash is for --device cuda, not cpu; use auto"),
        ("resnet18", {}, "--gpu.attention flash has nothing to choose in resnet18, whose kernels are fixed; use auto"),
        ("beit", {}, "takes no learned bias, which beit_base_patch16_224 has; use auto, efficient or products"),
        ("vit", {"precision": "fp32"}, "is not for --precision fp32; use bf16 or fp16, or auto, efficient or products"),
        ("vit", {}, "--gpu.attention flash needs compute capability 8.0, this GPU has 7.5; use auto or efficient"),
    ],
)
def test_a_kernel_that_cannot_be_used_is_refused_in_one_line(
    kind: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    config = tiny.config(kind, gpu={"attention": "flash"}, **{"device": "cuda", "precision": "bf16"} | settings)
    with pytest.raises(UserError) as caught:
        check_attention(config, tiny.encoder(kind).backbone)
    assert message in str(caught.value)


def test_the_kernels_that_are_allowed_come_back_at_the_end() -> None:
    def allowed() -> list[bool]:
        names = ("flash", "mem_efficient", "cudnn", "math")
        return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]

    before = allowed()
    with attention_kernels("efficient"):
        assert allowed() == [False, True, False, False]
    with attention_kernels("auto"):
        assert allowed() == before
    assert allowed() == before


def test_a_resumed_run_keeps_its_attention_unless_another_is_named(tmp_path: Path) -> None:
    began = tiny.config(gpu={"attention": "products"}, out=str(tmp_path))
    (tmp_path / "config.toml").write_text(to_toml(began))
    assert read_toml(tmp_path / "config.toml", type(began)).gpu == Gpu(attention="products")
    again = dataclasses.replace(began, gpu=Gpu())
    assert asked_gpu(again, "cuda") == Gpu()  # there is no checkpoint, so nothing is resumed
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert asked_gpu(again, "cuda") == Gpu(attention="products")
    assert asked_gpu(again, "cpu") == Gpu()
    assert asked_gpu(dataclasses.replace(again, gpu=Gpu(attention="flash")), "cuda") == Gpu(attention="flash")
