"""Images that cannot be read: left out, listed and counted, and a run is stopped at too many of them."""

import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

from simmim.disk import writing
from simmim.errors import UserError


class TooManyBadImages(UserError):
    """Unreadable images exceed `max_fraction` of a set."""


class BadImages:
    """The unreadable images of one set, each listed once in a text file.

    Lines are `NAME<TAB>REASON`, with `<TAB>PART` for a `part` that is not trained on, such as val. The file may exist
    already, hold other parts, and grow by other processes; without a `path` the list is kept in memory. `add` raises
    `TooManyBadImages` once more than `max_fraction` (0..1) of `total` images are listed.
    """

    def __init__(self, path: Path | None, *, total: int, max_fraction: float = 0.01, part: str = ""):
        if not 0 <= max_fraction <= 1:
            raise UserError(f"--max-bad-fraction {max_fraction} is not within 0..1; use 0.01")
        self.path = path
        self.total = total
        self.max_fraction = max_fraction
        self.part = part
        self._names: set[str] = set()
        self._bytes_read = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"total": self.total, "max_fraction": self.max_fraction, "part": self.part}
        return partial(BadImages, **options), (self.path,)

    def __len__(self) -> int:
        with self._lock:
            self._catch_up()
            return len(self._names)

    def add(self, name: str, reason: str) -> None:
        """List an image. Raises `TooManyBadImages` if that is one too many."""
        with self._lock:
            self._catch_up()
            name, reason = (re.sub(r"[\t\n]", " ", text) for text in (name, reason))
            if name not in self._names:
                self._names.add(name)
                if self.path is not None:
                    line = "\t".join([name, reason, *([self.part] if self.part else [])])
                    with writing(self.path), self.path.open("ab") as file:
                        file.write(f"{line}\n".encode(errors="surrogateescape"))
            bad = len(self._names)
        if bad > self.max_fraction * self.total:
            raise TooManyBadImages(
                f"{bad} of {self.total} images{self._where()} ({bad / self.total:.1%}) cannot be read, such as {name}, "
                f"more than --max-bad-fraction {self.max_fraction}{self._listed()}"
            )

    def none_readable(self) -> TooManyBadImages:
        """Return the error for a set in which every image is bad."""
        return TooManyBadImages(f"none of the {self.total} images{self._where()} can be read{self._listed()}")

    def _where(self) -> str:
        return f" of {self.part}" if self.part else ""

    def _listed(self) -> str:
        return f"; they are listed in {self.path}" if self.path else ""

    def _catch_up(self) -> None:
        """Read new lines of the file."""
        if self.path is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._bytes_read)
            lines = file.read().split(b"\n")[:-1]  # the text after the last line end is not complete yet
        self._bytes_read += sum(len(line) + 1 for line in lines)
        for line in lines:
            name, _, part = (*line.decode(errors="surrogateescape").split("\t"), "", "")[:3]
            if part == self.part:
                self._names.add(name)


def count_listed(path: Path) -> int:
    """Count the images that a `bad_images.txt` lists, whatever their part."""
    return len(set(path.read_bytes().splitlines())) if path.exists() else 0
