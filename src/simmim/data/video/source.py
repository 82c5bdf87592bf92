"""Frames of clips as images; an `ImageSource`."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simmim.config.frames import FRAMES, FrameChoice
from simmim.data.files import CLIP_SUFFIXES, PathList, is_clip, open_kind, open_list
from simmim.data.picture import BadImage, Raw
from simmim.data.video.decoder import Decoder, library, to_pixels
from simmim.data.video.index import Chosen, choose_frames
from simmim.errors import UserError
from simmim.hardware.host import reading_cores
from simmim.output import say

if TYPE_CHECKING:
    from simmim.data.sources import ImageSource

_FRAME = re.compile(r"#\d{6,}$")
_IDLE = 4
"""Clips that stay open while none of their frames is read. Each may hold tens of MB of decoded frames."""
_LOOKED_AT = 10_000  # names
_SAY_EVERY = 10.0  # seconds


class Clips:
    """The chosen frames of clips, in their order. A name is `CLIP#NUMBER`, where the clip's first frame has number 0.

    A clip that cannot be read counts as one image, which cannot be read either.
    """

    def __init__(self, files: PathList, choice: FrameChoice):
        """Look through all clips. Raises `UserError` where PyAV is missing or no clip can be read."""
        library()
        self.files, self.choice = files, choice
        self.broken: dict[str, str] = {}
        """Reasons why clips cannot be read, by their names."""
        found = [self._look(number, each) for number, each in enumerate(_choose_all(files, choice))]
        if len(self.broken) == len(files):
            name, reason = next(iter(self.broken.items()))
            raise UserError(f"none of {len(files)} clips can be read, such as {name}: {reason}; give other clips")
        self.total = sum(each.total for each in found)
        """Frames of all clips, chosen or not."""
        self._ends = np.cumsum([len(each.numbers) for each in found])
        self._numbers, self._stamps = (
            np.concatenate([getattr(each, name) for each in found]) for name in ("numbers", "stamps")
        )
        self._keys = [each.keys for each in found]
        self._pixels = [each.pixels for each in found]
        self._idle = _Idle()

    def _look(self, number: int, found: Chosen | str) -> Chosen:
        if isinstance(found, Chosen):
            return found
        self.broken[self.files.name(number)] = found
        one = np.full(1, -1, np.int64)
        return Chosen(0, 1, one, one, one)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def firsts(self) -> list[int]:
        """The numbers of the first frames of clips."""
        return [0, *map(int, self._ends[:-1])]

    def clip(self, index: int) -> int:
        """Return the number of the clip that a frame is of."""
        return int(np.searchsorted(self._ends, range(len(self))[index], side="right"))

    def name(self, index: int) -> str:
        clip, number = self.files.name(self.clip(index)), self._numbers[index]
        return clip if number < 0 else f"{clip}#{number:06}"

    def count_pixels(self, index: int) -> int:
        """Count an image's pixels, by its clip's header."""
        return self._pixels[self.clip(index)]

    def read(self, index: int) -> Raw:
        clip = self.clip(index)
        path = self.files.name(clip)
        if path in self.broken:
            raise BadImage(self.broken[path])
        stamp, keys = int(self._stamps[index]), self._keys[clip]
        decoder = self._idle.take(clip, stamp, keys) or Decoder(path)
        try:
            pixels = to_pixels(decoder.read(stamp, keys))
        except BaseException:
            decoder.close()
            raise
        self._idle.give(clip, decoder)
        return pixels

    def describe(self) -> str:
        """Say in one line how many frames of how many clips are taken."""
        count = len(self.files) - len(self.broken)
        return (
            f"{len(self) - len(self.broken):,} of {self.total:,} frames of {count:,} clip{'s' * (count != 1)}: "
            f"{self.choice.describe()} (--frames {self.choice})"
        )


def _choose_all(files: PathList, choice: FrameChoice) -> list[Chosen | str]:
    """Choose the frames of each clip; a word why not where that is not possible."""

    def choose(number: int) -> Chosen | str:
        try:
            return choose_frames(files.name(number), choice)
        except OSError as error:
            return error.strerror or str(error)
        except BadImage as error:
            return str(error)

    found: list[Chosen | str] = []
    said = time.monotonic()
    with ThreadPoolExecutor(reading_cores()) as pool:
        for each in pool.map(choose, range(len(files))):
            found.append(each)
            if (now := time.monotonic()) - said >= _SAY_EVERY:
                said = now
                say(f"{len(found)}/{len(files)} clips looked through")
    return found


class _Idle:
    """Open clips that no thread reads, the one that was used last at the end. Another process begins with none."""

    def __init__(self) -> None:
        self._held: list[tuple[int, Decoder]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Idle, ()

    def take(self, clip: int, stamp: int, keys: NDArray[np.int64]) -> Decoder | None:
        """Take a decoder of a clip, one that has to decode the least for a frame, if there is any."""
        with self._lock:
            mine = [each for each in self._held if each[0] == clip]
            if not mine:
                return None
            chosen = max(mine, key=lambda each: each[1].saves(stamp, keys))
            self._held.remove(chosen)
            return chosen[1]

    def give(self, clip: int, decoder: Decoder) -> None:
        """Keep a decoder, and close the one that was used longest ago where there are too many."""
        with self._lock:
            self._held.append((clip, decoder))
            oldest = self._held.pop(0)[1] if len(self._held) > _IDLE else None
        if oldest is not None:
            oldest.close()


def as_clips(files: PathList, frames: str) -> "Clips | PathList":
    """Return the frames of files that are clips by their names; other files as they are.

    Raises `UserError` where there are files of both kinds.
    """
    looked_at = np.unique(np.linspace(0, len(files) - 1, min(len(files), _LOOKED_AT)).astype(int))
    names = [files.name(index) for index in looked_at.tolist()]
    clip, other = (next((name for name in names if is_clip(name) is kind), None) for kind in (True, False))
    if clip is None:
        return files
    if other is not None:
        raise UserError(f"the data holds clips, such as {clip}, and others, such as {other}; give files of one kind")
    return Clips(files, FrameChoice.parse(frames))


def label_frames(files: PathList, names: list[str], frames: str) -> "tuple[Clips | PathList, list[str]]":
    """Return the frames of labelled clips, each with its clip's label; files that are no clips as they are."""
    source = as_clips(files, frames)
    if not isinstance(source, Clips):
        return files, names
    return source, [names[source.clip(index)] for index in range(len(source))]


def open_clips(data: str, frames: str = FRAMES) -> "Clips":
    """Open the clips of a folder whatever else it holds, of a list or a file whatever their names.

    Raises `UserError` where there are none.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"{data} of video:{data} does not exist; give a folder of clips, a list, or a clip")
    if path.is_dir():
        files = open_kind(path, CLIP_SUFFIXES)
        if not files:
            raise UserError(f"folder {data} holds no clips; files read end in {', '.join(CLIP_SUFFIXES)}")
    else:
        files = open_list(path) if path.suffix.lower() in (".txt", ".lst") else PathList([path])
    return Clips(files, FrameChoice.parse(frames))


def check_frames(frames: str, source: "ImageSource", data: str) -> None:
    """Raise `UserError` for a choice of frames where there are no clips."""
    if frames != FRAMES and not clips_of(source):
        raise UserError(f"--frames {frames} is for clips, and {data} holds none; leave it out")


def clip_numbers(source: "ImageSource") -> NDArray[np.int64]:
    """Number the clips of which images are frames, by their names, packed or not; other images one by one."""
    names = [] if isinstance(source, PathList) else [source.name(index) for index in range(len(source))]
    if not any(map(_FRAME.search, names)):  # the first may be a clip that cannot be read, which has no number
        return np.arange(len(source))
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(_FRAME.sub("", name), len(numbers)) for name in names], np.int64)


def clips_of(source: "ImageSource") -> Clips | None:
    """Return the clips whose frames a source, or a part of one, holds; `None` for other images."""
    source = source_behind(source)
    return source if isinstance(source, Clips) else None


def source_behind(source: "ImageSource") -> "ImageSource":
    """Return the source that a part of one, or its windows, are of."""
    found: Any = source
    while len(found) and (hasattr(found, "behind") or hasattr(found, "source")):
        found = found.behind(0)[0] if hasattr(found, "behind") else found.source
    return found
