"""Compiled steps on the GPU that computes nothing, in a process of its own, with caches of its own.

`python -m nullgpu.compiled FOLDER CASE ...` prints a JSON line for each case: what a compiled pretraining of three
epochs did; the case "cubins" says which kernels spill. `torchrun … -m nullgpu.compiled FOLDER CASE` does so in several
processes. Dynamo traces, Inductor writes Triton, and ptxas compiles it for the GPU that `NULLGPU_SM` names; only the
kernels do nothing.
"""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch_engine import tiny

from simmim.config.pretraining import PretrainConfig
from simmim.torch_engine.models.masked_image_model import PretrainStep
from simmim.torch_engine.train.pretrain import pretrain
from simmim.torch_engine.train.trainer import TorchTrainer
from simmim.torch_engine.train.update import Batch, Update

BATCH, EVALUATED = 4, 3
IMAGES = 10 + EVALUATED  # an epoch ends within a batch
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "vit, visible": ("vit", {"encode": "visible", "head": {"kind": "transformer", "width": 32, "depth": 1}}),
    "vit, drop path": ("vit", {"drop_path": 0.2}),
    "vit, checkpointing": ("vit", {"checkpoint_activations": True}),
    "vit, accumulation": ("vit", {"accumulate_steps": 2}),
    "vit, descriptor": ("vit", {"objectives": [{"kind": "descriptor", "words": 8}]}),
    "vit, ema": ("vit", {"objectives": [{"kind": "pixels"}, {"kind": "ema"}]}),
    "vit, sharded": ("vit", {"shard": True}),
    "beit": ("beit", {}),
    "swin": ("swin", {}),
    "resnet18": ("resnet18", {}),
}
"""Family and settings by name."""

MODES = {"reduce-overhead": ("vit", "swin", "resnet18"), "max-autotune-no-cudagraphs": ("vit",)}
"""Cases that are compiled in other modes of `torch.compile` too, as `CASE by MODE`. The first uses CUDA graphs."""

CUBINS = "cubins"
"""The name of what is told of all kernels in the caches."""

_normalize, _call, _read = PretrainStep.normalize, Update.__call__, TorchTrainer.read


def _ask(self: PretrainStep, image: torch.Tensor) -> torch.Tensor:
    return _normalize(self, image) * max(1, int(image.max().item()) // 256)


def _print(self: PretrainStep, image: torch.Tensor) -> torch.Tensor:
    print(f"images {tuple(image.shape)}", file=sys.stderr)
    return _normalize(self, image)


def _drop_last(self: Update, step: int, batch: Batch) -> Any:
    """Take a smaller batch at the end of an epoch, as a loader that knows epochs would give."""
    return _call(self, step, {name: rows[: 2 if step == 2 else BATCH] for name, rows in batch.items()})


FAULTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a question to the device": (PretrainStep, "normalize", _ask),
    "a print": (PretrainStep, "normalize", _print),
    "a smaller batch": (Update, "__call__", _drop_last),
}
"""What replaces which function of the case "vit", by name."""


def _read_nothing(self: TorchTrainer, figures: Sequence[torch.Tensor]) -> list[list[float]]:
    """Fetch the figures, which nothing has computed, and give zeros: a run would end for garbage that is not finite."""
    return [[0.0] * len(row) for row in _read(self, figures)]


class Counting:
    """Count the launches of each call of an `Update`, and those within CUDA graphs."""

    def __init__(self) -> None:
        self.launches: list[int] = []
        self.in_graphs: list[int] = []
        self._null = ctypes.CDLL("libcuda.so.1")
        self._null.nullgpu_report.restype = self._null.nullgpu_in_graphs.restype = ctypes.c_long

    def __call__(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(update: Update, step: int, batch: Batch) -> Any:
            self._null.nullgpu_reset()
            self._null.nullgpu_in_graphs()
            found = call(update, step, batch)
            self.launches.append(int(self._null.nullgpu_report(b"/dev/null")))
            self.in_graphs.append(int(self._null.nullgpu_in_graphs()))
            return found

        return counted


def write_images(folder: Path) -> None:
    """Write noise images, as many as make an epoch end within a batch."""
    folder.mkdir(exist_ok=True)
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def configuration(name: str, folder: Path, **more: Any) -> PretrainConfig:
    """Return the configuration of a case: three epochs, with an evaluation every two steps."""
    kind, settings = CASES[name]
    if "visible" in name:
        settings = settings | {"mask": {"kind": "random", "ratio": 0.5, "cell": 16}}
    settings = settings | {"epochs": 3.0, "val_images": EVALUATED, "picture_every_steps": 2, "batch_size": BATCH}
    settings |= {"data": str(folder / "images"), "out": str(folder / re.sub(r"\W+", "_", name)), "fresh": True}
    return tiny.config(kind, **(settings | {"device": "cuda", "precision": "bf16", "compile": True} | more))


def spilled(cache: Path) -> dict[str, int]:
    """Return the bytes of registers that a thread spills to memory, by kernel of a Triton cache, in its best variant.

    Inductor leaves out a variant that spills where another does not.

    cuobjdump shows which kernels use local memory at all; ptxas then says what of that are spills, and not a call's
    arguments (of an assertion) or an array (of a sine).
    """
    from triton.backends import nvidia

    tools, found = Path(nvidia.__file__).parent / "bin", {}
    for cubin in cache.rglob("*.cubin"):
        used = _say(tools / "cuobjdump", "--dump-resource-usage", cubin)
        spills = 0
        if any(int(each) for each in re.findall(r"(?:STACK|LOCAL):(\d+)", used)):
            arch = json.loads(cubin.with_suffix(".json").read_text())["target"]["arch"]
            ptxas = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
            target = f"sm_{arch}{'a' if arch >= 90 else ''}"  # as Triton does
            said = _say(ptxas, "-v", "--gpu-name", target, "-o", os.devnull, cubin.with_suffix(".ptx"))
            spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
        found[cubin.stem] = min(spills, found.get(cubin.stem, spills))
    return found


def _say(*command: Any) -> str:
    done = subprocess.run([*command], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def train(config: PretrainConfig, fault: str = "", mode: str | None = None) -> dict[str, Any]:
    """Pretrain, and return launches of each step, the compiler's counts, the seconds, and what went wrong."""
    torch.compiler.reset()
    counters.clear()
    clear_compilation_metrics()
    counting, begun, error = Counting(), time.perf_counter(), ""
    compile_ = nn.Module.compile
    patches = [mock.patch.object(*FAULTS[fault])] if fault else []
    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        stack.enter_context(mock.patch.object(Update, "__call__", counting(Update.__call__)))
        if mode is not None:
            stack.enter_context(
                mock.patch.object(nn.Module, "compile", lambda self, **settings: compile_(self, mode=mode, **settings))
            )
        stack.enter_context(mock.patch.object(TorchTrainer, "read", _read_nothing))
        try:
            pretrain(config)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    stats = counters["stats"]
    return {
        "error": error,
        "launches": counting.launches,
        "in_graphs": counting.in_graphs,
        "graphs": stats["unique_graphs"],
        "breaks": [reason.splitlines()[0] for reason in counters["graph_break"]],
        "recompiles": [each.recompile_reason for each in get_compilation_metrics() if each.recompile_reason],
        "seconds": round(time.perf_counter() - begun, 1),
    }


def report(name: str, folder: Path) -> None:
    """Print a line about a case, a fault, or a case with CUDA graphs."""
    case, _, how = name.partition(" by ")
    if case in FAULTS:
        found = train(configuration("vit", folder), fault=case)
    else:
        found = train(configuration(case, folder), mode=how or None)
        eager = train(configuration(case, folder, compile=False))
        found["eager"] = eager["launches"]
        found["error"] = found["error"] or eager["error"]
    print(json.dumps({"case": name, **found}), flush=True)


def report_cubins() -> None:
    """Print a line about all kernels that the cases with these caches have compiled."""
    cubins = spilled(Path(os.environ["TRITON_CACHE_DIR"]))
    local = {name: count for name, count in cubins.items() if count}
    print(json.dumps({"case": CUBINS, "kernels": len(cubins), "spilled": local}), flush=True)


def main(folder: Path, cases: list[str]) -> None:
    write_images(folder / "images")
    for name in cases:
        if name == CUBINS:
            report_cubins()
        else:
            report(name, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
