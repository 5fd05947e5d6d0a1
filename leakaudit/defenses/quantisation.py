"""Fewer bits a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leakaudit.defenses.base import Defense, after
from leakaudit.rounds import ClientUpdate


@dataclass(frozen=True)
class Quantise(Defense):
    """Round every number of the update.

    Attributes:
        to: "fp16" and "bf16" round to that format; "int8" to 255 even levels between
            -max|g| and max|g| of each tensor; "sign" keeps the sign times the mean magnitude.
    """

    to: Literal["fp16", "bf16", "int8", "sign"] = "int8"

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        return after(client, lambda update: update.map(_ROUNDING[self.to]))


def _int8(tensor: Tensor) -> Tensor:
    step = (tensor.abs().max() / 127).clamp_min(torch.finfo(tensor.dtype).tiny)
    return (tensor / step).round() * step


_ROUNDING = {
    "fp16": lambda tensor: tensor.to(torch.float16).to(tensor.dtype),
    "bf16": lambda tensor: tensor.to(torch.bfloat16).to(tensor.dtype),
    "int8": _int8,
    "sign": lambda tensor: tensor.sign() * tensor.abs().mean(),
}
