"""Do our features beat those of contrastive and self-distilling peers, after as much processor time?

    OMP_NUM_THREADS=1 python benchmarks/features_vs_peers.py ../shared/data/photo_fashion32 --work DIR \\
        --lightly LIGHTLY/bin/python --stable STABLE/bin/python [--arm ARM ...] [--encoder vit resnet] [--seconds 420]

The peers are lightly-train 0.18 (DINO, SimCLR) and stable-pretraining 0.1.8 (SimCLR), each in an environment of its
own: `python -m venv LIGHTLY; LIGHTLY/bin/pip install lightly-train timm`, and the same with stable-pretraining. They
train the encoder of `features.py` on the same images, in one thread. Each has two kinds of arms: its defaults, of which
only the image size is changed (views of 32 pixels, not 224, and DINO's small ones of half), and tuned ones, at two
rates. Tuned arms have AdamW, bf16, batches of 64, which means more steps, milder crops and jitter, and no blur, as
SimCLR has none on images of 32 pixels. All arms have TIMM_FUSED_ATTN=0, without which a step of the ViT takes about
twice as long on a CPU.

`--seconds` is the processor time of training, with reading of images, in the peer's process (`peer_training.py` says
what counts). A short trial finds how many steps that is. A run that took less than 90 % or more than 120 % of the time
is done again, once, with the number of steps that its own speed gives, and both are listed. With `--steps-as-seed-0`
another seed takes as many steps as seed 0, whose pieces are in DIR: so it is alike on a machine of another speed.

A peer's encoder becomes an encoder directory, so that our evaluation judges it like ours: 20 nearest neighbours and a
linear classifier on the mean of the feature map, with all labels and with 100 a class, and 300 steps of fine-tuning
with 100 a class as in `pretraining_helps.py`. The label set is that of the seed.

Each figure is kept in DIR/pieces as it comes, so that a stopped comparison goes on where it was. A peer that fails is a
figure too.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frozen_features import ENCODERS, classify, pretrained, vote
from peer_arms import ARMS, Arm
from peer_training import SKIPPED
from PIL import Image
from pretraining_helps import FINETUNING, LAYER_DECAY, PRETRAINED_RATE, STEPS, Comparison
from results import machine, save
from safetensors.torch import load_file

import simmim
from simmim.config.pretraining import PretrainConfig
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.torch_engine.models.encoders import create_backbone
from simmim.torch_engine.train.storage import save_hub
from simmim.training.whole_files import write_json

# For views of several sizes, and features that are the mean over the image, as our evaluation takes them.
PEER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "vit": {"img_size": 32, "dynamic_img_size": True, "global_pool": "avg", "fc_norm": False},
    "resnet": {},
}
TRIAL_STEPS = 15
TIME_KEPT = (0.9, 1.2)  # of the time; more is in the peer's favour


class PeerFailedError(Exception):
    """A peer's process ended with an error; the text is the last of what it printed."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """What all arms share: the data, the folder of work, the Pythons of the peers and the time."""

    comparison: Comparison
    pythons: dict[str, Path]
    seconds: float
    seed: int
    results: Path | None
    steps_as_seed_0: bool = False

    @property
    def work(self) -> Path:
        return self.comparison.work

    def piece(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the figures of a piece, found unless they are known, and keep all in the file of results."""
        found = self.comparison.piece(name, find)
        if self.results:
            write_json(self.results, {"seconds": self.seconds, "pieces": self.comparison.pieces()})
        return found

    def arm(self, name: str, encoder: str) -> None:
        """Pretrain and judge; a failure of the peer is kept as a piece, and retried when that file is removed."""
        piece = f"{name}, {encoder}, {self.seed}"
        out = self.work / "encoders" / piece.replace(", ", "-").replace(" ", "-")

        def pretrain() -> dict[str, Any]:
            try:
                return self.pretrain(piece, ARMS[name], encoder, out)
            except PeerFailedError as error:
                return {"error": str(error)}

        if "error" in self.piece(f"{piece}, pretraining", pretrain):
            return
        self.piece(f"{piece}, features", lambda: self.judge_features(out))
        self.piece(f"{piece}, fine-tuned few", lambda: self.finetune(out))

    def pretrain(self, piece: str, arm: Arm, encoder: str, out: Path) -> dict[str, Any]:
        """Train as many steps as take the time, or as seed 0 took; write the encoder directory `out`."""
        if self.steps_as_seed_0 and self.seed:
            first = f"{piece.rpartition(', ')[0]}, 0, pretraining"
            known: dict[str, Any] = self.comparison.pieces().get(first, {})
            if "steps" not in known:
                raise SystemExit(f"{self.work} holds no {first!r} that has ended well; run seed 0 first")
            return {**self.run_peer(arm, encoder, known["steps"], out), "thrown_away": []}
        trial = self.piece(f"{piece}, trial", lambda: self.run_peer(arm, encoder, TRIAL_STEPS, out))
        runs = [trial]
        while len(runs) < 3 and not self.in_time(runs[-1]):
            steps = SKIPPED + max(round(self.seconds / runs[-1]["seconds_per_step"]), 2)
            runs.append(self.run_peer(arm, encoder, steps, out))
        return {**runs[-1], "thrown_away": runs[1:-1]}

    def in_time(self, run: dict[str, Any]) -> bool:
        least, most = TIME_KEPT
        return least <= run["processor_seconds"] / self.seconds <= most

    def run_peer(self, arm: Arm, encoder: str, steps: int, out: Path) -> dict[str, Any]:
        """Train in a process of the peer; write the encoder directory and return what training took.

        Raises:
            PeerFailedError: The process failed, or weights are not finite.
        """
        size, folder = ENCODERS[encoder]["image_size"], self.work / "peer"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        settings = {
            "peer": arm.peer,
            "arguments": arm.arguments(size),
            "encoder": {
                "model_name": ENCODERS[encoder]["model"],
                **ENCODERS[encoder]["model_args"],
                **PEER_ARGUMENTS[encoder],
            },
            "image_size": size,
            "folder": str(write_pngs(self.comparison.images, self.work / "images")),
            "images": len(list((self.work / "images" / "all").iterdir())),
            "seed": self.seed,
            "steps": steps,
            "out": str(folder),
        }
        write_json(folder / "settings.json", settings)
        before = children_seconds()
        done = subprocess.run(
            [self.pythons[arm.peer], Path(__file__).with_name("peer_training.py"), folder / "settings.json"],
            cwd=folder,
            env=peer_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        (self.work / "last_peer.log").write_text(done.stdout, encoding="utf-8")
        if done.returncode:
            raise PeerFailedError(f"exit {done.returncode}: {done.stdout[-800:]}")
        weights = load_file(folder / "weights.safetensors")
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise PeerFailedError(f"weights are not finite after {steps} steps")
        write_encoder(out, encoder, weights)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return {**report, "seconds_of_process": children_seconds() - before, "arguments": settings["arguments"]}

    def judge_features(self, start: Path) -> dict[str, float]:
        """Return top-1 of the vote and of the linear classifier, with all labels and with few."""
        with np.load(self.comparison.images, allow_pickle=False) as arrays:
            chosen, whole = arrays[f"few100_seed{self.seed}"], pretrained(start, dict(arrays))
        few = dataclasses.replace(whole, train=whole.train[chosen], train_labels=whole.train_labels[chosen])
        found = {}
        for suffix, features in (("", whole), (" few", few)):
            found[f"k-NN{suffix}"] = vote(features)["top1"]
            found[f"linear{suffix}"] = classify(features, self.seed)["top1"]
        return found

    def finetune(self, start: Path) -> dict[str, float]:
        """Return top-1 after fine-tuning with few labels."""
        out = self.work / "finetuned"
        shutil.rmtree(out, ignore_errors=True)
        run = simmim.finetune(
            "classify",
            init=str(start),
            data=str(self.comparison.labelled(self.seed)),
            out=str(out),
            lr=PRETRAINED_RATE,
            steps=2 if self.comparison.quick else STEPS,
            layer_decay=LAYER_DECAY,
            seed=self.seed,
            **FINETUNING,
        )
        return {"top1": json.loads((run.path / "metrics.json").read_text(encoding="utf-8"))["top1"]}


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peer_environment() -> dict[str, str]:
    """Return an environment with one thread, without ours on the path, and in which a peer uses no network."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return ours | {
        "OMP_NUM_THREADS": "1",
        "TIMM_FUSED_ATTN": "0",
        "LIGHTLY_TRAIN_EVENTS_DISABLED": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }


def write_pngs(images: Path, folder: Path) -> Path:
    """Write the training images as files, in the one class that a peer's folder needs, unless they are there."""
    if not folder.exists():
        aside = folder.with_name("images.part")
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "all").mkdir(parents=True)
        with np.load(images, allow_pickle=False) as arrays:
            for index, image in enumerate(arrays["x_train"]):
                Image.fromarray(image).save(aside / "all" / f"{index:05}.png")
        aside.rename(folder)
    return folder


def write_encoder(out: Path, encoder: str, weights: dict[str, torch.Tensor]) -> None:
    """Write the encoder directory of weights under timm's names. Raises `RuntimeError` where a name is amiss."""
    settings = ENCODERS[encoder]
    size = (settings["image_size"],) * 2
    backbone = create_backbone(settings["model"], image_size=size, model_args=settings["model_args"])
    backbone.load_state_dict(weights)
    config = PretrainConfig(model=settings["model"], image_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_hub(out, backbone, backbone.state_dict(), config)


def table(pieces: dict[str, dict[str, Any]], seed: int) -> str:
    """Format what is known of each arm as Markdown."""
    columns = ("k-NN", "linear", "k-NN few", "linear few")
    lines = [f"| | encoder | {' | '.join(columns)} | fine-tuned few | steps | seconds |", "| --- " * 9 + "|"]
    for encoder in ENCODERS:
        for name in ARMS:
            pretraining, features, finetuned = (
                pieces.get(f"{name}, {encoder}, {seed}, {part}", {})
                for part in ("pretraining", "features", "fine-tuned few")
            )
            if "error" in pretraining:
                lines.append(f"| {name} | {encoder} | failed: {pretraining['error'].splitlines()[-1][:80]} |")
            elif pretraining:
                cells = [*(features.get(column) for column in columns), finetuned.get("top1")]
                shown = " | ".join("" if cell is None else f"{cell:.3f}" for cell in cells)
                took = f"{pretraining['steps']} | {pretraining['processor_seconds']:.0f}"
                lines.append(f"| {name} | {encoder} | {shown} | {took} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="features of peers after as much processor time as ours")
    parser.add_argument("data", type=Path, help="folder with photo_fashion32.npz")
    parser.add_argument("--work", type=Path, required=True, help="where pieces and encoders go")
    parser.add_argument("--lightly", type=Path, help="Python of an environment with lightly-train and timm")
    parser.add_argument("--stable", type=Path, help="Python of an environment with stable-pretraining and timm")
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--encoder", nargs="+", choices=list(ENCODERS), default=["vit"])
    parser.add_argument("--seed", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument("--seconds", type=float, default=420, help="processor time of a pretraining")
    parser.add_argument("--steps-as-seed-0", action="store_true", help="take as many steps as seed 0 did")
    parser.add_argument("--results", type=Path, help="also keep all pieces in this file as they come")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/features_vs_peers.json")
    parser.add_argument("--quick", action="store_true", help="two steps of fine-tuning, to see that it works")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    given = {"lightly": options.lightly, "stable": options.stable}
    pythons = {peer: path.absolute() for peer, path in given.items() if path}  # a link: not to be resolved
    comparison = Comparison(options.data, options.work.absolute(), quick=options.quick)
    peers = Peers(comparison, pythons, options.seconds, options.seed, options.results, options.steps_as_seed_0)
    for encoder in options.encoder:
        for name in options.arm:
            if ARMS[name].peer in pythons:
                peers.arm(name, encoder)
    print(table(comparison.pieces(), options.seed))
    if options.save:
        about = machine() | {"command": "python benchmarks/features_vs_peers.py DIR --work DIR", "encoders": ENCODERS}
        save("features_vs_peers", about | {"seconds": options.seconds, "pieces": comparison.pieces()})


if __name__ == "__main__":
    main()
