"""Noise added to the update before it is shared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leakaudit.defenses.base import Defense, after
from leakaudit.rounds import ClientUpdate
from leakaudit.threat import Fact, View, inferred, known
from leakaudit.update import Update

Draw = Callable[[torch.Size, torch.Generator, torch.dtype], Tensor]


@dataclass(frozen=True)
class Noise(Defense):
    """Independent noise of mean 0 on every number of the pseudo-gradient.

    Attributes:
        std: standard deviation, >= 0, in units of the pseudo-gradient.
        relative: the same as a share of the rms of all numbers of the update that it is added to, >= 0;
            where given it counts instead of `std`.
    """

    std: float = 1e-3
    relative: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("std", self.std), ("relative", self.relative)):
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")

    @property
    def _draw(self) -> Draw:
        """Independent numbers of mean 0 and standard deviation 1, on the generator's device."""
        raise NotImplementedError

    def std_on(self, update: Update) -> float:
        """Standard deviation per number of the noise that `update`, still without it, would get."""
        return self.std if self.relative is None else self.relative * update.rms()

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def noisy(update: Update) -> Update:
            std = self.std_on(update)
            return update.map(
                lambda tensor: (
                    tensor + std * self._draw(tensor.shape, generator, tensor.dtype).to(tensor.device)
                )
            )

        return after(client, noisy)

    def adapt(self, view: View) -> View:
        """The size of the noise is known; relative noise is estimated from observed^2 = rms^2 (1 + relative^2)."""
        if self.relative is None:
            return with_noise(view, self.std, "the defense is known")
        share = self.relative / math.sqrt(1 + self.relative**2)
        return with_noise(
            view, share * view.observed.rms(), "its share is known, the rms observed", exact=False
        )


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Independent N(0, std^2) on every number of the pseudo-gradient (Zhu et al. 2019, section 5.1)."""

    @property
    def _draw(self) -> Draw:
        return lambda shape, generator, dtype: torch.randn(
            shape, generator=generator, dtype=dtype, device=generator.device
        )


@dataclass(frozen=True)
class LaplaceNoise(Noise):
    """Independent Laplace noise on every number of the pseudo-gradient (Zhu et al. 2019, section 5.1).

    Its size is given as a standard deviation too: std = sqrt(2) b, with b the scale of the distribution.
    """

    @property
    def _draw(self) -> Draw:
        return _laplace


def _laplace(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """The difference of two independent exponential numbers of mean b is Laplace noise of scale b."""
    first, second = (
        torch.empty(shape, dtype=dtype, device=generator.device).exponential_(generator=generator)
        for _ in range(2)
    )
    return (first - second) / math.sqrt(2)


def with_noise(view: View, std: float, source: str, *, exact: bool = True) -> View:
    """The view of an adversary who knows that independent noise of size `std` was added last.

    What was known of the rounding before is still an error (`View.spread`), but no interval any more.
    """
    if not std > 0:
        return view
    spread = {name: math.hypot(view.spread.get(name, 0.0), std) for name in view.observed}
    total = math.sqrt(
        sum(spread[name] ** 2 * tensor.numel() for name, tensor in view.observed.items())
        / view.observed.numel()
    )
    fact: Fact = known(total, source) if exact else inferred(total, source)
    return replace(view, spread=spread, slack=None, knowledge=replace(view.knowledge, noise_std=fact))
