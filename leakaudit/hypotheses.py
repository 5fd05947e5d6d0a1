"""What the manifest does not say, found by trying.

Every combination of the unknowns (train or eval mode where there is BatchNorm, the number of local
steps of a delta) is a hypothesis.  Each gets the same short attack from the same start, the most
promising a longer one; the one whose simulated update comes closest to the observed one wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from leakaudit.attacks.base import Monitor, OnStep
from leakaudit.attacks.gradient_matching import InvertingGradients
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


def decided(tried: Sequence[Hypothesis]) -> bool:
    """Whether the best residual is below `CLEAR` times the second best."""
    return _ahead([hypothesis.residual for hypothesis in tried]) < CLEAR


def settle(view: View, seed: int, on_step: OnStep | None = None) -> tuple[View, list[Hypothesis]]:
    """The view under the best hypothesis, its facts marked as inferred, and all that were tried.

    Without unknowns nothing runs and the list is empty.  Without a learning rate several local
    steps cannot be simulated, and the update is taken as one step.  Where no attack can run the
    view stays as it is.
    """
    knowledge = view.knowledge
    modes: list[Mode] = ["eval", "train"] if knowledge.mode.value is None else [view.victim.mode]
    sweeps_steps = knowledge.local_steps.value is None and knowledge.learning_rate.value is not None
    steps = list(STEPS) if sweeps_steps else [view.round.local_steps]
    if len(modes) * len(steps) == 1:
        return view, []
    views = [
        replace(view, victim=view.victim.with_mode(mode), round=replace(view.round, local_steps=count))
        for mode, count in product(modes, steps)
    ]
    residuals = _residuals(views, seed, on_step)
    best = residuals.index(min(residuals))
    if math.isinf(residuals[best]):
        return view, []
    winner = views[best]
    source = f"best of {len(views)} hypotheses by residual"
    if len(modes) > 1:
        knowledge = replace(knowledge, mode=inferred(winner.victim.mode, source))
    if sweeps_steps:
        knowledge = replace(knowledge, local_steps=inferred(winner.round.local_steps, source))
    tried = [
        Hypothesis(candidate.victim.mode, candidate.round.local_steps, residual)
        for candidate, residual in zip(views, residuals, strict=True)
    ]
    return replace(winner, knowledge=knowledge), tried


def _residuals(views: Sequence[View], seed: int, on_step: OnStep | None) -> list[float]:
    """One a view: of the coarse attack, and unless that is obvious of the fine one for the finalists."""
    if len(views) <= FINALISTS:
        return [_residual(view, FINE, seed, on_step) for view in views]
    residuals = [_residual(view, COARSE, seed, on_step) for view in views]
    if _ahead(residuals) < OBVIOUS:
        return residuals
    for index in sorted(range(len(views)), key=lambda index: residuals[index])[:FINALISTS]:
        residuals[index] = min(residuals[index], _residual(views[index], FINE, seed, on_step))
    return residuals


def _residual(view: View, attack: InvertingGradients, seed: int, on_step: OnStep | None) -> float:
    generator = fork(seed, "hypotheses", view.victim.device)
    try:
        found = attack.run(view, generator, Monitor(on_step))
    except (RuntimeError, ArithmeticError, InputError):
        return math.inf
    residual = view.residual(found.x, found.y)
    return residual if math.isfinite(residual) else math.inf


def _ahead(residuals: Sequence[float]) -> float:
    """The best residual as a share of the second best; 1 when both are infinite."""
    first, second = sorted(residuals)[:2]
    return first / second if 0 < second < math.inf else float(math.isinf(first) or second == 0)
