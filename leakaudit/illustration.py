"""Outcome -> `Trial`: scores against the truth, where it is at hand, and what there is to see.

This is where truth enters, after the attacks have run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor

from leakaudit.attacks.base import Reconstruction
from leakaudit.outcomes import MATCHED, Measured, Outcome
from leakaudit.policy import Policy
from leakaudit.results import Attempt, SuccessRate, Trial
from leakaudit.threat import View, as_it_is

if TYPE_CHECKING:
    from leakaudit.media.base import Medium

T = TypeVar("T")
P = TypeVar("P")
Frame = tuple[int, float, Tensor]
MOST_FRAMES = 16
"""Of a film strip as shown: two rows of the report."""


@dataclass(frozen=True)
class Yardstick(Generic[T, P]):
    """What reconstructions are measured against.

    Attributes:
        truth: the private batch, or None.
        pool: unrelated examples.
        metrics: names of scores of the medium.
        policy: what counts as success.
        seed: for the chance levels.
        redact: show nothing of the truth.
    """

    truth: T | None
    pool: P | None
    metrics: tuple[str, ...]
    policy: Policy
    seed: int
    redact: bool = False

    @property
    def criterion(self) -> str:
        return f"relative residual below {MATCHED:g}" if self.truth is None else str(self.policy)


def hard_labels(y: Tensor) -> Tensor:
    """(N,) integers, from integers or (N, K) probabilities."""
    return (y.argmax(dim=1) if y.is_floating_point() else y).cpu()


def illustrate(
    medium: Medium[T, P],
    outcome: Outcome,
    view: View,
    yardstick: Yardstick[T, P],
    folder: Path,
    *,
    best: bool,
) -> Trial:
    """The trial of one attack; pictures go to `folder`/images, of differences only for the best attack."""
    attempts = [_attempt(medium, attempt, view, yardstick) for attempt in outcome.attempts]
    trial = Trial(
        attack=outcome.chosen.name,
        spec=outcome.chosen.spec,
        status=outcome.status,
        reason=outcome.reason,
        seconds=outcome.seconds,
        attempts=attempts,
        verification=outcome.verification,
    )
    winner = outcome.best
    if winner is None:
        return trial
    exhibit = medium.exhibit(
        decoded(winner.found, view), view, yardstick, folder, outcome.chosen.name, best=best
    )
    return trial.model_copy(
        update={
            "best": outcome.attempts.index(winner),
            "residual": winner.residual,
            "success": _success_rate(attempts, yardstick.criterion),
            "label_source": label_source(view, winner.found),
            "scores": exhibit.scores,
            "examples": exhibit.examples,
            "strip": exhibit.strip,
            "details": winner.found.details,
        }
    )


def decoded(found: Reconstruction, view: View) -> Reconstruction:
    """The private examples as the adversary makes them out from what the client trained on (`View.decode`)."""
    if view.decode is as_it_is:
        return found
    x, y = view.decode(found.x, found.y)
    return replace(found, x=x, y=y)


def label_source(view: View, found: Reconstruction) -> str:
    """Where the labels came from, in words; empty where they are the text itself."""
    if found.y.dim() == 2 and not found.y.is_floating_point():
        return ""
    if view.knowledge.labels.status == "known":
        return "given"
    return "jointly optimised" if found.y.is_floating_point() else "inferred from the last layer"


def thinned(frames: list[Frame], most: int = MOST_FRAMES) -> list[Frame]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    if len(frames) <= most:
        return frames
    return [frames[round(i * (len(frames) - 1) / (most - 1))] for i in range(most)]


def _attempt(medium: Medium[T, P], attempt: Measured, view: View, yardstick: Yardstick[T, P]) -> Attempt:
    found = attempt.found
    return Attempt(
        restart=attempt.restart,
        loss=found.loss,
        residual=attempt.residual,
        iterations=found.iterations,
        seconds=attempt.seconds,
        stopped=found.stopped,
        success=_succeeded(medium, attempt, view, yardstick),
        history=found.history,
    )


def _succeeded(medium: Medium[T, P], attempt: Measured, view: View, yardstick: Yardstick[T, P]) -> bool:
    """With the truth: the policy is broken.  Without: the update is matched."""
    if yardstick.truth is None:
        return attempt.residual < MATCHED
    scored = medium.measure(decoded(attempt.found, view), view, yardstick, yardstick.policy.metrics)
    return bool(yardstick.policy.broken_by(scored.per_example))


def _success_rate(attempts: Sequence[Attempt], criterion: str) -> SuccessRate:
    """Wilson 1927 score interval at 95 %."""
    from scipy.stats import binomtest  # half a second, which a single attempt does without

    successes = sum(bool(attempt.success) for attempt in attempts)
    interval = binomtest(successes, len(attempts)).proportion_ci(method="wilson")
    return SuccessRate(
        successes=successes,
        restarts=len(attempts),
        low=float(interval.low),
        high=float(interval.high),
        criterion=criterion,
    )
