"""Geometry of the charts of a sweep.  The template draws them; nothing here is markup."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from leakaudit.policy import Policy
from leakaudit.report import words
from leakaudit.report.charts import Tick
from leakaudit.report.sweep_summary import (
    Pair,
    Rate,
    Row,
    Yardstick,
    accuracy_text,
    bounds_of,
    epsilon_of,
    label_of,
    rows_of,
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
    """Per defense the cell that leaks most, of the adversary who knows it where that one was measured."""
    targets: dict[str, list[int]] = {}
    for index, cell in enumerate(result.cells):
        if cell.protocol == protocol:
            targets.setdefault(cell.defense, []).append(index)
    points, missing = [], []
    for defense, indices in targets.items():
        scored = [(i, score) for i in indices if (score := worst_score(result.cells[i], yard)) is not None]
        adaptive = [item for item in scored if result.cells[item[0]].adversary == "adaptive"]
        utility = utility_of(result, result.cells[indices[0]])
        if not scored or utility is None or utility.accuracy is None:
            missing.append(defense)
            continue
        index, score = max(adaptive or scored, key=lambda item: yard.leakage(item[1]))
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
    height = TOP + ROW_HEIGHT * len(gaps) + BOTTOM
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


def error_plots(result: SweepResult) -> list[Plot]:
    """Mean squared error of attacks with what theory says of it, one chart a protocol and family."""
    targets: dict[tuple[str, str], list[Row]] = {}
    for row in rows_of(result.cells):
        if row.option is not None:
            targets.setdefault((row.protocol, row.defense), []).append(row)
    plots = [_error_plot(result, rows) for rows in targets.values()]
    return [plot for plot in plots if plot is not None]


def _error_plot(result: SweepResult, rows: Sequence[Row]) -> Plot | None:
    cells = [
        (index, result.cells[index])
        for row in rows
        for pair in row.pairs
        for index in (pair.oblivious, pair.adaptive)
        if index is not None
    ]
    curves = _error_bounds(result, [cell for _, cell in cells])
    runs = {index: errors for index, cell in cells if (errors := run_errors(cell))}
    if not curves or not runs:
        return None
    option = rows[0].option or "strength"
    strengths = [cell.strength[1] for _, cell in cells if cell.strength is not None]
    values = [v for errors in runs.values() for v in errors] + [v for c in curves.values() for _, v in c]
    x = log_axis(strengths, LEFT, WIDTH - RIGHT)
    y = log_axis(values, HEIGHT - BOTTOM, TOP)
    strokes = [
        Stroke(
            " ".join(f"{x.at(strength)},{y.at(value)}" for strength, value in curve),
            f"{kind} {'second' if 'bayes' in name else ''}",
            f"{name} ({kind})",
        )
        for (name, kind), curve in curves.items()
    ]
    marks = [
        Mark(x.at(strength), y.at(value), f"{kind} {'second' if 'bayes' in name else ''}",
             f"{name} ({kind}) at {option} {words.number(strength)}: MSE {words.number(value)}", radius=2)
        for (name, kind), curve in curves.items()
        for strength, value in curve
    ]  # fmt: skip
    for index, errors in runs.items():
        cell = result.cells[index]
        assert cell.strength is not None
        look = "full" if cell.adversary == "adaptive" else "ring"
        place = x.at(cell.strength[1]) + (4 if cell.adversary == "adaptive" else -4)
        told = f"{cell.attack}, {cell.adversary}, {label_of(cell)}: MSE {words.number(min(errors))}"
        told += (
            f" to {words.number(max(errors))} in {words.plural(len(errors), 'run')}"
            if len(errors) > 1
            else ""
        )
        strokes.append(Stroke(f"{place},{y.at(min(errors))} {place},{y.at(max(errors))}", "range"))
        marks += [Mark(place, y.at(error), look, told, link=f"cell-{index}", radius=3.5) for error in errors]
    return Plot(
        title=f"{rows[0].defense} · {rows[0].protocol}",
        description=f"{rows[0].defense}: mean squared error of attacks against {option}, "
        f"with {', '.join(f'{name} ({kind})' for name, kind in curves)}",
        x_ticks=_strength_ticks(x, strengths),
        y_ticks=y.ticks(),
        x_label=option.replace("_", " "),
        y_label="MSE per pixel (down: leaks more)",
        strokes=strokes,
        marks=marks,
        keys=[
            Key("ring", "oblivious attack, a run a point"),
            Key("full", "adaptive attack"),
            *(
                Key(f"{kind} {'second' if 'bayes' in name else ''}", f"{name}: {kind}", line=True)
                for name, kind in curves
            ),
        ],
    )


def _strength_ticks(axis: Axis, strengths: Iterable[float]) -> list[Tick]:
    """Every strength where they fit, powers of ten otherwise."""
    ticks = [Tick(axis.at(value), words.number(value)) for value in sorted(set(strengths))]
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
    if error is None and psnr is not None and not math.isnan(psnr):
        return 10 ** (-psnr / 10)
    return error if error is not None and math.isfinite(error) else None


def _error_bounds(
    result: SweepResult, cells: Iterable[Cell]
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(name, kind) -> (strength, mean squared error), by strength."""
    curves: dict[tuple[str, str], dict[float, float]] = {}
    for cell in cells:
        for bound in bounds_of(result, cell):
            drawable = bound.value is not None and math.isfinite(bound.value) and bound.quantity == "mse"
            if drawable and bound.value is not None and cell.strength is not None:
                curves.setdefault((bound.name, bound.kind), {})[cell.strength[1]] = bound.value
    return {name: sorted(curve.items()) for name, curve in curves.items()}


# differential privacy: noise, epsilon, attack, bound and accuracy together


def privacy_plots(result: SweepResult, policy: Policy | None) -> list[Plot]:
    """Success of attacks, what theory allows, accuracy and epsilon, one chart a protocol and family."""
    targets: dict[tuple[str, str], list[Row]] = {}
    for row in rows_of(result.cells):
        if row.option is not None:
            targets.setdefault((row.protocol, row.defense), []).append(row)
    plots = [_privacy_plot(result, rows, policy) for rows in targets.values()]
    return [plot for plot in plots if plot is not None]


def _privacy_plot(result: SweepResult, rows: Sequence[Row], policy: Policy | None) -> Plot | None:
    cells = {
        index: result.cells[index]
        for row in rows
        for pair in row.pairs
        for index in (pair.oblivious, pair.adaptive)
        if index is not None
    }
    epsilons = {
        c.strength[1]: e for c in cells.values() if c.strength and (e := epsilon_of(result, c)) is not None
    }
    bounds = _probabilities(result, cells.values())
    if not epsilons and not bounds:
        return None
    strengths = sorted({cell.strength[1] for cell in cells.values() if cell.strength is not None})
    x = linear_axis(strengths, LEFT, WIDTH - RIGHT, 0.08)
    y = Axis(0.0, 100.0, HEIGHT - BOTTOM, TOP + 22)
    strokes: list[Stroke] = []
    marks: list[Mark] = []
    if bounds:
        line = " ".join(
            f"{x.at(strength)},{y.at(100 * b.value)}" for strength, b in bounds if b.value is not None
        )
        strokes.append(Stroke(line, "bound", "bound on the success of any adversary"))
        marks += [_bound_mark(x, y, strength, bound) for strength, bound in bounds]
    accuracies = _accuracies(result, cells.values())
    if accuracies:
        line = " ".join(f"{x.at(strength)},{y.at(100 * (u.accuracy or 0.0))}" for strength, u in accuracies)
        strokes.append(Stroke(line, "accuracy", "held-out accuracy"))
        for strength, utility in accuracies:
            strokes += _accuracy_whisker(x, y, strength, utility)
            told = f"accuracy {accuracy_text(utility)} at {words.number(strength)}"
            marks.append(
                Mark(x.at(strength), y.at(100 * (utility.accuracy or 0.0)), "accuracy", told, radius=3.5)
            )
    for index, cell in cells.items():
        found = success_rate(cell, policy)
        if found is not None and cell.strength is not None:
            shift = 5 if cell.adversary == "adaptive" else -5
            look = "full" if cell.adversary == "adaptive" else "ring"
            place = x.at(cell.strength[1]) + shift
            strokes.append(
                Stroke(f"{place},{y.at(100 * found.low)} {place},{y.at(100 * found.high)}", "range")
            )
            marks.append(Mark(place, y.at(100 * found.share), look, _told(cell, found), link=f"cell-{index}"))
    notes = [
        Note(x.at(s), TOP + 8, words.number(e, 2), "middle") for s, e in _spread(x, sorted(epsilons.items()))
    ]
    if notes:
        notes.append(Note(LEFT - 8, TOP + 8, "ε", "end"))
    title = f"{rows[0].defense} · {rows[0].protocol}"
    option = (rows[0].option or "strength").replace("_", " ")
    return Plot(
        title=title,
        description=f"{title}: success of attacks, its bound, accuracy and epsilon against {option}",
        x_ticks=_strength_ticks(x, strengths),
        y_ticks=y.ticks(),
        x_label=option,
        y_label="% of examples, or accuracy",
        strokes=strokes,
        marks=marks,
        notes=notes,
        keys=[
            Key("ring", "oblivious attack breaks the policy, 95 % Wilson interval"),
            Key("full", "adaptive attack"),
            *([Key("bound", "bound: no adversary succeeds more often", line=True)] if bounds else []),
            *([Key("accuracy", "held-out accuracy", line=True)] if accuracies else []),
        ],
        remarks=_stated(bounds),
    )


def _told(cell: Cell, found: Rate) -> str:
    interval = f"95 % interval {words.percent(found.low)} to {words.percent(found.high)}"
    return (
        f"{cell.attack}, {cell.adversary}, {label_of(cell)}: {found.successes} of {found.trials} ({interval})"
    )


def _probabilities(result: SweepResult, cells: Iterable[Cell]) -> list[tuple[float, Bound]]:
    found: dict[float, Bound] = {}
    for cell in cells:
        for bound in bounds_of(result, cell):
            certain = bound.quantity == "probability" and bound.kind == "bound"
            if (
                certain
                and bound.value is not None
                and math.isfinite(bound.value)
                and cell.strength is not None
            ):
                found.setdefault(cell.strength[1], bound)
    return sorted(found.items(), key=lambda item: item[0])


def _accuracies(result: SweepResult, cells: Iterable[Cell]) -> list[tuple[float, Utility]]:
    found = {
        cell.strength[1]: utility
        for cell in cells
        if cell.strength is not None
        and (utility := utility_of(result, cell)) is not None
        and utility.accuracy is not None
    }
    return sorted(found.items(), key=lambda item: item[0])


def _bound_mark(x: Axis, y: Axis, strength: float, bound: Bound) -> Mark:
    share = bound.value or 0.0
    return Mark(
        x.at(strength), y.at(100 * share), "bound", f"bound: {words.percent(share)}; {bound.text}", radius=2.5
    )


def _accuracy_whisker(x: Axis, y: Axis, strength: float, utility: Utility) -> list[Stroke]:
    if utility.low is None or utility.high is None:
        return []
    place = x.at(strength)
    return [
        Stroke(f"{place},{y.at(100 * utility.low)} {place},{y.at(100 * utility.high)}", "whisker accuracy")
    ]


def _spread(x: Axis, items: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those whose words do not run into each other."""
    kept: list[tuple[float, float]] = []
    for strength, value in items:
        if not kept or x.at(strength) - x.at(kept[-1][0]) >= 30:
            kept.append((strength, value))
    return kept


def _stated(bounds: Sequence[tuple[float, Bound]]) -> list[str]:
    return list(dict.fromkeys(f"{bound.source}: {'; '.join(bound.assumptions)}" for _, bound in bounds))[:3]
