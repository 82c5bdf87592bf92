"""Memory and start-up of real trainings: whether memory grows over 2,000 steps, and what a million names cost.

    python benchmarks/memory.py [--parts growth names] [--steps 2000]

growth  `simmim pretrain` of a very small ViT on the emoji in the package, with a checkpoint every 100 steps, in a
        process of its own: its resident memory, now and at its most, as /proc has it at step 200 and at the last.
names   the same on a list of a million different paths, which lead over links to folders to the photographs, and on
        the photographs alone: seconds from the start to the first step, by the clock and of processor time, and memory.

Needs Linux. Figures are saved as they come.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import machine, save

TRAINING = "--objective pixels --model vit_tiny_patch16_224 --model-args depth=1 --image-size 64 --batch-size 8"
TRAINING += " --precision fp32"
NAMES = 1_000_000


def train(data: str, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "simmim", "pretrain", "--data", data, "--out", str(out), *TRAINING.split()]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def usage(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Resident MiB of a process, now and at its most, and seconds of processor time; {} once it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return {}
    mib = {line.split(":")[0]: round(int(line.split()[1]) / 1024, 1) for line in status if line.startswith("Vm")}
    if "VmRSS" not in mib:  # it is ending
        return {}
    seconds = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return {"resident_mib": mib["VmRSS"], "peak_mib": mib["VmHWM"], "processor_seconds": seconds}


def last_step(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4000))
        lines = file.read().split(b"\n")[:-1]  # what follows the last line's end is not written yet
    return json.loads(lines[-1])["step"] if lines else 0


def at_steps(process: subprocess.Popen[bytes], out: Path, steps: list[int]) -> dict[int, dict[str, float]]:
    """What the process uses when `metrics.jsonl` has these steps."""
    found: dict[int, dict[str, float]] = {}
    start = time.perf_counter()
    while process.poll() is None:
        done, now = last_step(out / "metrics.jsonl"), usage(process)
        for step in steps:
            if done >= step and step not in found and now:
                found[step] = {"seconds": round(time.perf_counter() - start, 1), **now}
        time.sleep(0.05)
    if process.returncode or len(found) < len(steps):
        raise SystemExit(f"the training ended with {process.returncode} before step {steps[-1]}; run it by hand")
    return found


def growth(scratch: Path, steps: int) -> dict[str, Any]:
    options = ("--steps", str(steps), "--save-every-steps", "100", "--log-every-steps", "20")
    found = at_steps(train("demo", scratch / "run", *options), scratch / "run", [200, steps])
    first, last = found[200], found[steps]
    grown = {name: f"{100 * (last[name] / first[name] - 1):+.2f} %" for name in ("resident_mib", "peak_mib")}
    return {"at_step": found, "growth": grown}


def names(scratch: Path, photos: Path) -> dict[str, Any]:
    files = sorted(path.name for path in photos.resolve().glob("*.jpg"))
    folders = [f"{number:05d}" for number in range(-(-NAMES // len(files)))]
    for folder in folders:
        (scratch / folder).symlink_to(photos.resolve())
    paths = [f"{folder}/{file}" for folder in folders for file in files]
    found: dict[str, Any] = {}
    for title, count in (("photographs", len(files)), ("million", NAMES)):
        listed, out = scratch / f"{title}.txt", scratch / title
        listed.write_text("\n".join(paths[:count]) + "\n")
        process = train(str(listed), out, "--steps", "2", "--log-every-steps", "1", "--val-images", "8")
        found[title] = {"names": count, **at_steps(process, out, [1])[1]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="memory and start-up of real trainings")
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
    parser.add_argument("--parts", nargs="+", choices=("growth", "names"), default=["growth", "names"])
    parser.add_argument("--steps", type=int, default=2000, help="of growth (default: %(default)s)")
    parser.add_argument("--photos", type=Path, default=default, help="folder of JPEG files (default: %(default)s)")
    arguments = parser.parse_args()
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as scratch:
            if part == "growth":
                figures = growth(Path(scratch), arguments.steps)
            else:
                figures = names(Path(scratch), arguments.photos)
        print(part, json.dumps(figures, indent=1))
        save(f"memory_{part}", {**machine(), **figures}, quiet=True)


if __name__ == "__main__":
    main()
