"""Accuracy of several seeds as one figure with its interval, and curves that somebody trained elsewhere."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.stats import t as student

from leakaudit.errors import InputError
from leakaudit.formats.phrases import first_line, quoted
from leakaudit.spec import suggest
from leakaudit.sweep_results import Curve, Utility

CONFIDENCE = 0.95


def summary(finals: Sequence[float]) -> dict[str, float | None]:
    """`accuracy`, `low` and `high` of a `Utility`: mean of the seeds, and the 95 % interval of it by Student's t,
    within [0, 1]; None for no seed, and no interval for one."""
    if not finals:
        return {"accuracy": None, "low": None, "high": None}
    mean = statistics.fmean(finals)
    if len(finals) == 1:
        return {"accuracy": mean, "low": None, "high": None}
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(finals) - 1))
    half = quantile * statistics.stdev(finals) / math.sqrt(len(finals))
    return {"accuracy": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}


class _Row(BaseModel):
    """One accuracy of the file."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True, allow_inf_nan=False)

    protocol: Annotated[str, Field(min_length=1)]
    defense: Annotated[str, Field(min_length=1)]
    seed: int
    step: Annotated[int, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    epsilon: Annotated[float, Field(ge=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None

    @property
    def target(self) -> tuple[str, str]:
        return self.protocol, self.defense


_REQUIRED = tuple(name for name, field in _Row.model_fields.items() if field.is_required())
_ACCEPTED = f"{', '.join(_REQUIRED)}[, epsilon, delta]"


def read_curves(path: str | Path) -> list[Utility]:
    """Utilities from accuracy curves that were trained elsewhere, one for each protocol and defense, in order.

    Args:
        path: .csv with a header, or .json with a list of objects; of each accuracy the protocol, the defense
            ("none" without one), the seed, the step, the accuracy in [0, 1], and perhaps epsilon and
            delta, which must be the same for all of a target.

    The accuracy of a seed is that of its last step, which must be the same for all seeds of a target.
    Raises `InputError` for anything else.
    """
    path = Path(path)
    readers = {".csv": _csv_rows, ".json": _json_rows}
    if path.suffix.lower() not in readers:
        raise InputError(f"curves are read from .csv or .json, got {quoted(path.name)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot read {path}: {reason}") from error
    targets: dict[tuple[str, str], list[_Row]] = {}
    for place, fields in readers[path.suffix.lower()](path, text):
        row = _row(place, fields)
        targets.setdefault(row.target, []).append(row)
    if not targets:
        raise InputError(f"{path} holds no accuracies; accepted: rows of {_ACCEPTED}")
    return [_utility(path, rows) for rows in targets.values()]


def _csv_rows(path: Path, text: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(place, fields) of every row that is not blank; an empty field is one left out."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except csv.Error as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    header = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    if not set(_REQUIRED) <= set(header) or len(set(header)) < len(header):
        found = ", ".join(header) or "none"
        raise InputError(f"{path} has columns {quoted(found)}; accepted: {_ACCEPTED}")
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}, line {number} has {len(cells)} cells, the header {len(header)}")
        fields = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
        rows.append((f"{path}, line {number}", fields))
    return rows


def _json_rows(path: Path, text: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} is not a list of objects; accepted: objects of {_ACCEPTED}")
    return [(f"{path}, entry {number}", row) for number, row in enumerate(rows, start=1)]


def _row(place: str, fields: Mapping[str, Any]) -> _Row:
    unknown = [name for name in fields if name not in _Row.model_fields]
    if unknown:
        guess = suggest(unknown[0], _Row.model_fields)
        raise InputError(f"{place}: unknown field {quoted(unknown[0])}{guess}; accepted: {_ACCEPTED}")
    try:
        return _Row.model_validate(fields)
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        if name not in fields:
            raise InputError(f"{place}: {name} is missing; accepted: {_ACCEPTED}") from error
        raise InputError(f"{place}: {name}={quoted(fields[name])}: {fault['msg']}") from error


def _utility(path: Path, rows: Sequence[_Row]) -> Utility:
    """Of all the rows of one target."""
    protocol, defense = rows[0].target
    place = f"{path}: {protocol} with {defense}"
    seeds: dict[int, dict[int, float]] = {}
    for row in rows:
        points = seeds.setdefault(row.seed, {})
        if row.step in points:
            raise InputError(f"{place}: step {row.step} of seed {row.seed} is there twice")
        points[row.step] = row.accuracy
    ends = sorted({max(points) for points in seeds.values()})
    if len(ends) > 1:
        raise InputError(
            f"{place}: seeds end at steps {ends[0]} and {ends[-1]}; accepted: the same end for all"
        )
    curves = [Curve(seed=seed, points=sorted(points.items())) for seed, points in sorted(seeds.items())]
    return Utility(
        protocol=protocol,
        defense=defense,
        curves=curves,
        steps=ends[0],
        epsilon=_only(place, "epsilon", [row.epsilon for row in rows]),
        delta=_only(place, "delta", [row.delta for row in rows]),
        supplied=True,
        **summary([curve.points[-1][1] for curve in curves]),
    )


def _only(place: str, name: str, values: Iterable[float | None]) -> float | None:
    found = sorted({value for value in values if value is not None})
    if len(found) > 1:
        raise InputError(
            f"{place}: {name} is both {found[0]:g} and {found[-1]:g}; accepted: one for all rows"
        )
    return found[0] if found else None
