"""Is the learning rate that `simmim pretrain` chooses near the best? Three sets, three sizes, two families of encoders.

    OMP_NUM_THREADS=1 python benchmarks/rates.py ../shared/data --work DIR

A size is a side of the images, a width of the encoder and a batch; the rule knows the last two (and of a convolutional
net the batch alone). Plain settings (`default-small`, `default-small-resnet`) but for these, at a third of the rule's
rate, at the rate itself and at three times as much, for as many steps each. The figure is the balanced accuracy of a
k-NN vote on test images with all labels (`labelled_sets.py`); the last column is what the best of the three is ahead.
Figures are saved as they come, and the command goes on from there.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import results
from labelled_sets import load_set

import simmim
from simmim.method.objectives import DescriptorRegression
from simmim.method.schedules import usual_lr

NAMES = ("fashion", "photo-dev", "emoji")
SIZES = ((32, 128, 32), (32, 192, 64), (64, 256, 16))
"""Side in pixels, width of a ViT (of a ResNet's last stage twice as much), batch."""
FACTORS = (1 / 3, 1.0, 3.0)
FAMILIES = ("vit", "resnet")


def settings_of(family: str, side: int, width: int, batch: int) -> dict[str, Any]:
    """Return arguments of `simmim.pretrain`, the rule's rate among them."""
    if family == "vit":
        model = {"patch_size": side // 8, "embed_dim": width, "depth": 6, "num_heads": width // 32}
        rate = usual_lr(batch, width)
        found: dict[str, Any] = {"model": "vit_tiny_patch16_224", "model_args": model}
    else:
        channels = [width // 4, width // 2, width, width * 2]
        rate = usual_lr(batch, None)
        found = {"model": "resnet18", "model_args": {"channels": channels}}
    return {**found, "image_size": side, "batch_size": batch, "lr": rate * DescriptorRegression.usual_rate}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=8000, help="images of each training, whatever the batch")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        for side, width, batch in SIZES:
            for name in NAMES:
                load_set(name, options.data, options.work / "sets")
                data = str(options.work / "sets" / f"{name}.npz")
                steps = options.images // batch
                row: dict[str, Any] = {"family": family, "side": side, "width": width, "batch": batch, "set": name}
                for factor in FACTORS:
                    out = options.work / f"{family}-{side}-{width}-{batch}-{name}-{factor:.2g}"
                    row[f"{factor:.2g}"] = measure(data, out, settings_of(family, side, width, batch), factor, steps)
                figures = [row[f"{factor:.2g}"]["k-NN"] for factor in FACTORS]
                row["behind the best"] = round(max(figures) - row["1"]["k-NN"], 4)
                rows.append(row)
                print(row, flush=True)
                results.save("rates", {**results.machine(), "rows": rows}, quiet=True)


def measure(data: str, out: Path, settings: dict[str, Any], factor: float, steps: int) -> dict[str, float]:
    notes = out.with_suffix(".json")
    if not notes.exists():
        begun = time.process_time()
        settings = {**settings, "lr": settings["lr"] * factor}
        run = simmim.pretrain(data=data, out=str(out), steps=steps, **settings)
        took = round(time.process_time() - begun)
        found = simmim.probe(str(run.path), data, method="knn", baselines=False)
        row = {"k-NN": found["balanced_accuracy"], "peak rate": settings["lr"] * settings["batch_size"] / 512}
        notes.write_text(json.dumps({**row, "processor_seconds": took}), encoding="utf-8")
        shutil.rmtree(out)
    return json.loads(notes.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
