"""Geometry of the charts of a sweep.  The template draws them; nothing here is markup."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from leakaudit.policy import Policy
from leakaudit.report import words
from leakaudit.report.charts import Tick
from leakaudit.report.sweep_summary import (
    Pair,
    Rate,
    Yardstick,
    accuracy_text,
    bounds_of,
    epsilon_of,
    has_accuracy,
    label_of,
    rows_of,
    strength_of,
    success_rate,
    utility_of,
    worst_score,
)
from leakaudit.sweep_results import Bound, Cell, SweepResult, Utility

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 16, 44
SIDE = 18
"""Left edge of a chart whose rows are named above their lines."""
ROW_HEIGHT = 30
MAX_LABEL = 54
FIRST_GAPS = 20
COLOURS = 8
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
            return [
                Tick(self.at(value), words.number(value) + unit)
                for value in _round_values(self.low, self.high)
            ]
        first = math.ceil(self.low) + self.zero
        step = max(1, -(-(math.floor(self.high) - first) // 6))
        exponents = range(first, math.floor(self.high) + 1, step)
        ticks = [Tick(self.at(10.0**exponent), words.power_of_ten(exponent)) for exponent in exponents]
        return [Tick(self.at(0.0), "0"), *ticks] if self.zero else ticks


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


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats: (utility, leakage), more and less being better.

    One point beats another when it is at least as good in both and better in one.  By utility, ascending.
    """
    frontier: list[int] = []
    least = math.inf
    groups: dict[float, list[int]] = {}
    for index, (utility, _) in enumerate(points):
        groups.setdefault(utility, []).append(index)
    for utility in sorted(groups, reverse=True):
        best = min(points[index][1] for index in groups[utility])
        if best < least:
            frontier += [index for index in groups[utility] if points[index][1] == best]
            least = best
    return frontier[::-1]


def colour_of(families: Sequence[str], family: str) -> str:
    """The class of a family's colour; grey without a defense."""
    return "plain" if family == "none" else f"hue-{families.index(family) % COLOURS}"


def families_of(result: SweepResult) -> list[str]:
    return list(dict.fromkeys(cell.family for cell in result.cells if cell.family != "none"))


# privacy against utility


@dataclass(frozen=True)
class _Point:
    index: int
    cell: Cell
    accuracy: float
    score: float
    utility: Utility


def utility_plots(result: SweepResult, yard: Yardstick) -> list[Plot]:
    """Held-out accuracy against the worst case, one chart a protocol."""
    protocols = dict.fromkeys(cell.protocol for cell in result.cells)
    plots = (_utility_plot(result, yard, protocol) for protocol in protocols)
    return [plot for plot in plots if plot is not None]


def _utility_plot(result: SweepResult, yard: Yardstick, protocol: str) -> Plot | None:
    points, missing = _utility_points(result, yard, protocol)
    if not points:
        return None
    spans = [value for p in points for value in (p.utility.low, p.utility.high) if value is not None]
    x = linear_axis([100 * v for v in (*(p.accuracy for p in points), *spans)], LEFT, WIDTH - RIGHT)
    y = _score_axis(yard, [p.score for p in points], HEIGHT - BOTTOM, TOP)
    frontier = pareto([(p.accuracy, yard.leakage(p.score)) for p in points])
    families = families_of(result)
    strokes = _threshold_stroke(yard, y, vertical=False)
    if len(frontier) > 1:
        strokes.append(
            _staircase([(x.at(100 * points[i].accuracy), y.at(points[i].score)) for i in frontier])
        )
    marks, listed = [], []
    for number, point in enumerate(points, 1):
        look = colour_of(families, point.cell.family)
        place = x.at(100 * point.accuracy), y.at(point.score)
        if point.utility.low is not None and point.utility.high is not None:
            low, high = x.at(100 * point.utility.low), x.at(100 * point.utility.high)
            strokes.append(Stroke(f"{low},{place[1]} {high},{place[1]}", f"whisker {look}"))
        epsilon = epsilon_of(result, point.cell)
        text = f"{point.cell.defense}: {yard.name} {yard.write(point.score)}, accuracy {accuracy_text(point.utility)}"
        text += f", ε {words.number(epsilon)}" if epsilon is not None else ""
        link = f"cell-{point.index}"
        marks.append(Mark(*place, look=look, text=text, label=str(number), link=link, radius=8.5))
        listed.append(
            Listed(
                number,
                look,
                point.cell.defense,
                link,
                yard.write(point.score),
                words.percent(point.accuracy),
                accuracy_text(point.utility),
                words.number(epsilon),
                number - 1 in frontier,
            )
        )
    names = ", ".join(dict.fromkeys(points[i].cell.defense for i in frontier))
    left_out = (
        f"Not drawn, because leakage or accuracy was not measured: {', '.join(missing)}." if missing else ""
    )
    return Plot(
        title=protocol,
        description=f"{protocol}: {yard.name} of the worst case against held-out accuracy; frontier: {names}",
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        x_label="held-out accuracy, %",
        y_label=f"{yard.name}{', ' + yard.unit if yard.unit else ''} (up: leaks more)",
        strokes=strokes,
        marks=marks,
        keys=[
            *(
                [Key("frontier", "frontier: nothing drawn is better in both", line=True)]
                if len(frontier) > 1
                else []
            ),
            *_threshold_key(yard),
        ],
        listed=listed,
        remarks=[left_out] if left_out else [],
    )


def _utility_points(result: SweepResult, yard: Yardstick, protocol: str) -> tuple[list[_Point], list[str]]:
    """Per defense the cell that leaks most, whichever the adversary: who knows a defense may ignore it."""
    targets: dict[str, list[int]] = {}
    for index, cell in enumerate(result.cells):
        if cell.protocol == protocol:
            targets.setdefault(cell.defense, []).append(index)
    points, missing = [], []
    for defense, indices in targets.items():
        scored = [(i, score) for i in indices if (score := worst_score(result.cells[i], yard)) is not None]
        utility = utility_of(result, result.cells[indices[0]])
        if not scored or utility is None or utility.accuracy is None or not has_accuracy(utility):
            missing.append(defense)
            continue
        index, score = max(scored, key=lambda item: yard.leakage(item[1]))
        points.append(_Point(index, result.cells[index], utility.accuracy, score, utility))
    return points, missing


def _staircase(places: Sequence[tuple[float, float]]) -> Stroke:
    """Whoever wants more accuracy than one point of the frontier has pays the leakage of the next."""
    corners = [places[0]]
    for before, after in itertools.pairwise(places):
        corners += [(before[0], after[1]), after]
    return Stroke(" ".join(f"{x},{y}" for x, y in corners), "frontier", "the frontier")


def _score_axis(yard: Yardstick, scores: Iterable[float], start: float, end: float) -> Axis:
    """Along the metric, in the direction of more leakage."""
    values = [*scores, *([yard.threshold.value] if yard.threshold else [])]
    make = log_axis if yard.metric == "mse" else linear_axis
    return make(values, start, end) if yard.higher_leaks else make(values, end, start)


def _threshold_stroke(
    yard: Yardstick, axis: Axis, vertical: bool, length: float = HEIGHT - BOTTOM
) -> list[Stroke]:
    if yard.threshold is None:
        return []
    place = axis.at(yard.threshold.value)
    points = f"{place},{TOP} {place},{length}" if vertical else f"{LEFT},{place} {WIDTH - RIGHT},{place}"
    return [Stroke(points, "threshold", f"policy: {yard.threshold}")]


def _threshold_key(yard: Yardstick) -> list[Key]:
    return [Key("threshold", f"policy {yard.threshold}", line=True)] if yard.threshold else []


# adaptive against oblivious


@dataclass(frozen=True)
class _Gap:
    """Worst scores and cells of the two adversaries; `width` is by how much more the adaptive one reaches."""

    width: float
    blind: float
    aware: float
    blind_cell: int
    aware_cell: int


def gap_plots(result: SweepResult, yard: Yardstick) -> list[list[Plot]]:
    """Per protocol and attack, the widest gaps first; long lists are cut into several charts."""
    groups: dict[tuple[str, str], list[_Gap]] = {}
    for row in rows_of(result.cells):
        found = (_gap(result, yard, pair) for pair in row.pairs)
        groups.setdefault((row.protocol, row.attack), []).extend(gap for gap in found if gap is not None)
    charts = []
    for (protocol, attack), gaps in groups.items():
        if not gaps:
            continue
        gaps.sort(key=lambda gap: -gap.width)
        axis = _score_axis(yard, [v for gap in gaps for v in (gap.blind, gap.aware)], SIDE, WIDTH - RIGHT)
        pieces = [gaps[start : start + FIRST_GAPS] for start in range(0, len(gaps), FIRST_GAPS)]
        charts.append([_gap_plot(result, yard, f"{protocol} · {attack}", piece, axis) for piece in pieces])
    return charts


def _gap(result: SweepResult, yard: Yardstick, pair: Pair) -> _Gap | None:
    if pair.oblivious is None or pair.adaptive is None:
        return None
    blind = worst_score(result.cells[pair.oblivious], yard)
    aware = worst_score(result.cells[pair.adaptive], yard)
    if blind is None or aware is None:
        return None
    width = yard.leakage(aware) - yard.leakage(blind) if aware != blind else 0.0
    return _Gap(width, blind, aware, pair.oblivious, pair.adaptive)


def _gap_plot(result: SweepResult, yard: Yardstick, title: str, gaps: Sequence[_Gap], axis: Axis) -> Plot:
    height = TOP + ROW_HEIGHT * len(gaps) + 6 + BOTTOM
    strokes = _threshold_stroke(yard, axis, vertical=True, length=height - BOTTOM)
    marks, notes = [], []
    for place, gap in enumerate(gaps):
        y = TOP + ROW_HEIGHT * place + 21.0
        start, end = axis.at(gap.blind), axis.at(gap.aware)
        defense = result.cells[gap.aware_cell].defense
        told = f"{defense}: oblivious {yard.write(gap.blind)}, adaptive {yard.write(gap.aware)}"
        strokes.append(Stroke(f"{start},{y} {end},{y}", "gap" if gap.width > 0 else "gap lost", told))
        marks.append(Mark(start, y, "ring", told, link=f"cell-{gap.blind_cell}"))
        marks.append(Mark(end, y, "full", told, link=f"cell-{gap.aware_cell}", radius=4))
        notes.append(Note(SIDE, y - 8, shorten(defense, MAX_LABEL)))
    return Plot(
        title=title,
        description=f"{title}: worst {yard.name} of the oblivious and of the adaptive adversary, "
        f"for {words.plural(len(gaps), 'defense')}",
        x_ticks=axis.ticks(),
        y_ticks=[],
        x_label=f"worst case, {yard.name}{', ' + yard.unit if yard.unit else ''} (right: leaks more)",
        strokes=strokes,
        marks=marks,
        notes=notes,
        keys=[Key("ring", "oblivious"), Key("full", "adaptive"), *_threshold_key(yard)],
        height=height,
        left=SIDE,
    )


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


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


def privacy_plots(result: SweepResult, policy: Policy | None) -> list[Plot]:
    """Success of attacks, what theory allows, accuracy and epsilon, one chart a protocol and family.

    For families with an epsilon, or with a bound on the probability of success, somewhere.
    """
    plots = (_privacy_plot(result, family, policy) for family in _swept(result))
    return [plot for plot in plots if plot is not None]


def _privacy_plot(result: SweepResult, family: _Family, policy: Policy | None) -> Plot | None:
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


def _reached(x: Axis, y: Axis, family: _Family, policy: Policy | None) -> _Drawn:
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
