"""Defenses as text: `clip:max_grad_norm=1+gaussian-noise:std=1e-3` is the first, then the second.

parse_defense("clip+top-k:keep=0.1")              -> ("clip", Clip()), ("top-k", TopK(keep=0.1))
expand("gaussian-noise:std=1e-4,1e-2")            -> two specs, one a strength
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import product

from leakaudit.defenses import DEFENSES, Defense, adapt
from leakaudit.errors import InputError
from leakaudit.rounds import Round
from leakaudit.spec import format_spec, parse
from leakaudit.sweep_results import NO_DEFENSE
from leakaudit.threat import View, known

Parts = tuple[tuple[str, Defense], ...]
_BETWEEN = re.compile(r"\+(?=\s*[A-Za-z_])")
"""A "+" before a name; the one in 1e+3 is before a digit."""


def parse_defense(text: str) -> Parts:
    """(spec, defense) of every part in the order they are applied; none for "none" or an empty text.

    The specs name the first option always, the others where they differ from the default, so that the
    same defense always has the same spec, with its strength in it.
    Raises `InputError` for an unknown name or option (did you mean), or a value out of range.
    """
    if _is_none(text):
        return ()
    return tuple(_parse_part(part) for part in _BETWEEN.split(text))


def _is_none(text: str) -> bool:
    return text.strip() in ("", NO_DEFENSE)


def _parse_part(text: str) -> tuple[str, Defense]:
    name = text.partition(":")[0].strip()
    defense = parse(text, DEFENSES, "defense")
    return _spelt(name, defense), defense


def _spelt(name: str, defense: Defense) -> str:
    spec, preset = format_spec(name, defense, DEFENSES[name]), DEFENSES[name]
    first = next((field.name for field in fields(defense) if field.init), None)  # type: ignore[arg-type]
    overruled = getattr(defense, "relative", None) is not None  # then `std` says nothing
    if first is None or overruled or getattr(defense, first) != getattr(preset, first):
        return spec
    stated = f"{name}:{first}={getattr(defense, first)}"
    return stated + ("," + spec.partition(":")[2] if ":" in spec else "")


def defended(round: Round, parts: Parts) -> Round:
    """What the client does instead of `round`; `InputError` where a defense cannot do that."""
    for spec, defense in parts:
        try:
            round = defense.round(round)
        except ValueError as error:
            raise InputError(f"defense {spec!r}: {error}") from error
    return round


def format_defense(parts: Parts) -> str:
    """The whole spec of `parts`; "none" without any."""
    return "+".join(spec for spec, _ in parts) or NO_DEFENSE


def expand(text: str) -> list[str]:
    """Every defense that `text` stands for, where options have several values with commas between.

    A value without a key belongs to the key before it; the last list varies fastest, and of several parts
    (with "+") every combination is meant.  Each spec is canonical and comes once, "none" for no defense.
    Raises `InputError` as `parse_defense` does.
    """
    if _is_none(text):
        return [NO_DEFENSE]
    choices = [_alternatives(part) for part in _BETWEEN.split(text)]
    specs = (format_defense(parse_defense("+".join(chain))) for chain in product(*choices))
    return list(dict.fromkeys(specs))


def _alternatives(part: str) -> list[str]:
    """`name:a=1,2,b=3` -> `name:a=1,b=3` and `name:a=2,b=3`."""
    name, colon, options = part.partition(":")
    values: list[list[str]] = []
    for item in options.split(",") if options.strip() else []:
        if "=" in item or not values:
            values.append([item])
        else:
            key = values[-1][0].partition("=")[0]
            values[-1].append(f"{key}={item.strip()}")
    return [name + colon + ",".join(chosen) for chosen in product(*values)]


def family(spec: str) -> str:
    """Names without options, "+" between those of a chain; "none" without any."""
    if _is_none(spec):
        return NO_DEFENSE
    return "+".join(part.partition(":")[0].strip() for part in _BETWEEN.split(spec))


def strength(spec: str, among: Sequence[str] = ()) -> tuple[str, float] | None:
    """The numeric option that tells this defense from others of its family, and its value.

    It is the first that differs between `spec` and the specs of the same family in `among`; else the first
    that is given, or that the canonical spec gives.  None where no number is.
    """
    numbers = _numbers(spec)
    others = [_numbers(other) for other in among if family(other) == family(spec)]
    varying = (i for i, number in enumerate(numbers) if any(other[i] != number for other in others))
    given = (
        i
        for text in (spec, format_defense(parse_defense(spec)))
        for i, number in enumerate(numbers)
        if re.search(rf"\b{number[1]}\s*=", _part(text, number[0]))
    )
    for index in (*varying, *given):
        _, name, value = numbers[index]
        if value is not None:
            return name, value
    return None


def _part(spec: str, position: int) -> str:
    return _BETWEEN.split(spec)[position].replace("-", "_")


def _numbers(spec: str) -> list[tuple[int, str, float | None]]:
    """(part, option, value) of every option that may be a number; None where it is not given one."""
    return [
        (position, field.name, None if value is None else float(value))
        for position, (_, defense) in enumerate(parse_defense(spec))
        for field in fields(defense)  # type: ignore[arg-type]
        if field.init and _may_be_number(value := getattr(defense, field.name), str(field.type))
    ]


def _may_be_number(value: object, annotation: str) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float)) or (value is None and bool(re.search(r"int|float", annotation)))


def adapted(view: View, parts: Parts) -> View:
    """The view of an adversary who knows these defenses, given in the order they were applied."""
    view = adapt(view, [defense for _, defense in parts])
    if not parts or view.knowledge.defense.value:
        return view
    fact = known(tuple(spec for spec, _ in parts), "the defense is known")
    return replace(view, knowledge=replace(view.knowledge, defense=fact))


def parse_all(texts: Iterable[str]) -> Parts:
    """The parts of several specs, one chain after the other."""
    return tuple(part for text in texts for part in parse_defense(text))
