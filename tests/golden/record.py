"""Train the small configurations of this folder and keep what must not change: every figure and the final weights.

    python tests/golden/record.py --write            # train all of curves/*.toml and write their curves/*.json
    python tests/golden/record.py --write NAME ...   # only these

Write anew only where a change is meant to train something else, and say so in the commit. `curves/*.toml` stay as they
are: they are written as version 0.1 wrote them, and prove that such configurations still load.

Each run is read through public surfaces only (metrics.jsonl, `simmim.load_model`, RUN/encoder, RUN/model), so that
modules may move.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import simmim
from simmim.cli import main

HERE = Path(__file__).parent
CURVES = HERE / "curves"

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "opencv-python-headless", "grain", "keras", "jax")
CURVE_TOLERANCE = 2e-4
"""Largest relative difference of losses and gradient norms on another machine."""
DETECTION_TOLERANCE = 2e-2
"""The same for detection, whose clipped and matched boxes make much of little: 4e-3 from one instruction set to another
(`ATEN_CPU_CAPABILITY`, `ONEDNN_MAX_CPU_ISA`), where the other configurations stay below 3e-5, and of norms 2e-4."""
WEIGHT_TOLERANCE = 1e-4
"""Largest difference of sums over all weights on another machine, relative to the sum of absolute values."""

# Keras takes one backend a process. One thread of XLA's, whatever the number of cores: its sums depend on it.
KERAS = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "PJRT_NPROC": "1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false",
}

_EVERY_STEP = {"step", "epoch", "loss", "lr", "grad_norm", "images_per_second"}
_MEASURED = {"wall_seconds", "input_wait", "process_memory_gib"}


def machine() -> dict[str, str]:
    """What the last bits of a result depend on."""
    found = {"cpu": _processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    """Its model name, with the numbers that tell processors apart where a virtual machine hides their names."""
    facts = Path("/proc/cpuinfo")
    if not facts.is_file():
        return f"{platform.processor()} {platform.machine()}"
    lines = [line.partition(":") for line in facts.read_text().split("\n\n")[0].splitlines()]
    values = {name.strip(): value.strip() for name, _, value in lines}
    numbers = (f"{name} {values[name]}" for name in ("cpu family", "model", "stepping") if name in values)
    return ", ".join([values.get("model name", platform.machine()), *numbers])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums of several threads may come in another order, and the models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(config: Path, out: Path, *, data: Path | None = None) -> None:
    """Run `simmim` on a configuration in this process, or in one of its own where Keras trains."""
    settings = tomllib.loads(config.read_text(encoding="utf-8"))
    command = ["finetune", settings["task"]] if "task" in settings else ["pretrain"]
    words = [*command, "--config", str(config), "--out", str(out)]
    if data is not None:
        words += ["--data", str(data)]
    if settings.get("engine") == "keras":
        command = [sys.executable, "-m", "simmim", *words]
        done = subprocess.run(command, env=os.environ | KERAS, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return
    with one_thread():
        assert main(words) == 0


def train_golden(name: str, folder: Path) -> dict[str, Any]:
    """Train `curves/NAME.toml` in `folder`; the record of its run."""
    config, out = CURVES / f"{name}.toml", folder / "run"
    settings = tomllib.loads(config.read_text(encoding="utf-8"))
    data = None
    if settings.get("task") in ("segment", "detect"):
        data = folder / "data"
        draw_shapes(data)
    train(config, out, data=data)
    return record(out)


def record(run: Path) -> dict[str, Any]:
    """What is kept of a run: figures of each step, those of the last evaluation, and checksums of the weights."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    found: dict[str, Any] = {
        "losses": [row["loss"] for row in rows],
        "grad_norms": [row["grad_norm"] for row in rows],
        "learning_rates": [row["lr"] for row in rows],
    }
    # The components of a loss came after version 0.1, which wrote the records; the loss is their sum.
    names = [name for name in rows[-1] if name not in _EVERY_STEP | _MEASURED and not name.startswith("loss/")]
    figures = {name: rows[-1][name] for name in names}
    if "val_loss" in figures:
        found["val_loss"] = figures.pop("val_loss")
    if figures:
        found["figures"] = figures
    found["checksum"] = {name: checksum(weights) for name, weights in final_weights(run).items()}
    return found | {"machine": machine()}


def final_weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of a fine-tuning its best model, of a pretraining the whole model and the encoder that is written beside it."""
    if (run / "model").is_dir():
        return {"model": load_file(run / "model" / "model.safetensors")}
    whole, encoder = simmim.load_model(run).state_dict(), load_file(run / "encoder" / "model.safetensors")
    return {"model": whole, "encoder": encoder}


def checksum(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """SHA-256 of names and bytes in the order of the names, and sums that hardly change where roundings differ."""
    digest = hashlib.sha256()
    total, absolute = [], []
    for name in sorted(weights):
        values = weights[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
        total.append(float(values.astype(np.float64).sum()))
        absolute.append(float(np.abs(values.astype(np.float64)).sum()))
    return {
        "sha256": digest.hexdigest(),
        "sum": float(f"{math.fsum(total):.8g}"),
        "sum_of_absolutes": float(f"{math.fsum(absolute):.8g}"),
        "tensors": len(weights),
    }


def draw_shapes(root: Path) -> None:
    """Sixteen images to train on and four to evaluate on, 40x56 pixels, with coloured squares on dark ground.

    In one folder the data of two tasks: PNG files of class numbers for segmentation, COCO's boxes for detection.
    """
    colours = np.array([(30, 30, 30), (220, 60, 60), (60, 60, 220)], np.uint8)
    random = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 4)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            mask = np.zeros((40, 56), np.uint8)
            for k in (1, 2):
                top, left = 20 * (k - 1) + int(random.integers(0, 5)), int(random.integers(0, 38))
                mask[top : top + 14, left : left + 18] = k
                box = {"bbox": [left, top, 18, 14], "area": 252, "iscrowd": 0, "category_id": 4 + k}
                annotations.append({"id": len(annotations), "image_id": number, **box})
            noise = random.integers(0, 30, (40, 56, 3), dtype=np.uint8)
            Image.fromarray(colours[mask] + noise).save(root / part / "images" / f"{number}.png")
            mask[:2] = 255
            Image.fromarray(mask).save(root / part / "masks" / f"{number}.png")
        images = [{"id": n, "file_name": f"{n}.png", "height": 40, "width": 56} for n in range(count)]
        categories = [{"id": 5, "name": "red"}, {"id": 6, "name": "blue"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / part / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    (root / "classes.txt").write_text("ground\nred\nblue", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = CURVE_TOLERANCE) -> list[str]:
    """Where a run departs from its record: by one bit on the machine that wrote it, else by more than roundings."""
    if found["machine"] == expected["machine"]:
        return [
            f"{name}: {found.get(name)} is not {expected.get(name)}, bit for bit on the machine that recorded it"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
    wrong = []
    for name in ("losses", "grad_norms", "learning_rates", "val_loss"):
        values, wanted = np.atleast_1d(found.get(name, np.nan)), np.atleast_1d(expected.get(name, np.nan))
        close = values.shape == wanted.shape and np.allclose(values, wanted, rtol=tolerance, atol=0, equal_nan=True)
        if not close:
            wrong.append(f"{name}: {values.tolist()} is not near {wanted.tolist()}")
    if found.get("figures", {}).keys() != expected.get("figures", {}).keys():
        wrong.append(f"figures: {found.get('figures')} instead of {expected.get('figures')}")
    for name, wanted in expected["checksum"].items():
        values = found["checksum"].get(name, {"tensors": 0})
        room = WEIGHT_TOLERANCE * wanted["sum_of_absolutes"]
        sums = ("sum", "sum_of_absolutes")
        if values["tensors"] != wanted["tensors"] or any(abs(values[key] - wanted[key]) > room for key in sums):
            wrong.append(f"weights of {name}: {values} is not near {wanted}")
    return wrong


def names() -> list[str]:
    return sorted(path.stem for path in CURVES.glob("*.toml"))


def _write(wanted: list[str]) -> None:
    for name in wanted or names():
        with tempfile.TemporaryDirectory() as folder:
            found = train_golden(name, Path(folder))
        (CURVES / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="*", metavar="NAME", required=True, help="configurations (default: all)")
    _write(parser.parse_args().write)
