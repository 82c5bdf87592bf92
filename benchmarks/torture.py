"""Disturb tiny trainings at random moments: each must end in the bits of one that nothing disturbed.

    python benchmarks/torture.py --kills 15 --seed 0

Pretraining and fine-tuning of a classifier, fp32 on the CPU, one process each. A disturbance is SIGKILL, SIGTERM,
SIGINT, SIGHUP or SIGSTOP followed by SIGCONT, after a time drawn by the seed from that of an undisturbed run. A
training that ended early is resumed by the same command. Compared are the weights that users take (encoder or model)
and the figures of every step, once each. Processes are forked from a server that has imported PyTorch.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image

COMMON = "--steps 40 --save-every-steps 7 --batch-size 4 --device cpu --precision fp32 --workers 1 --log-every-steps 3"
MODEL = "--model vit_tiny_patch16_224 --model-args depth=1 embed_dim=48 num_heads=3 --image-size 64"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGSTOP")
KEPT = {"pretrain": "encoder/model.safetensors", "finetune": "model/model.safetensors"}
FIGURES = ("step", "loss", "lr", "grad_norm", "val_loss", "top1")

_context = multiprocessing.get_context("forkserver")


def simmim(argv: list[str], log: Path) -> None:
    """Run a command in this process, which it ends."""
    import torch

    from simmim.cli import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # as a program starts, and not as a fork server's child
    torch.set_num_threads(1)
    sys.exit(main(argv))


def start(argv: list[str], log: Path) -> BaseProcess:
    process = _context.Process(target=simmim, args=(argv, log))
    process.start()
    return process


def disturb(process: BaseProcess, name: str, seconds: float) -> bool:
    """Send a signal after `seconds`, unless the process has ended; return whether it was sent."""
    process.join(seconds)
    if process.exitcode is not None or process.pid is None:
        return False
    os.kill(process.pid, getattr(signal, name))
    if name == "SIGSTOP":
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGCONT)
    return True


def outcome(run: Path, command: str) -> tuple[bytes, list[list[float | None]]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (run / KEPT[command]).read_bytes(), [[row.get(name) for name in FIGURES] for row in rows]


def torture(command: str, argv: list[str], folder: Path, kills: int, draw: np.random.Generator) -> Counter[str]:
    """Disturb trainings until `kills` signals were sent; return how many of each, and the trainings that they hit."""
    start(["--version"], folder / "log").join()  # the server imports PyTorch, which is no time of a training
    begun, whole = time.monotonic(), start([*argv, "--out", str(folder / f"{command} whole")], folder / "log")
    whole.join()
    seconds = time.monotonic() - begun
    assert whole.exitcode == 0, (folder / "log").read_text()
    wanted = outcome(folder / f"{command} whole", command)
    counts: Counter[str] = Counter()
    while sum(counts[name] for name in SIGNALS) < kills:
        run, code = folder / f"{command} {counts['trainings']}", -1
        while code != 0:
            process, name = start([*argv, "--out", str(run)], folder / "log"), SIGNALS[draw.integers(len(SIGNALS))]
            if sum(counts[each] for each in SIGNALS) < kills:
                counts[name] += disturb(process, name, float(draw.uniform(0, seconds)))
            process.join()
            code = process.exitcode
            number = getattr(signal, name)
            assert code in (0, -number, 128 + number), f"code {code} after {name}\n{(folder / 'log').read_text()}"
        found = outcome(run, command)
        assert found[0] == wanted[0], f"{run}: other weights"
        assert found[1] == wanted[1], f"{run}: other figures"
        counts["trainings"] += 1
        shutil.rmtree(run)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15, help="disturbances of each command")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["SIMMIM_KERNELS"] = "rules"  # a measurement would choose by the machine's load
    _context.set_forkserver_preload(["simmim.cli", "simmim.torch_engine.train.finetune", "grain", "tensorboardX"])
    draw = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(32):
            (folder / f"images/{index % 2}").mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 128, (64, 64, 3)) + 100 * (index % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"images/{index % 2}/{index}.png")
        images = ["--data", str(folder / "images")]
        pretrain = ["pretrain", *images, *MODEL.split(), *COMMON.split(), "--objective", "pixels", "--val-images", "2"]
        begin = ["--from", str(folder / "pretrain whole"), "--val-fraction", "0.25"]
        for command, argv in (
            ("pretrain", pretrain),
            ("finetune", ["finetune", "classify", *images, *begin, *COMMON.split()]),
        ):
            counts = torture(command, argv, folder, options.kills, draw)
            sent = ", ".join(f"{counts[each]} {each}" for each in SIGNALS)
            when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
            print(f"{when}  {command}: {sent}; {counts['trainings']} trainings, all with the same bits", flush=True)


if __name__ == "__main__":
    main()
