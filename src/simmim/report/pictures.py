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


def panels(folder: Path, runs: int = 1, *, most_bytes: int) -> list[Panel]:
    """Return some of a run's pictures, the first and the last among them; unreadable files are left out.

    There are fewer of each run on a page of several `runs`, and where they would take over `most_bytes`.
    """
    most = max(2, _PANELS // runs)
    while most:
        found = _panels(folder, most)
        if sum(len(panel.uri) for panel in found) <= most_bytes:
            return found
        most //= 2
    return []


def _panels(folder: Path, most: int) -> list[Panel]:
    from PIL import Image, UnidentifiedImageError

    found = []
    files = [file for file in folder.glob("step-*.png") if file.stem[5:].isdecimal()]
    for file in spread(sorted(files), most):
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
    if most == 1:
        return [files[-1]]
    return [files[round(number * (len(files) - 1) / (most - 1))] for number in range(most)]
