"""What does plain `simmim pretrain` give at its own size, 128 pixels? Frozen features beside their floors and SimMIM.

    OMP_NUM_THREADS=1 python benchmarks/first_run.py ../shared/data --work DIR

The commands that a user types, on sets that the recipe was not chosen on (`labelled_sets.py`, at 128 pixels):

    simmim pretrain --data SET --out RUN --steps N                          # default-small
    simmim pretrain --data SET --out RUN --steps N --objective pixels …  # SimMIM with the same encoder and size
    simmim probe RUN --data SET --method knn, and linear

Both train for `--seconds` of processor time of all threads: a short trial finds how many steps that is. With `--whole`
there is no --steps, and a run is as long as its recipe. `simmim probe` adds raw pixels (shrunk to 32 pixels) and the
untrained encoder. With `--finetune` the encoder is fine-tuned with all labels too, at one rate, and an equal one from
scratch in as many steps, at the best of three rates on the test images, in its favour. Runs resume, and figures are
saved as they come.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import results
from labelled_sets import load_set
from pretraining_helps import FINETUNING, LAYER_DECAY, PRETRAINED_RATE, SCRATCH_RATES

import simmim

SIDE = 128
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "simmim": {"objectives": [{"kind": "pixels"}], "model": "vit_small_patch16_224", "image_size": SIDE},
}
METHODS = ("knn", "linear")
FINETUNING_STEPS = 150
FEW_CLASSES = ("emoji", "stamps")
"""Sets whose raw pixels a linear classifier learns in minutes; those of 60 classes take it hours."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, help="folder with photos and stamps_detseg")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=["photo-crops", "emoji", "stamps"])
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=1500)
    length.add_argument("--whole", action="store_true", help="as many steps as the recipe takes")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--finetune", action="store_true", help="fine-tune too, beside training from scratch")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.set:
        load_set(name, options.data, options.work / "sets", SIDE)
        images = str(options.work / "sets" / f"{name}.npz")
        for arm in options.arm:
            for seed in options.seed:
                row_of = f"{arm}, whole" if options.whole else arm
                out = options.work / f"{name}-{row_of.replace(', ', '-')}-{seed}"
                row = judge(name, images, out, ARMS[arm], seed, None if options.whole else options.seconds)
                if options.finetune:
                    row["fine-tuned"] = finetune(images, out, "pretrained", seed, PRETRAINED_RATE, f"{out}/encoder")
                    scratch = options.work / f"{name}-scratch-{seed}"
                    row["from scratch"] = {
                        rate: finetune(images, scratch, f"{rate:g}", seed, rate, "scratch") for rate in SCRATCH_RATES
                    }
                found.setdefault(name, {}).setdefault(row_of, {})[seed] = row
                print(name, arm, seed, row, flush=True)
                results.save("first_run", {**results.machine(), "sets": found}, quiet=True)


def judge(
    name: str, images: str, out: Path, settings: dict[str, Any], seed: int, seconds: float | None
) -> dict[str, Any]:
    """Pretrain for the seconds, or as long as the recipe says, and probe; what is known is not measured again."""
    notes = out.with_suffix(".json")
    row: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {}
    arguments = {"data": images, "seed": seed, "save_every_steps": 50, **settings}
    if seconds is not None and "steps" not in row:
        row |= {"seconds": seconds, "steps": max(round(seconds / seconds_a_step(arguments, out)), 1)}
        notes.write_text(json.dumps(row))
    begun = time.process_time()
    run = simmim.pretrain(**arguments, steps=None if seconds is None else row["steps"], out=str(out))
    row.setdefault("processor_seconds", round(time.process_time() - begun))
    row["steps"] = json.loads(run.metrics.read_text().splitlines()[-1])["step"]
    for method in METHODS:
        if method not in row:
            floors = method == "knn" or name in FEW_CLASSES
            row[method] = simmim.probe(str(run.path), images, method=method, baselines=floors)
            notes.write_text(json.dumps(row))
    return row


def finetune(images: str, out: Path, arm: str, seed: int, rate: float, start: str) -> dict[str, float]:
    """Fine-tune with all labels from an encoder, or from scratch the one of `default-small`; what is known is kept."""
    notes = Path(f"{out}-finetuned-{arm}.json")
    if notes.exists():
        return json.loads(notes.read_text())
    built = {"model": "vit_small_patch16_224", "image_size": SIDE} if start == "scratch" else {}
    begun = time.process_time()
    run = simmim.finetune(
        "classify",
        data=images,
        out=f"{out}-finetuned-{arm}",
        init=start,
        seed=seed,
        lr=rate,
        steps=FINETUNING_STEPS,
        layer_decay=1.0 if start == "scratch" else LAYER_DECAY,
        **built,
        **{**FINETUNING, "batch_size": 32},
    )
    figures = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
    row: dict[str, float] = {key: figures[key] for key in ("top1", "balanced_accuracy")}
    row["processor_seconds"] = round(time.process_time() - begun)
    notes.write_text(json.dumps(row))
    return row


def seconds_a_step(arguments: dict[str, Any], out: Path) -> float:
    """Time steps of a trial, less what starting takes."""
    took = []
    for steps in (4, 24):
        begun = time.process_time()
        simmim.pretrain(**arguments, steps=steps, out=f"{out}-trial-{steps}")
        took.append(time.process_time() - begun)
    return (took[1] - took[0]) / 20


if __name__ == "__main__":
    main()
