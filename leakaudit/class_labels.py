"""Labels as files of examples write them: numbers, or words."""

from __future__ import annotations

from collections.abc import Sequence


def numbered(words: Sequence[str]) -> tuple[list[int], tuple[str, ...] | None]:
    """The numbers that all words are, without names; else each word's place among the sorted words, its name."""
    if all(word.removeprefix("-").isascii() and word.removeprefix("-").isdigit() for word in words):
        return [int(word) for word in words], None
    names = tuple(sorted(set(words)))
    return [names.index(word) for word in words], names
