"""Sound files as images one pixel wide: samples (n, 1, 1) of one channel, at one rate.

libsndfile (through soundfile) reads WAV, FLAC, Ogg, MP3, AIFF and others, and only the part that is asked for; soxr
resamples it. Channels are averaged. Samples are int16, or float32 within -1..1 for files of more than 16 bits. The
engine computes spectrograms of them on its device (`simmim.method.spectrogram`).

Shapes: `n` samples.
"""

import io
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from simmim.data.files import PathList, is_sound
from simmim.data.picture import BadImage, Picture, Raw
from simmim.disk import writing
from simmim.errors import UserError

if TYPE_CHECKING:
    from simmim.data.augment import Box
    from simmim.data.sources import ImageSource

_EDGE = 0.05  # seconds beyond a part, so that resampling it equals resampling the whole
_BLOCK = 2**20  # frames read at a time to check a file
_LOOKED_AT = 10_000
_UNKNOWN = 2**62  # libsndfile's count of frames where a header has none is 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Clip(Picture):
    """A sound with a parsed header. Its height is its number of samples at the rate that is asked for."""

    cut: Callable[[int, int], NDArray[np.float32]]
    """First sample and count → samples (count,) within -1..1, zeros beyond the end. Raises `BadImage`."""
    file: Any
    """The open `soundfile.SoundFile`."""
    raw: Callable[[], bytes]
    """Return the file's bytes."""

    def fits(self, channels: int) -> bool:
        return channels == 1

    def decode(self, *, channels: int, dtype: DTypeLike, reduction: int = 1) -> NDArray[Any]:
        """Return all samples (n, 1, 1). Raises `BadImage`."""
        if channels != 1:
            raise BadImage(f"is a sound, and images of {channels} channels are wanted")
        return _as_stored(self.cut(0, self.height), dtype)

    def show(self, box: "Box", count: int, *, dtype: DTypeLike) -> NDArray[Any]:
        """Return `count` samples around the middle of a box, (count, 1, 1); a short sound ends in zeros."""
        first = max(0, min(box.top + (box.height - count) // 2, self.height - count))
        return _as_stored(self.cut(first, count), dtype)

    def check(self, channels: int | None = None, dtype: DTypeLike = np.float32) -> None:
        with _BlameTheSound():
            self.file.seek(0)
            while len(found := self.file.read(_BLOCK, dtype="float32", always_2d=True)):
                _check_finite(found)


class Sounds:
    """The sound files of a source, read at `rate`, or at their own; an `ImageSource`."""

    def __init__(self, source: "ImageSource", rate: int | None = None):
        """Raise `UserError` where the packages that read sounds are missing."""
        _library("soundfile")
        _library("soxr")
        self.source, self.rate = source, rate

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, index: int) -> Raw:
        source, index = _behind(self.source, index)
        if isinstance(source, Sounds):
            source, index = _behind(source.source, index)
        if isinstance(source, PathList):  # long recordings are not read whole
            path = source.name(index)
            if not stat.S_ISREG(Path(path).stat().st_mode):
                raise ValueError("is no regular file")
            return open_clip(path, self.rate)
        raw = source.read(index)
        if not isinstance(raw, bytes):
            raise BadImage("is an array or a picture, not a sound file")
        return open_clip(raw, self.rate)


def as_sounds(source: "ImageSource", rate: int | None) -> Sounds:
    """Return a source whose sounds are read at `rate`. Raises `UserError` where the extra [audio] is missing."""
    return Sounds(source.source if isinstance(source, Sounds) else source, rate)


def _behind(source: "ImageSource", index: int) -> tuple["ImageSource", int]:
    """Return the source that a part of one is of, and the number of an image there."""
    while hasattr(source, "behind"):
        source, index = source.behind(index)  # type: ignore[attr-defined]
    return source, index


def read_as(source: "ImageSource", rate: int | None, reader: str) -> "ImageSource":
    """Return a source as its reader takes it: sounds at `rate`, or images, for `None`.

    Raises `UserError` where it holds the other. `reader` names what reads it, for messages.
    """
    sounds = holds_sounds(source)
    if sounds and rate is None:
        raise UserError(f"{reader} was trained on images, and these are sounds; give images")
    if not sounds and rate is not None:
        raise UserError(f"{reader} was trained on sounds, and these are not; give sound files, or write audio:DATA")
    return source if rate is None else as_sounds(source, rate)


def holds_sounds(source: "ImageSource") -> bool:
    """Tell whether a source holds sounds, by the names of its files. Raises `UserError` for others among them."""
    if isinstance(_behind(source, 0)[0], Sounds):
        return True
    looked_at = np.unique(np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT)).astype(int))
    names = [source.name(index) for index in looked_at.tolist()]
    sound, other = (next((name for name in names if is_sound(name) is kind), None) for kind in (True, False))
    if sound is not None and other is not None:
        raise UserError(f"the data holds sounds, such as {sound}, and others, such as {other}; give files of one kind")
    return sound is not None


def open_clip(raw: bytes | str, rate: int | None = None) -> Clip:
    """Read the header of a sound file, given as bytes or as a path. Raises `BadImage`."""
    if isinstance(raw, bytes) and not raw:
        raise BadImage("the file is empty")
    if isinstance(raw, str) and not Path(raw).stat().st_size:
        raise BadImage("the file is empty")
    with _BlameTheSound():
        # As bytes: a path need not be text that UTF-8 holds.
        file = _library("soundfile").SoundFile(io.BytesIO(raw) if isinstance(raw, bytes) else os.fsencode(raw))
    if not file.frames:
        raise BadImage("holds no samples")
    if file.frames >= _UNKNOWN:
        raise BadImage("does not say how long it is; write it again, as by ffmpeg -i IN OUT.flac")
    wanted = rate or file.samplerate
    return Clip(
        height=max(1, file.frames * wanted // file.samplerate),
        width=1,
        bands=1,
        dtype=np.dtype(np.float32 if _is_deep(file.subtype) else np.int16),
        read=lambda _: _cut(file, wanted, 0, max(1, file.frames * wanted // file.samplerate))[:, None, None],
        cut=lambda first, count: _cut(file, wanted, first, count),
        file=file,
        raw=lambda: raw if isinstance(raw, bytes) else Path(raw).read_bytes(),
    )


def write_wav(path: Path, samples: NDArray[np.float32], rate: int) -> None:
    """Write samples (n,) within -1..1 as a 16-bit WAV file."""
    with writing(path):
        _library("soundfile").write(path, samples, rate, subtype="PCM_16", format="WAV")


def _cut(file: Any, rate: int, first: int, count: int) -> NDArray[np.float32]:
    """Read the samples `first` to `first + count` of a file at another rate; zeros beyond its end."""
    own = file.samplerate
    common = math.gcd(own, rate)
    up, down = rate // common, own // common  # so many samples for so many of the file's
    edge = 0 if own == rate else math.ceil(_EDGE * own / down)
    block = max(0, first // up - edge)  # parts begin where a sample of the file is one of the result
    frames = math.ceil((first + count) * own / rate) + edge * down - block * down
    with _BlameTheSound():
        file.seek(min(block * down, file.frames))
        found = file.read(min(frames, file.frames), dtype="float32", always_2d=True)
    if not len(found):
        raise BadImage("the file ends before the samples that it claims")
    _check_finite(found)
    mono = found[:, 0] if found.shape[1] == 1 else found.mean(axis=1)
    if own != rate:
        mono = _library("soxr").resample(mono, own, rate)
    part = mono[first - block * up :][:count]
    return part if len(part) == count else np.pad(part, (0, count - len(part)))


def _check_finite(samples: NDArray[np.float32]) -> None:
    if not np.isfinite(samples).all():
        raise BadImage("has values that are not finite")


def _as_stored(samples: NDArray[np.float32], dtype: DTypeLike) -> NDArray[Any]:
    """Convert samples (n,) within -1..1 to (n, 1, 1) of float32 or int16."""
    if dtype == np.int16:
        samples = np.clip(np.rint(samples * 32768), -32768, 32767)
    return samples.astype(dtype, copy=False)[:, None, None]


def _is_deep(subtype: str) -> bool:
    """Tell whether a file's samples have more than 16 bits. Lossy formats count as 16."""
    return "ADPCM" not in subtype and subtype.endswith(("_20", "_24", "_32", "FLOAT", "DOUBLE"))


class _BlameTheSound:
    """Turn errors of libsndfile into `BadImage`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadImage | OSError):
            reason = " ".join(str(getattr(error, "error_string", error)).split()) or type(error).__name__
            raise BadImage(f"cannot be read as a sound: {reason.removesuffix('.')}") from error


@cache
def _library(name: Literal["soundfile", "soxr"]) -> Any:
    try:
        if name == "soxr":
            import soxr as found
        else:
            import soundfile as found
        return found
    except (ImportError, OSError) as error:  # soundfile raises OSError where libsndfile is missing
        raise UserError(f"sounds need {name}, which is not here ({error}); pip install 'simmim[audio]'") from None
