"""Training on all cores, quiet and beside another process, by how threads wait for one another.

    python benchmarks/busy_cpu.py [--models vit_tiny resnet18] [--rounds 3] [--seconds 3]

PyTorch's threads meet after each operation. Those that are first keep their cores busy, by default long, until the last
is there. Each figure is of a process of its own with a setting of the OpenMP library in its environment; settings take
turns, and the median counts. The other process is a loop on the first core.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from results import machine, save

SETTINGS: dict[str, dict[str, str]] = {
    "usual": {"GOMP_SPINCOUNT": "300000"},  # GCC's, by the manual of its libgomp
    "sooner": {"GOMP_SPINCOUNT": "1000"},
    "at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}
MODELS: dict[str, tuple[str, int, int]] = {  # timm name, pixels, batch
    "vit_tiny": ("vit_tiny_patch16_224", 64, 64),
    "resnet18": ("resnet18", 64, 32),
    "vit_small": ("vit_small_patch16_224", 224, 8),
}
VARIABLES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}


def measure(case: str, seconds: float) -> None:
    """Print the images a second of training with its input, in a process that has its setting already."""
    from simmim.data.sources import open_source
    from simmim.torch_engine.perf.bench import BenchConfig, plan_of
    from simmim.torch_engine.perf.measure import Trial, measure_end_to_end
    from simmim.torch_engine.train import distributed

    model, size, batch = MODELS[case]
    config = BenchConfig(model=model, image_size=(size, size), batch_size=batch, device="cpu")
    with distributed.join("cpu") as world:
        trial = Trial(plan_of(config, open_source(config.data), "cpu"), world)
        print(json.dumps(measure_end_to_end(trial, seconds)["images_per_second"]))


def speed(case: str, setting: dict[str, str], seconds: float) -> float:
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES} | setting
    command = [sys.executable, __file__, "--one", case, "--seconds", str(seconds)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return round(json.loads(done.stdout.splitlines()[-1]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["vit_tiny", "resnet18"])
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each figure (default: %(default)s)")
    parser.add_argument("--one", choices=list(MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.seconds)
        return
    found: dict[str, dict[str, Any]] = {}
    for case in options.models:
        for place in ("quiet", "beside other work"):
            figures: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
            other = None
            if place != "quiet":
                other = subprocess.Popen(
                    [sys.executable, "-c", "import os\nos.sched_setaffinity(0, {0})\nwhile True: pass"]
                )
            try:
                for _ in range(options.rounds):
                    for setting, environment in SETTINGS.items():
                        figures[setting].append(speed(case, environment, options.seconds))
            finally:
                if other:
                    other.kill()
                    other.wait()
            for setting, values in figures.items():
                print(f"{case:10} {place:18} {setting:8} {statistics.median(values):8.1f}", values, flush=True)
            found.setdefault(case, {})[place] = figures
    save("busy_cpu", {**machine(), "images_per_second": found})


if __name__ == "__main__":
    main()
