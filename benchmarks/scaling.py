"""How time and memory of a training grow: with image size, batch, model, processes and images.

    python benchmarks/scaling.py [--parts size batch model processes files] [--seconds 2]

Every case runs in a process of its own (two for two gloo processes), so that its memory is its own: the most that was
resident less what the imported libraries take. One thread a process, but where it is said. Figures are saved as they
come; `python benchmarks/chart.py` draws them. What a long training keeps in memory is for `benchmarks/memory.py`.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import machine, save

from simmim.data.sources import open_source
from simmim.torch_engine.perf.bench import BenchConfig, plan_of
from simmim.torch_engine.perf.measure import Trial, median_time
from simmim.torch_engine.perf.trial import random_batch
from simmim.torch_engine.train import distributed
from simmim.torch_engine.train.update import Update

LIMIT = 300  # seconds of a case
SMALL = {"model": "vit_small_patch16_224", "size": 224, "batch": 8, "threads": 1, "processes": 1}
MODELS = ["vit_tiny_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224", "resnet50", "convnext_tiny"]
PARTS: dict[str, list[dict[str, Any]]] = {
    "size": [SMALL | {"size": size} for size in (96, 160, 224, 288, 352)],
    "batch": [SMALL | {"batch": batch} for batch in (1, 2, 4, 8, 16, 32)],
    "model": [SMALL | {"model": model} for model in (*MODELS, SMALL["model"])],
    "processes": [SMALL | {"batch": 16} | more for more in ({}, {"threads": 2}, {"processes": 2})],
    "files": [{"files": 10**power} for power in (3, 4, 5, 6)],
}


def peak() -> int:
    """Bytes: the most that this process had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trial_of(model: str, size: int, batch: int, data: str = "demo", **settings: Any) -> Trial:
    config = BenchConfig(model=model, image_size=(size, size), batch_size=batch, data=data, **settings)
    return Trial(plan_of(config, open_source(data), "cpu"), distributed.World(device=torch.device("cpu")))


def measure_step(case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Seconds an image and memory of a process that takes its part of each batch."""
    torch.set_num_threads(case["threads"])
    before = peak()
    with distributed.join("cpu") as world:
        mine = case["batch"] // world.size
        trial = trial_of(case["model"], case["size"], mine)
        update = trial.update
        if world.size > 1:
            model = distributed.spread(trial.step, world, shard=False)
            update = Update(model, update.optimizer, trial.plan.schedule, config=trial.config, world=world)
        batch = random_batch(trial.config, mine, trial.step)
        calls = 5 if world.size > 1 else 0  # as many on each process
        taken = (
            fixed_time(update, batch, calls) if calls else median_time(lambda: update(0, batch), seconds, trial.wait)
        )
        world.barrier()
    return {"seconds_an_image": taken / case["batch"], "memory_bytes": peak() - before}


def fixed_time(update: Update, batch: dict[str, Any], calls: int) -> float:
    """Fastest of so many calls, after two."""
    times = []
    for _ in range(calls + 2):
        begun = time.perf_counter()
        update(0, batch)
        times.append(time.perf_counter() - begun)
    return min(times[2:])


def measure_start(files: int) -> dict[str, Any]:
    """Until the first batch of so many names, all of the same few images."""
    with tempfile.TemporaryDirectory() as folder:
        source = open_source("demo")
        for number in range(16):
            Path(folder, f"{number}.webp").write_bytes(source.read(number))  # type: ignore[arg-type]
        Path(folder, "list.txt").write_text("\n".join(f"{number % 16}.webp" for number in range(files)))
        before = peak()
        begun = time.perf_counter()
        trial = trial_of("resnet10t", 64, 8, str(Path(folder, "list.txt")))
        with trial.batches() as batches:
            next(batches)
            return {"seconds": time.perf_counter() - begun, "memory_bytes": peak() - before}


def run(case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A case in its own process or processes; the figures of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = case.get("processes", 1)
    command = [sys.executable, __file__, "--case", json.dumps(case), "--seconds", str(seconds)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)} if size > 1 else {}
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in ranks]
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} s"}
    finally:
        for process in ranks:
            process.kill()
    codes = [process.returncode for process in ranks]
    return {"error": f"ended with {codes}"} if any(codes) else json.loads(outputs[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of a case (default: %(default)s)")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if case := arguments.case:
        found = measure_start(case["files"]) if "files" in case else measure_step(case, arguments.seconds)
        print(json.dumps(found))
        return
    figures: dict[str, list[dict[str, Any]]] = {}
    facts = {**machine(), "parts": figures}
    for part in arguments.parts:
        figures[part] = []
        for case in PARTS[part]:
            row = case | {"load_before": os.getloadavg()[0]} | run(case, arguments.seconds)
            figures[part].append(row)
            save("scaling", facts, quiet=True)
            print(part, "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    save("scaling", facts)


if __name__ == "__main__":
    main()
