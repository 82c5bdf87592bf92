"""Find the frames of a clip, without decoding it, and choose of them.

Shapes: `N` frames in the order in which they are shown; of these `n` are chosen.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from simmim.config.frames import FrameChoice
from simmim.data.decode import decode
from simmim.data.picture import BadImage
from simmim.data.video.decoder import BlameTheClip, Decoder, to_pixels

_SIDE, _PARTS = 32, 8
"""Frames are compared as grey thumbnails of 32 x 32, by the mean difference in each of 8 x 8 parts."""


@dataclass(frozen=True)
class Chosen:
    """The chosen frames of a clip."""

    total: int
    """N."""
    pixels: int
    """Pixels of a frame, as the clip's header says."""
    numbers: NDArray[np.int64]
    """Which of the N frames they are, counted from 0 (n,)."""
    stamps: NDArray[np.int64]
    """By what `Decoder.read` knows them (n,)."""
    keys: NDArray[np.int64]
    """Time stamps of the key frames; none in a file that has to be decoded from its beginning to any frame."""


@dataclass(frozen=True)
class _Frames:
    """All frames of a clip (N,)."""

    times: NDArray[np.int64]
    """When they are shown, in `base` seconds."""
    base: Fraction
    stamps: NDArray[np.int64]
    is_key: NDArray[np.bool_]
    keys: NDArray[np.int64]
    """Time stamps of the key frames, as `Chosen` has them."""


def choose_frames(path: str, choice: FrameChoice) -> Chosen:
    """Choose frames of a clip. Raises `BadImage` or `OSError` where it has none."""
    decoder = Decoder(path)
    try:
        found = _find(decoder)
        numbers = _choose(found, choice)
        if choice.levels is not None:
            numbers = _distinct(decoder, found, numbers, choice.levels)
        pixels = decoder.stream.codec_context.height * decoder.stream.codec_context.width
    finally:
        decoder.close()
    return Chosen(len(found.times), pixels, numbers, found.stamps[numbers], found.keys)


def _find(decoder: Decoder) -> _Frames:
    """List the frames by their packets, or by decoding all where packets lack usable time stamps."""
    packets: list[tuple[int, bool, bool]] = []
    usable = decoder.has_true_stamps
    try:
        with BlameTheClip():
            for packet in decoder.packets():
                usable &= packet.pts is not None
                packets.append((packet.pts or 0, packet.is_keyframe, packet.is_discard))
    except BadImage:
        if not packets:
            raise
    if not packets:
        raise BadImage("holds no frames")
    times = np.array([time for time, _, _ in packets], np.int64)
    is_key, hidden = (np.array([packet[place] for packet in packets], np.bool_) for place in (1, 2))
    keys = times[is_key]
    if not usable or len(np.unique(times)) < len(times) or (np.diff(keys) < 0).any():
        return _decode_all(decoder)
    before = keys.min(initial=2**62)  # frames shown before the first key frame lack what they are decoded from
    shown = np.flatnonzero(~hidden & (times >= before))
    shown = shown[np.argsort(times[shown])]
    if not len(shown):
        raise BadImage("holds no frames that can be decoded")
    times, is_key = times[shown], is_key[shown]
    return _Frames(times, Fraction(decoder.stream.time_base), times, is_key, keys)


def _decode_all(decoder: Decoder) -> _Frames:
    """Decode a clip whole, to count its frames. One that is damaged ends at the damage."""
    times: list[int] = []
    keys: list[bool] = []
    base, rate = Fraction(decoder.stream.time_base), Fraction(decoder.stream.guessed_rate or 25)
    try:
        for frame in decoder.all_frames():
            times.append(round(len(times) / rate / base) if frame.pts is None else frame.pts)
            keys.append(bool(frame.key_frame))
    except BadImage:
        if not times:
            raise
    if not times:
        raise BadImage("holds no frames")
    count = np.arange(len(times))
    ascending = np.maximum.accumulate(np.array(times, np.int64))  # clips that were joined may begin anew
    return _Frames(ascending, base, count, np.array(keys, np.bool_), count[:0])


def _choose(found: _Frames, choice: FrameChoice) -> NDArray[np.int64]:
    """Return the numbers of the chosen frames: of a time, the first that is shown from then on."""
    if choice.step is not None:
        return np.arange(0, len(found.times), choice.step)
    if choice.seconds is None:
        return np.flatnonzero(found.is_key)
    span = choice.seconds / found.base
    part = (found.times - found.times[0]) * span.denominator // span.numerator
    return np.unique(part, return_index=True)[1].astype(np.int64)


def _distinct(decoder: Decoder, found: _Frames, numbers: NDArray[np.int64], levels: float) -> NDArray[np.int64]:
    """Leave out frames of which no part differs by `levels` from the last kept one. Damaged ones stay, to be told."""
    kept: list[int] = []
    last: NDArray[np.float32] | None = None
    for number in numbers.tolist():
        try:
            frame = decoder.read(int(found.stamps[number]), found.keys)
            small = _thumbnail(decode(to_pixels(frame), channels=1, dtype=np.float32))
        except BadImage:
            kept.append(number)
            continue
        if last is None or _difference(small, last) >= levels:
            kept.append(number)
            last = small
    return np.array(kept, np.int64)


def _thumbnail(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    import cv2

    return cv2.resize(pixels, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)


def _difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    side = _SIDE // _PARTS
    return float(np.abs(first - second).reshape(_PARTS, side, _PARTS, side).mean(axis=(1, 3)).max())
