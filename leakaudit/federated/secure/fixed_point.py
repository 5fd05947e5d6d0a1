"""Updates as vectors of integers modulo 2^b, and their sum back; rounded as `SecureAggregation` rounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from leakaudit.defenses.secure_aggregation import SecureAggregation
from leakaudit.errors import InputError
from leakaudit.federated.secure.ring import Ring, Vector
from leakaudit.formats.phrases import quoted, shape_text
from leakaudit.update import Update


@dataclass(frozen=True)
class FixedPoint:
    """Numbers in [-limit, limit] as whole numbers of steps of 2 * limit / 2^bits, modulo 2^modulus_bits.

    Attributes:
        clients: whose vectors may be summed without wrapping around, >= 1.
        bits: of a number, 2 to 48; limit: > 0, larger numbers are clamped.
        modulus_bits: 8 to 63, such that 2^modulus_bits > clients * 2^bits.  (A number has 2^bits + 1 levels, both
            limits among them, so that equality would not do.)
    """

    clients: int
    bits: int = 22
    limit: float = 8.0
    modulus_bits: int = 32

    def __post_init__(self) -> None:
        _ = self._rounding  # refuses bits and limit
        Ring(self.modulus_bits, 1)
        if self.clients < 1:
            raise ValueError(f"clients must be at least 1, got {self.clients}")
        if 1 << self.modulus_bits <= self.clients << self.bits:
            needed = self.bits + self.clients.bit_length()
            raise ValueError(
                f"the sum of {self.clients} clients' numbers of {self.bits} bits wraps around modulo"
                f" 2^{self.modulus_bits}; accepted: a modulus of {needed} bits or more"
            )

    @cached_property
    def _rounding(self) -> SecureAggregation:
        return SecureAggregation(clients=1, bits=self.bits, limit=self.limit)

    @property
    def step(self) -> float:
        """Between neighbouring levels."""
        return self._rounding.step

    @property
    def largest(self) -> int:
        """Magnitude of a client's largest integer."""
        return 1 << (self.bits - 1)

    def ring(self, like: Update, extra: int = 0) -> Ring:
        """Of the vectors of updates such as `like`, with so many integers more."""
        return Ring(self.modulus_bits, like.numel() + extra)

    def encode(self, update: Update, like: Update, generator: torch.Generator | None = None) -> Vector:
        """All numbers in order, (like.numel(),) uint64.

        Args:
            like: names and shapes that all clients agreed on.
            generator: rounds at random, which keeps the mean; without it, to the nearest.

        Raises `InputError` for other names or shapes, and for a number that is not finite, which has no integer.
        """
        if list(update) != list(like):
            names = sorted(update.keys() ^ like.keys()) or list(update)
            raise InputError(f"the update does not hold the tensors that were agreed on: {quoted(names)}")
        for name, tensor in update.items():
            if tensor.shape != like[name].shape:
                raise InputError(
                    f"tensor {name} has shape {shape_text(tensor.shape)}; agreed on: {shape_text(like[name].shape)}"
                )
        if not update.is_finite():
            raise InputError("the update holds a number that is not finite, which has no fixed-point value")
        flat = update.detach().flat().double().cpu()
        lots = None if generator is None else torch.rand(flat.shape, generator=generator, dtype=torch.float64)
        return self.integers(self._rounding.levels(flat, lots).to(torch.int64))

    def integers(self, levels: torch.Tensor) -> Vector:
        """Signed whole numbers (n,) int64 modulo 2^modulus_bits."""
        return Ring(self.modulus_bits, len(levels)).reduce(levels.numpy().view(np.uint64))

    def decode(self, total: Vector, like: Update) -> Update:
        """The update of a sum of vectors (like.numel(),), in the names, shapes and types of `like`; within 2^53 steps
        nothing is rounded before the conversion to the type."""
        whole = torch.from_numpy(self.ring(like).signed(total).copy()).double() * self.step
        parts = torch.split(whole, [tensor.numel() for tensor in like.values()])
        return Update(
            {
                name: part.reshape(tensor.shape).to(tensor)
                for (name, tensor), part in zip(like.items(), parts, strict=True)
            }
        )

    def clamped(self, update: Update) -> int:
        """How many numbers of the update are beyond the limit."""
        return sum(int((tensor.abs() > self.limit).sum()) for tensor in update.values())

    @property
    def spec(self) -> str:
        """The defense that describes the rounding: every client's own, without multiplying clients."""
        defaults = SecureAggregation()
        named = {"bits": self.bits, "limit": self.limit}
        differing = [f"{name}={value}" for name, value in named.items() if value != getattr(defaults, name)]
        return ",".join(["secure-aggregation:clients=1", *differing])
