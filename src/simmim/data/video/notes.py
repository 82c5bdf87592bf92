"""What a user is told of clips, in lines."""

from typing import TYPE_CHECKING

from simmim.data.files import PathList, is_sound
from simmim.data.video.source import clips_of, source_behind

if TYPE_CHECKING:
    from simmim.data.sources import ImageSource


def describe_frames(source: "ImageSource") -> str | None:
    """Say how many frames of how many clips a source holds; `None` for other images."""
    clips = clips_of(source)
    return clips.describe() if clips else None


def warn_of_clips(source: "ImageSource") -> str | None:
    """Say which clips are left out, beside images or sounds, or cannot be read. `None` if there are none."""
    inner = source_behind(source)
    inner = getattr(inner, "files", inner)  # of volumes or clips
    if isinstance(inner, PathList) and (count := inner.clips_left_out):
        kind = "sounds" if is_sound(inner.name(0)) else "images"
        return (
            f"{_clips(count)} beside the {kind} {'is' if count == 1 else 'are'} left out; write video:FOLDER to read "
            "clips alone"
        )
    if (clips := clips_of(source)) and clips.broken:
        name, reason = next(iter(clips.broken.items()))
        of = f" of {len(clips.files):,}"
        return f"{len(clips.broken):,}{of} clips cannot be read, such as {name}: {reason}; each counts as one image"
    return None


def _clips(count: int) -> str:
    return f"{count:,} clip{'s' * (count != 1)}"
