"""Noise added to the update before it is shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakaudit.defenses.base import Defense, after
from leakaudit.rounds import ClientUpdate


@dataclass(frozen=True)
class GaussianNoise(Defense):
    """Independent N(0, std^2) on every number of the pseudo-gradient (Zhu et al. 2019, section 5.1).

    Attributes:
        std: >= 0, in units of the pseudo-gradient.
    """

    std: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.std < float("inf"):
            raise ValueError(f"std must be at least 0 and finite, got {self.std}")

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def noisy(tensor: Tensor) -> Tensor:
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            return tensor + self.std * noise.to(tensor.device)

        return after(client, lambda update: update.map(noisy))
