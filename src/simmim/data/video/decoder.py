"""Decode frames of clips by PyAV (FFmpeg): any frame, with the pixels that a decoding from the beginning gives.

A frame is always decoded from the last key frame that is shown before it, whatever was read before, so that its pixels
depend on nothing else. It is recognised by its presentation time stamp.

Shapes: `H W` pixels, `C` channels.
"""

import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simmim.data.picture import MAX_PIXELS, BadImage, Raw, check_size, upright
from simmim.errors import UserError

# Demuxers of files that hold their own pictures. Others, such as playlists, would open further files, or the network.
_FORMATS = (
    "3gp,asf,av1,avi,dv,flv,gif,h264,hevc,ivf,matroska,mov,mp4,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,webm,wtv,"
    "yuv4mpegpipe"
)
_EARLIER = (0.0, 1.0, 10.0, 100.0)
"""Seconds before a key frame at which it is looked for, before the clip is read from its beginning."""
_NOWHERE, _UNKNOWN = -(2**63), -(2**63)
_TRIES = 8  # key frames
_SMALL = 16  # pixels
# The upper left of a display matrix (a b; c d), of signs → EXIF orientation.
_ORIENTATIONS = {
    (1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8,
}  # fmt: skip


class BlameTheClip:
    """Turn errors of FFmpeg into `BadImage`; those of the file stay as they are."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, library().FFmpegError | UnicodeError):
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise BadImage(f"cannot be decoded: {' '.join(reason.split())}") from error


class Decoder:
    """An open clip, for one thread at a time. Close it."""

    def __init__(self, path: str):
        """Open a file. Raises `BadImage` or `OSError` where it holds no video that can be decoded."""
        self._path = path
        self._open()
        self._key: int | None = _UNKNOWN
        self._last = _NOWHERE
        self._frames: Iterator[tuple[int, Any]] = iter(())

    def _open(self) -> None:
        status = Path(self._path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("is no regular file")
        if not status.st_size:
            raise BadImage("the file is empty")
        with BlameTheClip():
            self._container: Any = library().open(
                f"file:{self._path}",  # else a colon in a name would begin with a protocol
                options={"max_pixels": str(MAX_PIXELS)},
                container_options={"protocol_whitelist": "file", "format_whitelist": _FORMATS},
                metadata_errors="replace",
            )
        try:
            self.stream: Any = self._container.streams.best("video")
            if self.stream is None or self.stream.disposition & library().stream.Disposition.attached_pic:
                raise BadImage("holds no video")
            if self.stream.codec_context is None:
                raise BadImage("is coded in a way that FFmpeg does not read here")
            self.stream.codec_context.thread_count = 1  # threads of ours read several clips at once
        except BaseException:
            self._container.close()
            raise

    def close(self) -> None:
        self._frames = iter(())  # which holds this object, and with it a decoder's megabytes
        self._release()

    def _release(self) -> None:
        self._container.close()
        self.stream = None

    @property
    def has_true_stamps(self) -> bool:
        """Whether packets say when they are shown. AVI keeps no such times, and FFmpeg's guess fails with B-frames."""
        return self._container.format.name != "avi" or not self.stream.codec_context.has_b_frames

    def packets(self) -> Iterator[Any]:
        """Yield the packets that hold pictures, from where the file stands."""
        invisible = self.stream.codec_context.name in ("vp8", "libvpx")
        for packet in self._container.demux(self.stream):
            if packet.size and not (invisible and not memoryview(packet)[0] >> 4 & 1):
                yield packet

    def all_frames(self) -> Iterator[Any]:
        """Yield all frames from the beginning, as FFmpeg gives them. Raises `BadImage`."""
        self._release()
        self._open()
        with BlameTheClip():
            yield from self._container.decode(self.stream)

    def saves(self, stamp: int, keys: NDArray[np.int64]) -> int:
        """Return the time stamp from which it can go on to a frame, after the same key frame; else the lowest."""
        return self._last if self._key == _key_before(stamp, keys)[0] and self._last < stamp else _NOWHERE

    def read(self, stamp: int, keys: NDArray[np.int64]) -> Any:
        """Return the frame with a time stamp, in a clip whose key frames have the time stamps `keys`, ascending.

        Where there are none the clip is decoded from its beginning, and `stamp` is the frame's number. Where the last
        key frame is not enough, as with a periodic intra refresh, an earlier one is tried. Raises `BadImage`.
        """
        goes_on = self.saves(stamp, keys) != _NOWHERE
        for key in _key_before(stamp, keys):
            if not goes_on:
                self._frames = enumerate(self.all_frames()) if key is None else self._frames_from(key)
            goes_on = False
            self._key, self._last = _UNKNOWN, stamp
            for found, frame in self._frames:
                if found == stamp:
                    self._key = key
                    return frame
                if found > stamp:
                    break
        raise BadImage("is not among the frames that FFmpeg decodes")

    def _frames_from(self, key: int) -> Iterator[tuple[int, Any]]:
        with BlameTheClip():
            context = self.stream.codec_context
            for packet in self._packets_from(key):
                for frame in context.decode(packet):
                    if frame.pts is not None:
                        yield frame.pts, frame
            for frame in context.decode(None):
                if frame.pts is not None:
                    yield frame.pts, frame

    def _packets_from(self, key: int) -> Iterator[Any]:
        """Yield the packets from a key frame on. Where a seek leads beyond it, one to an earlier time is tried."""
        for seconds in (*_EARLIER, None):
            if seconds is None:
                self._release()
                self._open()
            else:
                try:
                    self._container.seek(key - int(seconds / self.stream.time_base), stream=self.stream)
                except library().FFmpegError:
                    continue
            begun = False
            for packet in self._container.demux(self.stream):
                if not packet.size or packet.pts is None:
                    if begun and packet.size:
                        yield packet
                    continue
                if not begun and packet.is_keyframe and packet.pts > key:
                    break
                begun = begun or (packet.is_keyframe and packet.pts == key)
                if begun:
                    yield packet
            if begun:
                return
        raise BadImage("its key frame is not found again; was the clip changed?")


def to_pixels(frame: Any) -> Raw:
    """Convert a frame to upright pixels: RGB, grey, deep grey of 16 bits, or RGB with transparency as a Pillow image.

    Raises `BadImage` for one that is damaged or too large.
    """
    if frame.is_corrupt:
        raise BadImage("is damaged in the clip")
    check_size(frame.height, frame.width, 3)
    components = frame.format.components
    if any(component.is_alpha for component in components):
        form = "rgba"
    elif len(components) == 1 and frame.format.name.startswith("gray"):
        form = "gray" if components[0].bits <= 8 else "gray16le"
    else:
        form = "rgb24"
    with BlameTheClip():
        pixels = frame.to_ndarray(format=form, threads=1)
        orientation = _orientation(frame)
    pixels = upright(pixels, orientation)
    if form == "rgba":
        from PIL import Image

        return Image.fromarray(pixels)
    return pixels


def _orientation(frame: Any) -> int:
    """Return the EXIF orientation that a frame's display matrix says; 1 for a rotation that is no quarter turn."""
    # A frame whose side data was asked for is part of a cycle, and would keep its megabytes for a while.
    small = frame.reformat(width=_SMALL, height=_SMALL, threads=1)
    found = small.side_data.get("DISPLAYMATRIX")
    if found is None:
        return 1
    matrix: NDArray[np.int32] = np.frombuffer(bytes(found), np.int32, 9)
    signs = np.sign(matrix[[0, 1, 3, 4]])
    return _ORIENTATIONS.get(tuple(signs.tolist()), 1)


def _key_before(stamp: int, keys: NDArray[np.int64]) -> list[int | None]:
    """Return the last key frames that are shown no later than a frame, the last first; `None` for the beginning."""
    if not len(keys):
        return [None]
    end = int(np.searchsorted(keys, stamp, side="right"))
    return [*keys[max(0, end - _TRIES) : end][::-1].tolist()]


@cache
def library() -> Any:
    """Return PyAV. Raises `UserError` where it is missing."""
    try:
        import av

        return av
    except ImportError as error:
        raise UserError(f"clips need PyAV, which is not here ({error}); pip install 'simmim[video]'") from None
