"""Memory-efficient sequence of image names."""

from array import array
from collections.abc import Iterable, Sequence
from typing import overload


class Names(Sequence[str]):
    """Compact string sequence; uses half the memory of a list, also while it is built."""

    def __init__(self, names: Iterable[str]):
        self._text = bytearray()
        self._ends = array("Q", [0])
        for name in names:
            self._text += name.encode(errors="surrogateescape")
            self._ends.append(len(self._text))

    def may_mention(self, text: str) -> bool:
        """Tell, without a look at each, whether a text in lower case may be in any name, in any case."""
        return text.encode() in self._text.lower()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Names": ...
    def __getitem__(self, index: int | slice) -> "str | Names":
        if isinstance(index, slice):
            return Names(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        return self._text[self._ends[number] : self._ends[number + 1]].decode(errors="surrogateescape")
