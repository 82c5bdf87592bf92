"""The images that cannot be read: listed, counted, and too many of them."""

import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

from simmim.errors import UserError


class TooManyBadImages(UserError):
    """More images than a run puts up with cannot be read."""


class BadImages:
    """The images that cannot be read, each listed once in a file of `NAME<TAB>REASON` lines.

    The file may be there already, and other processes may add to it. `add` raises `TooManyBadImages` once more than
    `max_fraction` (0..1) of `total` images are listed.
    """

    def __init__(self, path: Path, *, total: int, max_fraction: float = 0.01):
        if not 0 <= max_fraction <= 1:
            raise UserError(f"--max-bad-fraction {max_fraction} is not within 0..1; use 0.01")
        self.path = path
        self.total = total
        self.max_fraction = max_fraction
        self._names: set[str] = set()
        self._bytes_read = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(BadImages, total=self.total, max_fraction=self.max_fraction), (self.path,)

    def __len__(self) -> int:
        with self._lock:
            self._catch_up()
            return len(self._names)

    def add(self, name: str, reason: str) -> None:
        with self._lock:
            self._catch_up()
            name = re.sub(r"[\t\n]", " ", name)
            if name not in self._names:
                with self.path.open("ab") as file:
                    file.write(f"{name}\t{reason}\n".encode(errors="surrogateescape"))
                self._catch_up()
            bad = len(self._names)
        if bad > self.max_fraction * self.total:
            raise TooManyBadImages(
                f"{bad} of {self.total} images ({bad / self.total:.1%}) cannot be read, more than --max-bad-fraction "
                f"{self.max_fraction}; they are listed in {self.path}"
            )

    def _catch_up(self) -> None:
        """Read the lines that are new in the file."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._bytes_read)
            lines = file.read().split(b"\n")[:-1]  # what follows the last line's end is not written yet
        self._bytes_read += sum(len(line) + 1 for line in lines)
        self._names |= {line.split(b"\t")[0].decode(errors="surrogateescape") for line in lines}
