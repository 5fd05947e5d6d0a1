"""Is this record in the batch?  The likelihood ratio, with everything else in the batch as coloured noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakaudit.attacks.base import require_at_least
from leakaudit.inference.base import Evidence, Question, enough_reference, imagined
from leakaudit.inference.responses import NUMBERS, Responses, responses, weight
from leakaudit.threat import View

LEAST_REFERENCE = 16
FLOOR = 1e-3
"""Least variance of one number, as a share of the mean over all: numbers that hardly answer are not trusted."""
EXACT = 1e-7
"""Relative error that any update has, from single precision."""
NORMAL_MEDIAN = 0.6745
"""Median size of a standard normal number."""


@dataclass(frozen=True)
class LikelihoodRatio:
    """log p(update | record in the batch) - log p(update | it is not), both Gaussian (Neyman and Pearson 1933).

    To first order u = w sum_i g_i + noise.  With g the candidate's response, m and S mean and covariance of
    responses, N records and noise D:

        in:   u ~ N(w (g + (N - 1) m), C)        out:  u ~ N(w N m, C)        C = w^2 N S + D
        score = w (g - m)' C^-1 (u - w N m) - w^2/2 (g - m)' C^-1 (g - m)

    so what the other records of the batch explain is removed before the record is looked for.  What several
    local steps add by their curvature is taken for noise, of the size it has in `calibration` updates that the
    adversary simulates.  When the candidates' standardised scores are wider than they should be (their median
    size tells, most candidates being non-members), C is too small by that factor and the score is divided by it.
    Where the length of the update says nothing, the standardised (g - m)' C^-1 u / |C^-1/2 (g - m)| is the score.
    S is the empirical covariance of the adversary's records, shrunk by the share `shrink` towards its own
    diagonal (Schaefer and Strimmer 2005, target D; fixed instead of estimated, because an update is
    explained best where little is shrunk), and inverted in the records' span.
    It is the matched filter of Carlini et al. 2022's Gaussian likelihood ratio in the space of updates; that form
    of the covariance, with the candidates in it (`joint`), is ours: Zari et al. 2021 and Li et al. 2022 use
    cosines, which drown in a batch of tens of records.

    Attributes:
        joint: the candidates themselves count among the records that may explain the update, so that all of them
            are regressed on it together.  They are known to the adversary; which are members is not used.
        shrink: in (0, 1].
        numbers: of the update that are looked at, at most; >= 1.
        calibration: simulated updates, for several local steps; >= 2.
    """

    joint: bool = True
    shrink: float = 0.003
    numbers: int = NUMBERS
    calibration: int = 32

    def __post_init__(self) -> None:
        require_at_least(self, 1, "numbers")
        require_at_least(self, 2, "calibration")
        if not 0 < self.shrink <= 1:
            raise ValueError(f"shrink must be in (0, 1], got {self.shrink}")

    @property
    def question(self) -> Question:
        return "membership"

    def applies(self, view: View, evidence: Evidence) -> str | None:
        return enough_reference(evidence, LEAST_REFERENCE)

    def scores(self, view: View, evidence: Evidence, generator: torch.Generator) -> Tensor:
        found = responses(view, evidence, self.numbers)
        share = weight(view)
        facts = (tuple(view.observed), tuple(view.spread.items()), view.round)
        expected, matched = evidence.remembered(
            f"filter/{self}", view, facts, lambda: self._filter(view, evidence, found, generator)
        )
        update = found.at(view.observed)
        if view.scale_free:
            update = update * (expected @ expected / (expected @ update).clamp_min(1e-300))
        inner = matched.inner(update - expected)
        standard = inner / matched.squares.clamp_min(1e-300).sqrt()
        if view.scale_free:
            return standard
        excess = max(1.0, float(standard.abs().median()) / NORMAL_MEDIAN) ** 2
        return (share * inner - share**2 / 2 * matched.squares) / excess

    def _filter(
        self, view: View, evidence: Evidence, found: Responses, generator: torch.Generator
    ) -> tuple[Tensor, MatchedFilter]:
        """The update of unrelated records (D,), and the filter for every candidate."""
        base = torch.cat([found.reference, found.candidates]) if self.joint else found.reference
        mean, share, count = base.mean(0), weight(view), view.round.num_examples
        expected, noise = share * count * mean, found.noise(view)
        if view.round.local_steps > 1:
            others = imagined(view, evidence, self.calibration, generator)
            curved = torch.stack(
                [found.at(other.update) - share * found.reference[other.rows].sum(0) for other in others]
            )
            expected = expected + curved.mean(0)
            noise = curved.std(0)  # which holds the noise of the defense as well
        signals, rows = found.candidates - mean, (base - mean) * (share * count**0.5)
        return expected, MatchedFilter.of(signals, rows, noise, self.shrink)


@dataclass(frozen=True)
class MatchedFilter:
    """s' C^-1 u of every signal s, for any update u.

    Attributes:
        signals: (M, D): C^-1 s, one a row.
        squares: (M,): s' C^-1 s.
    """

    signals: Tensor
    squares: Tensor

    @classmethod
    def of(cls, signals: Tensor, base: Tensor, noise: Tensor, shrink: float) -> MatchedFilter:
        """C = (1 - shrink) B'B/n + shrink diag(B'B/n) + diag(noise^2), inverted by Woodbury's identity.

        Args:
            signals: (M, D); base: (n, D), B, rows of mean zero; noise: (D,) standard deviations; all float64.
        """
        count = len(base)
        variance = base.square().mean(0)
        mean = variance.mean()
        diagonal = shrink * (variance + FLOOR * mean) + noise.square() + EXACT**2 * mean
        whiten = diagonal.rsqrt()
        rows = base * (whiten * ((1 - shrink) / count) ** 0.5)
        white = signals * whiten
        inner = torch.eye(count, dtype=rows.dtype, device=rows.device) + rows @ rows.T
        explained = torch.cholesky_solve(rows @ white.T, torch.linalg.cholesky(inner))
        left = white - explained.T @ rows
        return cls(left * whiten, (left * white).sum(1).clamp_min(0))

    def inner(self, update: Tensor) -> Tensor:
        """(M,) for u of (D,)."""
        return self.signals @ update
