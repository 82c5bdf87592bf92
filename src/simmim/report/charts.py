"""Line charts as SVG, with their points for the script that adds reading and zooming.

A chart is readable without the script, and when it is printed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from simmim.report.facts import Point, thinned

WIDTH, HEIGHT = 640, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 28, 10, 26
STEP = "step #"


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    name: str
    points: list[Point]
    """At most 400; of a longer curve means of neighbours."""
    colour: int
    """Number of its colour in the style sheet, from 0 on."""
    summary: float
    """What the legend says of it: its last value, or over recall the mean, which is AP50."""


@dataclass(frozen=True)
class Chart:
    """Curves over the steps, on one axis."""

    title: str
    lines: Sequence[Line]
    frame: ClassVar = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    """Size of the picture and margins around the curves, in pixels."""
    logarithmic: bool = False
    place: str = STEP
    """What is read at a place of the horizontal axis, `#` the number."""

    @property
    def first(self) -> int:
        return min(line.points[0][0] for line in self.lines)

    @property
    def last(self) -> int:
        return max(max(line.points[-1][0] for line in self.lines), self.first + 1)

    def scale(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.logarithmic else value

    @property
    def low_high(self) -> tuple[float, float]:
        """The least and greatest value, on the axis's scale, with some room."""
        values = [self.scale(value) for line in self.lines for _, value in line.points]
        low, high = min(values), max(values)
        room = (high - low) * 0.05 or abs(high) * 0.05 or 1
        return low - room, high + room

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.low_high
        return HEIGHT - BOTTOM - (self.scale(value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(self, line: Line) -> str:
        low, high = self.low_high  # once: a property of all points
        down, over = (HEIGHT - TOP - BOTTOM) / (high - low), (WIDTH - LEFT - RIGHT) / (self.last - self.first)
        places = [
            (LEFT + (step - self.first) * over, HEIGHT - BOTTOM - (self.scale(value) - low) * down)
            for step, value in line.points
        ]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)

    @property
    def value_ticks(self) -> list[tuple[float, str]]:
        """Return (y, label) of some round values."""
        low, high = self.low_high
        if self.logarithmic and high - low > 1:
            return [(self.y(10**tick), f"{10**tick:.3g}") for tick in ticks(low, high)]
        if self.logarithmic:  # within a decade, round values are even ones
            low, high = 10**low, 10**high
        found = ticks(low, high)
        return [(self.y(tick), label(tick, found)) for tick in found]

    @property
    def step_ticks(self) -> list[tuple[float, str]]:
        """Return (x, label) of some round steps."""
        return [(self.x(tick), f"{tick:,.0f}") for tick in ticks(self.first, self.last, most=6, least=1)]

    def data(self) -> dict[str, Any]:
        """Return what the script needs."""
        lines = [{"name": line.name, "colour": line.colour, "points": line.points} for line in self.lines]
        return {"lines": lines, "log": self.logarithmic, "place": self.place, "frame": self.frame}


def chart(
    title: str, curves: Sequence[tuple[str, list[Point]]], *, logarithmic: bool = False, place: str = STEP
) -> Chart | None:
    """Make a chart of named curves; `None` if all are empty. Values not above 0 keep the axis linear."""
    lines = []
    for number, (name, points) in enumerate(curves):
        if points:
            shown = [(step, float(f"{value:.5g}")) for step, value in thinned(points)]
            summary = points[-1][1] if place == STEP else statistics.mean(value for _, value in points)
            lines.append(Line(name, shown, number, float(f"{summary:.5g}")))
    if not lines:
        return None
    positive = all(value > 0 for line in lines for _, value in line.points)
    return Chart(title, lines, logarithmic and positive, place)


def ticks(low: float, high: float, most: int = 5, least: float = 0) -> list[float]:
    """Return at most `most` + 1 round numbers between two, at least `least` apart."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    step = max(step, least)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def label(tick: float, every: Sequence[float]) -> str:
    """Format a tick with the digits that tell it from its neighbours."""
    apart = every[1] - every[0] if len(every) > 1 else abs(tick) or 1
    digits = -math.floor(math.log10(apart) + 1e-9)
    return f"{tick:.3g}" if abs(tick) >= 1e5 or digits > 6 else f"{tick:.{max(digits, 0)}f}"
