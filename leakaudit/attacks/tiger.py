"""Embeddings descend to the span of the first attention layers' gradients.

The weight gradient of a linear layer is  dW = sum_t d_t x_t^T:  its rows lie in the span of the layer's
inputs x_t (DAGER, Petrov et al. 2024).  Query, key and value share their inputs, so their gradients are
stacked.  With V the right singular vectors, an input h of that layer has the distance

    1 - sum_i w_i (v_i . h)^2 / |h|^2,

which counts where the span has as many dimensions as there are tokens.
One layer leaves every token a space of as many dimensions as there are tokens; two layers leave only points
while the tokens are fewer than half the width, because the second sees every token in its context.

Source: Kalikman, Petrov, Dimitrov, Vechev 2026, "TIGER: Inverting Transformer Gradients via
Embedding-Subspace Distance Optimization" (arXiv 2606.18312), of which we know the abstract only: embeddings
are optimised to minimise their distance to the subspace.  The rest is ours:
    w_i is 1 without noise, 0 under the edge of the Marchenko-Pastur law, and in between the squared cosine of
        an observed singular vector with the true one (Benaych-Georges and Nadakuditi 2012);
    the noise is the known one, that of embedding rows which should be zero, or what the singular values
        beyond the number of tokens hold;
    tokens must also span what was observed (`SoftSpan.uncovered`), else several of them settle on one vector:
        MiniLM's 24 tokens from a random start go from 12 right to all;
    the descent is L-BFGS, started from position rows where they were shared, with the norm prior of LAMP;
    tokens are then searched by the same distance among the nearest, and at last by `View.residual`.
Limits: in a batch every sentence descends in the same span, and from random starts two may become one.  The
spans say nothing of a masked language model's labels: these are left where their random start put them, so
its residual is of no use there and the text alone is to be judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.attacks.base import Monitor, Reconstruction, require_positive
from leakaudit.attacks.optimise import Candidate, lbfgs
from leakaudit.attacks.rows import language, noise_level, place, read_rows
from leakaudit.attacks.sentences import (
    Seen,
    Sentences,
    check_lengths,
    labelled,
    laid_out,
    polish,
    refuse,
)
from leakaudit.attacks.spans import edge_of, gradients, noise_of
from leakaudit.models.language import LanguageVictim
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.threat import View

WHOLE = 0.9
"""Rank per token from which a span counts as that of all inputs; sentences share their first token."""

MARGIN = 1.02
"""Of a singular value over the edge of noise, which the largest of noise exceeds now and then."""

RIDGE = 1e-4
"""Added to the Gram matrix of unit vectors before it is inverted."""


@dataclass(frozen=True)
class SoftSpan:
    """What the inputs of one attention layer span, as far as the gradient shows it.

    Attributes:
        layer: the transformer block.
        basis: (H, r) orthonormal columns, r >= 1.
        weights: (r,) in (0, 1], how far a column is to be trusted.
        whole: whether the inputs lie in it.  Otherwise it only lies in theirs: noise hides a part, or the
            last block of a classifier, which reads one token, has no more than 2 heads + 1 dimensions.
    """

    layer: int
    basis: Tensor
    weights: Tensor
    whole: bool = True

    def distance(self, inputs: Tensor) -> Tensor:
        """(...,) in [0, 1] for (..., H) inputs of the layer."""
        held = (F.normalize(inputs, dim=-1) @ self.basis).square() @ self.weights
        return 1 - held

    def uncovered(self, inputs: Tensor) -> Tensor:
        """Share of the basis, in [0, 1], that (T, H) inputs together do not span; duplicates leave some."""
        unit = F.normalize(inputs, dim=-1)
        ridge = RIDGE * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        seen = unit @ self.basis
        held = (seen * torch.linalg.solve(unit @ unit.T + ridge, seen)).sum(0)
        return ((1 - held) * self.weights).sum() / self.weights.sum()


def soft_span(view: View, layer: int, tokens: int) -> SoftSpan | None:
    """The span of a block's attention inputs, of `tokens` vectors at most; None when nothing of it was shared
    or stands out of the noise."""
    victim = language(view)
    found = [matrix for matrix, mapping in gradients(victim, view.observed, layer) if mapping is None]
    if not found:
        return None
    matrix = torch.cat(found)
    _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
    noise = noise_level(view) or noise_of(values, matrix, tokens)
    edge = max(edge_of(matrix, noise), float(values[0]) * view.rounding)
    kept = int((values[:tokens] > MARGIN * edge).sum())
    if kept == 0:
        return None
    trust = torch.stack([_trust(value, noise, *matrix.shape) for value in values[:kept]])
    return SoftSpan(layer, vectors[:kept].T.to(victim.dtype), trust.to(victim.dtype), kept >= WHOLE * tokens)


def _trust(value: Tensor, noise: float, rows: int, width: int) -> Tensor:
    """Squared cosine of an observed singular vector (of length `width`) with the true one."""
    if noise == 0:
        return torch.ones_like(value)
    short, long = sorted((rows, width))
    ratio = short / long
    y2 = (value / noise).square() / long
    inner = (y2 - ratio - 1).clamp_min(2 * math.sqrt(ratio))
    x2 = (inner + (inner.square() - 4 * ratio).clamp_min(0).sqrt()) / 2
    slack = ratio * x2 if width == short else x2
    return ((x2.square() - ratio) / (x2.square() + slack)).clamp(1e-6, 1)


def position_start(view: View, sentences: Sentences) -> Tensor | None:
    """(1, L) tokens of a single sentence from position rows; None where they do not tell."""
    victim = language(view)
    if victim.position is None or victim.tied or view.round.num_examples > 1:
        return None
    if victim.position not in view.observed:
        return None
    rows = read_rows(view)
    if rows is None or len(rows.tokens) == 0:
        return None
    length = sentences.there.shape[1]
    positions = view.observed[victim.position][victim.first_position :][:length].double()
    tokens = place(replace(rows, position=positions))[None]
    return tokens.where(sentences.fixed == NO_TOKEN, sentences.fixed).where(sentences.there, NO_TOKEN)


@dataclass(frozen=True)
class SpanDistance:
    """Mean over layers and tokens of `SoftSpan.distance`, what of the spans is not covered, and the norm prior;
    for (F, H) candidates."""

    victim: LanguageVictim
    sentences: Sentences
    spans: tuple[SoftSpan, ...]
    norm: float = 0.0
    coverage: float = 0.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        inputs = self._inputs(self.sentences.embed(x), self.sentences.there)
        pairs = list(zip(self.spans, inputs, strict=True))
        apart = [span.distance(h).mean() for span, h in pairs if span.whole]
        missing = [span.uncovered(h) for span, h in pairs]
        distance = torch.stack(apart).mean() if apart else x.new_zeros(())
        if self.coverage:
            distance = distance + self.coverage * torch.stack(missing).mean()
        if self.norm:
            off = x.norm(dim=1).mean() / self.sentences.typical_norm - 1
            distance = distance + self.norm * off.square()
        return distance

    def of(self, embeddings: Tensor, there: Tensor) -> Tensor:
        """(tokens,) mean distance over whole spans of every token of (N, L, H) embeddings."""
        pairs = zip(self.spans, self._inputs(embeddings, there), strict=True)
        return torch.stack([span.distance(h) for span, h in pairs if span.whole]).mean(0)

    def _inputs(self, embeddings: Tensor, there: Tensor) -> list[Tensor]:
        layers = [span.layer for span in self.spans]
        return [h[there] for h in self.victim.inputs_of_attention(embeddings, layers)]

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """(N,) summed distance of sentences of token numbers (N, L) that are as long as one another."""
        with torch.no_grad():
            embeddings = self.sentences.rows[tokens]
            return self.of(embeddings, torch.ones_like(tokens, dtype=torch.bool)).view(len(tokens), -1).sum(1)


@dataclass(frozen=True)
class Tiger:
    """L-BFGS on the distance to the spans of attention inputs.

    Attributes:
        lengths: tokens of each sentence with + between; None for what the position rows show.
        layers: transformer blocks to use, from the first; fewer where the model or the update has fewer.
        rows: start from position rows where they tell the tokens, else at random.
        norm: weight of the embeddings' mean norm.
        coverage: weight of the share of the span that the tokens together leave out; 0 for the paper's loss.
        iterations: calls of L-BFGS, of 20 inner steps each.
        near: tokens nearest to an embedding that are searched by the same distance.
        sweeps: passes of that search over all positions.
        polish: residuals to measure at the end, at most.
    """

    lengths: str | None = None
    layers: int = 2
    rows: bool = True
    norm: float = 1e-2
    coverage: float = 1.0
    iterations: int = 60
    near: int = 16
    sweeps: int = 3
    patience: int = 10
    polish: int = 60
    restarts: int = 2

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        require_positive(self, "layers", "iterations", "near", "patience", "restarts")

    def applies(self, view: View) -> str | None:
        reason = refuse(view, self.lengths)
        if reason is not None:
            return reason
        if language(view).depth == 0:
            return "where this architecture keeps its attention layers is not known"
        tokens = int(laid_out(view, self.lengths).there.sum())
        if tokens >= language(view).hidden:
            return f"{tokens} tokens span all {language(view).hidden} dimensions of the attention inputs"
        if not self._spans(view, laid_out(view, self.lengths)):
            return "no attention layer's gradient was shared, or none stands out of the noise"
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        sentences = laid_out(view, self.lengths)
        seen = Seen(view, sentences, labelled(view, sentences))
        spans = self._spans(view, sentences)
        objective = SpanDistance(language(view), sentences, spans, self.norm, self.coverage)
        rows = position_start(view, sentences) if self.rows else None
        x = sentences.start(generator) if rows is None else sentences.rows_of(rows)
        labels = seen.labelling.candidate(x, generator)
        candidate = Candidate(x, labels=torch.empty(0))
        monitor.expect(self.iterations + 1 + self.polish)
        lbfgs(
            candidate,
            objective,
            monitor,
            iterations=self.iterations,
            patience=self.patience,
            target=1e-9,
            shown=lambda x, _: seen.show(x, labels.y.detach()),
        )
        near = self._likely(objective, candidate.x.detach())
        tried = [monitor.best_x] if monitor.best_x is not None else []
        if monitor.stopped != "budget" and any(span.whole for span in spans):
            tried.append(self._search(objective, sentences.nearest(candidate.x), near, monitor))
        if rows is not None:
            tried.append(rows)
        self._keep_best(seen, labels.y.detach(), tried, monitor)
        found = polish(seen, near[:, :3], labels.y.detach(), monitor, self.polish)
        return replace(found, details={"ranks": [span.basis.shape[1] for span in spans]})

    def _spans(self, view: View, sentences: Sentences) -> tuple[SoftSpan, ...]:
        tokens = int(sentences.there.sum())
        found = [soft_span(view, n, tokens) for n in range(min(self.layers, language(view).depth))]
        return tuple(span for span in found if span is not None)

    def _likely(self, objective: SpanDistance, x: Tensor) -> Tensor:
        """(F, k) tokens for every free position by the first span's distance there, from the tokens near to
        any embedding: a descent often finds a token at its neighbour's place."""
        sentences, span = objective.sentences, objective.spans[0]
        if span.layer > 0 or not span.whole:
            return sentences.similarity(x).topk(min(self.near, len(sentences.rows)), dim=1).indices
        pool = torch.unique(sentences.similarity(x).topk(max(1, self.near // 2), dim=1).indices)
        inputs = sentences.made_inputs(pool, sentences.there.shape[1])
        places = sentences.free.nonzero()[:, 1]
        order = (
            span.distance(inputs)[:, places].T.topk(min(self.near, len(pool)), dim=1, largest=False).indices
        )
        return pool[order]

    def _search(self, objective: SpanDistance, tokens: Tensor, near: Tensor, monitor: Monitor) -> Tensor:
        """Coordinate descent over the `near` (F, k) tokens by the span distance; (N, L)."""
        places = objective.sentences.free.nonzero().tolist()
        for _ in range(self.sweeps):
            before = tokens.clone()
            for (row, column), choices in zip(places, near, strict=True):
                length = int(objective.sentences.there[row].sum())
                trials = tokens[row, :length].repeat(len(choices) + 1, 1)
                trials[1:, column] = choices
                tokens[row, :length] = trials[objective.of_tokens(trials).argmin()]
            if monitor.late or torch.equal(tokens, before):
                break
        return tokens

    def _keep_best(self, seen: Seen, y: Tensor, tried: list[Tensor], monitor: Monitor) -> None:
        """Let the monitor's best be the one of `tried` with the smallest residual."""
        if not tried:
            return
        residuals = [seen.view.residual(tokens, seen.labelling.hard(y, tokens)) for tokens in tried]
        best = tried[residuals.index(min(residuals))]
        monitor.best_x, monitor.best_y = best, seen.labelling.hard(y, best)


TIGER = Tiger()
