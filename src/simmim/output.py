"""Standard output and error that may be closed, broken or full at any time: no work is lost for them."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

_GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ESHUTDOWN, errno.ECONNRESET}
"""No one reads on: a pipe, a terminal or a socket was closed."""


class SafeStream:
    """Text stream that goes silent once no one reads it, in place of an error that would end the work.

    A full disk is an error only if the text is a result (`keeps_results`): progress that cannot be written is no loss.
    What the encoding does not hold is written as an escape. `stream` is `None` where the process has none.
    """

    def __init__(self, stream: Any, *, keeps_results: bool = False):
        self._stream: Any = stream or Path(os.devnull).open("w")  # noqa: SIM115
        self._keeps_results = keeps_results
        self._silent = False

    def write(self, text: str) -> int:
        with self._watched():
            if not self._silent:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError as error:
                    self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        with self._watched():
            if not self._silent:
                self._stream.flush()

    def isatty(self) -> bool:
        return not self._silent and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._end()
            if self._keeps_results and error.errno not in _GONE:
                raise OSError(error.errno, f"standard output cannot be written: {error.strerror}") from None
        except ValueError:  # closed by whoever opened it
            self._silent = True

    def _end(self) -> None:
        """Go silent. What the stream still holds, and what others write to the same place, goes nowhere."""
        self._silent = True
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
            place = self._stream.fileno()
            if place in (1, 2):
                _open_nowhere(place)


def say(text: str) -> None:
    """Print a line on standard error, if there is one, with escapes for what would control a terminal."""
    stream = sys.stderr if isinstance(sys.stderr, SafeStream) else SafeStream(sys.stderr)
    stream.write(f"{printable(text)}\n")
    stream.flush()


def printable(text: str) -> str:
    """Escape what would control a terminal, such as an escape byte or a line end in the name of a file."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def show(lines: Iterable[object]) -> None:
    """Print results on standard output, one a line: names of files in them cannot control a terminal."""
    print("\n".join(printable(str(line)) for line in lines))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, of cells that are `printable`: columns are as wide as their widest cell."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in cells]


def shortened(text: str) -> str:
    """Shorten words that are too long to read, such as a name that was repeated by mistake."""
    return re.sub(r"\S{300,}", lambda word: f"{word[0][:100]}…{word[0][-50:]}", text)


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Make the process's standard output and error safe, whoever writes to them."""
    for place in (0, 1, 2):  # else the next file that is opened would be taken for one of them
        try:
            os.fstat(place)
        except OSError:
            _open_nowhere(place)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = SafeStream(before[0], keeps_results=True), SafeStream(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_nowhere(place: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != place:
        os.dup2(nowhere, place)
        os.close(nowhere)
