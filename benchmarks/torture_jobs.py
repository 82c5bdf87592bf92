"""What `torture.py` disturbs: tiny commands, the data that they take, and what they must leave."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SAVE_EVERY = 7
"""Steps."""
TRAINING = f"--save-every-steps {SAVE_EVERY} --batch-size 4 --device cpu --precision fp32 --workers 1"
VIT = "--model vit_tiny_patch16_224 --model-args depth=1 embed_dim=48 num_heads=3"
RESNET = "--from scratch --model resnet18 --model-args channels=[8,16,32,64] --image-size 64"
FIGURES = ("step", "loss", "lr", "grad_norm", "val_loss", "top1", "miou", "map")

Outcome = dict[str, Any]


def nothing(out: Path) -> int:
    return 0


@dataclass(frozen=True)
class Job:
    """A command, which writes `OUT` in a folder of its own; `%` in the words stands for the folder of the data."""

    name: str
    words: str
    modules: str
    """Modules to import before its time begins."""
    outcome: Callable[[Path], Outcome]
    """What must be the same after any disturbance."""
    progress: Callable[[Path], int] = nothing
    """How much of the work would not be done again."""
    at_stake: int = 1
    """Progress that may be lost: what was being written, and the same once more where it was not yet durable."""
    out: str = "run"
    processes: int = 1
    settings: tuple[tuple[str, str, int], ...] = ()
    """Module, constant and value: sizes that suit tiny data."""

    def argv(self, folder: Path, out: Path) -> list[str]:
        return [word.replace("%", str(folder)) for word in self.words.split()] + ["--out", str(out)]


def training(out: Path) -> Outcome:
    """Weights that users take, the figures of every step, and the names of all files."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = next(path for name in ("model", "encoder") if (path := out / name / "model.safetensors").exists())
    names = [name for name in _names(out) if not name.startswith(("tensorboard/", "report.html"))]
    # A signal's checkpoint is of any step, and a kill in the last one may leave one more.
    names = sorted({re.sub(r"checkpoints/step-\d+", "checkpoints/step", name) for name in names})
    return {"weights": _digest(weights), "figures": [[row.get(name) for name in FIGURES] for row in rows], "is": names}


def steps(out: Path) -> int:
    found = [int(path.name[5:]) for path in (out / "checkpoints").glob("step-*") if (path / "manifest.json").exists()]
    return max(found, default=0)


def files(out: Path) -> Outcome:
    """The bytes of every file."""
    return {name: _digest(out / name) for name in _names(out)} if out.is_dir() else {"file": _digest(out)}


def converted(out: Path) -> Outcome:
    """The same of a run, but the names alone in its checkpoint, in which PyTorch numbers what it writes."""
    return {name: digest for name, digest in files(out).items() if "checkpoints/" not in name} | {"is": _names(out)}


def page(out: Path) -> Outcome:
    """The length of the page and its last tag: it is whole. It says when it was written."""
    text = out.read_text()
    return {"bytes": len(text), "end": text.rstrip()[-7:]}


def shards(out: Path) -> int:
    return len([path for path in out.glob("0*.json") if path.stat().st_size])


def parts(out: Path) -> int:
    return len([path for path in Path(f"{out}.parts").glob("part-*") if path.stat().st_size])


def _names(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _train(name: str, words: str, modules: str, **more: Any) -> Job:
    return Job(name, f"{words} {TRAINING}", modules, training, steps, at_stake=SAVE_EVERY, **more)


_PRETRAIN = f"pretrain --data %/images {VIT} --image-size 64 --objective pixels --val-images 2 --steps 40"
_KERAS = f"{_PRETRAIN} --engine keras --backend jax"
_CLASSIFY = "finetune classify --data %/images --from %/pretrained --val-fraction 0.25 --log-every-steps 3 --steps 40"
_SEGMENT = f"finetune segment --data %/masks {RESNET} --decoder-channels 16 --steps 22"
_DETECT = f"finetune detect --data %/boxes {RESNET} --detector fcos --pyramid-channels 32 --steps 16"
_ENGINE = "grain tensorboardX torch.distributed.checkpoint.state_dict simmim.torch_engine"
_TASKS = f"{_ENGINE}.train.finetune simmim.torch_engine.tasks"
_PACKING = "simmim.commands.pack array_record.python.array_record_module"
_EMBED, _EXPORT = "simmim.torch_engine.tasks.embed", "simmim.torch_engine.interop.export"
_ONNX = f"{_EXPORT} onnx onnxscript onnxruntime torch.onnx"
_SMALL_PARTS = ((_EMBED, "PART_IMAGES", 20),)
PRETRAIN = _train("pretrain", _PRETRAIN, f"{_ENGINE}.train.pretrain")

JOBS = [
    PRETRAIN,
    _train("pretrain, Keras on JAX", _KERAS, "grain tensorboardX jax keras simmim.keras_engine.pretrain"),
    _train("pretrain, 2 processes", _PRETRAIN, f"{_ENGINE}.train.pretrain", processes=2),
    _train("pretrain --async-save", f"{_PRETRAIN} --async-save", f"{_ENGINE}.train.pretrain"),
    _train("pretrain --async-save, 2 processes", f"{_PRETRAIN} --async-save", f"{_ENGINE}.train.pretrain", processes=2),
    _train("finetune classify", _CLASSIFY, f"{_TASKS}.classify"),
    _train("finetune classify, 2 processes", _CLASSIFY, f"{_TASKS}.classify", processes=2),
    _train("finetune segment", _SEGMENT, f"{_TASKS}.segment"),
    _train("finetune detect", f"{_DETECT} --eval-every-epochs 4", f"{_TASKS}.detect faster_coco_eval"),
    Job("pack", "pack %/many --shard-size 20 --workers 1", _PACKING, files, shards),
    Job(
        "embed",
        "embed %/pretrained --data %/many --device cpu --workers 1 --batch-size 10",
        _EMBED,
        files,
        parts,
        out="features.npz",
        settings=_SMALL_PARTS,
    ),
    Job("convert", f"convert %/timm/model.safetensors {VIT}", "simmim.torch_engine.interop.convert", converted),
    Job("export to timm", "export %/pretrained --format timm", _EXPORT, files),
    Job("export to ONNX", "export %/pretrained --format onnx", _ONNX, files),
    Job("report", "report %/pretrained", "simmim.report.page matplotlib.pyplot", page, out="report.html"),
]


def draw_data(folder: Path, draw: np.random.Generator) -> None:
    """Write images of two classes, more images, and labelled ones for segmentation and detection."""
    for index in range(32):
        place = folder / "images" / str(index % 2)
        place.mkdir(parents=True, exist_ok=True)
        _save(draw.integers(0, 128, (64, 64, 3)) + 100 * (index % 2), place / f"{index}.png")
    (folder / "many").mkdir()
    for index in range(200):
        _save(draw.integers(0, 256, (48, 48, 3)), folder / f"many/{index:03d}.png")
    for part, count in (("train", 8), ("val", 4)):
        _draw_masks(folder / "masks" / part, count, draw)
        _draw_boxes(folder / "boxes" / part, count, draw)


def _draw_masks(place: Path, count: int, draw: np.random.Generator) -> None:
    for kind in ("images", "masks"):
        (place / kind).mkdir(parents=True)
    for number in range(count):
        mask = np.repeat(np.repeat(draw.integers(0, 2, (4, 4)), 16, 0), 16, 1)
        _save(mask[..., None] * 120 + draw.integers(0, 120, (64, 64, 3)), place / f"images/{number}.png")
        _save(mask, place / f"masks/{number}.png")


def _draw_boxes(place: Path, count: int, draw: np.random.Generator) -> None:
    (place / "images").mkdir(parents=True)
    images, boxes = [], []
    for number in range(count):
        pixels = draw.integers(0, 60, (64, 64, 3))
        left, top = draw.integers(0, 40, 2).tolist()
        pixels[top : top + 20, left : left + 20, number % 2] = 250
        _save(pixels, place / f"images/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
        box = {"bbox": [left, top, 20, 20], "area": 400, "iscrowd": 0}
        boxes.append({"id": number, "image_id": number, "category_id": number % 2 + 1, **box})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    found = {"images": images, "annotations": boxes, "categories": categories}
    (place / "annotations.json").write_text(json.dumps(found))


def _save(pixels: Any, path: Path) -> None:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
