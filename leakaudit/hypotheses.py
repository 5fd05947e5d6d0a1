"""What the manifest does not say, found by trying.

Every combination of the unknowns (train or eval mode where there is BatchNorm, the number of local
steps of a delta) is a hypothesis.  Each gets the same short attack from the same start; the one
whose simulated update comes closest to the observed one wins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from leakaudit.attacks.base import Monitor, OnStep
from leakaudit.attacks.gradient_matching import InvertingGradients
from leakaudit.models.victim import Mode
from leakaudit.randomness import fork
from leakaudit.threat import View, inferred

STEPS = (1, 2, 3, 4, 5, 8, 10)
SHORT = InvertingGradients(iterations=120, tv=0.0, statistics=0.0)


@dataclass(frozen=True)
class Hypothesis:
    """`residual` is the relative residual (`View.residual`) of the short attack under this hypothesis."""

    mode: Mode
    local_steps: int
    residual: float


def settle(view: View, seed: int, on_step: OnStep | None = None) -> tuple[View, list[Hypothesis]]:
    """The view under the best hypothesis, its facts marked as inferred, and all that were tried.

    Without unknowns nothing runs and the list is empty.  Without a learning rate several local
    steps cannot be simulated, and the update is taken as one step.
    """
    knowledge = view.knowledge
    modes: list[Mode] = ["eval", "train"] if knowledge.mode.value is None else [view.victim.mode]
    sweeps_steps = knowledge.local_steps.value is None and knowledge.learning_rate.value is not None
    steps = list(STEPS) if sweeps_steps else [view.round.local_steps]
    if len(modes) * len(steps) == 1:
        return view, []
    tried, views = [], []
    for mode, count in product(modes, steps):
        candidate = replace(
            view,
            victim=view.victim.with_mode(mode),
            round=replace(view.round, local_steps=count),
        )
        generator = fork(seed, "hypotheses", view.victim.device)
        attempt = SHORT.run(candidate, generator, Monitor(on_step))
        tried.append(Hypothesis(mode, count, candidate.residual(attempt.x, attempt.y)))
        views.append(candidate)
    best = min(range(len(tried)), key=lambda index: tried[index].residual)
    winner = tried[best]
    source = f"best of {len(tried)} hypotheses by residual"
    if len(modes) > 1:
        knowledge = replace(knowledge, mode=inferred(winner.mode, source))
    if sweeps_steps:
        knowledge = replace(knowledge, local_steps=inferred(winner.local_steps, source))
    return replace(views[best], knowledge=knowledge), tried
