"""Every kind of step on the GPU that computes nothing, in a process of its own.

`python -m nullgpu.steps CASE ...` prints a JSON line for each case: its name, what went wrong ("" if nothing) and how
many kernels a step launched. A name of `FAULTS` is the case "vit, bf16" with that fault put in.
"""

import ctypes
import dataclasses
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch_engine import tiny

from simmim.config.pretraining import PretrainConfig
from simmim.torch_engine.accelerators import choose_device
from simmim.torch_engine.models.attention import attention_kernels
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.perf.trial import random_batch
from simmim.torch_engine.train.distributed import World
from simmim.torch_engine.train.storage import save_hub
from simmim.torch_engine.train.update import Update

GPU = World(device=torch.device("cuda", 0))
FAMILIES = ("vit", "beit", "beit with a shared bias", "swin", "swinv2", "resnet18", "convnext", "regnet")
PRECISIONS = ("fp32", "bf16", "fp16")
_VISIBLE = {"encode": "visible", "head": {"kind": "transformer", "width": 32, "depth": 1}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "hog": {"target": {"kind": "hog"}, "loss": {"kind": "mse"}},
    "normalized": {"target": {"kind": "normalized"}},
    "pixel clusters": {
        "target": {"kind": "clusters", "clusters": 8, "centres": [[0.0, 0.0, float(each)] for each in range(8)]},
        "loss": {"kind": "cross_entropy"},
    },
    "descriptor": {"objectives": [{"kind": "descriptor"}]},
    "descriptor whole": {"objectives": [{"kind": "descriptor", "see": "whole"}]},
    "teacher": {"objectives": [{"kind": "teacher"}]},
    "pixels + ema": {"objectives": [{"kind": "pixels"}, {"kind": "ema"}]},
    "latent clusters": {"objectives": [{"kind": "clusters"}]},
    "sigreg": {"objectives": [{"kind": "sigreg"}]},
    "infonce": {"objectives": [{"kind": "infonce"}]},
}
ATTENTION = {"vit": ("efficient", "flash", "products"), "beit": ("efficient", "products"), "swin": ("efficient",)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{kind}, {precision}": (kind, {"precision": precision}) for kind in FAMILIES for precision in PRECISIONS},
    **{f"vit, {name}": ("vit", {"precision": "bf16", **settings}) for name, settings in OBJECTIVES.items()},
    **{
        f"resnet18, {name}": ("resnet18", {"precision": "bf16", **OBJECTIVES[name]})
        for name in ("descriptor whole", "teacher", "pixels + ema", "sigreg")
    },
    "vit, visible": ("vit", {"precision": "bf16", **_VISIBLE}),
    "vit, visible, fp16": ("vit", {"precision": "fp16", **_VISIBLE}),
    "vit, descriptor, visible": ("vit", {"precision": "bf16", "encode": "visible", **OBJECTIVES["descriptor"]}),
    "vit, eight masks": ("vit", {"precision": "bf16", "masks_per_image": 8, **OBJECTIVES["pixels + ema"]}),
    "vit, accumulation": ("vit", {"precision": "bf16", "accumulate_steps": 2}),
    "resnet18, accumulation": ("resnet18", {"precision": "bf16", "accumulate_steps": 2}),
    "vit, checkpointing": ("vit", {"precision": "bf16", "checkpoint_activations": True}),
    "swin, checkpointing": ("swin", {"precision": "bf16", "checkpoint_activations": True}),
    "vit, drop path": ("vit", {"precision": "bf16", "drop_path": 0.2}),
    "swin, drop path, fp16": ("swin", {"precision": "fp16", "drop_path": 0.2}),
    "vit, clipped": ("vit", {"precision": "bf16", "clip_grad": 1.0}),
    **{
        f"{kind}, attention {way}": (kind, {"precision": "bf16", "gpu": {"attention": way}})
        for kind, ways in ATTENTION.items()
        for way in ways
    },
    "vit, five channels": (
        "vit",
        {"precision": "bf16", "channels": 5, "mean": (0.5,) * 5, "std": (0.2,) * 5, "decode": "cpu"},
    ),
}
"""Family and settings by name. To cover a new objective, add it to `OBJECTIVES`."""
PARTS = {"flash": "flash_fwd", "efficient": "fmha_cutlassF"}
"""What the names of fused attention kernels contain."""


class NoPageableCopies(TorchDispatchMode):
    """Refuse copies to the device of arrays that are not in pinned memory: the host would wait for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            source = args[0]
            device = kwargs.get("device")
            if device is not None and device.type == "cuda" and source.device.type == "cpu" and source.numel() > 1:
                assert source.is_pinned(), f"a copy of {tuple(source.shape)} to the device is not from pinned memory"
        return func(*args, **kwargs)


_normalize, _clip, _to_device = PretrainStep.normalize, Update._clip, Update._to_device


def _norm_that_is_asked(self: Update) -> Tensor:
    norm = _clip(self)
    return norm / norm if norm > 5 else norm


def _send_unpinned(self: Update, batch: dict[str, Any]) -> dict[str, Tensor]:
    self._pins = False
    return _to_device(self, batch)


FAULTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "cpu tensor": (PretrainStep, "normalize", lambda self, image: _normalize(self, image) + torch.zeros(1, 3, 1, 1)),
    "wrong dtype": (PretrainStep, "normalize", lambda self, image: _normalize(self, image).double()),
    "wait": (Update, "_clip", _norm_that_is_asked),
    "copy of a constant": (
        PretrainStep,
        "normalize",
        lambda self, image: _normalize(self, image) * torch.tensor([1.0, 1.0], device=image.device)[0],
    ),
    "unpinned copy": (Update, "_to_device", _send_unpinned),
}
"""What replaces which function, by name."""


def configuration(name: str, folder: Path) -> PretrainConfig:
    """Return the configuration of a case. A teacher is a small ResNet, saved in the folder."""
    kind, settings = CASES[name]
    if "visible" in name:
        settings = settings | {"mask": {"kind": "random", "ratio": 0.5, "cell": 16}}
    objectives = [dict(each) for each in settings.get("objectives", ())]
    for each in objectives:
        if each["kind"] == "teacher":
            backbone = tiny.encoder("resnet18").backbone
            save_hub(folder, backbone, backbone.state_dict(), tiny.config("resnet18"))
            each["source"] = str(folder)
    more = {"objectives": objectives} if objectives else {}
    return dataclasses.replace(tiny.config(kind, **(settings | more)), device="cuda")


def step_twice(config: PretrainConfig) -> dict[str, int]:
    """Step twice, the second time without any wait allowed; return how often that launched which kernel."""
    update = tiny.update(config, world=GPU)
    batch = random_batch(config, config.batch_size, update.model)  # type: ignore[arg-type]
    update(0, batch)  # allocates and builds what is kept
    null = ctypes.CDLL("libcuda.so.1")
    null.nullgpu_reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with NoPageableCopies():
            _, figures = update(1, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert figures.device == GPU.device, f"the figures are on {figures.device}"
    with tempfile.NamedTemporaryFile("r") as kernels:
        null.nullgpu_report(kernels.name.encode())
        rows = (line.rstrip("\n").split("\t") for line in kernels)
        return {name: int(calls) for calls, name in rows}


def report(name: str, config: PretrainConfig) -> None:
    gc.collect()
    kernels, error = {}, ""
    try:
        with attention_kernels(config.gpu.attention):
            kernels = step_twice(config)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    attention = {way: sum(calls for kernel, calls in kernels.items() if part in kernel) for way, part in PARTS.items()}
    found = {"case": name, "error": error, "launches": sum(kernels.values()), "attention": attention}
    print(json.dumps(found), flush=True)


def report_choices() -> None:
    """Print which attention kernel PyTorch would choose for a ViT in bf16, before and after a device is chosen."""
    q = torch.empty(2, 3, 197, 64, dtype=torch.bfloat16, device="cuda")
    bias = torch.empty(1, 3, 197, 197, dtype=torch.bfloat16, device="cuda")
    before = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    choose_device("cuda")
    after, biased = (SDPBackend(torch._fused_sdp_choice(q, q, q, each)).name for each in (None, bias))
    with attention_kernels("cudnn"):
        named = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    print(json.dumps({"case": "choices", "before": before, "after": after, "biased": biased, "named": named}))


def main(cases: list[str]) -> None:
    report_choices()
    with tempfile.TemporaryDirectory() as folder:
        for name in cases:
            if name in FAULTS:
                with mock.patch.object(*FAULTS[name]):
                    report(name, configuration("vit, bf16", Path(folder)))
            else:
                report(name, configuration(name, Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
