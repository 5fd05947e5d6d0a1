"""From tokens that may stand at a position to whole sentences, by the second attention layer's span.

What enters the second layer depends on the whole sentence (in a decoder: on the tokens before), so a right
sentence lies in the span of that layer's gradient at every place, and a wrong one at hardly any.

Decoders (DAGER, Petrov et al. 2024): prefixes grow one token at a time, and only true ones survive.

Encoders: coordinate descent on the distance, from a start that the embedding rows suggest, for the longest
sentence first, whose last place belongs to it alone.  A found sentence is simulated and taken out of the
update (peeled), which makes the rest a smaller problem.  The start and the peeling are ours; DAGER descends
from random tokens of each position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.rows import Rows, read_rows
from leakaudit.attacks.spans import Span, attention_span, scan
from leakaudit.attacks.token_labels import complete_labels
from leakaudit.models.language import LanguageVictim
from leakaudit.models.spaces import stack_sentences
from leakaudit.rounds import Round
from leakaudit.threat import View
from leakaudit.update import Update

FOUND = 1e-4
"""Mean distance from the second layer's span below which a sentence counts as found, without noise."""
SLACK = 30.0
"""Distances of true candidates are alike within this factor."""
KICKS = 12
"""Times a sentence that does not pass is shaken and descends again."""
CHOICES = 12
SWEEPS = 6
SPREAD = 0.2
"""Temperature of tokens drawn anew, in units of the prior."""
MOST_PREFIXES = 4096


@dataclass(frozen=True)
class Candidates:
    """Tokens that may stand at each position.

    Attributes:
        tokens: (n,) candidates.
        prior: (L, n) how much the rows speak for each place; minus infinity where excluded.
        affinity: (n, n) likeness of the tokens' gradients, high within a sentence.
    """

    tokens: Tensor
    prior: Tensor
    affinity: Tensor


def candidates(victim: LanguageVictim, rows: Rows, span: Span, length: int) -> Candidates:
    """What the first layer's span and the rows leave of (position, token) pairs."""
    distance = scan(victim, span, rows.tokens, length)
    limit = accepted(distance.amin(dim=1).median().item(), span)
    prior = torch.zeros_like(distance)
    if len(rows.position):
        fit = torch.linalg.lstsq(rows.word.T, rows.position[:length].T, driver="gelsd").solution.T
        prior[: len(fit)] = fit
    unit = F.normalize(rows.word, dim=1)
    return Candidates(rows.tokens, prior.masked_fill(distance > limit, -torch.inf), unit @ unit.T)


def accepted(typical: float, span: Span) -> float:
    """Distance up to which a candidate passes, given that of a true one."""
    return max(min(SLACK * max(typical, 1e-7), 0.3), min(span.tolerance, FOUND))


# ------------------------------------------------------------------------------------------ decoders


def grow(
    victim: LanguageVictim, choices: Callable[[int], Tensor], span: Span, limit: int, monitor: Monitor
) -> list[list[int]]:
    """All sentences whose every prefix lies in the second layer's span.

    Args:
        choices: tokens that may stand at a position.
        limit: tokens of a sentence at most.
    """
    prefixes: list[list[int]] = [[]]
    ended: list[list[int]] = []
    typical = 0.0
    for place in range(limit):
        tokens = choices(place)
        if len(tokens) == 0:
            break
        grown = torch.tensor(
            [[*prefix, token] for prefix in prefixes for token in tokens.tolist()], device=victim.device
        )
        distance = torch.cat(
            [
                span.distance(victim.attention_inputs(part, 1)[:, -1])
                for part in torch.split(grown, max(1, (1 << 15) // (place + 1)))
            ]
        )
        typical = max(typical, float(distance.min())) if place < 2 else typical
        good = distance < accepted(typical, span)
        alive = good.view(len(prefixes), len(tokens))
        ended += [prefix for prefix, survives in zip(prefixes, alive.any(dim=1), strict=True) if not survives]
        if not bool(good.any()) or int(good.sum()) > MOST_PREFIXES:
            return [sentence for sentence in ended if sentence]
        prefixes = grown[good].tolist()
        if monitor.step(float(distance[good].mean()), stack_sentences(prefixes), torch.zeros(0)):
            break
    return [sentence for sentence in [*ended, *prefixes] if sentence]


# ------------------------------------------------------------------------------------------ encoders


@dataclass
class _Search:
    """Sentences found so far, and the update without them."""

    view: View
    monitor: Monitor
    generator: torch.Generator
    found: list[list[int]]
    guesses: list[list[int]]


def assemble(view: View, rows: Rows, generator: torch.Generator, monitor: Monitor) -> tuple[Tensor, int]:
    """The sentences of an encoder's batch (N, L), and how many of them passed the second layer's test."""
    search = _Search(view, monitor, generator, [], [])
    rest = view
    current: Rows | None = rows
    count = view.round.num_examples
    while len(search.found) + len(search.guesses) < count:
        if current is None or current.length == 0 or not len(current.tokens):
            break
        sentence, distance, limit = _longest(rest, current, search)
        if sentence is None:
            break
        (search.found if distance < limit else search.guesses).append(sentence)
        if monitor.step(distance, stack_sentences([*search.found, *search.guesses]), torch.zeros(0)):
            break
        if len(search.found) + len(search.guesses) < count:
            rest = _peel(rest, sentence, current, count)
            current = _significant(read_rows(rest), rows)
    return stack_sentences([*search.found, *search.guesses]).to(view.victim.device), len(search.found)


def _significant(rows: Rows | None, before: Rows) -> Rows | None:
    """Rows that are more than the rounding which the peeled sentences left."""
    if rows is None:
        return None
    floor = 1e-5 * float(before.word.norm(dim=1).median())
    kept = rows.word.norm(dim=1) > floor
    used = (rows.position.norm(dim=1) > floor).nonzero()
    last = int(used.max()) + 1 if len(used) else 0
    return replace(rows, tokens=rows.tokens[kept], word=rows.word[kept], position=rows.position[:last])


def _longest(view: View, rows: Rows, search: _Search) -> tuple[list[int] | None, float, float]:
    """The best sentence of the greatest length, its mean distance, and the limit it should keep."""
    victim = view.victim
    assert isinstance(victim, LanguageVictim)
    first, second = (attention_span(victim, view.observed, layer, rows.noise) for layer in (0, 1))
    if first is None or second is None or not second.tests:
        return None, 1.0, 0.0
    known = candidates(victim, rows, first, rows.length)
    last = (F.normalize(rows.position[-1:], dim=1) @ F.normalize(rows.word, dim=1).T)[0]
    limit = max(FOUND, min(second.tolerance, 50 * FOUND))
    climb = _Climb(victim, known, second, limit)
    chosen, here = climb(_suggest(known.prior + last, known.affinity, kinship=0.0), CHOICES)
    for kick in range(KICKS):
        if here.mean() < limit:
            break
        if kick == 0:
            tried = _suggest(known.prior + last, known.affinity, kinship=2.0)
        else:
            tried = climb.kicked(chosen, here, search.generator)
        tried, there = climb(tried, CHOICES if kick % 2 else len(known.tokens))
        if there.mean() < here.mean():
            chosen, here = tried, there
    return known.tokens[chosen].tolist(), float(here.mean()), limit


def _suggest(prior: Tensor, affinity: Tensor, kinship: float) -> Tensor:
    """A token for each position (indices): likely there, and alike in gradient to the others chosen."""
    chosen = prior.argmax(dim=1)
    for _ in range(SWEEPS if kinship else 0):
        before = chosen.clone()
        for place in range(len(chosen)):
            others = torch.cat([chosen[:place], chosen[place + 1 :]])
            kin = affinity[others].mean(dim=0) if len(others) else 0.0
            chosen[place] = (prior[place] + kinship * kin).argmax()
        if torch.equal(before, chosen):
            break
    return chosen


@dataclass(frozen=True)
class _Climb:
    """Coordinate descent of one sentence on its distance from the second layer's span."""

    victim: LanguageVictim
    known: Candidates
    span: Span
    limit: float

    def distances(self, chosen: Tensor) -> Tensor:
        """(n, L) for (n, L) indices of candidates."""
        return self.span.distance(self.victim.attention_inputs(self.known.tokens[chosen], 1))

    def __call__(self, chosen: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The sentence at the foot of the slope and its distances, with `most` candidates a place."""
        here = self.distances(chosen[None])[0]
        for _ in range(SWEEPS):
            before = float(here.mean())
            for place in here.argsort(descending=True).tolist():
                options = self._options(place, chosen[place], most)
                if len(options) == 0:
                    continue
                tried = chosen.repeat(len(options), 1)
                tried[:, place] = options
                distances = self.distances(tried)
                best = distances.mean(dim=1).argmin()
                if distances[best].mean() < here.mean():
                    chosen, here = tried[best], distances[best]
                if here.mean() < self.limit:
                    return chosen, here
            if float(here.mean()) > 0.999 * before:
                break
        return chosen, here

    def kicked(self, chosen: Tensor, here: Tensor, generator: torch.Generator) -> Tensor:
        """The sentence with some of its worst places drawn anew."""
        prior = self.known.prior.cpu()
        chosen = chosen.clone()
        for place in torch.multinomial(here.cpu(), max(1, len(here) // 6), generator=generator).tolist():
            weights = (prior[place] / SPREAD).softmax(dim=0)
            chosen[place] = torch.multinomial(weights, 1, generator=generator)[0]
        return chosen

    def _options(self, place: int, current: Tensor, most: int) -> Tensor:
        prior = self.known.prior[place]
        ranked = prior.argsort(descending=True)
        return ranked[(ranked != current) & prior[ranked].isfinite()][:most]


def _peel(view: View, sentence: list[int], rows: Rows, count: int) -> View:
    """The view of the update without this sentence's share, its label the one that leaves least."""
    victim = view.victim
    assert isinstance(victim, LanguageVictim)
    x = torch.tensor([sentence], device=victim.device)
    single = replace(view, round=Round(1), knowledge=replace(view.knowledge))
    if victim.task == "classification":
        labels = [torch.tensor([label], device=victim.device) for label in range(min(victim.num_classes, 16))]
    else:
        labels = [complete_labels(single, x, rows)]
    options = [_without(view.observed, single.simulate(x, y).detach(), victim, rows, count) for y in labels]
    best, _ = min(options, key=lambda option: option[1])
    return replace(view, observed=best)


def _without(
    observed: Update, share: Update, victim: LanguageVictim, rows: Rows, count: int
) -> tuple[Update, float]:
    """The update minus the sentence's share of it, and what is left of its last position's row.

    The share's weight shows where the sentence is the only one: at its last position.
    """
    assert victim.position is not None
    own = share[victim.position].double()[victim.first_position + rows.length - 1]
    seen = rows.position[-1]
    weight = float(own @ seen / (own @ own)) if bool(own.any()) else 0.0
    left = float((seen - weight * own).norm() / seen.norm())
    if left > 0.1:
        weight = 1 / count
    return observed - share * weight, left
