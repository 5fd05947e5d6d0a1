"""Bounded length of the update."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from leakaudit.defenses.base import Defense, after
from leakaudit.rounds import ClientUpdate
from leakaudit.threat import UNKNOWN, View, known
from leakaudit.update import Update

MARGIN = 1e-3
"""How far below the bound, relative, an update is clearly not clipped."""
NO_MASK = 0.01
"""Share of zeros up to which an update was not pruned."""


@dataclass(frozen=True)
class Clip(Defense):
    """Scale the whole update down to `max_grad_norm` when it is longer (McMahan et al. 2018, flat clipping).

    Attributes:
        max_grad_norm: > 0, in units of the pseudo-gradient.
    """

    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.max_grad_norm < float("inf"):
            raise ValueError(f"max_grad_norm must be positive and finite, got {self.max_grad_norm}")

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        return after(client, self._clip)

    def _clip(self, update: Update) -> Update:
        return shortened(update, self.max_grad_norm)

    def adapt(self, view: View) -> View:
        """At the bound only the direction says anything, and that clipping keeps.

        It is simulated too where something followed that a factor does not pass through, or that shortens
        (pruning, the mean over clients): then a length below the bound does not show that nothing was clipped.
        """
        zeros = sum(int((tensor == 0).sum()) for tensor in view.observed.values())
        if view.round.clients > 1 or zeros > NO_MASK * view.observed.numel():
            view = replace(view, client=after(view.client, self._clip))
        if float(view.observed.norm()) < (1 - MARGIN) * self.max_grad_norm:
            return view
        knowledge = replace(view.knowledge, scale=known(False, f"clipped to {self.max_grad_norm:g}"))
        if view.spread:  # what was added before was scaled with the update, by a factor that nobody shared
            knowledge = replace(knowledge, noise_std=UNKNOWN)
        return replace(view, knowledge=knowledge, spread={})


def shortened(update: Update, bound: float) -> Update:
    """The update, scaled down to length `bound` when it is longer."""
    factor = (bound / update.norm()).clamp(max=1.0)
    return update.map(lambda tensor: tensor * factor)
