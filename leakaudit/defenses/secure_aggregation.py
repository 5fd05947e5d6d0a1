"""Secure aggregation: the server sees the sum over a cohort and no client's own update."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leakaudit.defenses.base import Defense, after
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import ClientUpdate, Round, client_update, mean_update
from leakaudit.threat import View
from leakaudit.update import Update


@dataclass(frozen=True)
class SecureAggregation(Defense):
    """The adversary sees the mean over several clients, in fixed point (Bonawitz et al. 2017).

    The protocol sums integers modulo R.  Each client clamps its numbers to [-limit, limit] and rounds them to
    the nearest of 2^bits even levels; here the sum is taken without the modulus, which gives the same number as
    long as R >= clients * 2^bits, as the protocol needs anyway.  The masks cancel in the sum and are not
    simulated, nor are clients that drop out.

    In a chain, what is left of it acts on every client by itself and what is right of it on the mean.

    Attributes:
        clients: how many times as many clients share the round, each with as many examples as before; >= 1.
        bits: of a number, 2 to 48.  22, and a limit of 8, are the defaults of Flower's SecAgg+, which rounds
            at random; here to the nearest.
        limit: largest magnitude, > 0, in units of the pseudo-gradient.
    """

    clients: int = 4
    bits: int = 22
    limit: float = 8.0

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ValueError(f"clients must be at least 1, got {self.clients}")
        if not 2 <= self.bits <= 48:
            raise ValueError(f"bits must be between 2 and 48, got {self.bits}")
        if not 0 < self.limit < float("inf"):
            raise ValueError(f"limit must be positive and finite, got {self.limit}")

    @property
    def step(self) -> float:
        """Between neighbouring levels, in units of the pseudo-gradient."""
        return 2 * self.limit * 0.5**self.bits

    def round(self, round: Round) -> Round:
        return replace(
            round,
            num_examples=round.num_examples * self.clients,
            clients=round.clients * self.clients,
            sizes=round.sizes and round.sizes * self.clients,
            weights=round.weights and tuple(weight / self.clients for weight in round.weights * self.clients),
            client_steps=round.client_steps and round.client_steps * self.clients,
        )

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        return mean_of_each(after(client, lambda update: update.map(self._fixed_point)))

    def adapt(self, view: View) -> View:
        """Simulates every client by itself, without rounding, whose spread is taken for independent noise.

        What was known of one client's numbers becomes what is known of the mean: the mean of n independent
        noises has 1/sqrt(n) of their standard deviation, and the mean of n roundings lies in an interval as
        wide as one; of a weighted sum the length of the weights and the sum of their magnitudes take their places.
        """
        weights = view.round.each_weight()
        rounding, cohort = self.step / math.sqrt(12), math.hypot(*weights)
        width = math.fsum(map(abs, weights))
        spread = {name: math.hypot(view.spread.get(name, 0.0), rounding) * cohort for name in view.observed}
        slack = (
            None if view.slack is None else view.slack.map(lambda tensor: (tensor + self.step / 2) * width)
        )
        plain = view.client is client_update  # which takes the mean over clients itself
        client = view.client if plain else mean_of_each(view.client)
        return replace(view, client=client, spread=spread, slack=slack)

    def levels(self, tensor: Tensor, lots: Tensor | None = None) -> Tensor:
        """Whole numbers of steps (float64, in [-2^(bits-1), 2^(bits-1)]): to the nearest, ties to even; or, with
        `lots` (the tensor's shape, uniform in [0, 1)), up with the probability that keeps the mean."""
        exact = tensor.double() / self.step
        rounded = exact.round() if lots is None else (exact + lots).floor()
        return rounded.clamp(-(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1))

    def _fixed_point(self, tensor: Tensor) -> Tensor:
        return (self.levels(tensor) * self.step).to(tensor.dtype)


def mean_of_each(client: ClientUpdate) -> ClientUpdate:
    """The mean over the round's clients of what `client` makes of each one's own examples."""

    def aggregated(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        return mean_update(client, victim, params, round, x, y)

    return aggregated
