"""Gradient matching on continuous embeddings: dlg-text, tag, lamp; and tiger's presets beside them.

The candidate stands in place of the word embedding's rows (`leakaudit.attacks.sentences`), so everything
but the word embedding's own gradient is matched; at the end every embedding becomes the nearest token by
cosine, and a short search by `View.residual` tries the next nearest ones.  The film strip shows tokens.

Limits.  Sentences of a batch whose lengths are not stated are taken to be as long as the longest.  Labels of
masked language models need the output bias's gradient of one step (`masked_labels`).  A known clipping is
simulated without the word embedding's share of the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leakaudit.attacks.base import Attack, Monitor, Reconstruction, needs_scale, require_positive
from leakaudit.attacks.matching import Distance
from leakaudit.attacks.optimise import DISTANCES, Candidate, DistanceName, lbfgs
from leakaudit.attacks.sentences import (
    Labelling,
    Seen,
    Sentences,
    by_position_rows,
    check_lengths,
    explained,
    labelled,
    laid_out,
    order,
    polish,
    refuse,
)
from leakaudit.attacks.tiger import TIGER
from leakaudit.errors import InputError
from leakaudit.models.language import LanguageVictim, text_as_labels
from leakaudit.threat import View
from leakaudit.update import Update

CHECK = 10
"""Iterations between two looks at whether the nearest tokens already reproduce the update."""

PLACE = 50
"""First-order iterations between two attempts to put embeddings in their places."""


def layer_cosine(simulated: Update, observed: Update) -> Tensor:
    """Mean over tensors of 1 - cos(g, g*), in [0, 2] (Balunovic et al. 2022, equation 4)."""
    terms = []
    for name, g in simulated.items():
        unit = observed[name] / observed[name].abs().max()
        largest = g.detach().abs().max().clamp_min(1e-30)
        terms.append(1 - (g / largest * unit).sum() / ((g / largest).norm() * unit.norm()).clamp_min(1e-30))
    return torch.stack(terms).mean()


@dataclass(frozen=True)
class TagDistance:
    """sum_l |g_l - g*_l|_2^2 + a_l |g_l - g*_l|_1  (Deng et al. 2021, equation 4).

    a_l falls in a straight line from `weight` at the first tensor towards `weight * (1 - slope)` at the
    last: "larger weights for the front layers", whose form the paper leaves open.
    """

    weight: float
    slope: float

    def __call__(self, simulated: Update, observed: Update) -> Tensor:
        terms = []
        for depth, (name, g) in enumerate(simulated.items()):
            weight = self.weight * (1 - self.slope * depth / len(simulated))
            difference = g - observed[name]
            terms.append(difference.square().sum() + weight * difference.abs().sum())
        return torch.stack(terms).sum()


@dataclass(frozen=True)
class EmbeddingMatching:
    """distance(g(x), g*) + norm * (mean |x_i| - mean |row of the word embedding|)^2, for (F, H) candidates.

    The second term is Balunovic et al. 2022, equation 5.
    """

    view: View
    sentences: Sentences
    labelling: Labelling
    distance: Distance
    norm: float = 0.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        loss, prior = self.of_update(self.view.simulate(*self.client_input(x, y))), self.prior(x, y)
        return loss if prior is None else loss + prior

    def client_input(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings in their places, and labels as the victim takes them."""
        embeddings = self.sentences.embed(x)
        return embeddings, self.labelling.soft(y, embeddings)

    def of_update(self, simulated: Update) -> Tensor:
        """What the simulated update contributes, a scalar."""
        return self.distance(simulated, self.view.observed)

    def prior(self, x: Tensor, y: Tensor) -> Tensor | None:
        """What the candidate itself contributes, a scalar; None for nothing."""
        if not self.norm:
            return None
        return self.norm * (x.norm(dim=1).mean() - self.sentences.typical_norm).square()


def put_in_place(candidate: Candidate, objective: EmbeddingMatching) -> Tensor | None:
    """Move the embeddings to the places where their position rows' gradients fit, when that lowers the loss;
    the order (F,) that was taken."""
    with torch.no_grad():
        x, y = candidate.x.detach(), candidate.y.detach()
        embeddings = objective.sentences.embed(x)
        simulated = objective.view.simulate(embeddings, objective.labelling.soft(y, embeddings))
        order = by_position_rows(objective.view, objective.sentences, simulated)
        if order is None or torch.equal(order, torch.arange(len(order), device=order.device)):
            return None
        moved = objective.sentences.moved(x, order)
        if not float(objective(moved, y)) < float(objective(x, y)):
            return None
        candidate.x.copy_(moved)
        return order


@dataclass(frozen=True)
class TextDeepLeakage:
    """L-BFGS on the squared distance, as `dlg` on images.

    Attributes:
        distance: "squared" over all numbers is the paper's; "relative" divides it by the length of each
            tensor, which on BERT takes a tenth of the iterations: else the head is all that is matched.
        every: after so many iterations embeddings are put in their places.
        lengths: tokens of each sentence with + between; None for what the position rows show.
        joint: find unknown classes as soft labels with the text.
        iterations: calls of L-BFGS, of 20 inner steps each.
        target: stop at this relative residual of the embeddings.
        patience: stop after this many iterations without a gain of 0.1 %.
        polish: residuals to measure at the end, at most.
    """

    lengths: str | None = None
    joint: bool = True
    distance: DistanceName = "relative"
    iterations: int = 60
    every: int = 10
    learning_rate: float = 1.0
    target: float = 1e-3
    patience: int = 10
    polish: int = 60
    restarts: int = 2

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        require_positive(self, "iterations", "learning_rate", "patience", "restarts")

    def applies(self, view: View) -> str | None:
        return refuse(view, self.lengths) or needs_scale(view)

    def _target(self, matched: View) -> float:
        whole = float(matched.observed.norm().square()) if self.distance == "squared" else 1.0
        return whole * self.target**2

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        sentences = laid_out(view, self.lengths)
        seen = Seen(view, sentences, labelled(view, sentences, self.joint))
        candidate = seen.labelling.candidate(sentences.start(generator), generator)
        matched = explained(view)
        objective = EmbeddingMatching(matched, sentences, seen.labelling, DISTANCES[self.distance])
        rounds = -(-self.iterations // self.every)
        monitor.expect(rounds * (self.every + 1) + self.polish)
        for _ in range(rounds):
            lbfgs(
                candidate,
                objective,
                monitor,
                iterations=self.every,
                learning_rate=self.learning_rate,
                target=self._target(matched),
                patience=self.patience,
                shown=seen.show,
            )
            if monitor.stopped in ("budget", "converged", "diverged"):
                break
            if seen.proven(candidate.x, candidate.y):
                seen.keep(monitor)
                break
            if put_in_place(candidate, objective) is None and monitor.stopped == "plateau":
                break
        return finish(seen, candidate, monitor, self.polish)


@dataclass(frozen=True)
class TextGradientAttack:
    """AdamW on `TagDistance`.

    Attributes:
        lengths: tokens of each sentence with + between; None for what the position rows show.
        weight, slope: of the L1 term, see `TagDistance`.
    """

    lengths: str | None = None
    weight: float = 0.01
    slope: float = 0.5
    iterations: int = 1000
    learning_rate: float = 0.1
    polish: int = 60
    restarts: int = 1

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        require_positive(self, "iterations", "learning_rate", "restarts")

    def applies(self, view: View) -> str | None:
        return refuse(view, self.lengths) or needs_scale(view)

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        sentences = laid_out(view, self.lengths)
        seen = Seen(view, sentences, labelled(view, sentences))
        candidate = seen.labelling.candidate(sentences.start(generator), generator)
        objective = EmbeddingMatching(
            explained(view), sentences, seen.labelling, TagDistance(self.weight, self.slope)
        )
        optimizer = torch.optim.AdamW(candidate.variables, lr=self.learning_rate, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, self.iterations)
        monitor.expect(self.iterations + 1 + self.polish)
        descend(candidate, objective, seen, monitor, optimizer, scheduler, self.iterations)
        return finish(seen, candidate, monitor, self.polish)


@dataclass(frozen=True)
class LanguageModelPrior:
    """Adam on a distance of gradients, with rearrangements of tokens in between.

    Attributes:
        lengths: tokens of each sentence with + between; None for what the position rows show.
        distance: "cosine" per tensor, or "tag" (L1 + L2).
        norm: weight of the embeddings' mean norm.
        perplexity: weight of the language model's cross-entropy where rearrangements are compared.
        language_model: `hf:NAME_OR_FOLDER` of a causal language model with the victim's tokenizer.
        starts: random starts to take the best of, and as many rearrangements of that one.
        every, proposals: try so many rearrangements of each sentence after so many iterations, from a
            tenth of the iterations on.
    """

    lengths: str | None = None
    distance: Literal["cosine", "tag"] = "cosine"
    norm: float = 1.0
    perplexity: float = 0.2
    language_model: str | None = None
    iterations: int = 1000
    learning_rate: float = 0.01
    decay: float = 0.89
    starts: int = 50
    every: int = 75
    proposals: int = 50
    polish: int = 60
    restarts: int = 1

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        require_positive(self, "iterations", "learning_rate", "every", "restarts")

    def applies(self, view: View) -> str | None:
        reason = refuse(view, self.lengths)
        if reason is None and self.distance == "tag":
            reason = needs_scale(view)
        return reason or self._refuse_language_model(view)

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        sentences = laid_out(view, self.lengths)
        seen = Seen(view, sentences, labelled(view, sentences))
        objective = EmbeddingMatching(
            explained(view), sentences, seen.labelling, LAMP_DISTANCES[self.distance], self.norm
        )
        prior = self._prior()
        candidate = self._start(objective, generator, monitor)
        optimizer = torch.optim.Adam(candidate.variables, lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 50, self.decay)

        def rearrange(step: int) -> None:
            if step >= self.iterations // 10 and step % self.every == 1:
                self._rearrange(candidate, objective, prior, generator, monitor)

        monitor.expect(self.iterations + 1 + self.polish)
        descend(candidate, objective, seen, monitor, optimizer, scheduler, self.iterations, rearrange)
        return finish(seen, candidate, monitor, self.polish)

    def _start(self, objective: EmbeddingMatching, generator: torch.Generator, monitor: Monitor) -> Candidate:
        """The best of random starts, then of its rearrangements, with embeddings of typical norm."""
        best, least = None, float("inf")
        for _ in range(max(1, self.starts)):
            x = objective.sentences.start(generator)
            x = x / x.norm(dim=1, keepdim=True) * objective.sentences.typical_norm
            candidate = objective.labelling.candidate(x, generator)
            loss = value(objective, candidate)
            if best is None or loss < least:
                best, least = candidate, loss
            if monitor.late:
                break
        assert best is not None
        if self.starts > 1:
            self._rearrange(best, objective, None, generator, monitor)
        return best

    def _rearrange(
        self,
        candidate: Candidate,
        objective: EmbeddingMatching,
        prior: LanguageVictim | None,
        generator: torch.Generator,
        monitor: Monitor,
    ) -> None:
        """For every sentence the best of `proposals` rearrangements and of none, in place."""
        owner = objective.sentences.free.nonzero()[:, 0]
        for sentence in range(len(objective.sentences.there)):
            places = (owner == sentence).nonzero().flatten()
            if len(places) < 2:
                continue
            kept = candidate.x.detach().clone()
            best, least = kept, self._score(candidate, objective, prior)
            for _ in range(self.proposals):
                trial = kept.clone()
                trial[places] = kept[list(order(places, generator))]
                candidate.x.data.copy_(trial)
                score = self._score(candidate, objective, prior)
                if score < least:
                    best, least = trial, score
                if monitor.late:
                    break
            candidate.x.data.copy_(best)

    def _score(
        self, candidate: Candidate, objective: EmbeddingMatching, prior: LanguageVictim | None
    ) -> float:
        score = value(objective, candidate)
        if prior is not None:
            tokens = objective.sentences.nearest(candidate.x)
            labels = text_as_labels(tokens)
            with torch.no_grad():
                score += self.perplexity * float(prior.loss(prior.params, tokens, labels))
        return score

    def _prior(self) -> LanguageVictim | None:
        if self.language_model is None:
            return None
        from leakaudit.models.pretrained import load_language_victim  # transformers, which others do without

        return load_language_victim(self.language_model, "causal-lm")

    def _refuse_language_model(self, view: View) -> str | None:
        try:
            prior = self._prior()
        except InputError as error:
            return str(error)
        if prior is None or not isinstance(view.victim, LanguageVictim):
            return None
        ours, theirs = view.victim.space.tokenizer, prior.space.tokenizer
        if ours is None or theirs is None or ours.get_vocab() != theirs.get_vocab():
            return f"language_model={self.language_model} has another tokenizer than {view.victim.name}"
        return None


def descend(
    candidate: Candidate,
    objective: EmbeddingMatching,
    seen: Seen,
    monitor: Monitor,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    iterations: int,
    between: Callable[[int], None] | None = None,
) -> None:
    """First-order steps on a candidate, until its nearest tokens reproduce the update; `between` follows
    every step."""
    monitor.start(iterations)
    for step in range(iterations + 1):
        loss = objective(candidate.x, candidate.y)
        if monitor.step(float(loss.detach()), *seen.show(candidate.x, candidate.y)) or step == iterations:
            return
        if step % CHECK == CHECK - 1 and seen.proven(candidate.x, candidate.y):
            seen.keep(monitor)
            return
        candidate.differentiate(loss)
        optimizer.step()
        scheduler.step()
        if step % PLACE == PLACE - 1:
            order = put_in_place(candidate, objective)
            if order is not None:
                _reorder(optimizer.state[candidate.x], order)
        if between is not None:
            between(step)


def _reorder(state: dict[str, Tensor], order: Tensor) -> None:
    """Adam's moments go with their embeddings."""
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = state[name][order]


def finish(seen: Seen, candidate: Candidate, monitor: Monitor, evaluations: int) -> Reconstruction:
    """What the monitor saw at best, with near-miss tokens tried."""
    cosines = seen.sentences.similarity(candidate.x.detach())
    near = cosines.topk(min(3, cosines.shape[1]), dim=1).indices
    return polish(seen, near, candidate.y.detach(), monitor, evaluations)


def value(objective: EmbeddingMatching, candidate: Candidate) -> float:
    with torch.no_grad():
        return float(objective(candidate.x.detach(), candidate.y.detach()))


LAMP_DISTANCES: dict[Literal["cosine", "tag"], Distance] = {
    "cosine": layer_cosine,
    "tag": TagDistance(0.01, 0.0),
}

# Zhu, Liu, Han 2019, "Deep Leakage from Gradients", section 4.2 (masked language model, embeddings as the
# candidate).  Deviations: strong Wolfe line search, a start with the word embedding's statistics, a search
# among near-miss tokens at the end.
DLG_TEXT = TextDeepLeakage()

# Deng et al. 2021, "TAG: Gradient Attack on Transformer-based Language Models", equation 4.  Learning rate
# and L1 weight are those that Balunovic et al. 2022 found best for it (tag.sh: 0.1, 0.01).  Deviations: the
# weights' form over layers, 1,000 iterations with a falling learning rate instead of 2,500 with a constant.
TAG = TextGradientAttack()

# Balunovic, Dimitrov, Jovanovic, Vechev 2022, "LAMP: Extracting Text from Gradients with Language Model
# Priors", algorithm 1; values of its code (lamp_cos.sh: norm 1, perplexity 0.2, learning rate 0.01, decay
# 0.89 every 50, rearrangements every 75).  Deviations: 1,000 iterations, 50 starts and 50 rearrangements
# instead of 2,000, 500 and 200, which here take an hour a sentence; the language model is optional and never
# draws starts; tensors whose gradient is rounding are left out of the mean of cosines.
LAMP = LanguageModelPrior()

EMBEDDING_ATTACKS: dict[str, Attack] = {"tiger": TIGER, "dlg-text": DLG_TEXT, "tag": TAG, "lamp": LAMP}

EMBEDDING_DESCRIPTIONS: dict[str, str] = {
    "tiger": "embeddings descend to the span of the first attention gradients (Kalikman et al. 2026)",
    "dlg-text": "L-BFGS on squared distance of gradients of embeddings (Zhu et al. 2019)",
    "tag": "L1 + L2 distance, front layers heavier, AdamW (Deng et al. 2021)",
    "lamp": "cosine distance, norm prior, tokens rearranged; optional language model (Balunovic et al. 2022)",
}
