"""Charts of what a sweep measured: privacy against utility, and the adaptive against the oblivious adversary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from leakaudit.report import words
from leakaudit.report.sweep_plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Key,
    Listed,
    Mark,
    Note,
    Plot,
    Stroke,
    linear_axis,
    log_axis,
)
from leakaudit.report.sweep_summary import (
    Pair,
    Yardstick,
    accuracy_text,
    epsilon_of,
    has_accuracy,
    rows_of,
    utility_of,
    worst_score,
)
from leakaudit.sweep_results import NO_DEFENSE, Cell, SweepResult, Utility

SIDE = 18
"""Left edge of a chart whose rows are named above their lines."""
ROW_HEIGHT = 30
MAX_LABEL = 54
MAX_GAPS = 20
"""Rows of one chart."""
COLOURS = 8


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
    strokes = [_threshold_stroke(yard, y, vertical=False)]
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
            _threshold_key(yard),
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
    values = [*scores, yard.threshold.value]
    make = log_axis if yard.metric == "mse" else linear_axis
    return make(values, start, end) if yard.higher_leaks else make(values, end, start)


def _threshold_stroke(yard: Yardstick, axis: Axis, vertical: bool, length: float = HEIGHT - BOTTOM) -> Stroke:
    place = axis.at(yard.threshold.value)
    points = f"{place},{TOP} {place},{length}" if vertical else f"{LEFT},{place} {WIDTH - RIGHT},{place}"
    return Stroke(points, "threshold", f"policy: {yard.threshold}")


def _threshold_key(yard: Yardstick) -> Key:
    return Key("threshold", f"policy {yard.threshold}", line=True)


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
    return "plain" if family == NO_DEFENSE else f"hue-{families.index(family) % COLOURS}"


def families_of(result: SweepResult) -> list[str]:
    return list(dict.fromkeys(cell.family for cell in result.cells if cell.family != NO_DEFENSE))


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
        pieces = [gaps[start : start + MAX_GAPS] for start in range(0, len(gaps), MAX_GAPS)]
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
    strokes = [_threshold_stroke(yard, axis, vertical=True, length=height - BOTTOM)]
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
        keys=[Key("ring", "oblivious"), Key("full", "adaptive"), _threshold_key(yard)],
        height=height,
        left=SIDE,
    )


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
