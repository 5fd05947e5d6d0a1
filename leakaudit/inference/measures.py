"""How well scores tell members from others: AUC, true-positive rates at low false-positive rates, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_roc

from leakaudit.inference_results import RATES, Rate

CONFIDENCE = 0.95
RESAMPLES = 2000
FALSE_POSITIVES = {"tpr01": 0.01, "tpr001": 0.001}
CURVE_POINTS = 200


@dataclass(frozen=True)
class Trialled:
    """The scores of one update: of what is true, (m,), and of what is not, (n,); either may be empty."""

    positive: Tensor
    negative: Tensor


def rates(trials: Sequence[Trialled], generator: torch.Generator) -> list[Rate]:
    """AUC and the true-positive rates at 1 % and 0.1 % false positives, over all trials together.

    The interval of the AUC resamples whole trials (percentile bootstrap, Efron 1979), because the scores of one
    update depend on each other; where it has no width, the bound of Clopper and Pearson 1934 for as many
    successes as positives.  That of a true-positive rate is Clopper and Pearson's for the positives, at the
    threshold that the negatives gave.
    """
    positive = torch.cat([trial.positive for trial in trials])
    negative = torch.cat([trial.negative for trial in trials])
    if not len(positive) or not len(negative):
        reason = f"needs scores of both kinds, got {len(positive)} and {len(negative)}"
        return [Rate(name=name, value=None, chance=chance, reason=reason) for name, chance in RATES.items()]
    return [
        _auc(trials, positive, negative, generator),
        *(_true_positive_rate(name, level, positive, negative) for name, level in FALSE_POSITIVES.items()),
    ]


def auc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive's score is above a negative's, ties counting half."""
    return float(binary_auroc(*_ranked(positive, negative)))


def roc(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """(false-positive rates, true-positive rates), rising from (0, 0) to (1, 1), float64."""
    false, true, _ = binary_roc(*_ranked(positive, negative))
    return false.double(), true.double()


def curve(positive: Tensor, negative: Tensor) -> list[tuple[float, float]]:
    """The ROC curve thinned to some two hundred points, dense where false positives are few."""
    false, true = roc(positive, negative)
    if len(false) > CURVE_POINTS:
        at = torch.cat([torch.zeros(1), torch.logspace(-4, 0, CURVE_POINTS - 1)]).double()
        rows = torch.unique(torch.searchsorted(false, at, right=True).sub(1).clamp(0))
        false, true = false[rows], true[rows]
    return [(round(x, 6), round(y, 6)) for x, y in zip(false.tolist(), true.tolist(), strict=True)]


def _ranked(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Scores as ranks in [0, 1], which torchmetrics leaves as they are (it squashes others), and targets."""
    scores = torch.cat([positive, negative]).double()
    _, rank = torch.unique(scores, return_inverse=True)
    target = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).long().to(scores.device)
    return rank.double() / max(1, int(rank.max())), target


def _auc(trials: Sequence[Trialled], positive: Tensor, negative: Tensor, generator: torch.Generator) -> Rate:
    value = auc(positive, negative)
    low, high = _bootstrap(trials, value, generator)
    if not low < high:
        exact = _exact(round(value * len(positive)), len(positive))
        low, high = min(value, exact[0]), max(value, exact[1])
    return Rate(name="auc", value=value, low=low, high=high, chance=RATES["auc"])


def _bootstrap(trials: Sequence[Trialled], value: float, generator: torch.Generator) -> tuple[float, float]:
    """Percentiles of the AUC over trials drawn with repetition, moved so that their mean is `value`: trials drawn
    twice pair their own positives and negatives more often than the sample does.

    The AUC of pooled scores is the mean over pairs of trials of the AUC of one's positives against the
    other's negatives, weighted by their numbers, so that no score is sorted twice.
    """
    wins = torch.stack([_wins(trials, trial.negative) for trial in trials], dim=1)
    positives = torch.tensor([len(trial.positive) for trial in trials], dtype=torch.float64)
    negatives = torch.tensor([len(trial.negative) for trial in trials], dtype=torch.float64)
    drawn = torch.randint(len(trials), (RESAMPLES, len(trials)), generator=generator)
    counts = torch.zeros(RESAMPLES, len(trials), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    pairs = (counts @ positives) * (counts @ negatives)
    values = torch.einsum("rs,st,rt->r", counts, wins, counts)[pairs > 0] / pairs[pairs > 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    shift = value - float(values.mean())
    return max(0.0, min(value, low + shift)), min(1.0, max(value, high + shift))


def _wins(trials: Sequence[Trialled], negative: Tensor) -> Tensor:
    """(T,): how many pairs each trial's positives win against these negatives, ties counting half."""
    ordered = negative.double().sort().values
    positive = torch.cat([trial.positive for trial in trials]).double()
    won = (
        torch.searchsorted(ordered, positive) + torch.searchsorted(ordered, positive, right=True)
    ).double() / 2
    owner = torch.repeat_interleave(torch.tensor([len(trial.positive) for trial in trials]))
    return torch.zeros(len(trials), dtype=torch.float64).index_add(0, owner, won)


def _true_positive_rate(name: str, level: float, positive: Tensor, negative: Tensor) -> Rate:
    least = round(1 / level)
    if len(negative) < least:
        reason = f"needs at least {least} non-members, got {len(negative)}"
        return Rate(name=name, value=None, chance=RATES[name], reason=reason)
    false, true = roc(positive, negative)
    value = float(true[false <= level * (1 + 1e-9)].max())
    low, high = _exact(round(value * len(positive)), len(positive))
    return Rate(name=name, value=value, low=low, high=high, chance=RATES[name])


def _exact(successes: int, count: int) -> tuple[float, float]:
    interval = binomtest(successes, count).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)
