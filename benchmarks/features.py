"""Do frozen features, and fine-tuning, beat raw pixels, an untrained encoder and training from scratch?

    OMP_NUM_THREADS=1 python benchmarks/features.py ../shared/data --work DIR
    OMP_NUM_THREADS=1 python benchmarks/features.py ../shared/data --work DIR --set emoji --encoder vit --arm pixels

Every arm pretrains on the training images of a set, without labels, for `--seconds` of processor time of all threads:
teachers and further views are charged for. A trial finds how many steps that is. A run whose time is off by more than
10 % is thrown away, listed, and done again with the number of steps that its own speed gives. With `--steps-as-seed-0`
other seeds take as many steps as seed 0, whose figures are in DIR: so they are alike on a machine of another speed.

Its frozen features are judged by a k-NN vote and a linear probe, with all labels and with few (`labelled_sets.py`), and
its encoder by fine-tuning with few labels. Label set, pretraining and fine-tuning of a row share their seed.

Floors, in every table: chance; raw pixels; the encoder with random weights; and fine-tuning from scratch in as many
steps, at the best of three rates, chosen on the test images of seed 0, in its favour. An arm has one rate.

To add an arm, add a line to `ARMS`. To stop is safe: every figure is kept in DIR/pieces as it comes, and the command
goes on from there. Processes that share DIR may do different parts side by side (`--set`, `--encoder`, `--arm`,
`--seed`, `--floors`); `--gather` then writes the tables of whatever is there, as the whole command does at its end.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from frozen_features import ENCODERS, classify, pretrained, raw_pixels, untrained, vote
from labelled_sets import LABEL_SETS, SETS, few_path, load_set
from pretraining_helps import FINETUNING, LAYER_DECAY, PRETRAINED_RATE, SCRATCH_RATES, STEPS
from results import machine, save

import simmim
from simmim.hardware.host import cpu_name
from simmim.torch_engine.tasks.probe import Features
from simmim.training.run_directory import Run
from simmim.training.whole_files import write_json

# Those of pretraining_helps. Rates are for a batch of 512, so that 0.008 is 1e-3 at a batch of 64.
PIXELS: dict[str, Any] = {"objectives": [{"kind": "pixels"}], "batch_size": 64, "lr": 0.008, "val_images": 0}
# Chosen on fashion and photo-dev. The learning rate is the one that `simmim pretrain` chooses.
DESCRIPTOR: dict[str, Any] = {
    "objectives": [{"kind": "descriptor"}],
    "batch_size": 32,
    "val_images": 0,
    "clip_grad": 3.0,
    "crop_scale": (0.6, 1.0),
    "vit": {"mask": {"kind": "random", "cell": 4, "ratio": 0.5}, "encode": "visible", "positions": "sincos"},
    "resnet": {"objectives": [{"kind": "descriptor", "see": "whole"}]},
}
LATENT: dict[str, Any] = PIXELS | {"crop_scale": (0.6, 1.0)}
ARMS: dict[str, dict[str, Any]] = {
    "pixels": PIXELS,
    "descriptor": DESCRIPTOR,
    "pixels + ema": LATENT | {"objectives": [{"kind": "pixels"}, {"kind": "ema"}]},
    "clusters": LATENT | {"objectives": [{"kind": "clusters"}]},
    "sigreg": LATENT | {"objectives": [{"kind": "sigreg"}]},
    "infonce": LATENT | {"objectives": [{"kind": "infonce"}]},
    "descriptor + infonce": DESCRIPTOR | {"objectives": [{"kind": "descriptor"}, {"kind": "infonce", "weight": 0.1}]},
    "pixels, hard mask": PIXELS | {"vit": {"mask": {"kind": "hard", "cell": 4}}},
    "pixels, attention mask": PIXELS | {"vit": {"mask": {"kind": "attention", "cell": 4}}},
    "teacher: descriptor": LATENT | {"objectives": [{"kind": "teacher"}]},
}
"""Arguments of `simmim.pretrain` by arm, with those for one encoder under its name. They may replace an encoder's."""
TEACHERS = {"teacher: descriptor": "descriptor"}
"""The arm that trains an arm's teacher. Teacher and student have half of the processor time each."""


def arm_settings(arm: str, encoder: str) -> dict[str, Any]:
    """Return the arguments of an arm for an encoder."""
    common = {key: value for key, value in ARMS[arm].items() if key not in ENCODERS}
    return {**ENCODERS[encoder], **common, **ARMS[arm].get(encoder, {})}


FIGURES = ("k-NN", "linear", "k-NN few", "linear few", "fine-tuned few")
SEEDS = LABEL_SETS
TOLERANCE = 0.1
ATTEMPTS = 3


class Pieces:
    """Figures by set, encoder, arm, seed and name, each in a file of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, *name: Any) -> dict[str, Any] | None:
        file = self.folder / f"{', '.join(map(str, name))}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def get(self, *name: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a piece; measure and keep it, with the seconds that it took, unless it is known."""
        if (known := self.find(*name)) is not None:
            return known
        start, worked = time.monotonic(), time.process_time()
        found = measure()
        found |= {"seconds": round(time.monotonic() - start), "cpu_seconds": round(time.process_time() - worked)}
        write_json(self.folder / f"{', '.join(map(str, name))}.json", found)
        print(*name, found, flush=True)
        return found


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all measurements share: the data, the folder of work, and how long to pretrain."""

    data: Path
    work: Path
    seconds: float
    quick: bool
    steps_as_seed_0: bool = False

    @property
    def pieces(self) -> Pieces:
        return Pieces(self.work / "pieces")

    @property
    def sets(self) -> Path:
        return self.work / "sets"

    def floors(self, name: str, encoder: str) -> None:
        """Measure what any pretraining has to beat."""
        for seed in SEEDS:
            self.probe((name, "any", "raw pixels", seed), raw_pixels, all_labels=seed == SEEDS[0])
        for seed in SEEDS:
            self.probe((name, encoder, "untrained", seed), lambda images, seed=seed: untrained(encoder, seed, images))
        found = {rate: self.finetune(name, encoder, f"scratch {rate:g}", SEEDS[0], rate) for rate in SCRATCH_RATES}
        best = max(found, key=lambda rate: found[rate])
        for seed in SEEDS[1:]:
            self.finetune(name, encoder, f"scratch {best:g}", seed, best)

    def arm(self, name: str, encoder: str, arm: str, seed: int) -> None:
        """Pretrain, then judge features and fine-tuning."""
        self.pretrain(name, encoder, arm, seed)
        start = self.encoder_path(name, encoder, arm, seed)
        self.probe((name, encoder, arm, seed), lambda images: pretrained(start, images))
        self.finetune(name, encoder, arm, seed, PRETRAINED_RATE, start)

    def encoder_path(self, *part: Any) -> Path:
        return self.work / "encoders" / "-".join(map(str, part))

    def pretrain(self, name: str, encoder: str, arm: str, seed: int) -> None:
        """Pretrain for the processor time, and keep the encoder. Raises `SystemExit` where the time cannot be met."""
        load_set(name, self.data, self.sets)
        settings = {**arm_settings(arm, encoder), "seed": seed, "data": str(self.sets / f"{name}.npz")}
        seconds = self.seconds
        if arm in TEACHERS:
            seconds /= 2
            half = dataclasses.replace(self, seconds=seconds, work=self.work / "teachers")
            half.pretrain(name, encoder, TEACHERS[arm], seed)
            source = str(half.encoder_path(name, encoder, TEACHERS[arm], seed) / "model.safetensors")
            settings["objectives"] = [{**part, "source": source} for part in settings["objectives"]]
        shown = {key: str(value) for key, value in settings.items() if key != "data"} | {"seconds": str(self.seconds)}
        path = self.encoder_path(name, encoder, arm, seed)
        steps = None
        if self.steps_as_seed_0 and seed != SEEDS[0]:
            first = self.pieces.find(name, encoder, arm, SEEDS[0], "pretraining")
            if first is None:
                raise SystemExit(f"{self.work} holds no pretraining of {arm} with seed {SEEDS[0]}; run it first")
            steps = first["steps"]

        def measure() -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                found, run = self._pretrain_for_seconds(settings, seconds, Path(folder), steps)
                losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
                shutil.rmtree(path, ignore_errors=True)
                path.parent.mkdir(exist_ok=True)
                shutil.move(run.encoder, path)
            return {**found, "cpu": cpu_name(), "loss": statistics.mean(losses[-100:]), "settings": shown}

        known = self.pieces.get(name, encoder, arm, seed, "pretraining", measure=measure)["settings"]
        if known != shown:
            changed = ", ".join(key for key in shown | known if shown.get(key) != known.get(key))
            raise SystemExit(f"{self.work} holds arm {arm} with another {changed}; give the arm another name")

    def _pretrain_for_seconds(
        self, settings: dict[str, Any], seconds: float, folder: Path, steps: int | None
    ) -> tuple[dict[str, Any], Run]:
        """Pretrain `steps`, or as many as take the processor time; return steps and seconds, and the run."""

        def train(steps: int) -> tuple[float, Run]:
            shutil.rmtree(folder / "run", ignore_errors=True)
            begun = time.process_time()
            run = simmim.pretrain(**settings, steps=steps, save_every_steps=steps, out=str(folder / "run"))
            return time.process_time() - begun, run

        if self.quick:
            return {"steps": 2, "processor_seconds": 0.0, "thrown_away": []}, train(2)[1]
        if steps is not None:
            took, run = train(steps)
            return {"steps": steps, "processor_seconds": round(took, 1), "thrown_away": []}, run
        train(10)  # warms up
        short, long = (train(steps)[0] for steps in (10, 90))
        step = (long - short) / 80
        start = max(short - 10 * step, 0.0)  # building, reading the first images and saving
        thrown_away = []
        for _ in range(ATTEMPTS):
            steps = round((seconds - start) / step)
            took, run = train(steps)
            found = {"steps": steps, "processor_seconds": round(took, 1), "expected_per_step": round(step, 5)}
            if abs(took / seconds - 1) <= TOLERANCE:
                return {**found, "thrown_away": thrown_away}, run
            thrown_away.append(found)
            print(f"thrown away, since it took other than {seconds:g} s: {found}", flush=True)
            step = (took - start) / steps
        raise SystemExit(f"{ATTEMPTS} runs missed {seconds:g} s of processor time by more than {TOLERANCE:.0%}")

    def probe(
        self, part: tuple[str, str, str, int], read: Callable[[dict[str, Any]], Features], *, all_labels: bool = True
    ) -> None:
        """Judge features by a vote and a linear classifier; `read` computes them, if a figure is missing."""
        images = load_set(part[0], self.data, self.sets)
        seed = part[3]
        features = cache(lambda: read(images))

        def few() -> Features:
            whole, chosen = features(), images[f"few_{seed}"]
            return dataclasses.replace(whole, train=whole.train[chosen], train_labels=whole.train_labels[chosen])

        choices: dict[str, Callable[[], Features]] = {" few": few} | ({"": features} if all_labels else {})
        for suffix, choose in choices.items():
            self.pieces.get(*part, f"k-NN{suffix}", measure=lambda choose=choose: vote(choose()))
            self.pieces.get(*part, f"linear{suffix}", measure=lambda choose=choose: classify(choose(), seed))

    def finetune(self, name: str, encoder: str, arm: str, seed: int, rate: float, start: Path | None = None) -> float:
        """Fine-tune with the few labels of a seed, from an encoder or from scratch; return the balanced accuracy."""
        load_set(name, self.data, self.sets)
        built = {key: ENCODERS[encoder][key] for key in ("model", "model_args", "image_size")}

        def measure() -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                run = simmim.finetune(
                    "classify",
                    data=str(few_path(name, seed, self.sets)),
                    out=f"{folder}/run",
                    lr=rate,
                    steps=2 if self.quick else STEPS,
                    seed=seed,
                    init="scratch" if start is None else str(start),
                    layer_decay=1.0 if start is None else LAYER_DECAY,
                    **({} if start else built),
                    **FINETUNING,
                )
                figures = json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))
            return {key: figures[key] for key in ("top1", "balanced_accuracy")}

        return self.pieces.get(name, encoder, arm, seed, "fine-tuned few", measure=measure)["balanced_accuracy"]


Row = tuple[str, dict[str, dict[int, float]], str]
"""Of a table: its name, balanced accuracy by figure and seed, and what pretraining took."""


def rows(bench: Bench, name: str, encoder: str) -> Iterator[Row]:
    """Yield the floors of a set and an encoder, then the arms that are there."""
    pieces = bench.pieces

    def figures(arm: str, encoder: str = encoder) -> dict[str, dict[int, float]]:
        found = {
            figure: {
                seed: piece["balanced_accuracy"]
                for seed in SEEDS
                if (piece := pieces.find(name, encoder, arm, seed, figure))
            }
            for figure in FIGURES
        }
        return {figure: values for figure, values in found.items() if values}

    classes = len(load_set(name, bench.data, bench.sets)["class_names"])
    yield "chance", {figure: {SEEDS[0]: 1 / classes} for figure in FIGURES}, ""
    yield "raw pixels", figures("raw pixels", "any"), ""
    yield "untrained encoder", figures("untrained"), ""
    yield from_scratch(figures)
    for arm in ARMS:
        took = [piece for seed in SEEDS if (piece := pieces.find(name, encoder, arm, seed, "pretraining"))]
        steps, seconds = ([piece[key] for piece in took] for key in ("steps", "processor_seconds"))
        if took:
            yield arm, figures(arm), f"{statistics.mean(steps):.0f} steps, {statistics.mean(seconds):.0f} s"


def from_scratch(figures: Callable[[str], dict[str, dict[int, float]]]) -> Row:
    """Return the row of the best rate, whose name tells what the others gave."""
    tried = {rate: found[FIGURES[-1]] for rate in SCRATCH_RATES if (found := figures(f"scratch {rate:g}"))}
    if not tried:
        return "from scratch", {}, ""
    best = max(tried, key=lambda rate: tried[rate][SEEDS[0]])
    others = ", ".join(f"{rate:g}: {values[SEEDS[0]]:.3f}" for rate, values in tried.items() if rate != best)
    return f"from scratch, rate {best:g} ({others})", {FIGURES[-1]: tried[best]}, ""


def table(found: list[Row]) -> str:
    """Format rows as Markdown: mean, and in brackets each seed."""
    lines = ["| | " + " | ".join((*FIGURES, "pretraining")) + " |", "| --- " * (len(FIGURES) + 2) + "|"]
    for row, figures, took in found:
        cells = []
        for values in (figures.get(figure, {}) for figure in FIGURES):
            each = f" ({', '.join(f'{value:.3f}' for value in values.values())})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values.values()):.3f}{each}" if values else "")
        lines.append(f"| {' | '.join((row, *cells, took))} |")
    return "\n".join(lines)


def gather(bench: Bench, names: list[str], encoders: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the tables of sets and encoders as Markdown and as figures for JSON."""
    texts, figures = [], {}
    for name in names:
        for encoder in encoders:
            found = [row for row in rows(bench, name, encoder) if row[1]]
            texts.append(f"## {name}, {encoder}\n\n{table(found)}\n")
            figures[f"{name}, {encoder}"] = {row: values for row, values, _ in found}
    return "\n".join(texts), figures


def save_all(bench: Bench) -> None:
    text, figures = gather(bench, list(SETS), list(ENCODERS))
    pieces = {file.stem: json.loads(file.read_text()) for file in sorted(bench.pieces.folder.glob("*.json"))}
    about = machine() | {
        "command": f"python benchmarks/features.py DIR --work DIR --seconds {bench.seconds:g}",
        "encoders": ENCODERS,
    }
    arms = {arm: {key: str(value) for key, value in settings.items()} for arm, settings in ARMS.items()}
    path = save("features", about | {"arms": arms, "balanced_accuracy": figures, "pieces": pieces})
    path.with_suffix(".md").write_text(f"{HEADING}\n{text}", encoding="utf-8")


HEADING = """# Features against raw pixels, an untrained encoder and training from scratch

Written by `benchmarks/features.py`, which says how. Balanced accuracy on the test images: the mean, and in brackets
each seed. `few`: 100 labels a class (fashion) or 25 (the others). Encoders and sets: `features.py`, `labelled_sets.py`.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="features and fine-tuning against their floors, at equal compute")
    parser.add_argument("data", type=Path, help="folder with photo_fashion32, stamps_detseg and photos")
    parser.add_argument("--work", type=Path, required=True, help="where pieces, sets and encoders go")
    parser.add_argument("--set", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--encoder", nargs="+", choices=list(ENCODERS), default=list(ENCODERS))
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--seconds", type=float, default=420, help="processor time of a pretraining")
    parser.add_argument("--steps-as-seed-0", action="store_true", help="other seeds take as many steps as seed 0 did")
    parser.add_argument("--floors", action="store_true", help="floors only")
    parser.add_argument("--gather", action="store_true", help="measure nothing; save the tables of what is there")
    parser.add_argument("--quick", action="store_true", help="two steps a training, to see that it works")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    bench = Bench(options.data, options.work, options.seconds, options.quick, options.steps_as_seed_0)
    chosen, everything = vars(options), {"set": SETS, "encoder": ENCODERS, "arm": ARMS, "seed": SEEDS}
    whole = all(set(chosen[part]) == set(values) for part, values in everything.items()) and not options.floors
    if options.gather:
        save_all(bench)
        return
    for encoder in options.encoder:
        for name in options.set:
            bench.floors(name, encoder)
            if not options.floors:
                for arm in options.arm:
                    for seed in options.seed:
                        bench.arm(name, encoder, arm, seed)
    print(gather(bench, options.set, options.encoder)[0])
    if whole and not options.quick:
        save_all(bench)


if __name__ == "__main__":
    main()
