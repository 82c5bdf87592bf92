"""Input on few CPU cores beside a GPU: JPEGs decoded by the cores' threads against nvJPEG (`--decode gpu`).

    python benchmarks/gpu_decode.py [--photos FOLDER] [--cores 2] [--rounds 3] [--seconds 3]

The process keeps to so many cores. Both read the same images and crop them to 224 pixels for a batch of 256; nvJPEG's
are then on the GPU, those of the threads in memory. A third way reads files and headers and decodes nothing: it is
what nvJPEG leaves to the threads. Without photographs it takes 256 mosaics of emoji, JPEGs of 640 × 480. Rounds
alternate; the median counts, of the speed by the clock and of the processor time of an image, which other work on the
machine disturbs less. With `--device cpu` libjpeg-turbo is in the place of nvJPEG, of which that says nothing.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results import machine, save

from simmim.data.augment import RandomResizedCrop
from simmim.data.bad_images import BadImages
from simmim.data.decode import decode
from simmim.data.pipeline import Batch, Reading, train_batches
from simmim.data.readers.device_jpegs import device_batches
from simmim.data.sources import open_source
from simmim.torch_engine.train.jpegs import JpegDecoder, one_ahead

SIZE = (224, 224)


def draw_mosaics(folder: Path, count: int) -> None:
    emoji, draw = open_source("demo"), np.random.default_rng(0)
    for number in range(count):
        indices = draw.integers(len(emoji), size=(4, 5))
        tiles = [[decode(emoji.read(int(index)), channels=3, dtype=np.uint8) for index in row] for row in indices]
        mosaic = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in tiles]))
        mosaic.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number:03}.jpg", quality=90)


class Contest:
    def __init__(self, photos: str, bad_images: Path, *, device: str, batch_size: int, threads: int):
        self.source = open_source(photos)
        self.reading = Reading(
            batch_size=batch_size,
            seed=0,
            start_step=0,
            total_steps=10**6,
            threads=threads,
            bad_images=BadImages(bad_images, total=len(self.source), max_fraction=1),
        )
        self.decoder = JpegDecoder(torch.device(device), size=SIZE, channels=3)

    def batches(self, way: str) -> Iterator[Batch]:
        views: dict[str, Any] = {"crop": RandomResizedCrop(size=SIZE), "channels": 3}
        if way == "threads":
            return train_batches(self.source, self.reading, **views, dtype=np.uint8)
        decode = self.decoder if way == "nvjpeg" else lambda images, jpegs, fill: images
        return one_ahead(device_batches(self.source, self.reading, **views, decode=decode))

    def measure(self, way: str, seconds: float) -> dict[str, float]:
        """Images/s and milliseconds of processor time an image, from the third batch on."""
        with contextlib.closing(self.batches(way)) as batches:  # type: ignore[type-var]
            for _ in range(2):
                next(batches)
            begun, worked, count = time.perf_counter(), time.process_time(), 0
            while not count or time.perf_counter() - begun < seconds:
                next(batches)
                count += 1
            images = count * self.reading.batch_size
            return {
                "images_per_second": images / (time.perf_counter() - begun),
                "processor_ms": 1e3 * (time.process_time() - worked) / images,
            }

    def difference(self) -> float:
        """Mean absolute difference of a batch's pixels, in levels of 255."""
        images = []
        for way in ("threads", "nvjpeg"):
            with contextlib.closing(self.batches(way)) as batches:  # type: ignore[type-var]
                images.append(torch.as_tensor(next(batches)["image"]).cpu().float())
        return float((images[0] - images[1]).abs().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder of JPEG files (default: mosaics)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cores", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each figure in a round (default: %(default)s)")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
    os.sched_setaffinity(0, cores)
    with tempfile.TemporaryDirectory() as scratch:
        photos = arguments.photos or str(Path(scratch, "mosaics"))
        if not arguments.photos:
            Path(photos).mkdir()
            draw_mosaics(Path(photos), arguments.batch_size)
        contest = Contest(
            photos,
            Path(scratch, "bad_images.txt"),
            device=arguments.device,
            batch_size=arguments.batch_size,
            threads=len(cores),
        )
        difference = contest.difference()
        rounds: dict[str, list[dict[str, float]]] = {"threads": [], "nvjpeg": [], "reading": []}
        for _ in range(arguments.rounds):
            for way, found in rounds.items():
                found.append(contest.measure(way, arguments.seconds))
    medians = {
        way: {name: statistics.median(figures[name] for figures in found) for name in found[0]}
        for way, found in rounds.items()
    }
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    facts = {**machine(), "gpu": gpu, "cores_used": len(cores), "photos": arguments.photos or "mosaics"}
    figures = {"rounds": rounds, "medians": medians, "difference_levels": difference}
    for way, found in medians.items():
        speed, work = found["images_per_second"], found["processor_ms"]
        print(f"{len(cores)} cores, {way:8} {speed:7.0f} images/s, {work:.2f} ms of processor time an image")
    print(f"pixels differ by {difference:.2f} levels on average")
    save("gpu_decode" if gpu else "gpu_decode_tiny", facts | figures)


if __name__ == "__main__":
    main()
