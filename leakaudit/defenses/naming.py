"""Specs of defenses: chains such as `clip:max_grad_norm=1+gaussian-noise:std=0.1`, and lists of strengths."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from leakaudit.defenses import DEFENSES
from leakaudit.defenses.base import Defense
from leakaudit.errors import InputError
from leakaudit.spec import format_spec, parse

NONE = "none"
_BETWEEN = re.compile(r"\+(?=\s*[a-z])")
"""A plus between two defenses, not that of an exponent."""


def parse_defense(text: str) -> tuple[tuple[str, Defense], ...]:
    """(spec, defense) of a chain in the order they are applied; () for "none".  `InputError` for an unknown one."""
    if text.strip() == NONE:
        return ()
    return tuple(_single(part.strip()) for part in _BETWEEN.split(text))


def expand(text: str) -> list[str]:
    """The specs that `text` lists, in order: `top-k:keep=0.3,0.1` are two."""
    chains = [""]
    for part in _BETWEEN.split(text):
        chains = [f"{chain}+{one}" if chain else one for chain in chains for one in _expand_one(part.strip())]
    for chain in chains:
        parse_defense(chain)
    return [NONE if chain == NONE else "+".join(spec for spec, _ in parse_defense(chain)) for chain in chains]


def family(spec: str) -> str:
    """Names without options, "+" between."""
    return "+".join(part.partition(":")[0].strip() for part in _BETWEEN.split(spec))


def strength(spec: str, among: Sequence[str] = ()) -> tuple[str, float] | None:
    """The first option that is a number, or that differs from the others of the family; None where there is none."""
    others = [dict(_numbers(other)) for other in among if family(other) == family(spec)]
    numbers = _numbers(spec)
    varying = [pair for pair in numbers if any(other.get(pair[0]) != pair[1] for other in others)]
    return next(iter([*varying, *numbers]), None)


def _numbers(spec: str) -> list[tuple[str, float]]:
    found = []
    for _, defense in parse_defense(spec):
        for field in dataclasses.fields(defense):  # type: ignore[arg-type]
            value = getattr(defense, field.name)
            if isinstance(value, float):
                found.append((field.name, value))
    return found


def _single(text: str) -> tuple[str, Defense]:
    name = text.partition(":")[0].strip()
    defense = parse(text, DEFENSES, "defense")
    return format_spec(name, defense, DEFENSES[name]), defense


def _expand_one(text: str) -> list[str]:
    name, _, options = text.partition(":")
    if not options:
        return [name]
    variants: list[list[str]] = [[]]
    choices: list[list[str]] = []
    for item in options.split(","):
        if "=" in item:
            choices.append([item.strip()])
        elif choices:
            choices[-1].append(f"{choices[-1][0].partition('=')[0]}={item.strip()}")
        else:
            raise InputError(f"defense {name!r}: {item.strip()!r} is not key=value")
    for alternatives in choices:
        variants = [[*variant, one] for variant in variants for one in alternatives]
    return [f"{name}:{','.join(variant)}" for variant in variants]
