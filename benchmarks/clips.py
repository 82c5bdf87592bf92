"""Frames a second by distance of key frames, loose and packed, of one core's processor time (docs/video.md).

python benchmarks/clips.py [--work DIR]; writes clips of 1920 x 1080 there, if they are not there yet.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from simmim.cli import main as simmim
from simmim.data.augment import RandomResizedCrop, load
from simmim.data.decode import decode
from simmim.data.sources import DemoImages, ImageSource, open_source
from simmim.data.video import source as video

HEIGHT, WIDTH, FRAMES, SIDE = 1080, 1920, 750, 3200
CROP = RandomResizedCrop(size=(224, 224))


def scene() -> NDArray[np.uint8]:
    """Lay out 400 emoji as a picture (3200, 3200, 3) to pan over."""
    demo, rng = DemoImages(), np.random.default_rng(0)
    tiles = [decode(demo.read(int(index)), channels=3, dtype=np.uint8) for index in rng.permutation(len(demo))[:400]]
    rows = [np.concatenate(tiles[first : first + 20], axis=1) for first in range(0, 400, 20)]
    return cv2.resize(np.concatenate(rows), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def write(path: Path, gop: int) -> None:
    """Write 30 s of a noisy camera that pans over the scene."""
    picture, rng = scene(), np.random.default_rng(1)
    noise = rng.normal(0, 4, (8, HEIGHT, WIDTH, 1)).astype(np.int16)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "23"})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = HEIGHT, WIDTH, "yuv420p", gop
        for number in range(FRAMES):
            left = int((np.sin(number / 90) + 1) / 2 * (SIDE - WIDTH))
            top = int((np.cos(number / 70) + 1) / 2 * (SIDE - HEIGHT))
            seen = picture[top : top + HEIGHT, left : left + WIDTH].astype(np.int16) + noise[number % 8]
            frame = av.VideoFrame.from_ndarray(np.clip(seen, 0, 255).astype(np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def rate(source: ImageSource, indices: Sequence[int]) -> float:
    """Return images a second of processor time, cropped and resized for a training."""
    begun = time.process_time()
    for index in indices:
        load(source.read(index), partial(CROP.box, index), size=CROP.size, channels=3, dtype=np.uint8)
    return len(indices) / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("clips-benchmark"))
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)
    for gop in (1, 12, 50, 250):
        path = work / f"gop{gop}.mp4"
        if not path.exists():
            write(path, gop)
        source = open_source(str(path), "5")
        order = np.random.default_rng(0).permutation(len(source))[: 60 if gop < 100 else 30].tolist()
        kept, apart = video._IDLE, rate(source, order)
        video._IDLE = 0  # each read opens the clip, as with many clips
        anew = rate(open_source(str(path), "5"), order)
        video._IDLE = kept
        size, ordered = path.stat().st_size / 1e6, rate(source, range(len(source)))
        print(f"key frame every {gop}: {size:.1f} MB, random {apart:.1f}, anew {anew:.1f}, in order {ordered:.1f}")
    for options in ([], ["--short-side", "288"]):
        out = work / "-".join(["packed", *options[1:]])
        simmim(["pack", str(work / "gop50.mp4"), "--out", str(out), "--frames", "5", *options])
        packed = open_source(str(out))
        order = np.random.default_rng(0).permutation(len(packed)).tolist()
        print(f"{out.name}: random {rate(packed, order):.1f}")


if __name__ == "__main__":
    main()
