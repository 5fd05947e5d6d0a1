"""From nearly right to right: token by token and swap by swap, as long as the update fits better.

Under Gaussian noise the smallest residual is the maximum of the likelihood, so what this finds is the most
likely text among those tried, whatever the attack before it went by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.rows import Rows, evidence, language
from leakaudit.models.language import text_as_labels
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.threat import View

REPRODUCED = 1e-5
"""Relative residual of a text below which nothing is left to find: it is what was shared.  One token off is
farther away, unlike pixels a little off, of which `leakaudit.outcomes.MATCHED` asks less."""
CHOICES = 3

Edit = Callable[[Tensor], Tensor]
"""A change of token numbers (N, L), whatever they are by then; they come back as they were where it is none."""


def put(row: int, column: int, token: int) -> Edit:
    """Another token at a place."""

    def edit(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[row, column] = token
        return changed

    return edit


def swap(row: int, column: int) -> Edit:
    """A token and the next one in each other's places."""

    def edit(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[row, [column, column + 1]] = x[row, [column + 1, column]]
        return changed

    return edit


def descend(
    view: View,
    x: Tensor,
    y: Tensor,
    edits: Sequence[Edit],
    labels: Callable[[Tensor], Tensor],
    monitor: Monitor,
    evaluations: int,
    one_a_round: bool = False,
) -> tuple[Tensor, Tensor, float]:
    """The text x (N, L) with labels y after edits that bring its update nearer, and its residual.

    Args:
        edits: in the order to try them, round after round until none helps.
        labels: the labels of a text.
        evaluations: updates to simulate at most, after that of x.
        one_a_round: make the best edit of each round, not every one that helps.  Where little is wrong many
            wrong edits help a little, and the right one most; where much is wrong it takes more rounds.

    Ends at a residual of `REPRODUCED` and at the monitor's deadline; the monitor sees the best so far.
    """
    best = view.residual(x, y)
    monitor.start(evaluations, target=REPRODUCED)
    done, left, improved = monitor.step(best, x, y), evaluations, True
    while improved and not done:
        improved, before = False, x
        for edit in edits:
            base = before if one_a_round else x
            trial = edit(base)
            if torch.equal(trial, base):
                continue
            if left <= 0 or done:
                return x, y, best
            left -= 1
            truth = labels(trial)
            residual = view.residual(trial, truth)
            if residual < best:
                x, y, best, improved = trial, truth, residual, True
            done = monitor.step(best, x, y)
    return x, y, best


def search(
    view: View, x: Tensor, y: Tensor, rows: Rows, monitor: Monitor, evaluations: int
) -> tuple[Tensor, Tensor, float]:
    """`descend` for one sentence x (1, L), one edit a round: other tokens at the places where the rows are
    least sure, and neighbours swapped there; labels that are the text itself follow it, others stay."""
    itself = language(view).task == "causal-lm"

    def labels(trial: Tensor) -> Tensor:
        return text_as_labels(trial) if itself else y

    return descend(view, x, y, _near(x, rows), labels, monitor, evaluations, one_a_round=True)


def _near(x: Tensor, rows: Rows) -> list[Edit]:
    """Edits of a sentence (1, L) where another token would explain most more of the word rows than its own."""
    scores = evidence(rows, x[0])
    length = min(len(scores), int((x[0] != NO_TOKEN).sum()))
    own = rows.tokens == x[0, :length, None]
    others = scores[:length].masked_fill(own, -torch.inf)
    ranked = others.topk(min(CHOICES, others.shape[1]), dim=1)
    gains = ranked.values[:, 0] - (scores[:length] * own).sum(dim=1)
    edits: list[Edit] = []
    for place in gains.argsort(descending=True).tolist():
        edits += [put(0, place, token) for token in rows.tokens[ranked.indices[place]].tolist()]
        if place + 1 < length:
            edits.append(swap(0, place))
    return edits
