"""What the charts of a sweep are made of: marks, lines and axes, in SVG units.  The template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from leakaudit.report import words
from leakaudit.report.charts import Tick

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 16, 44
LARGEST = 1e100
"""Values beyond are drawn at the end of their axis."""


@dataclass(frozen=True)
class Mark:
    """A point: `look` is its class, `label` is written inside, `link` is the cell it stands for."""

    x: float
    y: float
    look: str
    text: str
    label: str = ""
    link: str = ""
    radius: float = 4.5


@dataclass(frozen=True)
class Stroke:
    """A line through SVG `points`."""

    points: str
    look: str
    text: str = ""


@dataclass(frozen=True)
class Note:
    """Words at a place of the chart."""

    x: float
    y: float
    text: str
    anchor: str = "start"


@dataclass(frozen=True)
class Key:
    """One entry of the legend."""

    look: str
    text: str
    line: bool = False


@dataclass(frozen=True)
class Listed:
    """One numbered point of a chart, in the table beside it."""

    number: int
    look: str
    defense: str
    link: str
    score: str
    accuracy: str
    interval: str
    epsilon: str
    frontier: bool


@dataclass(frozen=True)
class Plot:
    """A chart.  Places are SVG units; `description` is what a reader who listens gets."""

    title: str
    description: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_label: str
    y_label: str = ""
    strokes: list[Stroke] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    listed: list[Listed] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    top: int = TOP

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM


@dataclass(frozen=True)
class Axis:
    """Values -> SVG units, linear or by their logarithm.

    Values outside are drawn at the nearest end.  Zero has no logarithm: with `zero` it has a place
    of its own, one decade below the rest.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero: bool = False

    def at(self, value: float) -> float:
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self, unit: str = "") -> list[Tick]:
        if not self.log:
            return self._told_apart(_round_values(self.low, self.high), unit)
        first = math.ceil(self.low) + self.zero
        step = max(1, -(-(math.floor(self.high) - first) // 6))
        exponents = range(first, math.floor(self.high) + 1, step)
        if len(exponents) < 2 and not self.zero:  # less than two decades, or between two powers of ten
            return self._told_apart(_round_values(10.0**self.low, 10.0**self.high), unit)
        ticks = [Tick(self.at(10.0**exponent), words.power_of_ten(exponent)) for exponent in exponents]
        return [Tick(self.at(0.0), "0"), *ticks] if self.zero else ticks

    def _told_apart(self, values: Sequence[float], unit: str) -> list[Tick]:
        """Ticks with three digits, or as many as tell one from the next."""
        for digits in range(3, 17):
            texts = [words.number(value, digits) for value in values]
            if len(set(texts)) == len(texts):
                break
        return [Tick(self.at(value), text + unit) for value, text in zip(values, texts, strict=True)]


def linear_axis(values: Iterable[float], start: float, end: float, margin: float = 0.06) -> Axis:
    """An axis that holds all finite values, with some air at both ends."""
    finite = [value for value in values if abs(value) < LARGEST] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    air = margin * (high - low) or max(1e-9, 0.05 * abs(high)) or 0.05
    return Axis(low - air, high + air, start, end)


def log_axis(values: Iterable[float], start: float, end: float, margin: float = 0.12) -> Axis:
    """As `linear_axis`, by the logarithm; with a place for zero when some value is not above it."""
    finite = [value for value in values if abs(value) < LARGEST]
    logs = [math.log10(value) for value in finite if value > 0] or [-1.0, 0.0]
    air = max(margin * (max(logs) - min(logs)), 0.15)
    zero = any(value <= 0 for value in finite)
    low = math.floor(min(logs)) - 1.0 if zero else min(logs) - air
    return Axis(low, max(logs) + air, start, end, log=True, zero=zero)


def _round_values(low: float, high: float, most: int = 6) -> list[float]:
    """Up to `most` + 1 multiples of 1, 2 or 5 times a power of ten inside the range."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(unit * factor for factor in (1, 2, 5, 10) if (high - low) / (unit * factor) <= most)
    return [round(step * index, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
