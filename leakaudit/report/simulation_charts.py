"""Charts of simulations: quality against virtual time and against bytes, one line a system or group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from leakaudit.report import words
from leakaudit.report.sweep_plots import (
    BOTTOM,
    HEIGHT,
    LARGEST,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Key,
    Mark,
    Plot,
    Stroke,
    linear_axis,
    log_axis,
)
from leakaudit.simulation_results import ALL, Comparison, CurvePoint, LimitValues, SimulationResult

MAX_POINTS = 240
"""Of a line that is drawn."""
MAX_MARKS = 40
"""Points of a line that are drawn as such, too."""
LOOKS = 8
"""Colours there are."""

Measure = Callable[[CurvePoint], float]


@dataclass(frozen=True)
class Course:
    """One line: what it is, its colour, and its points."""

    name: str
    hue: int
    points: Sequence[CurvePoint]
    group: str = ALL

    @property
    def look(self) -> str:
        return f"hue-{self.hue % LOOKS}"


@dataclass(frozen=True)
class Yard:
    """What is drawn upwards: a name, its value at a point, whether by its logarithm, and the target."""

    name: str
    value: Callable[[CurvePoint, str], float]
    unit: str = ""
    log: bool = False
    target: float | None = None


def yard_of(result: SimulationResult) -> Yard:
    """Perplexity where words are predicted, else accuracy in percent."""
    limits = result.limits
    if result.by_perplexity:
        return Yard(
            "perplexity", lambda point, group: point.quality[group].perplexity, "", True, limits.perplexity
        )
    target = None if limits.accuracy is None else 100 * limits.accuracy
    return Yard("accuracy", lambda point, group: 100 * point.quality[group].accuracy, "%", False, target)


def run_plots(result: SimulationResult) -> list[Plot]:
    """Quality of every group against virtual time, against bytes up, and the loss against time."""
    courses = [
        Course("all held-out data" if group == ALL else group, index, result.curve, group)
        for index, group in enumerate(result.groups)
    ]
    yard, loss = yard_of(result), Yard("loss", lambda point, group: point.quality[group].loss)
    return [_by_time(courses, yard), _by_bytes(courses, yard), _by_time(courses, loss)]


def comparison_plots(found: Comparison) -> list[Plot]:
    """Quality on all held-out data against virtual time and bytes up, then each other group against time."""
    yard = yard_of(found.first)

    def courses(group: str) -> list[Course]:
        return [
            Course(system.spec, index, run.result.curve, group)
            for index, system in enumerate(found.systems)
            for run in system.runs
            if group in run.result.groups
        ]

    others = [group for group in found.first.groups if group != ALL]
    free = replace(yard, target=None)  # a target is of all held-out data
    return [
        _by_time(courses(ALL), yard),
        _by_bytes(courses(ALL), yard),
        *(_by_time(courses(group), free, f" of {group} of clients by data") for group in others),
    ]


def _by_time(courses: Sequence[Course], yard: Yard, more: str = "") -> Plot:
    scale, unit = words.time_unit(max(course.points[-1].time for course in courses))
    title = f"{yard.name.capitalize()}{more} over time"
    return _plot(title, courses, yard, lambda point: point.time / scale, f"virtual time, {unit}")


def _by_bytes(courses: Sequence[Course], yard: Yard) -> Plot:
    scale, unit = words.size_unit(max(course.points[-1].uploaded for course in courses))
    title = f"{yard.name.capitalize()} over bytes sent"
    return _plot(title, courses, yard, lambda point: point.uploaded / scale, f"sent by all clients, {unit}")


def _plot(title: str, courses: Sequence[Course], yard: Yard, along: Measure, x_label: str) -> Plot:
    values = [yard.value(point, course.group) for course in courses for point in course.points]
    wanted = values if yard.target is None else [*values, yard.target]
    x_axis = linear_axis(
        [0.0, *(along(point) for course in courses for point in course.points)], LEFT, WIDTH - RIGHT, 0.02
    )
    y_axis = (log_axis if yard.log else linear_axis)(wanted, HEIGHT - BOTTOM, TOP)
    strokes = [_stroke(course, yard, along, x_axis, y_axis) for course in courses]
    names = {course.name: course.look for course in courses}
    keys = [Key(look, name, line=True) for name, look in names.items()]
    if yard.target is not None:
        strokes.append(_level(yard.target, y_axis))
        keys.append(
            Key("threshold", f"target {words.number(yard.target)}{yard.unit and ' ' + yard.unit}", line=True)
        )
    return Plot(
        title=title,
        description=f"{title}: "
        + "; ".join(_end(course, yard, along) for course in courses)
        + f" ({x_label})",
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        x_label=x_label,
        y_label=yard.name + (f", {yard.unit}" if yard.unit else "") + (", log scale" if yard.log else ""),
        strokes=strokes,
        marks=[mark for course in courses for mark in _marks(course, yard, along, x_axis, y_axis)],
        keys=keys,
    )


def _stroke(course: Course, yard: Yard, along: Measure, x_axis: Axis, y_axis: Axis) -> Stroke:
    places = (
        f"{x_axis.at(along(point))},{y_axis.at(yard.value(point, course.group))}"
        for point in _thinned(course.points, MAX_POINTS)
        if abs(yard.value(point, course.group)) < LARGEST
    )
    return Stroke(" ".join(places), course.look, course.name)


def _level(value: float, y_axis: Axis) -> Stroke:
    y = y_axis.at(value)
    return Stroke(f"{LEFT},{y} {WIDTH - RIGHT},{y}", "threshold", f"target {words.number(value)}")


def _marks(course: Course, yard: Yard, along: Measure, x_axis: Axis, y_axis: Axis) -> Iterable[Mark]:
    for point in _thinned(course.points, MAX_MARKS):
        value = yard.value(point, course.group)
        if abs(value) < LARGEST:
            text = (
                f"{course.name}: {yard.name} {words.quantity(value, yard.unit)} after {words.duration(point.time)},"
                f" {words.plural(point.step, 'step')}, {words.size(point.uploaded)} sent"
            )
            yield Mark(x_axis.at(along(point)), y_axis.at(value), course.look, text, radius=2.6)


def _end(course: Course, yard: Yard, along: Measure) -> str:
    last = course.points[-1]
    value = words.quantity(yard.value(last, course.group), yard.unit)
    return f"{course.name} ends at {value} at {words.number(along(last))}"


def _thinned(points: Sequence[CurvePoint], most: int) -> list[CurvePoint]:
    """At most so many, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def target_text(limits: LimitValues) -> str:
    """What was to be reached, in words; empty without a target."""
    accuracy = None if limits.accuracy is None else f"accuracy of {words.number(100 * limits.accuracy)} %"
    perplexity = None if limits.perplexity is None else f"perplexity of {words.number(limits.perplexity)}"
    return " or ".join(filter(None, (accuracy, perplexity)))
