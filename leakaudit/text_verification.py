"""What a reconstruction of text proves without the truth.

Tokens are discrete: where the update of the recovered text equals the observed one to rounding, and that of
every text near it does not, the text is the private one, as far as texts near it go.  Nothing is said of texts
far away, nor of the order of the batch, which an update does not tell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from leakaudit.formats.phrases import counted
from leakaudit.models.language import IGNORED, LanguageVictim
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.results import Verification
from leakaudit.text_data import fill_masks
from leakaudit.threat import View
from leakaudit.verification import compare, matches

PROBES = 12
CLEAR = 3.0
"""How many times the floor the update of another text must be off to be told apart."""
SECONDS = 20.0


@dataclass(frozen=True)
class Alternative:
    """A text near the recovered one.

    Attributes:
        x, y: model inputs and labels.
        what: how it differs, in words.
    """

    x: Tensor
    y: Tensor
    what: str


def verify_text(view: View, x: Tensor, y: Tensor, seconds: float = SECONDS) -> Verification:
    """Compare the update of (x, y) with the observed one, and with those of texts near it.

    Args:
        x: (N, L) int64 token numbers, filled up with `NO_TOKEN`.
        y: labels as `LanguageVictim` takes them, taken as given where they are classes.
        seconds: for all simulations, judged by timing one; fewer alternatives are tried for a large model.

    `residual` and `floor` are relative to the norm of the observed update.
    """
    exact = view.to(dtype=torch.float64)
    victim = cast(LanguageVictim, exact.victim)
    x = x.detach().to(victim.device)
    y = y.detach().to(victim.device, torch.float64 if y.is_floating_point() else None)
    found, floor = compare(view, exact, x, y, int((x != NO_TOKEN).sum()))
    relative = found.floor
    if not found.residual <= relative:
        return found
    equal = matches(found, floor)
    began = time.monotonic()
    view.residual(x, y)
    once = time.monotonic() - began
    affordable = int(max(0.0, seconds - once) / max(once, 1e-9))
    others = list(alternatives(victim, x, y, min(PROBES, affordable)))
    if not others:
        reason = (
            f"one simulation takes {once:.0f} s, so no other text was tried"
            if affordable < 1
            else "no text near it could be tried"
        )
        return _consistent(found, equal, reason)
    misses = [view.residual(other.x, other.y) for other in others]  # far from the floor, or no proof
    nearest = min(range(len(others)), key=misses.__getitem__)
    if misses[nearest] <= CLEAR * relative:
        reason = f"{others[nearest].what}, it is off by {misses[nearest]:.1e} only"
        return _consistent(found, equal, reason)
    text = (
        f"verified exact: {equal}, while each of {counted(len(others), 'text')} near it (a token replaced by"
        f" its nearest neighbour, or two neighbours swapped) is off by {misses[nearest]:.1e} or more (up to the"
        " order of the batch)"
    )
    return found.model_copy(update={"status": "verified", "text": text})


def _consistent(found: Verification, equal: str, reason: str) -> Verification:
    text = f"{equal}, but other texts may share it: {reason}"
    return found.model_copy(update={"status": "consistent", "text": text, "reason": reason})


def alternatives(victim: LanguageVictim, x: Tensor, y: Tensor, count: int) -> Iterator[Alternative]:
    """At most `count` texts near (x, y), spread over sentences and positions, the same every time.

    Half of them have a token replaced by the one whose word row is nearest, half two neighbours swapped.
    """
    sentences = fill_masks(x, y)
    ordinary = victim.space.ordinary(sentences)
    pairs = ordinary[:, :-1] & ordinary[:, 1:] & (sentences[:, :-1] != sentences[:, 1:])
    places, starts = ordinary.nonzero().tolist(), pairs.nonzero().tolist()
    swaps = min(count // 2, len(starts))
    for i, j in _spread(places, count - swaps):
        old = int(sentences[i, j])
        new = _neighbour(victim, old)
        yield _changed(victim, x, y, i, {j: new}, "replaced")
    for i, j in _spread(starts, swaps):
        tokens = {j: int(sentences[i, j + 1]), j + 1: int(sentences[i, j])}
        yield _changed(victim, x, y, i, tokens, "swapped")


def _changed(
    victim: LanguageVictim, x: Tensor, y: Tensor, i: int, tokens: dict[int, int], how: str
) -> Alternative:
    """(x, y) with other tokens in sentence `i`: as inputs where they were seen, as labels where they are asked."""
    x, y = x.clone(), y.clone()
    before = fill_masks(x, y)
    for j, token in tokens.items():
        labelled = y.dim() == 2 and not y.is_floating_point() and int(y[i, j]) != IGNORED
        if not labelled or int(x[i, j]) == int(y[i, j]):
            x[i, j] = token
        if labelled:
            y[i, j] = token
    j = min(tokens)
    places = sorted(tokens)
    old, new = (
        " ".join(victim.space.pieces(torch.tensor(row)))
        for row in ([int(before[i, p]) for p in places], [tokens[p] for p in places])
    )
    return Alternative(x, y, f"with {old!r} {how} by {new!r} (sentence {i + 1}, token {j + 1})")


def _neighbour(victim: LanguageVictim, token: int) -> int:
    """The token, not a special one, whose word row is nearest to that of `token`."""
    rows = victim.word_rows
    apart = (rows - rows[token]).norm(dim=1)
    apart[[token, *(number for number in victim.space.special if number < len(apart))]] = math.inf
    return int(apart.argmin())


def _spread(places: list[list[int]], count: int) -> list[list[int]]:
    """At most `count` of them, evenly spread."""
    if len(places) <= count:
        return places
    return [places[(2 * k + 1) * len(places) // (2 * count)] for k in range(count)]
