"""Pictures of a report: JPEGs inside the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simmim.training.pictures import data_uri

_PANELS = 8
_PANEL_WIDTH = 480


@dataclass(frozen=True)
class Panel:
    """A picture of a step, as a data URI."""

    step: int
    uri: str
    width: int
    height: int


def panels(folder: Path, runs: int = 1) -> list[Panel]:
    """Return some of a run's pictures, the first and the last among them; unreadable files are left out.

    There are fewer of each run on a page of several `runs`.
    """
    from PIL import Image, UnidentifiedImageError

    found = []
    files = [file for file in folder.glob("step-*.png") if file.stem[5:].isdecimal()]
    for file in spread(sorted(files), max(2, _PANELS // runs)):
        try:
            with Image.open(file) as stored:
                picture = stored.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            continue
        if picture.width > _PANEL_WIDTH:
            picture = picture.resize((_PANEL_WIDTH, round(picture.height * _PANEL_WIDTH / picture.width)))
        found.append(Panel(int(file.stem.removeprefix("step-")), data_uri(picture), *picture.size))
    return found


def spread(files: Sequence[Path], most: int) -> list[Path]:
    """Choose at most `most` files, at even distances, with the first and the last."""
    if len(files) <= most:
        return list(files)
    return [files[round(number * (len(files) - 1) / (most - 1))] for number in range(most)]
