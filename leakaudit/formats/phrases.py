"""Short phrases for messages about files and errors that may hold anything."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_LENGTH = 120


def limit(text: str) -> str:
    """At most 120 characters."""
    return text if len(text) <= _LENGTH else text[: _LENGTH - 3] + "..."


def quoted(value: object) -> str:
    return limit(repr(value))


def listing(names: Iterable[str], most: int = 5) -> str:
    """'a, b, c and 4 more'."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(limit(name) for name in found[:most]) + more


def counted(count: int, noun: str) -> str:
    """'1 tensor', '3 tensors'; 'entry' becomes 'entries'."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("ry") else f"{count:,} {noun}s"


def shape_text(shape: torch.Size | tuple[int, ...]) -> str:
    """'(12, 3, 5, 5)'; '()' for a single number."""
    return f"({', '.join(str(size) for size in shape)})"


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type's name when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return limit(lines[0]) if lines else type(error).__name__
