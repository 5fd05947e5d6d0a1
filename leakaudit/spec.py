"""`name:key=value,...` <-> frozen dataclass, typed, with did-you-mean.

A registry maps a name to a preset: an instance of a frozen dataclass.  A spec
names a preset and changes some of its fields (several values of one field are joined by +):

    >>> parse("dlg:iterations=50,restarts=2", {"dlg": preset})        # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from leakaudit.errors import InputError

T = TypeVar("T")


def parse(text: str, registry: Mapping[str, T], kind: str = "name") -> T:
    """Return the preset called by `text`, with the options it gives replaced.

    Raises `InputError` for an unknown name or option, or a value of the wrong type.
    """
    name, _, options = text.partition(":")
    name = name.strip()
    if name not in registry:
        raise InputError(f"unknown {kind} {name!r}{suggest(name, registry)}; known: {', '.join(registry)}")
    preset = registry[name]
    changes = _options(options, preset, f"{kind} {name!r}")
    try:
        return dataclasses.replace(preset, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise InputError(f"{kind} {name!r}: {error}") from error


def format_spec(name: str, value: Any, preset: Any) -> str:
    """The shortest spec that `parse` turns back into `value`."""
    changed = [
        f"{field.name}={_format_value(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if field.init and getattr(value, field.name) != getattr(preset, field.name)
    ]
    return name + (":" + ",".join(changed) if changed else "")


def described(preset: object) -> str:
    """The first paragraph of what the preset's class says of itself, as one line."""
    return " ".join(inspect.cleandoc(type(preset).__doc__ or "").partition("\n\n")[0].split())


def suggest(word: str, known: Iterable[str]) -> str:
    """', did you mean ...?' when something close is known, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _options(text: str, preset: Any, owner: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    fields = {field.name: field for field in dataclasses.fields(preset) if field.init}
    hints = typing.get_type_hints(type(preset))
    changes: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, raw = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise InputError(f"{owner}: {item.strip()!r} is not key=value")
        if key not in fields:
            raise InputError(
                f"{owner} has no option {key!r}{suggest(key, fields)}; options: {', '.join(fields) or 'none'}"
            )
        changes[key] = _convert(raw.strip(), hints[key], f"{owner}: {key}")
    return changes


def _convert(raw: str, hint: Any, owner: str) -> Any:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if raw.lower() == "none" and type(None) in choices:
            return None
        (hint,) = [choice for choice in choices if choice is not type(None)]
        choices = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple(_convert(part, choices[0], owner) for part in raw.split("+"))
    if typing.get_origin(hint) is typing.Literal:
        if raw not in choices:
            raise InputError(f"{owner}={raw!r}{suggest(raw, choices)}; accepted: {', '.join(choices)}")
        return raw
    if hint is bool:
        if raw.lower() not in ("true", "false"):
            raise InputError(f"{owner}={raw!r} is not true or false")
        return raw.lower() == "true"
    try:
        return hint(raw)
    except (TypeError, ValueError) as error:
        raise InputError(f"{owner}={raw!r} is not of type {getattr(hint, '__name__', hint)}") from error


def _format_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(_format_value(part).replace("e+", "e") for part in value)  # 1e+20 is one number
    return str(value).lower() if isinstance(value, bool) else str(value)
