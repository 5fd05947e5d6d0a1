"""What the manifest does not say, found by trying.

Every combination of the unknowns (train or eval mode where there is BatchNorm, the number of local
steps of a delta) is a hypothesis.  Each gets the same short attack from the same start, the most
promising a longer one; the one whose simulated update comes closest to the observed one wins.
Where the time for it runs out, only attacks that came to their end are compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from leakaudit.attacks.base import Monitor, OnStep
from leakaudit.attacks.gradient_matching import InvertingGradients
from leakaudit.attacks.head import effective_rank, head_gradient
from leakaudit.errors import InputError
from leakaudit.models.victim import Mode
from leakaudit.randomness import fork
from leakaudit.threat import View, inferred

STEPS = (1, 2, 3, 4, 5, 8, 10)
COARSE = InvertingGradients(iterations=40, tv=0.0, statistics=0.0)
FINE = InvertingGradients(iterations=120, tv=0.0, statistics=0.0)
FINALISTS = 3
CLEAR = 0.75
OBVIOUS = 0.3


@dataclass(frozen=True)
class Hypothesis:
    """`residual` is the relative residual (`View.residual`) of the short attack under this hypothesis,
    infinite where the attack failed."""

    mode: Mode
    local_steps: int
    residual: float


@dataclass(frozen=True)
class Sweep:
    """What was tried.

    Attributes:
        tried: the hypotheses with a residual, from few local steps to many.
        planned: how many there were to try; 0 when nothing was unknown.
        complete: False when time ran out before all were compared, finalists at length.
    """

    tried: tuple[Hypothesis, ...] = ()
    planned: int = 0
    complete: bool = True

    @property
    def best(self) -> Hypothesis | None:
        """The one with the smallest residual; None unless two can be compared and an attack ran."""
        if len(self.tried) < 2:
            return None
        best = min(self.tried, key=lambda hypothesis: hypothesis.residual)
        return best if math.isfinite(best.residual) else None

    @property
    def decided(self) -> bool:
        """Whether all was compared and the best residual is below `CLEAR` times the second best."""
        residuals = [hypothesis.residual for hypothesis in self.tried]
        return self.complete and self.best is not None and _ahead(residuals) < CLEAR


def settle(
    view: View, seed: int, on_step: OnStep | None = None, budget: float | None = None
) -> tuple[View, Sweep]:
    """The view under the best hypothesis, its facts marked as inferred, and what was tried.

    `budget` is in seconds, None for no limit.  Without unknowns nothing runs.  Without a learning
    rate several local steps cannot be simulated, and the update is taken as one step.  Where no two
    hypotheses can be compared the view stays as it is.
    """
    knowledge = view.knowledge
    modes: list[Mode] = ["eval", "train"] if knowledge.mode.value is None else [view.victim.mode]
    sweeps_steps = knowledge.local_steps.value is None and knowledge.learning_rate.value is not None
    steps = _plausible_steps(view) if sweeps_steps else [view.round.local_steps]
    if len(modes) * len(steps) == 1:
        return view, Sweep()
    views = [
        replace(view, victim=view.victim.with_mode(mode), round=replace(view.round, local_steps=count))
        for count, mode in product(steps, modes)
    ]
    deadline = None if budget is None else time.monotonic() + budget
    residuals, complete = _compare(views, _Trial(seed, on_step, deadline))
    tried = tuple(
        Hypothesis(candidate.victim.mode, candidate.round.local_steps, residual)
        for candidate, residual in zip(views, residuals, strict=False)
    )
    sweep = Sweep(tried, len(views), complete)
    if sweep.best is None:
        return view, sweep
    winner = views[tried.index(sweep.best)]
    source = f"best of {len(tried)} hypotheses by residual"
    if len(modes) > 1:
        knowledge = replace(knowledge, mode=inferred(winner.victim.mode, source))
    if sweeps_steps:
        knowledge = replace(knowledge, local_steps=inferred(winner.round.local_steps, source))
    return replace(winner, knowledge=knowledge), sweep


def _plausible_steps(view: View) -> list[int]:
    """`STEPS` without those too few for the rank of the last layer's gradient.

    Every example of every step adds one outer product to it.  A full rank tells nothing (noise has it).
    """
    head = head_gradient(view)
    if head is None or head.weight_gradient is None or view.knowledge.batch_size.value is None:
        return list(STEPS)
    rank = effective_rank(head.weight_gradient, head.epsilon)
    if rank >= min(head.weight_gradient.shape[0] - 1, head.weight_gradient.shape[1]):
        return list(STEPS)
    used = sum(own.batch_size for own in view.round.each())
    return [count for count in STEPS if count * used >= rank] or list(STEPS)


@dataclass(frozen=True)
class _Trial:
    """How a hypothesis is tried: the same start for all, until the deadline for all."""

    seed: int
    on_step: OnStep | None
    deadline: float | None

    def residuals(self, views: Sequence[View], attack: InvertingGradients) -> list[float]:
        """One a view, for as many as there was time for."""
        found: list[float] = []
        for view in views:
            residual = self._residual(view, attack)
            if residual is None:
                break
            found.append(residual)
        return found

    def _residual(self, view: View, attack: InvertingGradients) -> float | None:
        """Infinite when the attack failed, None when time ran out before its end."""
        generator = fork(self.seed, "hypotheses", view.victim.device)
        try:
            found = attack.run(view, generator, Monitor(self.on_step, self.deadline))
        except (RuntimeError, ArithmeticError, InputError):
            return math.inf
        if found.stopped == "budget":
            return None
        residual = view.residual(found.x, found.y)
        return residual if math.isfinite(residual) else math.inf


def _compare(views: Sequence[View], trial: _Trial) -> tuple[list[float], bool]:
    """One residual a view: of the coarse attack, and unless that is obvious of the fine one for the
    finalists, in which all or none of them take part; and whether there was time for all of it."""
    few = len(views) <= FINALISTS
    residuals = trial.residuals(views, FINE if few else COARSE)
    complete = len(residuals) == len(views)
    if few or not complete or _ahead(residuals) < OBVIOUS:
        return residuals, complete
    finalists = sorted(range(len(views)), key=lambda index: residuals[index])[:FINALISTS]
    finer = trial.residuals([views[index] for index in finalists], FINE)
    if len(finer) < len(finalists):
        return residuals, False
    for index, residual in zip(finalists, finer, strict=True):
        residuals[index] = min(residuals[index], residual)
    return residuals, True


def _ahead(residuals: Sequence[float]) -> float:
    """The best residual as a share of the second best; 1 when both are infinite."""
    first, second = sorted(residuals)[:2]
    return first / second if 0 < second < math.inf else float(math.isinf(first) or second == 0)
