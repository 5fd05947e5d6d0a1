"""Bounded length of the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leakaudit.defenses.base import Defense, after
from leakaudit.rounds import ClientUpdate
from leakaudit.update import Update


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
        def clip(update: Update) -> Update:
            factor = (self.max_grad_norm / update.norm()).clamp(max=1.0)
            return update.map(lambda tensor: tensor * factor)

        return after(client, clip)
