"""Charts that put theory beside attacks: errors with Cramer-Rao figures, and success under differential privacy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from leakaudit.policy import Policy
from leakaudit.report import words
from leakaudit.report.charts import Tick
from leakaudit.report.sweep_plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Key,
    Mark,
    Note,
    Plot,
    Stroke,
    linear_axis,
    log_axis,
)
from leakaudit.report.sweep_summary import (
    Rate,
    accuracy_text,
    bounds_of,
    epsilon_of,
    has_accuracy,
    label_of,
    rows_of,
    strength_of,
    success_rate,
    utility_of,
)
from leakaudit.sweep_results import Bound, Cell, SweepResult, Utility

# bounds on the axes of attacks


@dataclass(frozen=True)
class _Swept:
    """One cell of a family whose strength is a number."""

    index: int
    cell: Cell
    strength: float

    @property
    def look(self) -> str:
        return "full" if self.cell.adversary == "adaptive" else "ring"

    @property
    def shift(self) -> float:
        """Keeps the two adversaries from hiding each other."""
        return 4.5 if self.cell.adversary == "adaptive" else -4.5


@dataclass(frozen=True)
class _Family:
    """All strengths of one family under one protocol, by all attacks."""

    title: str
    option: str
    cells: list[_Swept]

    @property
    def strengths(self) -> list[float]:
        return sorted({item.strength for item in self.cells})


def _swept(result: SweepResult) -> list[_Family]:
    families: dict[tuple[str, str, str], list[_Swept]] = {}
    for row in rows_of(result.cells):
        for pair in row.pairs:
            for index in (pair.oblivious, pair.adaptive):
                strength = None if index is None else strength_of(result.cells[index])
                if index is not None and strength is not None:
                    key = (row.protocol, row.defense, strength[0])
                    families.setdefault(key, []).append(_Swept(index, result.cells[index], strength[1]))
    return [
        _Family(f"{defense} · {protocol}", option.replace("_", " "), cells)
        for (protocol, defense, option), cells in families.items()
    ]


def error_plots(result: SweepResult) -> list[Plot]:
    """Mean squared error of attacks with what theory says of it, one chart a protocol and family."""
    plots = (_error_plot(result, family) for family in _swept(result))
    return [plot for plot in plots if plot is not None]


def _error_plot(result: SweepResult, family: _Family) -> Plot | None:
    curves = _error_curves(result, family)
    runs = [(item, errors) for item in family.cells if (errors := run_errors(item.cell))]
    if not curves or not runs:
        return None
    values = [error for _, errors in runs for error in errors]
    values += [value for curve in curves for _, value in curve.points]
    x = log_axis(family.strengths, LEFT, WIDTH - RIGHT)
    y = log_axis(values, HEIGHT - BOTTOM, TOP)
    strokes = [curve.stroke(x, y) for curve in curves]
    marks = [mark for curve in curves for mark in curve.marks(x, y)]
    for item, errors in runs:
        place = x.at(item.strength) + item.shift
        strokes.append(Stroke(f"{place},{y.at(min(errors))} {place},{y.at(max(errors))}", "range"))
        told, link = _errors_told(item, errors), f"cell-{item.index}"
        marks += [Mark(place, y.at(error), item.look, told, link=link, radius=3.5) for error in errors]
    names = ", ".join(f"{curve.name} ({curve.kind})" for curve in curves)
    return Plot(
        title=family.title,
        description=f"{family.title}: mean squared error of attacks against {family.option}, with {names}",
        x_ticks=_strength_ticks(x, family.strengths),
        y_ticks=y.ticks(),
        x_label=family.option,
        y_label="MSE per pixel (down: leaks more)",
        strokes=strokes,
        marks=marks,
        keys=[
            Key("ring", "oblivious attack, a point a run"),
            Key("full", "adaptive attack"),
            *(Key(curve.look, f"{curve.name}: {curve.kind}", line=True) for curve in curves),
        ],
    )


def _errors_told(item: _Swept, errors: Sequence[float]) -> str:
    least, most = words.number(min(errors)), words.number(max(errors))
    spread = f"{least} to {most} in {len(errors)} runs" if len(errors) > 1 else least
    return f"{item.cell.attack}, {item.cell.adversary}, {label_of(item.cell)}: MSE {spread}"


@dataclass(frozen=True)
class _Curve:
    """What theory says of every strength."""

    name: str
    kind: str
    points: list[tuple[float, float]]

    @property
    def look(self) -> str:
        return f"{self.kind} second" if "bayes" in self.name else self.kind

    def stroke(self, x: Axis, y: Axis) -> Stroke:
        return Stroke(_line(x, y, self.points), self.look, f"{self.name} ({self.kind})")

    def marks(self, x: Axis, y: Axis) -> list[Mark]:
        return [
            Mark(
                x.at(strength),
                y.at(value),
                self.look,
                f"{self.name} ({self.kind}): {words.number(value)}",
                radius=2,
            )
            for strength, value in self.points
        ]


def _line(x: Axis, y: Axis, points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x.at(first)},{y.at(second)}" for first, second in points)


def _error_curves(result: SweepResult, family: _Family) -> list[_Curve]:
    curves: dict[tuple[str, str], dict[float, float]] = {}
    for item in family.cells:
        for bound in bounds_of(result, item.cell):
            if bound.quantity == "mse" and bound.value is not None and math.isfinite(bound.value):
                curves.setdefault((bound.name, bound.kind), {})[item.strength] = bound.value
    return [_Curve(name, kind, sorted(points.items())) for (name, kind), points in curves.items()]


def _strength_ticks(axis: Axis, strengths: Iterable[float]) -> list[Tick]:
    """Every strength where they fit, round numbers otherwise."""
    ticks = [Tick(axis.at(value), words.number(value)) for value in strengths]
    apart = all(b.place - a.place >= 34 for a, b in itertools.pairwise(ticks))
    return ticks if apart else axis.ticks()


def run_errors(cell: Cell) -> list[float]:
    """Mean squared error a pixel of every run, over its examples; from the PSNR where it is not there."""
    means = []
    for run in cell.runs:
        errors = [error for example in run.examples if (error := _squared_error(example.scores)) is not None]
        if errors:
            means.append(sum(errors) / len(errors))
    return means


def _squared_error(scores: dict[str, float | None]) -> float | None:
    error, psnr = scores.get("mse"), scores.get("psnr")
    if error is None and psnr is not None and psnr > -100:
        error = 10 ** (-psnr / 10)
    return error if error is not None and math.isfinite(error) else None


# differential privacy: noise, epsilon, attack, bound and accuracy together


def privacy_plots(result: SweepResult, policy: Policy) -> list[Plot]:
    """Success of attacks, what theory allows, accuracy and epsilon, one chart a protocol and family.

    For families with an epsilon, or with a bound on the probability of success, somewhere.
    """
    plots = (_privacy_plot(result, family, policy) for family in _swept(result))
    return [plot for plot in plots if plot is not None]


def _privacy_plot(result: SweepResult, family: _Family, policy: Policy) -> Plot | None:
    epsilons = {item.strength: epsilon_of(result, item.cell) for item in family.cells}
    limits = _limits(result, family)
    if not limits and not any(epsilon is not None for epsilon in epsilons.values()):
        return None
    x = linear_axis(family.strengths, LEFT, WIDTH - RIGHT, 0.08)
    y = Axis(0.0, 100.0, HEIGHT - BOTTOM, TOP + 22)
    accuracies = _accuracies(result, family)
    strokes, marks = _allowed(x, y, limits)
    for drawn in (_trained(x, y, accuracies), _reached(x, y, family, policy)):
        strokes += drawn[0]
        marks += drawn[1]
    return Plot(
        title=family.title,
        description=f"{family.title}: success of attacks, its bound, accuracy and epsilon against {family.option}",
        x_ticks=_strength_ticks(x, family.strengths),
        y_ticks=y.ticks(),
        x_label=family.option,
        y_label="% of examples, or accuracy in %; ε above",
        strokes=strokes,
        marks=marks,
        notes=_epsilon_notes(x, epsilons),
        keys=[
            Key("ring", "oblivious attack breaks the policy, 95 % Wilson interval"),
            Key("full", "adaptive attack"),
            *(Key(limit.look, f"bound on any adversary: {limit.name}", line=True) for limit in limits),
            *([Key("accuracy", "held-out accuracy", line=True)] if accuracies else []),
        ],
        remarks=_stated([bound for limit in limits for _, bound in limit.bounds]),
    )


_Drawn: TypeAlias = tuple[list[Stroke], list[Mark]]


@dataclass(frozen=True)
class _Limit:
    """The greatest probability of success at every strength, of an update or of a whole training."""

    name: str
    bounds: list[tuple[float, Bound]]

    @property
    def look(self) -> str:
        return "bound second" if self.name.endswith("-training") else "bound"


def _allowed(x: Axis, y: Axis, limits: Sequence[_Limit]) -> _Drawn:
    strokes: list[Stroke] = []
    marks: list[Mark] = []
    for limit in limits:
        shares = [(strength, bound.value or 0.0) for strength, bound in limit.bounds]
        line = _line(x, y, ((strength, 100 * share) for strength, share in shares))
        strokes.append(Stroke(line, limit.look, f"{limit.name} (bound)"))
        for (strength, share), (_, bound) in zip(shares, limit.bounds, strict=True):
            told = f"bound: {words.percent(share)}; {bound.text}"
            marks.append(Mark(x.at(strength), y.at(100 * share), limit.look, told, radius=2.5))
    return strokes, marks


def _trained(x: Axis, y: Axis, accuracies: Sequence[tuple[float, Utility]]) -> _Drawn:
    """Accuracy with its interval."""
    shares = [(strength, 100 * (utility.accuracy or 0.0)) for strength, utility in accuracies]
    strokes = [Stroke(_line(x, y, shares), "accuracy", "held-out accuracy")] if shares else []
    for strength, utility in accuracies:
        if utility.low is not None and utility.high is not None:
            ends = [(strength, 100 * utility.low), (strength, 100 * utility.high)]
            strokes.append(Stroke(_line(x, y, ends), "whisker accuracy"))
    marks = [
        Mark(x.at(strength), y.at(share), "accuracy", f"accuracy {accuracy_text(utility)}", radius=3.5)
        for (strength, share), (_, utility) in zip(shares, accuracies, strict=True)
    ]
    return strokes, marks


def _reached(x: Axis, y: Axis, family: _Family, policy: Policy) -> _Drawn:
    """How often attacks broke the policy."""
    strokes, marks = [], []
    for item in family.cells:
        found = success_rate(item.cell, policy)
        if found is not None:
            place = x.at(item.strength) + item.shift
            interval = f"{place},{y.at(100 * found.low)} {place},{y.at(100 * found.high)}"
            strokes.append(Stroke(interval, "range"))
            told, link = _rate_told(item, found), f"cell-{item.index}"
            marks.append(Mark(place, y.at(100 * found.share), item.look, told, link=link))
    return strokes, marks


def _rate_told(item: _Swept, found: Rate) -> str:
    interval = f"95 % interval {words.percent(found.low)} to {words.percent(found.high)}"
    who = f"{item.cell.attack}, {item.cell.adversary}, {label_of(item.cell)}"
    return f"{who}: {found.successes} of {found.trials} ({interval})"


def _limits(result: SweepResult, family: _Family) -> list[_Limit]:
    found: dict[str, dict[float, Bound]] = {}
    for item in family.cells:
        for bound in bounds_of(result, item.cell):
            certain = bound.quantity == "probability" and bound.kind == "bound"
            if certain and bound.value is not None and math.isfinite(bound.value):
                found.setdefault(bound.name, {}).setdefault(item.strength, bound)
    return [
        _Limit(name, sorted(bounds.items(), key=lambda entry: entry[0])) for name, bounds in found.items()
    ]


def _accuracies(result: SweepResult, family: _Family) -> list[tuple[float, Utility]]:
    found = {item.strength: utility_of(result, item.cell) for item in family.cells}
    measured = [(strength, utility) for strength, utility in found.items() if utility is not None]
    return sorted(((s, u) for s, u in measured if has_accuracy(u)), key=lambda entry: entry[0])


def _epsilon_notes(x: Axis, epsilons: Mapping[float, float | None]) -> list[Note]:
    """Epsilon above its strength, where the words do not run into each other."""
    notes: list[Note] = []
    for strength, epsilon in sorted(epsilons.items()):
        place = x.at(strength)
        if not notes or place - notes[-1].x >= 30:
            notes.append(Note(place, TOP + 8, words.number(epsilon, 2), "middle"))
    return [*notes, Note(LEFT - 8, TOP + 8, "ε", "end")]


def _stated(bounds: Sequence[Bound]) -> list[str]:
    return list(dict.fromkeys(f"{bound.source}: {'; '.join(bound.assumptions)}" for bound in bounds))[:3]
