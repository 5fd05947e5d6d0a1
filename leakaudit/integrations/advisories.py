"""Publicly reported weaknesses of other software that bear on what a verdict means.

Each entry names its public reference.  Nothing is listed that is not public, and nothing here exploits
anything: a check runs a published function on two made-up seeds and compares the results.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Advisory:
    """Attributes:
    package: as pip names it.
    concerns: what part of it; an advisory is told where a message was made by that part.
    summary: what was reported, in a sentence.
    meaning: what it means for the verdict, in a sentence.
    references: public addresses.
    seen_in: versions whose published source we read and found the same.
    shows: whether the version installed here behaves so; None where it cannot be asked.
    """

    package: str
    concerns: str
    summary: str
    meaning: str
    references: tuple[str, ...]
    seen_in: tuple[str, ...]
    shows: Callable[[], bool | None]


def flower_masks_hold_32_bits() -> bool | None:
    """Whether the installed Flower expands two different 256-bit seeds, whose 32-bit words have the same
    exclusive or, to the same SecAgg+ mask.  None where Flower, or the function, is not there."""
    try:
        tools = importlib.import_module("flwr.common.secure_aggregation.secaggplus_utils")
        expand = tools.pseudo_rand_gen
        one, other = (words.astype("<u4").tobytes() for words in _WORDS)
        pairs = zip(expand(one, 1 << 32, [(64,)]), expand(other, 1 << 32, [(64,)]), strict=True)
        return all(np.array_equal(left, right) for left, right in pairs)
    except Exception:  # another version may differ in any way, and then we do not know
        return None


_WORDS = (np.array([1, 2, 0, 0, 0, 0, 0, 0]), np.array([7, 4, 0, 0, 0, 0, 0, 0]))
"""Two 256-bit seeds of eight words each, with the same exclusive or: 3."""

ADVISORIES = (
    Advisory(
        package="flwr",
        concerns="secagg+",
        summary="SecAgg+ folds each 256-bit mask seed into 32 bits and expands it with a generator that is not"
        " cryptographic (numpy.random.RandomState)",
        meaning="the masks hide no more than 32-bit seeds do, so this message is not protected as secure"
        " aggregation promises, and 'nothing to reconstruct' holds only against a server that does not look for seeds",
        references=(
            "https://github.com/flwrlabs/flower/issues/7522",
            "https://github.com/flwrlabs/flower/pull/7570",
        ),
        seen_in=("1.20.0", "1.41.0"),
        shows=flower_masks_hold_32_bits,
    ),
)


@dataclass(frozen=True)
class Notice:
    """An advisory that bears on a message, and how it is known to.

    `confirmed`: the very version that made the message behaves so, here or in its published source.
    """

    advisory: Advisory
    version: str
    confirmed: bool
    how: str

    @property
    def text(self) -> str:
        reported = f"Publicly reported of {self.advisory.package}: {self.advisory.summary}"
        return f"{reported} ({', '.join(self.advisory.references)}). {self.how}: {self.advisory.meaning}."


def notices(software: str | None, concerns: str) -> list[Notice]:
    """What is publicly known about the part `concerns` of `software`, such as "flwr 1.41.0".

    Behaviour goes before version numbers: where the same version is installed here, it is asked, and an
    advisory that it does not show is left out.  Of another version it is said whether we read its source.
    """
    package, _, version = (software or "").partition(" ")
    found = (
        _notice(advisory, version)
        for advisory in ADVISORIES
        if advisory.package == package and advisory.concerns == concerns
    )
    return [notice for notice in found if notice is not None]


def _notice(advisory: Advisory, version: str) -> Notice | None:
    if version and version == installed_version(advisory.package):
        shows = advisory.shows()
        if shows is not None:
            how = f"The {advisory.package} {version} installed here behaves so"
            return Notice(advisory, version, True, how) if shows else None
    if version in advisory.seen_in:
        how = f"The published source of {advisory.package} {version}, which made the message, is so"
        return Notice(advisory, version, True, how)
    how = (
        f"Whether {advisory.package} {version or 'of unknown version'} still is so was not checked; if it is"
    )
    return Notice(advisory, version, False, how)


def installed_version(package: str) -> str | None:
    """The version that is installed here; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
