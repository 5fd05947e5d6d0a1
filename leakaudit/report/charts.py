"""Geometry of the report's charts.  The template draws them; nothing here is markup."""

from __future__ import annotations

import math
from dataclasses import dataclass

from leakaudit.report.words import number, plural, power_of_ten
from leakaudit.results import Attempt, Trial

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 40
MAX_POINTS = 240


@dataclass(frozen=True)
class Tick:
    """`place` in SVG units along the axis."""

    place: float
    text: str


@dataclass(frozen=True)
class Line:
    """One attempt: SVG `points`, and what a reader who hovers or listens gets."""

    points: str
    end: tuple[float, float]
    best: bool
    text: str


@dataclass(frozen=True)
class LossChart:
    """Loss over iterations of all attempts of one trial, log scale."""

    attack: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    description: str
    clipped: bool
    others: int
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def loss_chart(trial: Trial) -> LossChart | None:
    """None when no attempt has a finite loss.

    Losses of zero or below have no logarithm: they are drawn at the lower edge and
    `clipped` says so.  Losses that are not finite are left out.
    """
    curves = [(attempt, _finite(attempt.history)) for attempt in trial.attempts]
    points = [point for _, curve in curves for point in curve]
    if not points:
        return None
    positive = [loss for _, loss in points if loss > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    clipped = min(loss for _, loss in points) <= 0
    low, high = low - clipped, max(high, low + 1)
    last = max(1, max(iteration for iteration, _ in points))

    def place(iteration: int, loss: float) -> tuple[float, float]:
        height = (math.log10(loss) if loss > 0 else low) - low
        x = LEFT + (WIDTH - LEFT - RIGHT) * iteration / last
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * height / (high - low)
        return round(x, 1), round(y, 1)

    lines = []
    for index, (attempt, curve) in enumerate(curves):
        if curve:
            places = [place(*point) for point in _thin(curve)]
            lines.append(
                Line(
                    points=" ".join(f"{x},{y}" for x, y in places),
                    end=places[-1],
                    best=index == trial.best,
                    text=_describe(attempt),
                )
            )
    lines.sort(key=lambda line: line.best)
    return LossChart(
        attack=trial.attack,
        lines=lines,
        x_ticks=[Tick(place(x, 1.0)[0], f"{x:,}") for x in _round_steps(last)],
        y_ticks=[
            Tick(place(0, 10.0**e)[1], power_of_ten(e)) for e in range(low, high + 1, -(-(high - low) // 5))
        ],
        description=_summary(trial, len(lines)),
        clipped=clipped,
        others=sum(not line.best for line in lines),
    )


def _finite(history: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(iteration, loss) for iteration, loss in history if math.isfinite(loss)]


def _thin(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(curve) <= MAX_POINTS:
        return curve
    step = (len(curve) - 1) / (MAX_POINTS - 1)
    return [curve[round(i * step)] for i in range(MAX_POINTS)]


def _round_steps(last: int) -> list[int]:
    """Up to six round iteration numbers from 0 to `last`."""
    unit = 10 ** max(0, math.floor(math.log10(last)) - 1)
    steps = (unit * factor for factor in (1, 2, 5, 10, 20, 50, 100))
    step = next(step for step in steps if last / step <= 5)
    return list(range(0, last + 1, step))


def _describe(attempt: Attempt) -> str:
    steps = plural(attempt.iterations, "iteration")
    return f"restart {attempt.restart}: loss {number(attempt.loss)} after {steps}, {attempt.stopped}"


def _summary(trial: Trial, drawn: int) -> str:
    best = next((attempt for index, attempt in enumerate(trial.attempts) if index == trial.best), None)
    text = f"{trial.attack}: matching loss over iterations, log scale, {plural(drawn, 'attempt')}"
    return text if best is None else f"{text}; the best is {_describe(best)}"
