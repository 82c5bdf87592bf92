"""Does pretraining on sounds without labels help? Spoken words, of which few have labels, from voices never heard.

    OMP_NUM_THREADS=1 python benchmarks/words.py --work DIR --set dev            # to choose on
    OMP_NUM_THREADS=1 python benchmarks/words.py --work DIR --set test --save    # to prove on: results/words.json

`spoken_words.py` says what the clips are. An arm pretrains on 4,000 clips without labels, for the steps in `ARMS`;
its processor time, of all threads and with everything before its first step, is measured. Its features
are judged by a k-NN vote and a linear classifier with 25 labelled clips a word, and its encoder by fine-tuning with
them, on 1,000 clips of other voices. Label set, pretraining and fine-tuning share their seed.

Floors: chance; the log-mel spectrogram itself (shrunk to 32 x 32, standardised); the untrained encoder; and
fine-tuning from scratch in as many steps at the best of three rates, chosen on the clips that judge it, with seed 0: in
its favour; and at that rate in three times as many steps. An arm has one rate.

To add an arm, add a line to `ARMS`. Every figure is kept in DIR/pieces as it comes; the command goes on from there.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from features import Pieces
from frozen_features import classify, standardised, vote
from pretraining_helps import LAYER_DECAY, PLAIN
from results import machine, save
from spoken_words import FEW, WORDS, few_labels, fingerprint, make_set

import simmim
from simmim.config.commands import ProbeConfig
from simmim.torch_engine.tasks.probe import Features, Probe, raw_pixels

SIZE = (96, 64)  # frames x mel bands: 0.975 s
ENCODER: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"patch_size": 16, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "image_size": SIZE,
}
DESCRIPTOR: dict[str, Any] = {
    "objectives": [{"kind": "descriptor", "texture_scale": 0.0}],  # chosen on dev, as all else but the rate
    "mask": {"kind": "random", "cell": 16, "ratio": 0.5},
    "encode": "visible",
    "positions": "sincos",
    "batch_size": 32,
    "clip_grad": 3.0,
    "val_images": 0,
    "steps": 1000,
}
# audio-small. Chosen on dev (results/words_search.md): fewer axes, and whole spectrograms.
WHOLE: dict[str, Any] = {
    "objectives": [
        {"kind": "descriptor", "see": "whole", "shape_values": 32, "colour_scale": 1.0, "texture_scale": 0.0}
    ],
    "positions": "sincos",
    "batch_size": 32,
    "clip_grad": 3.0,
    "val_images": 0,
    "steps": 1200,
}
# audio-small-pixels, with a head in the proportion of the smaller encoder.
PIXELS: dict[str, Any] = {
    "recipe": "audio-small-pixels",
    "mask": {"kind": "random", "cell": 16, "ratio": 0.8},
    "head": {"kind": "transformer", "depth": 2, "width": 128},
    "val_images": 0,
    "steps": 1360,
}
ARMS: dict[str, dict[str, Any]] = {
    "pixels": PIXELS,
    "descriptor": DESCRIPTOR,
    "descriptor, whole": WHOLE,
}
"""Arguments of `simmim.pretrain` by arm."""
FINETUNING: dict[str, Any] = {"batch_size": 32, "time_mask": 16, "band_mask": 8, **PLAIN}
PRETRAINED_RATE, SCRATCH_RATES = 0.016, (0.008, 0.016, 0.032)  # for a batch of 512: 0.016 is 1e-3 at a batch of 32


@dataclasses.dataclass(frozen=True)
class Bench:
    """A set of words, where figures are kept, and the steps of a fine-tuning."""

    name: str
    clips: Path
    work: Path
    steps: int

    @property
    def pieces(self) -> Pieces:
        return Pieces(self.work / "pieces")

    def run(self, arm: str, seed: int) -> Path:
        return self.work / "runs" / f"{self.name}-{arm}-{seed}"

    def pretrain(self, arm: str, seed: int) -> None:
        """Pretrain an arm for its steps, and measure the processor time."""
        settings = {**ENCODER, **ARMS[arm], "data": str(self.clips / "train"), "seed": seed}
        shown = json.loads(json.dumps({name: settings[name] for name in settings if name not in ("data", "seed")}))

        def measure() -> dict[str, Any]:
            shutil.rmtree(self.run(arm, seed), ignore_errors=True)  # of a run that was broken off the time is not known
            begun = time.process_time()
            simmim.pretrain(**settings, save_every_steps=settings["steps"], out=str(self.run(arm, seed)))
            return {"processor_seconds": round(time.process_time() - begun), "settings": shown}

        measured = self.pieces.get(self.name, arm, seed, "pretraining", measure=measure)
        if shown != measured["settings"]:
            raise SystemExit(f"{self.work} holds arm {arm} with other settings; give the arm another name")

    def probe(self, run: Path, seed: int, *, floors: bool, arm: str) -> None:
        """Judge frozen features with the few labels; with `floors` those of the spectrogram and untrained instead."""
        data = str(few_labels(self.clips, seed))
        opened = Probe(ProbeConfig(run=str(run), data=data, seed=seed, precision="fp32", device="cpu"))
        arms: dict[str, Any] = {arm: None}
        if floors:
            arms = {"spectrogram": raw_pixels, "untrained": opened.untrained()}
        for name, model in arms.items():
            self._judge(name, seed, lambda model=model: self._features(opened, model))

    def _features(self, opened: Probe, model: Any) -> Features:
        found = opened.features(model)
        return standardised(found) if model is raw_pixels else found

    def _judge(self, name: str, seed: int, read: Any) -> None:
        known = [self.pieces.find(self.name, name, seed, figure) for figure in ("k-NN", "linear")]
        if None in known:
            features = read()
            self.pieces.get(self.name, name, seed, "k-NN", measure=lambda: vote(features))
            self.pieces.get(self.name, name, seed, "linear", measure=lambda: classify(features, seed))

    def finetune(self, arm: str, seed: int, rate: float, *, times: int = 1, run: Path | None = None) -> float:
        """Fine-tune with the few labels, from a run or from scratch; return the balanced accuracy."""

        def measure() -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                tuned = simmim.finetune(
                    "classify",
                    data=str(few_labels(self.clips, seed)),
                    out=f"{folder}/run",
                    lr=rate,
                    steps=times * self.steps,
                    seed=seed,
                    init="scratch" if run is None else str(run),
                    layer_decay=1.0 if run is None else LAYER_DECAY,
                    **({} if run else ENCODER),
                    **FINETUNING,
                )
                figures = json.loads((tuned.path / "metrics.json").read_text(encoding="utf-8"))
            return {key: figures[key] for key in ("top1", "balanced_accuracy")}

        return self.pieces.get(self.name, arm, seed, "fine-tuned", measure=measure)["balanced_accuracy"]

    def scratch(self, seeds: list[int], times: int) -> None:
        """Fine-tune from scratch at three rates, and with the best of them for `times` as many steps."""
        found = {rate: self.finetune(f"scratch {rate:g}", 0, rate) for rate in SCRATCH_RATES}
        best = max(found, key=lambda rate: found[rate])
        for seed in seeds:
            self.finetune(f"scratch {best:g}", seed, best)
            self.finetune(f"scratch {best:g} x{times}", seed, best, times=times)


def table(bench: Bench, seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Return balanced accuracies by arm, figure and seed, with steps and processor time of each pretraining."""
    names = ["spectrogram", "untrained"]
    names += [f"scratch {rate:g}{times}" for rate in SCRATCH_RATES for times in ("", " x3")]
    rows: dict[str, dict[str, Any]] = {"chance": {"all": 1 / len(WORDS[bench.name].split())}}
    for name in (*names, *ARMS):
        row: dict[str, Any] = {}
        for figure in ("k-NN", "linear", "fine-tuned"):
            found = {seed: bench.pieces.find(bench.name, name, seed, figure) for seed in seeds}
            if kept := {seed: round(piece["balanced_accuracy"], 4) for seed, piece in found.items() if piece}:
                row[figure] = kept
        for seed in seeds:
            if took := bench.pieces.find(bench.name, name, seed, "pretraining"):
                steps = took["settings"]["steps"]
                row.setdefault("pretraining", {})[seed] = {
                    "steps": steps,
                    "processor_seconds": took["processor_seconds"],
                }
        if row:
            rows[name] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", choices=WORDS, default="dev")
    parser.add_argument("--arm", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of a fine-tuning")
    parser.add_argument("--no-floors", action="store_true", help="judge the arms only")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/words.json")
    options = parser.parse_args()
    clips = make_set(options.set, options.work / "sets")
    bench = Bench(options.set, clips, options.work, options.steps)
    for arm in options.arm:
        for seed in options.seed:
            bench.pretrain(arm, seed)
            bench.probe(bench.run(arm, seed), seed, floors=False, arm=arm)
            if not options.no_floors:
                bench.probe(bench.run(arm, seed), seed, floors=True, arm=arm)
            bench.finetune(arm, seed, PRETRAINED_RATE, run=bench.run(arm, seed))
    if not options.no_floors:
        bench.scratch(options.seed, times=3)
    rows = table(bench, [0, 1, 2])
    print(json.dumps(rows, indent=1))
    if options.save:
        setting = {"fine_tuning_steps": options.steps, "labels_a_word": FEW}
        save("words", {**machine(), "set": fingerprint(clips), **setting, "balanced_accuracy": rows})


if __name__ == "__main__":
    main()
