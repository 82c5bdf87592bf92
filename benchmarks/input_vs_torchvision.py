"""Input speed: simmim's batches against torchvision's ImageFolder and DataLoader, on the same photographs and cores.

    python benchmarks/input_vs_torchvision.py [--photos FOLDER] [--rounds 5]

Both read JPEG files, cut out RandomResizedCrop(224, scale=(0.67, 1)) and mirror half of the images. torchvision hands
over normalised float32, and simmim uint8, which its engine mirrors, converts and normalises on the device. So that this
work is not taken for free, a second figure has it done on the CPU. Two more are of the same photographs after
`simmim pack --short-side 288`, as JPEG and as raw pixels. Rounds alternate, so that a machine whose speed
drifts slows all alike; what counts is the ratio to torchvision with workers or without, whichever is faster.
"""

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from results import machine, save
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from simmim.accelerators import cpu_cores
from simmim.data import IMAGENET_MEAN, IMAGENET_STD, BadImages, RandomResizedCrop, Reading, open_source, train_batches
from simmim.data.pipeline import Batch
from simmim.pack import PackConfig, pack

SIZE, BATCH = 224, 32


def torchvision_batches(folder: Path, *, workers: int, batches: int) -> Iterator[torch.Tensor]:
    steps = [
        transforms.RandomResizedCrop(SIZE, scale=(0.67, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    images = ImageFolder(folder, transforms.Compose(steps))
    sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=batches * BATCH)
    for batch, _ in DataLoader(images, BATCH, sampler=sampler, num_workers=workers):
        yield batch


def simmim_batches(folder: Path, *, threads: int, batches: int) -> Iterator[Batch]:
    source = open_source(str(folder))
    yield from train_batches(
        source,
        Reading(
            batch_size=BATCH,
            seed=0,
            start_step=0,
            total_steps=batches,
            threads=threads,
            bad_images=BadImages(folder / "bad_images.txt", total=len(source), max_fraction=0),
        ),
        crop=RandomResizedCrop(size=(SIZE, SIZE)),
        channels=3,
        dtype=np.uint8,
    )


def normalised(batches: Iterator[Batch]) -> Iterator[torch.Tensor]:
    mean = 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    for batch in batches:
        images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float()
        flip = torch.from_numpy(batch["flip"])
        images[flip] = images[flip].flip(3)
        yield images.sub_(mean).div_(std)


def images_per_second(batches: Iterator[object]) -> float:
    """Of the batches after the first, which starts threads or processes."""
    next(batches)
    start = time.perf_counter()
    done = sum(1 for _ in batches)
    return done * BATCH / (time.perf_counter() - start)


def measure(photos: Path, *, rounds: int, batches: int) -> dict[str, list[float]]:
    """Images per second of each contender in each round."""
    cores = cpu_cores()
    torch.set_num_threads(1)  # the cores are taken by workers or threads
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as packs:
        folder = Path(scratch, "photos")
        folder.mkdir()
        for file in sorted(photos.resolve().glob("*.jpg")):
            (folder / file.name).symlink_to(file)
        shards = {form: Path(packs, form) for form in ("jpeg", "raw")}
        for form, out in shards.items():
            pack(PackConfig(images=str(folder), out=str(out), form=form, short_side=288))  # type: ignore[arg-type]
        contenders: dict[str, Callable[[], Iterator[object]]] = {
            f"torchvision, {cores} workers": lambda: torchvision_batches(Path(scratch), workers=cores, batches=batches),
            "torchvision, no workers": lambda: torchvision_batches(Path(scratch), workers=0, batches=batches),
            "simmim": lambda: simmim_batches(folder, threads=cores, batches=batches),
            "simmim, normalised": lambda: normalised(simmim_batches(folder, threads=cores, batches=batches)),
            "simmim, packed as jpeg": lambda: simmim_batches(shards["jpeg"], threads=cores, batches=batches),
            "simmim, packed as raw": lambda: simmim_batches(shards["raw"], threads=cores, batches=batches),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, start in contenders.items():
                rates[name].append(images_per_second(start()))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description="simmim's input against torchvision's, in images per second")
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
    parser.add_argument("--photos", type=Path, default=default, help="folder of JPEG files (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=15, help="of 32 images, a round (default: %(default)s)")
    arguments = parser.parse_args()
    rates = measure(arguments.photos, rounds=arguments.rounds, batches=arguments.batches)
    peers = [name for name in rates if name.startswith("torchvision")]
    peer = max(peers, key=lambda name: statistics.median(rates[name]))
    figures = machine()
    figures["versions"] |= {
        package: importlib.metadata.version(package) for package in ("simplejpeg", "opencv-python-headless")
    }
    figures["images_per_second"] = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    figures[f"ratio to {peer}"] = {
        name: round(statistics.median(np.divide(found, rates[peer])), 2) for name, found in rates.items()
    }
    for name, rate in figures["images_per_second"].items():
        print(f"{name:24} {rate:6.0f} images/s, {figures[f'ratio to {peer}'][name]:.2f} times {peer}")
    save("input_vs_torchvision", figures)


if __name__ == "__main__":
    main()
