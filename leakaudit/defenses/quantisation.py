"""Fewer bits a number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from leakaudit.defenses.base import Defense, after
from leakaudit.rounds import ClientUpdate
from leakaudit.threat import View

Format = Literal["fp16", "bf16", "int8", "sign"]
SHORT_FLOATS: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
SOFTNESS = 0.1
"""Of the adversary's soft sign, in units of the mean magnitude."""


@dataclass(frozen=True)
class Quantise(Defense):
    """Round every number of the update (Zhu et al. 2019, section 5.1; stochastic: Alistarh et al. 2017).

    Attributes:
        to: "fp16" and "bf16" round to that format; "int8" to even levels between -max|g| and max|g|;
            "sign" keeps the sign times the mean magnitude (Bernstein et al. 2018, scaled as by
            Karimireddy et al. 2019).
        scope: what has its own max|g| or mean magnitude: each "tensor", or each "row" (first index)
            of a tensor with more than one dimension.
        rounding: of "int8": "nearest", or "stochastic", up with the probability that keeps the mean.
        bits: of "int8", 2 to 16: 2^bits - 1 levels; 255 for 8, and 3 for 2 (Wen et al. 2017, TernGrad).
    """

    to: Format = "int8"
    scope: Literal["tensor", "row"] = "tensor"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be between 2 and 16, got {self.bits}")
        if self.to != "int8" and (self.bits != 8 or self.rounding != "nearest"):
            raise ValueError(f"bits and rounding=stochastic are of to=int8, got to={self.to}")
        if self.to in SHORT_FLOATS and self.scope != "tensor":
            raise ValueError(f"scope=row is of to=int8 and to=sign, got to={self.to}")

    @property
    def levels(self) -> int:
        """Steps between 0 and max|g|."""
        return 2 ** (self.bits - 1) - 1

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def rounded(tensor: Tensor) -> Tensor:
            if self.to in SHORT_FLOATS:
                return tensor.to(SHORT_FLOATS[self.to]).to(tensor.dtype)
            if self.to == "sign":
                return tensor.sign() * self._mean_size(tensor)
            return self._even(tensor, generator)

        return after(client, lambda update: update.map(rounded))

    def _even(self, tensor: Tensor, generator: torch.Generator) -> Tensor:
        step = self._step(tensor).clamp_min(torch.finfo(tensor.dtype).tiny)
        levels = tensor / step
        if self.rounding == "nearest":
            return levels.round() * step
        lots = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype, device=generator.device)
        return (levels + lots.to(tensor.device)).floor().clamp(-self.levels, self.levels) * step

    def _dims(self, tensor: Tensor) -> list[int]:
        first = 1 if self.scope == "row" and tensor.dim() > 1 else 0
        return list(range(first, tensor.dim()))

    def _step(self, tensor: Tensor) -> Tensor:
        """Distance between two levels, of a shape that broadcasts; 0 where all numbers are."""
        return tensor.abs().amax(self._dims(tensor), keepdim=True) / self.levels

    def _mean_size(self, tensor: Tensor) -> Tensor:
        return tensor.abs().mean(self._dims(tensor), keepdim=True)

    def adapt(self, view: View) -> View:
        """The interval that every number was rounded from is known; of signs, a soft sign is simulated.

        The largest number of each scope is a level, so the step between levels shows.
        """
        if self.to == "sign":
            return replace(view, client=after(view.client, lambda update: update.map(self._soft_sign)))
        slack = view.observed.detach().map(self._half_width)
        share = math.sqrt(6) if self.rounding == "stochastic" else math.sqrt(3)
        errors = {name: float(width.double().square().mean().sqrt()) for name, width in slack.items()}
        spread = {
            name: math.hypot(view.spread.get(name, 0.0), error / share) for name, error in errors.items()
        }
        return replace(view, slack=slack, spread={name: std for name, std in spread.items() if std > 0})

    def _half_width(self, observed: Tensor) -> Tensor:
        """How far from `observed` the number may have been that was rounded to it."""
        if self.to in SHORT_FLOATS:
            kind = torch.finfo(SHORT_FLOATS[self.to])
            power = torch.ldexp(torch.ones_like(observed), observed.frexp().exponent - 1)
            return (power * kind.eps / 2).clamp_min(kind.smallest_normal * kind.eps / 2)
        step = self._step(observed).expand_as(observed)
        return (step if self.rounding == "stochastic" else step / 2).clone()

    def _soft_sign(self, tensor: Tensor) -> Tensor:
        size = self._mean_size(tensor)
        width = SOFTNESS * size.detach() + torch.finfo(tensor.dtype).tiny
        return (tensor / width).tanh() * size
