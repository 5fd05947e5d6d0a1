"""Sparse updates: only the largest numbers are shared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leakaudit.defenses.base import Defense, after
from leakaudit.rounds import ClientUpdate


@dataclass(frozen=True)
class TopK(Defense):
    """Keep the largest share `keep` of every tensor by magnitude, zero the rest (Zhu et al. 2019, section 5.2).

    Attributes:
        keep: in (0, 1]; at least one number of a tensor is kept.
    """

    keep: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}")

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def prune(tensor: Tensor) -> Tensor:
            flat = tensor.reshape(-1)
            kept = flat.abs().topk(max(1, math.ceil(self.keep * flat.numel()))).indices
            return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(tensor.shape)

        return after(client, lambda update: update.map(prune))
