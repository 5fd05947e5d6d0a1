"""Is this record in the batch?  How well the update agrees with what the record alone would do to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leakaudit.attacks.base import require_at_least
from leakaudit.inference.base import Evidence, Question, enough_reference, imagined
from leakaudit.inference.responses import NUMBERS, losses, responses
from leakaudit.threat import View
from leakaudit.update import Update

Measure = Literal["cosine", "inner"]
LEAST_REFERENCE = 8
"""Reference records below which nothing is calibrated by them."""


@dataclass(frozen=True)
class Alignment:
    """Cosine, or inner product, of the record's own gradient with the update.

    The passive gradient attack of Nasr et al. 2019 in closed form, as Li et al. 2022 ("Effective passive membership
    inference attacks in federated learning against overparameterized models") use it over many rounds.
    Deviations: one round, not a sequence of them; the score is compared with what the same record gets from
    `calibration` updates that the adversary simulates from reference records, as (score - mean) / standard
    deviation: the offline attack of Carlini et al. 2022 (section V) carried over from models to updates.

    Attributes:
        measure: "cosine", or "inner" for the inner product, which is the first-order loss attack.
        calibration: simulated updates, 0 for the bare score, else >= 2.
        numbers: of the update that are looked at, at most; >= 1.
    """

    measure: Measure = "cosine"
    calibration: int = 32
    numbers: int = NUMBERS

    def __post_init__(self) -> None:
        require_at_least(self, 0, "calibration")
        require_at_least(self, 1, "numbers")
        if self.calibration == 1:
            raise ValueError("calibration must be 0 or at least 2, got 1")

    @property
    def question(self) -> Question:
        return "membership"

    def applies(self, view: View, evidence: Evidence) -> str | None:
        return enough_reference(evidence, LEAST_REFERENCE) if self.calibration else None

    def scores(self, view: View, evidence: Evidence, generator: torch.Generator) -> Tensor:
        found = responses(view, evidence, self.numbers)

        def agreement(update: Update) -> Tensor:
            numbers = found.at(update)
            inner = found.candidates @ numbers
            if self.measure == "inner":
                return inner
            return inner / (found.candidates.norm(dim=1) * numbers.norm()).clamp_min(1e-300)

        return calibrated(agreement, self.calibration, view, evidence, generator)


@dataclass(frozen=True)
class LossDrop:
    """How much applying the update lowers the record's loss (Yeom et al. 2018, on the two models of one round).

    A server has the model before and after; members' losses fall more.  Deviations: the difference of losses, not
    the loss after, and calibrated as `Alignment` is; of one local step, whose learning rate is the client's
    affair, the model after is one step of `step` relative to the length of the parameters.

    Attributes:
        step: length of the step, > 0, as a share of the parameters' length, where the round does not say.
        calibration: as in `Alignment`.
    """

    step: float = 0.01
    calibration: int = 16

    def __post_init__(self) -> None:
        require_at_least(self, 0, "calibration")
        if not self.step > 0 or self.calibration == 1:
            raise ValueError(
                f"step must be positive and calibration 0 or at least 2, got {self.step} and {self.calibration}"
            )

    @property
    def question(self) -> Question:
        return "membership"

    def applies(self, view: View, evidence: Evidence) -> str | None:
        return enough_reference(evidence, LEAST_REFERENCE) if self.calibration else None

    def scores(self, view: View, evidence: Evidence, generator: torch.Generator) -> Tensor:
        records, params = evidence.candidates, view.victim.params
        before = losses(view.victim, params, records)

        def drop(update: Update) -> Tensor:
            rate = self._rate(view, update)
            after = {name: p - rate * update[name] if name in update else p for name, p in params.items()}
            return before - losses(view.victim, after, records)

        return calibrated(drop, self.calibration, view, evidence, generator)

    def _rate(self, view: View, update: Update) -> float:
        if view.round.local_steps > 1 and not view.scale_free:
            return view.round.learning_rate
        length = Update(view.victim.params).select(update).norm()
        return float(self.step * length / update.norm().clamp_min(torch.finfo(length.dtype).tiny))


def calibrated(
    score: Callable[[Update], Tensor],
    count: int,
    view: View,
    evidence: Evidence,
    generator: torch.Generator,
) -> Tensor:
    """The scores (M,) of the observed update; for a count > 0 against those of so many imagined ones."""
    bare = score(view.observed)
    if not count:
        return bare
    return standardised(bare, [score(other.update) for other in imagined(view, evidence, count, generator)])


def standardised(bare: Tensor, others: list[Tensor]) -> Tensor:
    """Each score against what the same record gets from updates that do not hold it."""
    table = torch.stack(others)
    spread = table.std(0)
    return (bare - table.mean(0)) / spread.clamp_min(1e-12 * float(spread.max()) + 1e-300)
