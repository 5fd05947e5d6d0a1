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
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.attacks.attention_rows import joint_rows
from leakaudit.attacks.base import Monitor
from leakaudit.attacks.rows import Rows, language, read_rows
from leakaudit.attacks.scans import scan
from leakaudit.attacks.spans import Span, attention_span
from leakaudit.attacks.token_labels import complete_labels
from leakaudit.models.language import IGNORED, LanguageVictim, text_as_labels
from leakaudit.models.spaces import NO_TOKEN, stack_sentences
from leakaudit.numerics import least_squares
from leakaudit.threat import View
from leakaudit.update import Update

FOUND = 1e-4
"""Mean distance from the second layer's span below which a sentence counts as found, without noise."""
SLACK = 30.0
"""Distances of true candidates are alike within this factor."""
FEW_KICKS, KICKS = 3, 24
"""Times a sentence that does not pass is shaken and descends again in a row, and at most for every length."""
ROUNDS = 10
"""Times as often where a deadline ends it."""
TIRED = 0.1
"""What every time adds to the distance of the sentence that is shaken, when the next one is chosen."""
MOST_LENGTHS = 8
DOUBTFUL = 0.5
"""Distance of a place, over the mean, from which on it is looked at a second time."""
CHOICES = 12
SWEEPS = 6
SPREAD = 0.2
"""Temperature of tokens drawn anew, in units of the prior."""
MOST_PREFIXES = 4096
REPEATS = 8
MOST_CLASSES = 16
"""Labels that are tried for a sentence to take out."""
ALONE = 0.1
"""Share of the last position's row that a sentence may leave unexplained and still be the only one there."""


@dataclass(frozen=True)
class Candidates:
    """Tokens that may stand at each position.

    Attributes:
        tokens: (n,) candidates.
        limit: distance from a span up to which a candidate passes.
        prior: (L, n) how much the rows speak for each place; minus infinity where excluded.
        affinity: (n, n) likeness of the tokens' gradients, high within a sentence.
        ending: (n,) their likeness to the last position's, which is of one sentence alone.
    """

    tokens: Tensor
    limit: float
    prior: Tensor
    affinity: Tensor
    ending: Tensor


def candidates(victim: LanguageVictim, rows: Rows, span: Span, update: Update) -> Candidates:
    """What the first layer's span and the rows leave of (position, token) pairs."""
    distance = scan(victim, span, rows.tokens, rows.length)
    limit = accepted(distance.amin(dim=1).median().item(), span)
    words, places = joint_rows(victim, rows, update)
    prior = least_squares(words.T, places.T, "gelsd").T
    unit = F.normalize(words, dim=1)
    ending = unit @ F.normalize(places[-1], dim=0)
    return Candidates(
        rows.tokens, limit, prior.masked_fill(distance > limit, -torch.inf), unit @ unit.T, ending
    )


def accepted(typical: float, span: Span) -> float:
    """Distance up to which a candidate passes, given that of a true one."""
    return max(min(SLACK * max(typical, 1e-7), 0.3), min(span.tolerance, FOUND))


# ------------------------------------------------------------------------------------------ decoders


def grow(
    victim: LanguageVictim,
    choices: Callable[[int], Tensor],
    span: Span,
    limit: int,
    count: int,
    monitor: Monitor,
) -> list[list[int]]:
    """All sentences whose every prefix lies in the second layer's span.

    Args:
        choices: tokens that may stand at a position.
        limit: tokens of a sentence at most.
        count: sentences of the batch.
    """
    prefixes: list[list[int]] = [[]]
    ended: list[list[int]] = []
    typical = 0.0
    for place in range(limit):
        tokens = choices(place)
        if len(tokens) == 0:
            break
        prefixes = [prefix for prefix in prefixes if not _stuck(prefix)]
        grown = torch.tensor(
            [[*prefix, token] for prefix in prefixes for token in tokens.tolist()], device=victim.device
        )
        if len(grown) == 0:
            break
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
        if monitor.step(float(distance[good].mean()), *_shown(victim, prefixes, count)):
            break
    return [sentence for sentence in [*ended, *prefixes] if sentence]


def _shown(victim: LanguageVictim, sentences: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
    """Sentences as a candidate of the whole batch, the first in place of those not found yet, with labels
    that need no thought: it is for the film strip, and what an interrupted attack has to show."""
    rows = [sentences[i] if i < len(sentences) else sentences[0] for i in range(count)]
    x = stack_sentences(rows).to(victim.device)
    if victim.task == "classification":
        return x, torch.zeros(count, dtype=torch.int64, device=victim.device)
    return x, text_as_labels(x)


def _stuck(prefix: list[int]) -> bool:
    """One token over and over: without positions such a prefix looks the same at every length."""
    return len(prefix) > REPEATS and len(set(prefix)) == 1


def by_evidence(victim: LanguageVictim, sentences: list[list[int]]) -> list[list[int]]:
    """Those that explain most independent vectors of the second layer first, the short before the long."""

    def evidence(sentence: list[int]) -> tuple[int, int]:
        inputs = victim.attention_inputs(torch.tensor([sentence], device=victim.device), 1)[0].double()
        return -int(torch.linalg.matrix_rank(inputs, rtol=FOUND)), len(sentence)

    return sorted(sentences, key=evidence)


# ------------------------------------------------------------------------------------------ encoders


def assemble(view: View, rows: Rows, generator: torch.Generator, monitor: Monitor) -> tuple[Tensor, int]:
    """The sentences of an encoder's batch (N, L), and how many of them passed the second layer's test.

    Those that passed come first; what could not be found is filled up with the best guesses, one a length.
    """
    found: list[list[int]] = []
    guesses: list[list[int]] = []
    rest, current = view, rows
    count = view.round.num_examples
    while len(found) < count and current.length and len(current.tokens):
        search = _Search.of(rest, current, generator, view.observed)
        if search is None:
            break
        (sentence, distance), *others = search.any_length(found, monitor)
        if distance >= search.known.limit:
            guesses = [sentence, *(other for other, _ in others)]
            break
        if sentence in found:  # its share was not taken out as it should have been
            break
        peeled = _peel(rest, sentence, current, len(rows.outputs), view)
        found += [sentence] * min(peeled.copies, count - len(found))
        if monitor.late:
            break
        rest, current = peeled.rest, _significant(read_rows(peeled.rest), rows)
    sentences = [*found, *guesses][:count]
    if not sentences:
        raise RuntimeError("no token passes the membership test of the first layer at some position")
    return stack_sentences(sentences).to(view.victim.device), len(found)


def _significant(rows: Rows | None, before: Rows) -> Rows:
    """Rows that are more than the rounding which the peeled sentences left."""
    if rows is None:
        return replace(before, tokens=before.tokens[:0], word=before.word[:0], position=before.position[:0])
    floor = 1e-5 * float(before.word.norm(dim=1).median())
    kept = rows.word.norm(dim=1) > floor
    used = (rows.position.norm(dim=1) > floor).nonzero()
    last = int(used.max()) + 1 if len(used) else 0
    return replace(rows, tokens=rows.tokens[kept], word=rows.word[kept], position=rows.position[:last])


@dataclass(frozen=True)
class _Search:
    """The search for one more sentence in what is left of the update."""

    climb: _Climb
    known: Candidates
    rows: Rows
    generator: torch.Generator
    count: int

    @classmethod
    def of(cls, view: View, rows: Rows, generator: torch.Generator, whole: Update) -> _Search | None:
        """None where a layer's span excludes nothing; `whole` is what the client shared."""
        victim = language(view)
        first, second = (attention_span(victim, view.observed, layer, rows.noise, whole) for layer in (0, 1))
        if first is None or second is None or not first.tests or not second.tests:
            return None
        known = candidates(victim, rows, first, view.observed)
        if not bool(known.prior.isfinite().any(dim=1).all()):
            return None
        return cls(_Climb(victim, known, second), known, rows, generator, view.round.num_examples)

    def any_length(self, found: list[list[int]], monitor: Monitor) -> list[tuple[list[int], float]]:
        """Sentences and their mean distances, one a length that was tried, the nearest first.

        The longest, whose end is known, comes first, then the short and cheap ones; then the length whose sentence
        is nearest is shaken a few times, each time counting as if it were farther away, until one passes.
        """
        longest, *others = self._lengths()
        lengths = [longest, *sorted(others)]
        most = (1 if not monitor.limited else ROUNDS) * KICKS * len(lengths)
        best: dict[int, tuple[Tensor, Tensor]] = {}
        shaken = dict.fromkeys(lengths, 0)
        while len(best) < len(lengths) or sum(shaken.values()) < most:
            if len(best) < len(lengths):
                length = lengths[len(best)]
                best[length] = self._begun(length)
                self._resize(best, list(best))
            else:
                length = min(lengths, key=lambda n: float(best[n][1].mean()) * (1 + TIRED * shaken[n]))
                best[length] = self._shaken(*best[length], fresh=shaken[length] == 0)
                shaken[length] += FEW_KICKS
                self._resize(best, [length])
            chosen, here = min(best.values(), key=lambda sentence: float(sentence[1].mean()))
            guess = self.known.tokens[chosen].tolist()
            late = monitor.step(float(here.mean()), *_shown(self.climb.victim, [*found, guess], self.count))
            if here.mean() < self.known.limit or late:
                break
        sentences = [
            (self.known.tokens[chosen].tolist(), float(here.mean())) for chosen, here in best.values()
        ]
        return sorted(sentences, key=lambda sentence: sentence[1])

    def _lengths(self) -> list[int]:
        """The greatest, then where the tokenizer ends every sentence alike the likeliest other places of that
        token."""
        if not bool(self._end.any()):
            return [self.rows.length]
        prior = self.known.prior[: self.rows.length - 1, self._end][:, 0]
        others = [int(place) + 1 for place in prior.argsort(descending=True) if prior[place].isfinite()]
        return [self.rows.length, *others[:MOST_LENGTHS]]

    @property
    def _end(self) -> Tensor:
        """(n,) bool: which candidate is the token that ends every sentence."""
        tokenizer = self.climb.victim.space.tokenizer
        end = None if tokenizer is None else tokenizer.sep_token_id
        return self.known.tokens == (NO_TOKEN if end is None else end)

    def _begun(self, length: int) -> tuple[Tensor, Tensor]:
        """The sentence of a length (indices) that the rows suggest, after a descent, and its distances."""
        climb = self._climb(length)
        return climb(_suggest(climb.known.prior, self.known.affinity, kinship=0.0), CHOICES)

    def _shaken(self, chosen: Tensor, here: Tensor, fresh: bool) -> tuple[Tensor, Tensor]:
        """The best of a sentence and what a few kicks make of it, the first of a `fresh` one being another start."""
        climb = self._climb(len(chosen))
        for kick in range(FEW_KICKS):
            if here.mean() < self.known.limit:
                break
            if fresh and kick == 0:
                tried = _suggest(climb.known.prior, self.known.affinity, kinship=2.0)
            else:
                tried = climb.kicked(chosen, here, self.generator)
            tried, there = climb(tried, len(self.known.tokens) if kick % 4 == 1 else CHOICES)
            if there.mean() < here.mean():
                chosen, here = tried, there
        return chosen, here

    def _climb(self, length: int) -> _Climb:
        return replace(self.climb, known=replace(self.known, prior=self._prior(length)))

    def _prior(self, length: int) -> Tensor:
        """(length, n) how much speaks for each token at each place of a sentence of so many."""
        prior = self.known.prior[:length]
        if length == self.rows.length:  # the last position's row is that of this sentence alone
            prior = prior + self.known.ending
        if bool(self._end.any()) and bool(prior[-1, self._end].isfinite()):
            prior = prior.clone()
            prior[-1, ~self._end] = -torch.inf
        return prior

    def _resize(self, best: dict[int, tuple[Tensor, Tensor]], lengths: list[int]) -> None:
        """Replace the best sentences of other lengths by those of `lengths` cut or drawn out, and the descents from
        there, where these are nearer: a descent often ends at a true sentence but for its length."""
        for length in lengths:
            chosen, _ = best[length]
            for other in [n for n in best if n != length]:
                climb, kept = self._climb(other), min(length, other) - 1
                tried = torch.cat([chosen[:kept], climb.known.prior.argmax(dim=1)[kept:]])
                if climb.distances(tried[None]).mean() < best[other][1].mean():
                    best[other] = climb(tried, CHOICES)


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
    measured: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """Distances (L,) of the sentences looked at so far: a descent often ends where an earlier one did."""

    def distances(self, chosen: Tensor) -> Tensor:
        """(n, L) for (n, L) indices of candidates."""
        sentences = [tuple(sentence) for sentence in chosen.tolist()]
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in self.measured]
        if new:
            tokens = self.known.tokens[torch.tensor(new, device=chosen.device)]
            found = self.span.distance(self.victim.attention_inputs(tokens, 1))
            self.measured.update(zip(new, found, strict=True))
        return torch.stack([self.measured[sentence] for sentence in sentences])

    def __call__(self, chosen: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The sentence at the foot of the slope and its distances, with `most` candidates a place."""
        here = self.distances(chosen[None])[0]
        for sweep in range(SWEEPS):
            before = float(here.mean())
            for place in here.argsort(descending=True).tolist():
                if sweep and here[place] < DOUBTFUL * here.mean():
                    continue
                options = self._options(place, chosen[place], most)
                if len(options) == 0:
                    continue
                tried = chosen.repeat(len(options), 1)
                tried[:, place] = options
                distances = self.distances(tried)
                best = distances.mean(dim=1).argmin()
                if distances[best].mean() < here.mean():
                    chosen, here = tried[best], distances[best]
                if here.mean() < self.known.limit:
                    return chosen, here
            if float(here.mean()) > 0.999 * before:
                break
        return chosen, here

    def kicked(self, chosen: Tensor, here: Tensor, generator: torch.Generator) -> Tensor:
        """The sentence with some of its worst places drawn anew."""
        prior, here = (tensor.to(generator.device) for tensor in (self.known.prior, here))
        chosen = chosen.clone()
        for place in torch.multinomial(here, max(1, len(here) // 6), generator=generator).tolist():
            weights = (prior[place] / SPREAD).softmax(dim=0)
            chosen[place] = torch.multinomial(weights, 1, generator=generator)[0]
        return chosen

    def _options(self, place: int, current: Tensor, most: int) -> Tensor:
        prior = self.known.prior[place]
        ranked = prior.argsort(descending=True)
        return ranked[(ranked != current) & prior[ranked].isfinite()][:most]


@dataclass(frozen=True)
class _Peeled:
    """The view without a sentence, and how often that stood in the batch."""

    rest: View
    copies: int


def _peel(view: View, sentence: list[int], rows: Rows, labelled: int, whole: View) -> _Peeled:
    """Take a sentence's share out of what is left of the update, its label being the one that leaves the lowest
    rank in the second layer (a wrong one leaves what the sentence spans), then the shortest update.

    Args:
        labelled: labelled places of the whole batch, in masked language models.
        whole: the view of the whole batch.
    """
    victim, count = language(view), whole.round.num_examples
    x = torch.tensor([sentence], device=victim.device)
    single = replace(view, round=view.round.of(1))
    if victim.task == "classification":
        classes = range(min(victim.num_classes, MOST_CLASSES))
        labels = [torch.tensor([label], device=victim.device) for label in classes]
        part = 1 / count
    else:
        labels = [complete_labels(single, x, rows)]
        part = float((labels[0] != IGNORED).sum()) / max(labelled, 1)
    shares = [single.simulate(x, y).detach() for y in labels]
    weights = [_weight(share, victim, rows, part) for share in shares]
    layer = tuple(f"{name}." for name, _ in victim.projections(1))
    names = [name for name in view.observed if name.startswith(layer)]

    def rank(i: int) -> int:
        rest = _less(view.observed.select(names), shares[i].select(names), weights[i])
        span = attention_span(victim, rest, 1, rows.noise, whole.observed)
        return 0 if span is None else span.rank

    ranks = [rank(i) for i in range(len(shares))] if len(shares) > 1 else [0]
    lowest = [i for i, found in enumerate(ranks) if found == min(ranks)]
    best = (
        min(lowest, key=lambda i: shares[i].distance(view.observed, weights[i])) if lowest[1:] else lowest[0]
    )
    rest = _less(view.observed, shares[best], weights[best])
    return _Peeled(replace(view, observed=rest), max(1, round(weights[best] / part)))


def _less(update: Update, share: Update, weight: float) -> Update:
    """An update without so much of another."""
    return update.combine(share, lambda whole, part: torch.sub(whole, part, alpha=weight))


def _weight(share: Update, victim: LanguageVictim, rows: Rows, part: float) -> float:
    """What a sentence's own update counts in the batch's: as its last position shows where it is the only one
    there, else `part`."""
    assert victim.position is not None
    own = share[victim.position].double()[victim.first_position + rows.length - 1]
    seen = rows.position[-1]
    if not bool(own.any()):
        return part
    weight = float(own @ seen / (own @ own))
    return weight if bool((seen - weight * own).norm() < ALONE * seen.norm()) else part
