"""Training end to end against its step and its input alone: does reading hide behind the step?

    python benchmarks/end_to_end.py [--photos FOLDER] [--cases vit_small vit_tiny] [--device cuda] [--seconds 4]

Each model trains on loose JPEG files and on the same photographs after `simmim pack --short-side 288`, as JPEG and
raw pixels. What counts is the share of the slower of step and input. On a CPU both have the same cores, so that a run
takes at best the time of both, 1 / (1 / step + 1 / input); the share of that is given too. The three take turns, so
that a machine whose speed drifts slows all alike; the median of each counts. Figures are saved as they come.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from results import machine, save

from simmim.commands.pack import PackConfig, pack
from simmim.data.sources import open_source
from simmim.torch_engine.perf.bench import BenchConfig, plan_of
from simmim.torch_engine.perf.limits import compare
from simmim.torch_engine.perf.measure import Trial, measure_end_to_end, measure_input, median_time
from simmim.torch_engine.perf.trial import random_batch
from simmim.torch_engine.train import distributed

CASES = {  # timm name, pixels, batch on a CPU and on a GPU
    "vit_base": ("vit_base_patch16_224", 224, 8, 256),
    "vit_small": ("vit_small_patch16_224", 224, 16, 512),
    "vit_tiny": ("vit_tiny_patch16_224", 64, 64, 1024),  # a step so short that reading counts
}


def measure(case: str, data: str, world: distributed.World, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Images/s of step, input and both; medians over the rounds."""
    model, size, on_cpu, on_gpu = CASES[case]
    device = world.device.type
    config = BenchConfig(
        model=model, image_size=(size, size), batch_size=on_cpu if device == "cpu" else on_gpu, data=data
    )
    trial = Trial(plan_of(config, open_source(data), device), world)
    batch = random_batch(trial.config, config.batch_size, trial.step)
    found: dict[str, list[float]] = {"step": [], "input": [], "end_to_end": []}
    for _ in range(rounds):
        taken = median_time(lambda: trial.update(0, batch), seconds, trial.wait)
        found["step"].append(config.batch_size / taken)
        found["input"].append(measure_input(trial, seconds)["images_per_second"])
        found["end_to_end"].append(measure_end_to_end(trial, seconds)["images_per_second"])
    speeds = {name: statistics.median(values) for name, values in found.items()}
    shares = compare(speeds["end_to_end"], speeds["step"], speeds["input"], shared_cores=device == "cpu")
    facts = {"model": model, "image_size": size, "batch_size": config.batch_size, "threads": trial.config.workers}
    return facts | {"precision": trial.config.precision, "rounds": found} | speeds | shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    photos = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
    parser.add_argument("--photos", default=str(photos), help="folder of JPEG files, or demo (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["vit_small", "vit_tiny"])
    parser.add_argument("--forms", nargs="+", choices=["files", "jpeg", "raw"], default=["files", "jpeg", "raw"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each figure in a round (default: %(default)s)")
    parser.add_argument("--name", help="of the file in benchmarks/results (default: end_to_end, on a GPU …_cuda)")
    arguments = parser.parse_args()
    name = arguments.name or ("end_to_end" if arguments.device == "cpu" else "end_to_end_cuda")
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    figures: dict[str, dict[str, Any]] = {}
    facts = {**machine(), "gpu": gpu, "cases": figures}
    with tempfile.TemporaryDirectory() as folder, distributed.join(arguments.device) as world:
        places = {"files": arguments.photos}
        for form in set(arguments.forms) - {"files"}:
            places[form] = str(Path(folder, form))
            pack(PackConfig(images=places["files"], out=places[form], form=form, short_side=288))
        for case in arguments.cases:
            figures[case] = {}
            for form in arguments.forms:
                row = measure(case, places[form], world, rounds=arguments.rounds, seconds=arguments.seconds)
                figures[case][form] = row
                save(name, facts, quiet=True)
                shared = f", {row['share_of_shared']:.1%} of what they can share" if "share_of_shared" in row else ""
                print(
                    f"{case:10}{form:6} step {row['step']:8.1f}  input {row['input']:8.1f}  both "
                    f"{row['end_to_end']:8.1f} images/s: {row['share_of_slower']:.1%} of the slower{shared}",
                    flush=True,
                )
    save(name, facts)


if __name__ == "__main__":
    main()
