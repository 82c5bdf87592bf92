"""The training step as TorchTPU lowers it: run on XLA's CPU it gives eager PyTorch's numbers; compiled it fits, or not.

Nothing runs on a TPU.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simmim.commands.tpu_check import TpuCheckConfig, tpu_check
from simmim.config.validation import from_settings
from simmim.torch_engine.tpu import lower
from simmim.torch_engine.train.storage import save_hub

from . import tiny

_MISSING = [name for name in ("torch_tpu", "libtpu", "jax") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"{', '.join(_MISSING)} not installed: pip install 'simmim[tpu]'"),
    pytest.mark.timeout(900),
]

# The quick one in a process; those that add little to it in another.
QUICK = ["vit_tiny_patch16_224 depth=2 embed_dim=48"]
SLOW = [
    "swin_tiny_patch4_window7_224 embed_dim=24 depths=[1,1,2] num_heads=[2,4,4] window_size=4 visible",
    "resnet18 layers=[1,1,1,1] channels=[8,16,16,32]",
    "beit_base_patch16_224 depth=2 embed_dim=48 num_heads=3 use_rel_pos_bias=false use_shared_rel_pos_bias=true",
    "swin_tiny_patch4_window7_224 embed_dim=24 depths=[1,2] num_heads=[2,4] window_size=4",
]


@functools.cache
def distances(*cases: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, str(Path(__file__).with_name("lower_and_run.py")), *cases]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("words", [*QUICK, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)])
def test_a_lowered_step_equals_an_eager_one(words: str) -> None:
    found = distances(*(QUICK if words in QUICK else SLOW))[words]
    assert found["moved"] > 5e-5
    assert found["loss"] < 1e-5
    assert found["gradients"] < 1e-4
    assert found["parameters"] < 1e-5


VIT_B = {"model": "vit_base_patch16_224", "precision": "bf16"}
FORWARD_AND_BACKWARD = 103e9  # FLOP of an image, by simmim.torch_engine.perf.cost
STATE = 12 * 86.4e6  # bytes: parameters and AdamW's two averages


def test_a_small_step_compiles_for_a_tpu() -> None:
    tiny = {"model": "vit_tiny_patch16_224", "model_args": {"depth": 1, "embed_dim": 48}, "image_size": (64, 64)}
    report = tpu_check(TpuCheckConfig(**tiny, batch_size=8))
    assert report.fits
    assert 0 < report.hbm["temporaries"] < report.hbm["total"] < 2**30


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_vit_b_fits_at_128_images_a_device(topology: str) -> None:
    report = tpu_check(TpuCheckConfig(**VIT_B, batch_size=128, topology=topology))
    assert report.fits
    assert 8 * 2**30 < report.hbm["total"] < report.available
    assert report.hbm["arguments"] == pytest.approx(STATE + 128 * 224 * 224 * 3, rel=0.02)
    assert report.hbm["aliased"] == pytest.approx(STATE, rel=0.01)
    assert report.flops is not None
    assert 0.9 < report.flops / (128 * FORWARD_AND_BACKWARD) < 1.02  # attention's kernels are not counted
    if topology == "v5e:1x1":  # of the v6e's program jaxlib 0.10.2 cannot read an operation
        assert report.kernels == 36
        assert report.collectives is not None
        assert not any(report.collectives.values())


@pytest.mark.slow
def test_vit_b_does_not_fit_at_512_images_a_device() -> None:
    report = tpu_check(TpuCheckConfig(**VIT_B, batch_size=512, topology="v5e:1x1"))
    assert (report.fits, report.hbm, report.flops) == (False, {}, None)
    assert report.needed is not None
    assert report.needed > report.available == round(15.75 * 2**30)


@pytest.mark.slow
def test_a_topology_that_does_not_exist_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^topology 'v9:1x1' is not known \(.*\); use one like v4:2x2x1, v5e:1x1"):
        tpu_check(TpuCheckConfig(topology="v9:1x1"))


def test_a_batch_that_does_not_divide_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "topology_devices", lambda _: [object()] * 8)  # libtpu is for processes of their own
    with pytest.raises(ValueError, match=r"^batch size 30 does not divide among the 8 devices of v5e:2x4 × 1 .* of 8$"):
        lower.compile_step(TpuCheckConfig(batch_size=30), "v5e:2x4")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "clusters", "sigreg", "infonce", "teacher", "descriptor"])
def test_the_step_of_every_objective_compiles_for_a_tpu(kind: str, tmp_path: Path) -> None:
    objective: dict[str, Any] = {"kind": kind}
    if kind == "teacher":
        backbone = tiny.encoder("vit", size=(64, 64)).backbone
        save_hub(tmp_path, backbone, backbone.state_dict(), tiny.config("vit"))
        objective["source"] = str(tmp_path)
    small = {"model": "vit_tiny_patch16_224", "model_args": {"depth": 1, "embed_dim": 48}, "image_size": (64, 64)}
    report = tpu_check(from_settings(TpuCheckConfig, {**small, "batch_size": 8, "objectives": [objective]}))
    assert report.fits
    assert 0 < report.hbm["temporaries"] < report.hbm["total"] < 2**30
    assert report.hbm["aliased"] > 0  # the new state takes the place of the old


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kernels"), [("vit_tiny_patch16_224", 3), ("beit_base_patch16_224", 0)])
def test_bf16_attention_is_by_torchtpus_kernel_unless_it_has_a_bias(model: str, kernels: int) -> None:
    """`simmim advise` counts on it (`simmim.torch_engine.perf.cost`): forward, queries, keys and values."""
    small = {"model_args": {"depth": 1, "embed_dim": 48, "num_heads": 3}, "image_size": (64, 64), "batch_size": 8}
    assert tpu_check(TpuCheckConfig(model=model, **small)).kernels == kernels
