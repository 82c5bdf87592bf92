"""Clips for tests, written by PyAV (FFmpeg)."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH = 48, 64


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Draw a picture that is another for each number."""
    rows, columns = np.mgrid[:height, :width]
    drawn = np.stack([columns * 3 + number * 7, rows * 2 + number * 11, rows + columns + number * 5], axis=-1)
    return (drawn % 256).astype(np.uint8)


def write_clip(
    path: Path,
    codec: str = "libx264",
    *,
    pictures: Sequence[NDArray[np.uint8]] | None = None,
    frames: int = 40,
    form: str = "yuv420p",
    gop: int = 10,
    times: Sequence[int] | None = None,
    base: Fraction = Fraction(1, 25),
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Path:
    """Write a clip, shown at `times` in `base` seconds (default: 0, 1, 2 …)."""
    pictures = pictures or [picture(number) for number in range(frames)]
    usual = {"x264-params": "log=-1", "x265-params": "log-level=none"}
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=Fraction(1) / base, options=usual | (options or {}))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.gop_size, stream.codec_context.time_base = form, gop, base
        if prepare:
            prepare(stream)
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=form)
            frame.pts, frame.time_base = times[number] if times else number, base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def decode_whole(path: Path) -> list[tuple[int | None, NDArray[Any]]]:
    """Decode a clip from its beginning, by PyAV alone: time stamps and RGB."""
    with av.open(str(path)) as file:
        return [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
