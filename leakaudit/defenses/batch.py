"""More work behind one update: larger batches, more local steps.

The manifest of the update says how many examples and steps there are, so every adversary simulates them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from leakaudit.defenses.base import Defense
from leakaudit.rounds import ClientUpdate, Round


@dataclass(frozen=True)
class LargerBatch(Defense):
    """More examples in every local step (Zhu et al. 2019, section 5.2; Huang et al. 2021, section 4.3).

    Attributes:
        size: examples of each client, >= 1, all in one local batch.
    """

    size: int = 8

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        return client

    def round(self, round: Round) -> Round:
        return replace(round, num_examples=self.size * round.clients, local_batch_size=None)


@dataclass(frozen=True)
class LocalSteps(Defense):
    """More local SGD steps on the same examples before anything is shared (McMahan et al. 2017, FedAvg).

    Attributes:
        steps: >= 1, in place of the round's.
        learning_rate: of these steps, > 0, in place of the round's.
    """

    steps: int = 5
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        return client

    def round(self, round: Round) -> Round:
        return replace(round, local_steps=self.steps, learning_rate=self.learning_rate)
