"""What the attacks that move embeddings share: where a batch's tokens stand, their labels, their projection.

A candidate is (F, H): one embedding in place of the word embedding's row for each of the F *free*
positions of a batch.  Positions whose token the tokenizer always writes ([CLS] first, [SEP] last) are not
free where the victim has a tokenizer: whoever knows the model knows them.

Encoders with learnt positions see only the sums of word and position rows, in no order.  An embedding at
place s that is  w_v + p_t - p_s  makes the gradients of token v at place t, but for the position rows' own;
so a descent finds the tokens at each other's places.  `Sentences.nearest` puts them where they fit best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from leakaudit.attacks.base import Monitor, Reconstruction
from leakaudit.attacks.head import head_gradient
from leakaudit.attacks.near_misses import REPRODUCED, descend, put
from leakaudit.attacks.optimise import Candidate
from leakaudit.attacks.rows import IMAGES, language, noise_level, position_rows
from leakaudit.attacks.token_labels import masked_labels
from leakaudit.models.language import IGNORED, LanguageVictim, text_as_labels
from leakaudit.models.spaces import NO_TOKEN, Tokens
from leakaudit.threat import View
from leakaudit.update import Update

NEAR = 8
"""Nearest tokens of an embedding that are tried at other places."""

UNEXPLAINED = 1e-4
"""A tensor whose numbers are that much smaller than the median tensor's is rounding, as attention's key
bias is: softmax does not change when it does, so its gradient is zero."""


@dataclass(frozen=True)
class Sentences:
    """Where the tokens of a batch stand, and which of them are free.

    Attributes:
        victim: whose word embedding is meant.
        there: (N, L) bool, whether a sentence has a token there.
        fixed: (N, L) int64, the tokens that the tokenizer writes by itself; `NO_TOKEN` elsewhere.
    """

    victim: LanguageVictim
    there: Tensor
    fixed: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """(V, H), the word embedding."""
        return self.victim.word_rows.detach()

    @cached_property
    def directions(self) -> Tensor:
        """(V, H), its rows at length 1."""
        return F.normalize(self.rows, dim=-1)

    @property
    def movable(self) -> bool:
        """Whether the order of embeddings leaves no trace but in position rows."""
        found = self.victim.architecture
        return found is not None and found.position is not None and not found.causal

    @property
    def free(self) -> Tensor:
        """(N, L) bool with F entries true."""
        return self.there & (self.fixed == NO_TOKEN)

    @property
    def typical_norm(self) -> float:
        return float(self.rows.norm(dim=1).mean())

    def start(self, generator: torch.Generator) -> Tensor:
        """(F, H) draws from a normal distribution with the mean and deviation of every column of `rows`."""
        shape = (int(self.free.sum()), self.rows.shape[1])
        noise = torch.randn(shape, generator=generator, dtype=self.rows.dtype, device=generator.device)
        return self.rows.mean(0) + self.rows.std(0) * noise.to(self.rows.device)

    def embed(self, x: Tensor) -> Tensor:
        """(N, L, H) embeddings of a candidate (F, H), NaN where there is no token; differentiable."""
        whole = x.new_full((*self.there.shape, x.shape[1]), math.nan)
        known = self.there & ~self.free
        whole[known] = self.rows[self.fixed[known]].to(x.dtype)
        whole[self.free] = x
        return whole

    def rows_of(self, tokens: Tensor) -> Tensor:
        """(F, H) embeddings of the free ones among (N, L) token numbers."""
        return self.rows[tokens[self.free]]

    def similarity(self, x: Tensor) -> Tensor:
        """(..., V) cosines of (..., H) embeddings with every row of the word embedding."""
        return F.normalize(x, dim=-1) @ self.directions.to(x.dtype).T

    def nearest(self, x: Tensor) -> Tensor:
        """(N, L) token numbers of a candidate: the nearest by cosine, as in LAMP's code; where embeddings are
        `movable`, each of them with the place at which it and its token make the same input of attention."""
        x = x.detach()
        tokens = self.fixed.clone()
        if not self.movable:
            tokens[self.free] = self.similarity(x).argmax(dim=-1)
            return tokens
        owner, places = self.free.nonzero().T
        inputs = self.victim.attention_inputs(self.embed(x), 0)[self.free]
        for sentence in range(len(tokens)):
            slots = owner == sentence
            if bool(slots.any()):
                tokens[sentence, places[slots]] = self._arranged(x[slots], inputs[slots], places[slots])
        return tokens

    def _arranged(self, x: Tensor, inputs: Tensor, places: Tensor) -> Tensor:
        """(P,) tokens for the places of one sentence from its embeddings and their attention inputs."""
        near = self.similarity(x).topk(min(NEAR, len(self.rows)), dim=1).indices
        pool, which = torch.unique(near, return_inverse=True)
        made = F.normalize(self.made_inputs(pool, int(places.max()) + 1)[:, places], dim=-1)
        fits = torch.stack([made[own] @ h for own, h in zip(which, F.normalize(inputs, dim=-1), strict=True)])
        best = fits.max(dim=1)
        slots, goals = linear_sum_assignment(-best.values.cpu().double().numpy())
        tokens = torch.empty_like(places)
        tokens[goals] = pool[which[slots, best.indices[slots, goals]]]
        return tokens

    def moved(self, x: Tensor, order: Tensor) -> Tensor:
        """The candidate whose place i is taken by embedding order[i], changed so that the sum with the
        position row stays; (F,) `order` keeps to a sentence."""
        name = self.victim.position
        assert name is not None
        rows = {**self.victim.params, **self.victim.frozen}[name].detach()
        here = rows[self.victim.first_position + self.free.nonzero()[:, 1]]
        return x[order] + here[order] - here

    def made_inputs(self, pool: Tensor, length: int) -> Tensor:
        """(K, L, H) inputs of the first attention that each of (K,) tokens makes at each of L places."""
        return self.victim.attention_inputs(pool[:, None].expand(-1, length), 0)


def check_lengths(lengths: str | None) -> None:
    """`ValueError` unless these are numbers with + between."""
    if lengths is not None and not all(part.isdecimal() for part in lengths.split("+")):
        raise ValueError(f"lengths={lengths!r} are not numbers with + between, such as 12 or 12+9")


def lay_out(view: View, lengths: str | None) -> Sentences | str:
    """Where the tokens stand, from `lengths` or the observed position rows; or why that is not known.

    Args:
        lengths: tokens a sentence, special ones included, with + between; one number for all alike.
    """
    victim = language(view)
    count = view.round.num_examples
    if lengths is not None:
        numbers = [int(number) for number in lengths.split("+")]
        numbers = numbers * count if len(numbers) == 1 else numbers
        if len(numbers) != count:
            return f"lengths={lengths} are of {len(numbers)} sentences, the update is of {count}"
    else:
        longest = len(position_rows(view, noise_level(view)))
        if longest == 0:
            return (
                "how many tokens a sentence has is not known: the update holds no gradient of learnt"
                " position rows (state lengths=12, or lengths=12+9 for two sentences)"
            )
        last = int(victim.task == "causal-lm")  # only a label, so without a gradient
        numbers = [min(longest + last, victim.space.max_length)] * count
    if not all(1 <= number <= victim.space.max_length for number in numbers):
        return f"sentences of {max(numbers)} tokens; the model takes 1 to {victim.space.max_length}"
    places = torch.arange(max(numbers), device=victim.device)
    there = places < torch.tensor(numbers, device=victim.device)[:, None]
    fixed = torch.full(there.shape, NO_TOKEN, device=victim.device)
    before, after = special_tokens(victim.space)
    for row, number in zip(fixed, numbers, strict=True):
        if number > len(before) + len(after):
            row[: len(before)] = torch.tensor(before, device=row.device)
            row[number - len(after) : number] = torch.tensor(after, device=row.device)
    return Sentences(victim, there, fixed)


def laid_out(view: View, lengths: str | None) -> Sentences:
    """As `lay_out`, for a view that the attack applies to."""
    found = lay_out(view, lengths)
    assert isinstance(found, Sentences)
    return found


def special_tokens(space: Tokens) -> tuple[list[int], list[int]]:
    """What the tokenizer writes before and after every sentence."""
    if space.tokenizer is None:
        return [], []
    empty = list(space.tokenizer("")["input_ids"])
    word = list(space.tokenizer("a")["input_ids"])
    before = 0
    while before < len(empty) and word[before] == empty[before]:
        before += 1
    return empty[:before], empty[before:]


def refuse(view: View, lengths: str | None) -> str | None:
    """Why embeddings cannot be matched on this view, or None."""
    victim = view.victim
    if not isinstance(victim, LanguageVictim):
        return IMAGES
    found = lay_out(view, lengths)
    if isinstance(found, str):
        return found
    if len(explained(view).observed) == 0:
        return "the update holds nothing but the word embedding's gradient, which embeddings do not explain"
    labels = labelling(view, found)
    return labels if isinstance(labels, str) else None


def explained(view: View) -> View:
    """The view without what a candidate does not explain: the word embedding's gradient, whose rows are
    chosen by token numbers (tied to the output layer it would have that side alone), and rounding.

    Over several local steps the word embedding is taken to stand still.
    """
    victim = language(view)
    params = {name: p for name, p in victim.params.items() if name != victim.word}
    frozen = {**victim.frozen, victim.word: victim.word_rows.detach()}
    observed = {name: g for name, g in view.observed.items() if name in params}
    if observed:
        sizes = torch.stack([g.double().square().mean().sqrt() for g in observed.values()])
        enough = sizes > UNEXPLAINED * sizes.median()
        kept = [name for name, large in zip(observed, enough.tolist(), strict=True) if large]
    else:
        kept = []
    return replace(
        view,
        victim=replace(victim, params=params, frozen=frozen),
        observed=view.observed.select(kept),
    )


def by_position_rows(view: View, sentences: Sentences, simulated: Update) -> Tensor | None:
    """(F,) the order of embeddings in which their position rows' gradients fit the observed ones best;
    None for more than one sentence, whose rows are summed, or where these were not shared."""
    name = language(view).position
    if name is None or name not in view.observed or not sentences.movable or len(sentences.there) > 1:
        return None
    places = language(view).first_position + sentences.free.nonzero()[:, 1]
    ours, theirs = (F.normalize(update[name][places], dim=1) for update in (simulated, view.observed))
    _, order = linear_sum_assignment(-(theirs @ ours.T).detach().cpu().double().numpy())
    return torch.from_numpy(order).to(places.device)


class Labelling(Protocol):
    """How the labels of candidates come about.

    `soft` gives labels that a descent can follow, from the candidate's own y and its embeddings
    (N, L, H); `hard` the integers that go with token numbers (N, L).
    """

    def candidate(self, x: Tensor, generator: torch.Generator) -> Candidate: ...

    def soft(self, y: Tensor, embeddings: Tensor) -> Tensor: ...

    def hard(self, y: Tensor, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class GivenLabels:
    """Known or inferred before: (N,) classes or (N, L) token numbers."""

    labels: Tensor

    def candidate(self, x: Tensor, generator: torch.Generator) -> Candidate:
        return Candidate(x, labels=self.labels)

    def soft(self, y: Tensor, embeddings: Tensor) -> Tensor:
        return y

    def hard(self, y: Tensor, tokens: Tensor) -> Tensor:
        return y


@dataclass(frozen=True)
class JointClasses:
    """Classes found with the text, as softmax of free logits (N, K) (Zhu et al. 2019)."""

    count: int
    classes: int

    def candidate(self, x: Tensor, generator: torch.Generator) -> Candidate:
        shape = (self.count, self.classes)
        logits = torch.randn(shape, generator=generator, dtype=x.dtype, device=generator.device)
        return Candidate(x, logits=logits.to(x.device))

    def soft(self, y: Tensor, embeddings: Tensor) -> Tensor:
        return y

    def hard(self, y: Tensor, tokens: Tensor) -> Tensor:
        return y.argmax(dim=-1)


@dataclass(frozen=True)
class NextTokens:
    """Causal language models: the labels are the text itself.

    Softly they are softmax(cosine / `temperature`) over the vocabulary, so a descent feels them.
    """

    sentences: Sentences
    temperature: float = 0.05

    def candidate(self, x: Tensor, generator: torch.Generator) -> Candidate:
        return Candidate(x, labels=torch.empty(0, device=x.device))

    def soft(self, y: Tensor, embeddings: Tensor) -> Tensor:
        there = self.sentences.there
        weights = embeddings.new_zeros((*there.shape, len(self.sentences.rows)))
        cosines = self.sentences.similarity(embeddings[there])
        weights[there] = (cosines / self.temperature).softmax(dim=-1)
        return weights

    def hard(self, y: Tensor, tokens: Tensor) -> Tensor:
        return text_as_labels(tokens)


@dataclass(frozen=True)
class PlacedLabels:
    """Masked language models: which labels there are is known, where they stand is found with the text.

    Each of the M labels has free logits over the P positions; softly it stands at all of them with
    their softmax.  At the end the best one-to-one assignment counts.

    Attributes:
        labels: (M,) token numbers, with repetitions.
    """

    sentences: Sentences
    labels: Tensor

    def candidate(self, x: Tensor, generator: torch.Generator) -> Candidate:
        shape = (len(self.labels), int(self.sentences.there.sum()))
        logits = torch.randn(shape, generator=generator, dtype=x.dtype, device=generator.device)
        return Candidate(x, logits=0.1 * logits.to(x.device))

    def soft(self, y: Tensor, embeddings: Tensor) -> Tensor:
        there = self.sentences.there
        placed = embeddings.new_zeros((int(there.sum()), len(self.sentences.rows)))
        placed = placed.index_add(1, self.labels, y.T)
        weights = embeddings.new_zeros((*there.shape, placed.shape[1]))
        weights[there] = placed
        return weights

    def hard(self, y: Tensor, tokens: Tensor) -> Tensor:
        which, places = linear_sum_assignment(-y.detach().cpu().double().numpy())
        flat = torch.full((y.shape[1],), IGNORED, device=y.device)
        flat[torch.from_numpy(places).to(y.device)] = self.labels[torch.from_numpy(which).to(y.device)]
        labels = torch.full(tokens.shape, IGNORED, device=y.device)
        labels[self.sentences.there] = flat
        return labels


def labelling(view: View, sentences: Sentences, joint: bool = False) -> Labelling | str:
    """How labels come about for this view, or why they cannot.

    Known ones are taken.  A causal language model's are its tokens.  A masked one's are counted in the
    gradient of the output bias.  The class of one example is the negative entry of the last bias
    gradient, unless `joint`; of several, classes are found jointly.
    """
    victim, known = language(view), view.knowledge.labels.value
    if victim.task == "causal-lm":
        return NextTokens(sentences)
    if known is not None:
        return GivenLabels(torch.as_tensor(known, device=victim.device))
    if victim.task == "mlm":
        labels = masked_labels(view, int(sentences.there.sum()))
        return labels if isinstance(labels, str) else PlacedLabels(sentences, labels)
    head = head_gradient(view) if view.round.num_examples == 1 and not joint else None
    if head is not None and head.bias_gradient is not None:
        return GivenLabels(head.bias_gradient.argmin()[None].to(victim.device))
    return JointClasses(view.round.num_examples, victim.num_classes)


def labelled(view: View, sentences: Sentences, joint: bool = False) -> Labelling:
    """As `labelling`, for a view that the attack applies to."""
    found = labelling(view, sentences, joint)
    assert not isinstance(found, str)
    return found


@dataclass
class Seen:
    """Token numbers of the last candidate and whether they reproduce the update, which is proof."""

    view: View
    sentences: Sentences
    labelling: Labelling
    tokens: Tensor | None = None
    labels: Tensor | None = None
    residual: float = math.inf

    def show(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What a monitor gets for a candidate: token numbers (N, L) and integer labels."""
        tokens = self.sentences.nearest(x)
        return tokens, self.labelling.hard(y, tokens)

    def proven(self, x: Tensor, y: Tensor) -> bool:
        """Whether the tokens of a candidate give the update to rounding; measured when they are new."""
        tokens, labels = self.show(x, y)
        if self.tokens is None or not torch.equal(tokens, self.tokens):
            self.tokens, self.labels = tokens, labels
            self.residual = self.view.residual(tokens, labels)
        return self.residual < REPRODUCED

    def keep(self, monitor: Monitor) -> None:
        """Make the proven tokens the monitor's best."""
        assert self.tokens is not None
        monitor.best_x, monitor.best_y = self.tokens, self.labels
        monitor.stopped = "converged"


def polish(
    seen: Seen, candidates: Tensor, labels: Tensor, monitor: Monitor, evaluations: int
) -> Reconstruction:
    """Coordinate descent over near-miss tokens by `View.residual`, from the monitor's best.

    Args:
        candidates: (F, k) token numbers to try at every free position, the likeliest first.
        labels: soft labels of the last candidate, as its y.
        evaluations: residuals to measure at most.

    The residual takes the place of the matching loss.  A descent that ran out of time is returned as it is.
    """
    if monitor.stopped in ("budget", "interrupted") or monitor.best_x is None:
        return monitor.result()
    places = seen.sentences.free.nonzero().tolist()
    edits = [
        put(row, column, token)
        for choice in candidates.T.tolist()
        for (row, column), token in zip(places, choice, strict=True)
    ]

    def hard(tokens: Tensor) -> Tensor:
        return seen.labelling.hard(labels, tokens)

    monitor.forget_best()
    tokens = monitor.best_x
    descend(seen.view, tokens, hard(tokens), edits, hard, monitor, evaluations)
    return ending(monitor.result())


def ending(found: Reconstruction) -> Reconstruction:
    """With a film strip that ends in what was found."""
    strip = found.strip
    if strip and torch.equal(strip[-1][2], found.x.cpu()):
        return found
    return replace(found, strip=[*strip, (found.iterations, found.loss, found.x.cpu())])


def order(places: Tensor, generator: torch.Generator) -> Sequence[int]:
    """One of LAMP's four rearrangements of a sentence's (P,) places: a swap, a token moved, a run moved,
    or a beginning put at the end."""
    rest = places.tolist()

    def draw(top: int) -> int:
        return int(torch.randint(top, (1,), generator=generator, device=generator.device))

    kind, first, second = draw(4), draw(len(rest)), draw(len(rest))
    if kind == 0:
        rest[first], rest[second] = rest[second], rest[first]
        return rest
    if kind == 3:
        return rest[first:] + rest[:first]
    first, last = (first, first + 1) if kind == 1 else (min(first, second), max(first, second) + 1)
    moved, rest = rest[first:last], rest[:first] + rest[last:]
    goal = draw(len(rest) + 1)
    return rest[:goal] + moved + rest[goal:]
