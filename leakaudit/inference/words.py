"""Is this sentence in the batch?  Rows of the word embedding that the update moves are words that were said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leakaudit.inference.base import Evidence, Question, Records, enough_reference
from leakaudit.models.spaces import Pixels
from leakaudit.threat import View

SILENT = 0.99
"""Share of the vocabulary above which rows that move tell nothing (a tied output layer, noise)."""


@dataclass(frozen=True)
class Words:
    """All its words are among those said, and they are rare (Melis et al. 2019, section 4.1).

    There a record is taken for a member when its words are in the batch's bag of words.  Deviation: words count by
    how unlikely they are to be said by somebody else, which is the likelihood ratio where words are independent:
    the sum of -log p over the candidate's words that were said, p = 1 - (1 - f)^(N - 1) with f the share of
    reference sentences that say it, and log(`missing`) for each that was not said, which no member has.

    Attributes:
        missing: probability in (0, 1) that a member's word leaves no row, as after top-k.
        smoothing: sentences, > 0, added to each word's count, half of them saying it.
    """

    missing: float = 1e-6
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.missing < 1 and self.smoothing > 0):
            raise ValueError(
                f"missing must be in (0, 1) and smoothing positive, got {self.missing} and {self.smoothing}"
            )

    @property
    def question(self) -> Question:
        return "membership"

    def applies(self, view: View, evidence: Evidence) -> str | None:
        victim: Any = view.victim
        if isinstance(victim.space, Pixels):
            return "it reads words, the model takes images"
        if victim.word not in view.observed:
            return "the word embedding is not in the update"
        said = float(_said(view).double().mean())
        if said > SILENT or said == 0:
            return f"{said:.0%} of the word embedding's rows are not zero, so they do not tell which words were said"
        return enough_reference(evidence, 1)

    def scores(self, view: View, evidence: Evidence, generator: torch.Generator) -> Tensor:
        said = _said(view)
        holds, others = _bags(view, evidence.candidates), _bags(view, evidence.reference)
        share = (others.double().sum(0) + self.smoothing / 2) / (len(others) + self.smoothing)
        elsewhere = (1 - (1 - share) ** (view.round.num_examples - 1)).clamp(self.missing, 1.0)
        evidence_of = torch.where(said, -elsewhere.log(), torch.tensor(self.missing).double().log())
        return (holds.double() * evidence_of).sum(1)


def _said(view: View) -> Tensor:
    """(V,) bool: rows of the word embedding with any number that is not zero."""
    victim: Any = view.victim
    return view.observed[victim.word].ne(0).any(1)


def _bags(view: View, records: Records) -> Tensor:
    """(n, V) bool: which ordinary tokens each sentence holds."""
    victim: Any = view.victim
    bags = torch.zeros(len(records), len(view.observed[victim.word]), dtype=torch.bool, device=victim.device)
    rows, places = victim.space.ordinary(records.x).nonzero(as_tuple=True)
    bags[rows, records.x[rows, places]] = True
    return bags
