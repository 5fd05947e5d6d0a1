"""Exact recovery of text from the gradients of transformers: bag of tokens, position rows, span check.

Sources: non-zero embedding rows: Melis et al. 2019, section 4; span check: DAGER (Petrov et al. 2024), with
the deviations that `leakaudit.attacks.spans` and `leakaudit.attacks.assembly` name.  Matching position rows
to word rows is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakaudit.attacks import near_misses
from leakaudit.attacks.assembly import accepted, assemble, by_evidence, grow
from leakaudit.attacks.base import Attack, Monitor, Reconstruction, Stop, require_at_least
from leakaudit.attacks.rows import IMAGES, Rows, explains, language, place, read_rows, text_victim, widened
from leakaudit.attacks.scans import scan
from leakaudit.attacks.spans import Span, attention_span
from leakaudit.attacks.token_labels import complete_labels, refine
from leakaudit.models.language import LanguageVictim
from leakaudit.models.spaces import NO_TOKEN, stack_sentences
from leakaudit.threat import View

STEPS = 100
"""Steps that a progress bar expects of the search for sentences, whose number is not known."""
NO_ROWS = "the gradient of the word embedding was not shared (frozen, or LoRA)"


def conclude(
    view: View, x: Tensor, y: Tensor, monitor: Monitor, details: dict[str, object]
) -> Reconstruction:
    """A reconstruction whose loss is the view's residual."""
    stopped: Stop = "budget" if monitor.late else "finished"
    loss = view.residual(x, y)
    monitor.step(loss, x, y)
    history = [(monitor.iteration, loss)]
    strip = [(iteration, loss, _shaped(frame, x)) for iteration, loss, frame in monitor.strip]
    if not strip or not torch.equal(strip[-1][2], x.cpu()):
        strip.append((monitor.iteration, loss, x.cpu()))
    return Reconstruction(x, y, loss, monitor.iteration, stopped, history, strip, dict(details))


def _shaped(frame: Tensor, like: Tensor) -> Tensor:
    """A frame of fewer or other sentences in the shape of the last one."""
    shaped = torch.full_like(like, NO_TOKEN, device="cpu")
    rows, columns = (min(pair) for pair in zip(frame.shape, like.shape, strict=True))
    shaped[:rows, :columns] = frame[:rows, :columns]
    return shaped


@dataclass(frozen=True)
class BagOfTokens:
    """The tokens of the batch without their order, from the rows of the word embedding's gradient.

    Exact where nothing was added or pruned; under noise those whose rows stand out.
    """

    restarts: int = 1

    def applies(self, view: View) -> str | None:
        if text_victim(view) is None:
            return IMAGES
        rows = read_rows(view)
        if rows is None:
            return NO_ROWS
        if rows.ranked or not len(rows.tokens):
            return f"the tokens cannot be told from the rest: {rows.reason}"
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        """All tokens in the order of their numbers, cut into as many rows as there are sentences."""
        rows = read_rows(view)
        assert rows is not None
        count = min(view.round.num_examples, len(rows.tokens))
        limit = view.victim.space.shape[0]
        x = stack_sentences([part.tolist()[:limit] for part in rows.tokens.tensor_split(count)])
        if count < view.round.num_examples:
            x = x[torch.arange(view.round.num_examples) % count]
        x = x.to(view.victim.device)
        monitor.start(1)
        return conclude(
            view,
            x,
            complete_labels(view, x, None),
            monitor,
            {"tokens": len(rows.tokens), "exact": rows.certain},
        )


@dataclass(frozen=True)
class PositionRows:
    """Tokens and their order for one sentence: rows of positions matched to rows of words.

    Needs learnt absolute positions.  Exact without noise; with it, each place has the most likely token.

    Attributes:
        polish: updates to simulate at most for texts near the one found, where noise leaves doubt.
    """

    polish: int = 12
    restarts: int = 1

    def __post_init__(self) -> None:
        require_at_least(self, 0, "polish")

    def applies(self, view: View) -> str | None:
        victim = text_victim(view)
        if victim is None:
            return IMAGES
        if victim.position is None:
            return "the model has no learnt absolute positions, or its family is not known"
        if view.round.num_examples > 1:
            return "position rows add up over the batch; span-check uses them to take sentences apart"
        rows = read_rows(view)
        if rows is None:
            return NO_ROWS
        if rows.length == 0 or len(rows.tokens) == 0:
            return "no row of the position embedding's gradient stands out"
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        victim, rows = language(view), read_rows(view)
        assert rows is not None
        rows = widened(view, rows)
        monitor.start(1)
        sentence = place(rows)[None]
        proven = victim.task != "causal-lm" and explains(rows, sentence[0])
        if victim.task == "causal-lm":
            sentence = with_last_tokens(view, victim, sentence)
        sentence, y = fitted(view, sentence, rows)
        if rows.noise:  # else rows are surer than the residual, which pruning or unknown dropout disturbs
            sentence, y, _ = near_misses.search(view, sentence, y, rows, monitor, self.polish)
        return conclude(view, sentence, y, monitor, {"length": rows.length, "proven": proven})


@dataclass(frozen=True)
class SpanCheck:
    """Tokens by membership in the span of the first attention layer's inputs, sentences by the second's.

    Attributes:
        vocabulary: candidates to scan when the bag of tokens is not known; 0 for all of the vocabulary.
    """

    vocabulary: int = 0
    restarts: int = 1

    def __post_init__(self) -> None:
        require_at_least(self, 0, "vocabulary")

    def applies(self, view: View) -> str | None:
        victim = text_victim(view)
        if victim is None:
            return IMAGES
        if victim.architecture is None:
            family = victim.module.config.model_type
            return f"where {family} keeps its attention inputs is not known (see models/architectures.py)"
        span = attention_span(victim, view.observed, 0)
        if span is None:
            return "the gradient of the first attention layer was not shared (frozen)"
        if not span.tests:
            return (
                f"the first layer's gradient fills its {span.width} dimensions ({span.rank} independent"
                " inputs or more, or noise): membership is not identifiable this way"
            )
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        victim, rows = language(view), read_rows(view)
        noise = 0.0 if rows is None else rows.noise
        first = attention_span(victim, view.observed, 0, noise)
        assert first is not None
        details: dict[str, object] = {"rank": first.rank, "width": first.width}
        monitor.start(STEPS)
        if victim.architecture is not None and victim.architecture.causal:
            second = attention_span(victim, view.observed, 1, noise) if victim.depth > 1 else None
            x = self._decode(view, victim, rows, first, second, monitor)
        elif rows is not None and rows.length and rows.certain:
            x, found = assemble(view, rows, generator, monitor)
            details["found"] = found
        else:
            x = self._one(view, victim, rows, first)
        if x.numel() == 0:
            raise RuntimeError("no token passes the membership test of the first layer")
        return finish(view, x, rows, monitor, details)

    def _tokens(self, victim: LanguageVictim, rows: Rows | None) -> Tensor:
        if rows is not None and rows.certain:
            return rows.tokens
        everything = torch.arange(victim.space.vocabulary, device=victim.device)
        if rows is None:
            return everything
        ranked = torch.cat([rows.tokens, everything[~torch.isin(everything, rows.tokens)]])
        return ranked[: self.vocabulary or len(ranked)]

    def _decode(
        self,
        view: View,
        victim: LanguageVictim,
        rows: Rows | None,
        first: Span,
        second: Span | None,
        monitor: Monitor,
    ) -> Tensor:
        """Prefixes grown by the second layer's test; in causal-lm the last token shows only as a label."""
        tokens = self._tokens(victim, rows)
        length = rows.length if rows is not None and rows.length else victim.space.max_length
        positions = length if victim.position is not None else 1
        distance = scan(victim, first, tokens, positions)
        nearest = distance.amin(dim=1)
        limit = accepted(float(nearest.median()), first)

        def choices(place: int) -> Tensor:
            return tokens[distance[min(place, positions - 1)] <= limit]

        if second is None or not second.tests:
            best = distance.argmin(dim=1)
            return tokens[best][None] if victim.position is not None else choices(0)[None]
        sentences = by_evidence(
            victim, grow(victim, choices, second, length, view.round.num_examples, monitor)
        )
        if not sentences:
            raise RuntimeError("no sentence passes the membership test of the second layer")
        x = stack_sentences(sentences[: view.round.num_examples]).to(victim.device)
        return with_last_tokens(view, victim, x) if victim.task == "causal-lm" else x

    def _one(self, view: View, victim: LanguageVictim, rows: Rows | None, first: Span) -> Tensor:
        """Without a bag and rows of positions: the nearest token of each place, while one is near."""
        tokens = self._tokens(victim, rows)
        length = rows.length if rows is not None and rows.length else min(first.rank, victim.space.max_length)
        distance = scan(victim, first, tokens, length)
        return tokens[distance.argmin(dim=1)][None]


def finish(
    view: View, x: Tensor, rows: Rows | None, monitor: Monitor, details: dict[str, object]
) -> Reconstruction:
    """Fit the number of sentences to the round, add labels, and score."""
    missing = view.round.num_examples - len(x)
    if missing > 0:
        details["missing"] = missing
    x, y = fitted(view, x, rows)
    return conclude(view, x, y, monitor, details)


def fitted(view: View, x: Tensor, rows: Rows | None) -> tuple[Tensor, Tensor]:
    """As many sentences as the round has, the first in place of missing ones, and their labels."""
    count = view.round.num_examples
    if len(x) < count:
        x = torch.cat([x, x[:1].expand(count - len(x), -1)])
    x = x[:count]
    return x, complete_labels(view, x, rows)


def with_last_tokens(view: View, victim: LanguageVictim, x: Tensor) -> Tensor:
    """Prefixes (N, L) with one more token each: the label of the last place, read off the score layer.

    A causal language model's last token is no input of anything that is scored, so it has no gradient of
    its own and shows only as a label.
    """
    there = x != NO_TOKEN
    ends = torch.stack([torch.arange(len(x), device=x.device), there.sum(dim=1)], dim=1)
    x = torch.cat([x, x.new_full((len(x), 1), NO_TOKEN)], dim=1)
    x[ends[:, 0], ends[:, 1]] = x[:, 0].clone()
    y = refine(view, x, complete_labels(view, x, None), ends)
    x[ends[:, 0], ends[:, 1]] = y[ends[:, 0], ends[:, 1]]
    return x


EXACT_TEXT_ATTACKS: dict[str, Attack] = {
    "bag-of-tokens": BagOfTokens(),
    "position-rows": PositionRows(),
    "span-check": SpanCheck(),
}

EXACT_TEXT_DESCRIPTIONS: dict[str, str] = {
    "bag-of-tokens": "the words without their order, from rows of the word embedding (Melis et al. 2019)",
    "position-rows": "words and order of one sentence: position rows matched to word rows; exact, and firm under noise",
    "span-check": "membership in the span of attention's inputs, whole batches (after Petrov et al. 2024, DAGER)",
}
