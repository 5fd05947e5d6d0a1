"""From nearly right to right: token by token and swap by swap, as long as the update fits better.

Under Gaussian noise the smallest residual is the maximum of the likelihood, so what this finds is the most
likely text among those tried, whatever the attack before it went by.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.rows import Rows, overlaps
from leakaudit.models.language import IGNORED, LanguageVictim
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.threat import View

MATCHED = 1e-5
"""Relative residual below which nothing is left to find."""
CHOICES = 3


def search(
    view: View, x: Tensor, y: Tensor, rows: Rows, monitor: Monitor, evaluations: int
) -> tuple[Tensor, Tensor, float]:
    """One sentence x (1, L) with y, improved by at most so many simulated updates; its residual last."""
    best = view.residual(x, y)
    left = evaluations if best > MATCHED else 0
    improved = True
    while improved and left > 0:
        improved = False
        for trial in _near(x, rows):
            if left <= 0 or monitor.late:
                return x, y, best
            labels = _labels(view, trial, y)
            left -= 1
            residual = view.residual(trial, labels)
            if residual < best:
                x, y, best, improved = trial, labels, residual, True
                monitor.step(best, x, y)
            if best < MATCHED:
                return x, y, best
    return x, y, best


def _near(x: Tensor, rows: Rows) -> Iterator[Tensor]:
    """Other tokens at the places where the rows are least sure, and there the two neighbours swapped."""
    scores = overlaps(rows)
    length = min(len(scores), int((x[0] != NO_TOKEN).sum()))
    most = min(CHOICES + 1, scores.shape[1])
    if length == 0 or most < 2:
        return
    ranked = scores[:length].topk(most, dim=1)
    margins = ranked.values[:, 0] - ranked.values[:, 1]
    for place in margins.argsort().tolist():
        for token in rows.tokens[ranked.indices[place]].tolist():
            if token != int(x[0, place]):
                trial = x.clone()
                trial[0, place] = token
                yield trial
        if place + 1 < length and int(x[0, place]) != int(x[0, place + 1]):
            trial = x.clone()
            trial[0, [place, place + 1]] = x[0, [place + 1, place]]
            yield trial


def _labels(view: View, x: Tensor, y: Tensor) -> Tensor:
    """Labels that are the text itself follow it; others stay."""
    victim = view.victim
    assert isinstance(victim, LanguageVictim)
    return x.where(x != NO_TOKEN, torch.tensor(IGNORED)) if victim.task == "causal-lm" else y
