"""Which frames of a clip are images: one every so often, or key frames, with or without those that hardly differ."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator

from simmim.config.field_types import one_word
from simmim.errors import UserError

_FORM = re.compile(  # more digits would overflow where time stamps are divided
    r"(?:(?P<seconds>\d{1,9}(?:\.\d{1,6})?)s|(?P<step>\d{1,9})|key)"
    r"(?P<distinct>\+distinct(?:=(?P<levels>\d+(?:\.\d+)?))?)?"
)
LEVELS = 4.0
"""Grey levels, of 255, by which a part of a frame differs from the last kept one."""


@dataclass(frozen=True)
class FrameChoice:
    """A choice of frames. Of `seconds` and `step` one is set, or neither for key frames."""

    seconds: Fraction | None = None
    step: int | None = None
    levels: float | None = None
    """Least difference from the last kept frame; `None` keeps all."""

    @classmethod
    def parse(cls, text: str) -> "FrameChoice":
        """Read Ns, N or key, each also with +distinct or +distinct=LEVELS. Raises `UserError`."""
        found = _FORM.fullmatch(text.strip().lower())
        seconds, step, distinct, levels = found.groups() if found else ("0", None, None, None)
        choice = cls(
            seconds=Fraction(seconds) if seconds else None,
            step=int(step) if step else None,
            levels=float(levels or LEVELS) if distinct else None,
        )
        if 0 in (choice.seconds, choice.step, choice.levels):
            raise UserError(
                f"{text!r} is not a choice of frames; write 1s (one a second), 30 (every 30th), key (key frames), "
                "or 1s+distinct to drop those that hardly differ"
            )
        return choice

    def __str__(self) -> str:
        if self.seconds is not None:
            start = f"{float(self.seconds):.12g}s"
        else:
            start = "key" if self.step is None else str(self.step)
        if self.levels is None:
            return start
        return f"{start}+distinct" if self.levels == LEVELS else f"{start}+distinct={self.levels:.12g}"

    def describe(self) -> str:
        """Say in words which frames are taken."""
        if self.seconds is not None:
            words = "one a second" if self.seconds == 1 else f"one every {float(self.seconds):.12g} s"
        elif self.step is None:
            words = "key frames"
        else:
            words = "every frame" if self.step == 1 else f"one of every {self.step}"
        return words if self.levels is None else f"{words}, less those that hardly differ"


def _parse(value: Any) -> str:
    return str(FrameChoice.parse(str(value)))


FRAMES = "1s"
"""Frames that are taken unless an option says otherwise."""
Frames = Annotated[str, BeforeValidator(_parse), one_word(str, "Ns|N|key[+distinct]", nothing="")]
"""A choice of frames, as `FrameChoice.parse` takes it."""
