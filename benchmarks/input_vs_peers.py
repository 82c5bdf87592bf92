"""Input speed: simmim's batches against torchvision's ImageFolder and DataLoader, on the same photographs and cores.

    python benchmarks/input_vs_peers.py [--parts loose large packed] [--photos FOLDER] [--rounds 5] [--seconds 2]

Both cut out RandomResizedCrop(224, scale=(0.67, 1)) and mirror half of the images. torchvision, in the loader that the
official code has, hands over normalised float32, and simmim uint8, which its engine mirrors, converts and normalises on
the device. So that this work is not taken for free, one figure has it done on the CPU. The parts:

    loose   the JPEG files as they are
    large   some of them enlarged to 4000 pixels (here, by Pillow, quality 90)
    packed  after `simmim pack --short-side 288`, as JPEG and as raw pixels, against torchvision on the loose files

simmim reads by threads, its default, and by as many processes (`--readers processes`), of raw pixels also without the
blur that keeps fine patterns from aliasing (`--no-antialias`).

Each is measured in a process of its own, in rounds that alternate, so that a machine whose speed drifts slows all
alike. A round counts the batches of some seconds, after the first ones, which were read ahead while threads or
processes started. What counts is the ratio, the median of those of the rounds, to the fastest torchvision (0, 2 or as
many workers as there are cores): by the clock, and by the processor time of an image, which other work on the machine
disturbs less. Figures are saved as they come.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results import machine, save
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from simmim.commands.pack import PackConfig, pack
from simmim.data.augment import RandomResizedCrop, load
from simmim.data.bad_images import BadImages
from simmim.data.pipeline import Reading, train_batches
from simmim.data.readers.processes import stream_from_processes
from simmim.data.sources import open_source
from simmim.data.statistics import IMAGENET_MEAN, IMAGENET_STD
from simmim.hardware.host import cpu_cores
from simmim.method.random_keys import sample_key

SIZE = 224
PARTS = {"loose": 32, "large": 8, "packed": 32}
"""Images of a batch."""
AHEAD = 6
"""Batches of a round that do not count: a worker of torchvision's makes two ahead."""
ENDLESS = 10_000
"""Batches, which no round reads to the end."""
Batches = Generator[Any, None, None]
Contenders = dict[str, Callable[[], Batches]]


def torchvision_batches(classes: Path, *, workers: int, size: int) -> Batches:
    steps = [
        transforms.RandomResizedCrop(SIZE, scale=(0.67, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    images = ImageFolder(classes, transforms.Compose(steps))
    sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=ENDLESS * size)
    for batch, _ in DataLoader(images, size, sampler=sampler, num_workers=workers):
        yield batch


def simmim_batches(folder: Path, *, size: int, processes: bool = False, antialias: bool = True) -> Batches:
    source = open_source(str(folder))
    yield from train_batches(
        source,
        Reading(
            batch_size=size,
            seed=0,
            start_step=0,
            total_steps=ENDLESS,
            threads=cpu_cores(),
            bad_images=BadImages(folder / "bad_images.txt", total=len(source), max_fraction=0),
        ),
        crop=RandomResizedCrop(size=(SIZE, SIZE)),
        channels=3,
        dtype=np.uint8,
        antialias=antialias,
        stream=stream_from_processes if processes else None,
    )


def normalised(folder: Path, *, size: int) -> Batches:
    mean = 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    for batch in simmim_batches(folder, size=size):
        images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float()
        flip = torch.from_numpy(batch["flip"][:, 0])
        images[flip] = images[flip].flip(3)
        yield images.sub_(mean).div_(std)


def prepare(part: str, photos: Path, scratch: Path) -> float:
    """Write a part's files: `scratch/classes/photos`, and packed ones `scratch/jpeg` and `scratch/raw`.

    Gives the difference of up to 32 of them.
    """
    folder = scratch / "classes" / "photos"  # ImageFolder wants classes: there is one
    folder.mkdir(parents=True)
    files = sorted(photos.resolve().glob("*.jpg"))
    if part == "large":
        for file in files[:: max(1, len(files) // 32)]:
            enlarge(file, folder / file.name)
    else:
        for file in files:
            (folder / file.name).symlink_to(file)
    if part == "packed":
        for form in ("jpeg", "raw"):
            pack(PackConfig(images=str(folder), out=str(scratch / form), form=form, short_side=288))
    return difference(sorted(folder.iterdir())[:32])


def enlarge(photo: Path, path: Path) -> None:
    with Image.open(photo) as image:
        scale = 4000 / max(image.size)
        large = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
    large.save(path, quality=90)


def difference(photos: list[Path]) -> float:
    """Mean |simmim's - torchvision's pixels| over the same crops, in levels of 255."""
    crop, found = RandomResizedCrop(size=(SIZE, SIZE)), []
    for number, photo in enumerate(photos):
        key = sample_key(0, 0, number, stream="crop")
        with Image.open(photo) as image:
            box = crop.box(key, image.height, image.width)
            theirs = transforms.functional.resized_crop(image.convert("RGB"), *box, [SIZE, SIZE])  # type: ignore[arg-type]
        ours = load(photo.read_bytes(), lambda *_, box=box: box, size=(SIZE, SIZE), channels=3, dtype=np.uint8)
        found.append(np.abs(ours - np.asarray(theirs, float)).mean())
    return round(float(np.mean(found)), 2)


def contenders(part: str, scratch: Path) -> Contenders:
    size = PARTS[part]

    def peer(workers: int) -> Callable[[], Batches]:
        return partial(torchvision_batches, scratch / "classes", workers=workers, size=size)

    def ours(data: str, **options: bool) -> Callable[[], Batches]:
        return partial(simmim_batches, scratch / data, size=size, **options)

    found: Contenders = {f"torchvision, {workers} workers": peer(workers) for workers in sorted({0, 2, cpu_cores()})}
    if part == "packed":
        for form in ("jpeg", "raw"):
            found[f"simmim, {form}"] = ours(form)
            found[f"simmim, {form}, processes"] = ours(form, processes=True)
        found["simmim, raw, processes, no antialiasing"] = ours("raw", processes=True, antialias=False)
        return found
    found["simmim"] = ours("classes")
    found["simmim, processes"] = ours("classes", processes=True)
    if part == "loose":
        found["simmim, normalised"] = partial(normalised, scratch / "classes", size=size)
    return found


def speed(start: Callable[[], Batches], size: int, seconds: float) -> tuple[float, float]:
    """Images per second by the clock, and per second of the processors' time."""
    torch.set_num_threads(1)  # the cores are taken by workers or threads
    batches = start()
    for _ in range(AHEAD):
        next(batches)
    begun, processor, done = time.perf_counter(), processor_seconds(), 0
    while time.perf_counter() - begun < seconds:
        next(batches)
        done += size
    taken, worked = time.perf_counter() - begun, processor_seconds() - processor
    batches.close()
    time.sleep(0.3)  # its threads finish what they are at
    return done / taken, done / worked


def processor_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def summary(rates: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios to the fastest torchvision."""
    medians = {name: np.median(found, axis=0) for name, found in rates.items()}
    peers = [name for name in rates if name.startswith("torchvision")]
    peer = max(peers, key=lambda name: medians[name][0])
    idle = "torchvision, 0 workers"
    # Of other processes the processor time is known when they have ended, and with that of their start.
    here = [name for name in rates if name == idle or (name not in peers and "processes" not in name)]
    return {
        "images_per_second": {name: round(float(median[0]), 1) for name, median in medians.items()},
        "images_per_processor_second": {
            name: round(float(median[1]), 1) for name, median in medians.items() if name in here
        },
        f"ratio to {peer}": {name: ratio(rates[name], rates[peer], 0) for name in rates},
        f"ratio of processor time to {idle}": {
            name: ratio(rates[name], rates[idle], 1) for name in here if name != idle
        },
    }


def ratio(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], which: int) -> float:
    return round(statistics.median(one[which] / other[which] for one, other in zip(ours, theirs, strict=True)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="simmim's input against torchvision's, in images per second")
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--photos", type=Path, default=default, help="folder of JPEG files (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round, for each (default: %(default)s)")
    arguments = parser.parse_args()
    for part in arguments.parts:
        rates: dict[str, list[tuple[float, float]]] = {}
        figures: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as processes:
            levels = prepare(part, arguments.photos, Path(scratch))
            starts = contenders(part, Path(scratch))
            # Each in a process of its own: what one frees would change how memory is got for those that follow.
            spawn = multiprocessing.get_context("spawn")
            aside = {name: processes.enter_context(ProcessPoolExecutor(1, spawn)) for name in starts}
            for number in range(1, arguments.rounds + 1):
                for name, start in starts.items():
                    round_ = aside[name].submit(speed, start, PARTS[part], arguments.seconds)
                    rates.setdefault(name, []).append(round_.result())
                figures = {"rounds": number, "load_average": round(os.getloadavg()[0], 1), **summary(rates)}
                figures["mean_difference_of_pixels"] = levels
                save(f"input_vs_peers_{part}", {**described(), **figures}, quiet=True)
        print(part, json.dumps(figures, indent=1))


def described() -> dict[str, Any]:
    found = machine()
    for package in ("simplejpeg", "opencv-python-headless"):
        found["versions"][package] = importlib.metadata.version(package)
    return found


if __name__ == "__main__":
    main()
