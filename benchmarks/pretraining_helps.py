"""Does pretraining help with few labels? Pretrained and fine-tuned against from scratch, on three sets of labels.

    python benchmarks/pretraining_helps.py ../shared/data/photo_fashion32 [--work DIR] [--part PART] [--quick]

One pretraining on all training images without labels serves three label sets of 100 images a class. From scratch the
same encoder has the same augmentations, the same steps and three times as many, and the best of three learning rates,
chosen on the test images of the first label set: in its favour. The pretrained one has one rate only. The images are
Fashion-MNIST garments, tinted, with a thin dark outline, on crops of photographs; test garments and backgrounds are not
in training.

Each figure is kept in DIR/pieces as it comes, so that a stopped comparison goes on where it was.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from results import machine, save

import simmim
from simmim.training.whole_files import write_json

LABEL_SETS = (0, 1, 2)
ENCODER = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "image_size": 32,
}
# Rates are for a batch of 512, so that 0.008 is 1e-3 at a batch of 64.
PRETRAINING: dict[str, Any] = {
    **ENCODER,
    "objectives": ["pixels"],
    "mask_cell": 4,
    "batch_size": 64,
    "steps": 7000,
    "lr": 0.008,
    "warmup_epochs": 0.5,
    "val_images": 0,
}
# Without the paper's strong augmentations, which few labels and plain images do not bear.
PLAIN: dict[str, Any] = {
    "rand_augment": 0.0,
    "erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": 0.0,
    "eval_every_epochs": 1e4,  # at the end only
}
FINETUNING: dict[str, Any] = {"batch_size": 64, "crop_scale": 0.6, "eval_crop": 1.0, **PLAIN}
STEPS = 300
PRETRAINED_RATE, SCRATCH_RATES = 0.008, (0.008, 0.016, 0.032)
LAYER_DECAY = 0.75


class Comparison:
    """Trainings and probes on one copy of the data, each a piece that is kept when it is done."""

    def __init__(self, data: Path, work: Path, *, quick: bool):
        self.work, self.quick = work, quick
        (work / "pieces").mkdir(parents=True, exist_ok=True)
        self.images = data / "photo_fashion32.npz"
        for label_set in LABEL_SETS:
            if not self.labelled(label_set).exists():
                write_label_set(self.images, label_set, self.labelled(label_set), test_images=50 if quick else None)

    def labelled(self, label_set: int) -> Path:
        return self.work / f"few100_{label_set}.npz"

    def piece(self, name: str, find: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The figures of a piece with the time that it took, unless they are known."""
        file = self.work / "pieces" / f"{name}.json"
        if not file.exists():
            start, worked = time.monotonic(), time.process_time()
            found = find()
            found |= {"seconds": round(time.monotonic() - start), "cpu_seconds": round(time.process_time() - worked)}
            write_json(file, found)
            print(name, found, flush=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def pieces(self) -> dict[str, dict[str, float]]:
        return {file.stem: json.loads(file.read_text()) for file in sorted((self.work / "pieces").glob("*.json"))}

    def pretrain(self) -> None:
        steps = 2 if self.quick else PRETRAINING["steps"]
        settings: dict[str, Any] = PRETRAINING | ({"warmup_epochs": 0.0} if self.quick else {}) | {"steps": steps}

        def find() -> dict[str, float]:
            run = simmim.pretrain(data=str(self.images), out=str(self.work / "pretrained"), **settings)
            losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
            check_finished(len(losses), steps)
            return {"loss": statistics.mean(losses[-100:])}

        self.piece("pretraining", find)

    def probe(self, method: str, label_set: int) -> float:
        def find() -> dict[str, float]:
            figures = simmim.probe(str(self.work / "pretrained"), str(self.labelled(label_set)), method=method)
            return {"top1": figures["top1"]}

        return self.piece(f"{method} {label_set}", find)["top1"]

    def finetune(self, name: str, label_set: int, *, init: str, lr: float, steps: int) -> float:
        """Test accuracy after `steps` (2 in a quick run)."""
        steps = 2 if self.quick else steps
        encoder = ENCODER if init == "scratch" else {}
        decay = 1.0 if init == "scratch" else LAYER_DECAY
        out = self.work / f"{name} {label_set}".replace(" ", "-")

        def find() -> dict[str, float]:
            run = simmim.finetune(
                "classify",
                init=init,
                data=str(self.labelled(label_set)),
                out=str(out),
                lr=lr,
                steps=steps,
                layer_decay=decay,
                **{**encoder, **FINETUNING},
            )
            check_finished(len(run.metrics.read_text().splitlines()), steps)
            return {"top1": json.loads((run.path / "metrics.json").read_text())["top1"]}

        return self.piece(f"{name} {label_set}", find)["top1"]


def check_finished(done: int, steps: int) -> None:
    """A training that a signal stops returns like one that ended: its figures must not be taken for whole."""
    if done < steps:
        raise SystemExit(f"stopped at step {done} of {steps}; the same command with the same --work goes on")


def write_label_set(images: Path, label_set: int, path: Path, *, test_images: int | None) -> None:
    """An .npz of the labelled images of a set and of the test images (the first of them, or all)."""
    with np.load(images, allow_pickle=False) as arrays:
        chosen = arrays[f"few100_seed{label_set}"]
        np.savez(
            path,
            x_train=arrays["x_train"][chosen],
            y_train=arrays["y_train"][chosen],
            x_test=arrays["x_test"][:test_images],
            y_test=arrays["y_test"][:test_images],
            class_names=arrays["class_names"],
        )


def pretrained(comparison: Comparison) -> dict[str, Any]:
    """Top-1 of the probes and of fine-tuning on each label set."""
    comparison.pretrain()
    found: dict[str, Any] = {
        f"probe, {method}": [comparison.probe(method, label_set) for label_set in LABEL_SETS]
        for method in ("knn", "linear")
    }
    start = str(comparison.work / "pretrained")
    found["pretrained"] = [
        comparison.finetune("pretrained", label_set, init=start, lr=PRETRAINED_RATE, steps=STEPS)
        for label_set in LABEL_SETS
    ]
    return found


def scratch(comparison: Comparison) -> dict[str, Any]:
    """Top-1 from scratch on each label set, at the best of the rates, in as many steps and in three times as many."""
    tried = {
        lr: comparison.finetune(f"scratch {lr:g}", LABEL_SETS[0], init="scratch", lr=lr, steps=STEPS)
        for lr in SCRATCH_RATES
    }
    best = max(tried, key=lambda lr: tried[lr])
    found: dict[str, Any] = {"rates tried from scratch": {f"{lr:g}": top1 for lr, top1 in tried.items()}}
    for name, times in (("scratch", 1), ("scratch, 3 times the steps", 3)):
        long = " long" if times > 1 else ""
        found[name] = [
            comparison.finetune(f"scratch {best:g}{long}", label_set, init="scratch", lr=best, steps=times * STEPS)
            for label_set in LABEL_SETS
        ]
    return found


PARTS: dict[str, Callable[[Comparison], dict[str, Any]]] = {"pretrained": pretrained, "scratch": scratch}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="pretrained and fine-tuned against from scratch, with few labels")
    parser.add_argument("data", type=Path, help="folder with photo_fashion32.npz")
    parser.add_argument("--work", type=Path, help="where runs go (default: a temporary folder)")
    parser.add_argument(
        "--part",
        choices=list(PARTS),
        help="this part only, beside another process with the same --work; the whole command then gathers them",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two steps a training, to see that it works; saves nothing"
    )
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        comparison = Comparison(arguments.data, arguments.work or Path(temporary), quick=arguments.quick)
        if arguments.part:
            PARTS[arguments.part](comparison)
            return
        found = {name: value for part in PARTS.values() for name, value in part(comparison).items()}
        command = "python benchmarks/pretraining_helps.py DIR --work DIR"  # not the paths of one machine
        figures = machine() | {"command": command, "top1": found, "pieces": comparison.pieces()}
    rows = {name: top1 for name, top1 in found.items() if isinstance(top1, list)}
    for name, top1 in rows.items():
        print(f"{name:28} {statistics.mean(top1):.3f}  ({', '.join(f'{value:.3f}' for value in top1)})")
    means = {name: statistics.mean(top1) for name, top1 in rows.items()}
    best = max(means[name] for name in means if name.startswith("scratch"))
    print(f"pretrained is {100 * (means['pretrained'] - best):+.1f} points from the best from scratch")
    if not arguments.quick:
        save("pretraining_helps", figures | {"pretraining": PRETRAINING, "fine-tuning": FINETUNING})


if __name__ == "__main__":
    main()
