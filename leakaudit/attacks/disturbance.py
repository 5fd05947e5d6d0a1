"""What the adversary knows of how the observed numbers were disturbed, as errors and as a comparison.

An adversary who knows the defense compares updates by what the disturbance leaves of them: by maximum
likelihood under Gaussian noise of known size, by what lies outside the interval of a quantised number,
and without lengths where the update was clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from leakaudit.attacks.matching import fitted, outside
from leakaudit.threat import View
from leakaudit.update import Update

EXACT_SHARE = 1e-3
"""Tensors without an error of their own beside others with one get this share of the largest."""
PULL = 0.1
"""Weight of a departure within the interval of a quantised number, against one outside."""
LEAST_LENGTH = 0.1
"""Of the observed length, what is left at least for the undisturbed update."""


def noise_of(view: View) -> dict[str, float]:
    """Tensor name -> standard deviation of the noise on each of its numbers; empty where none is known.

    `View.spread` where there is one, else `Knowledge.noise_std` for all alike.
    """
    if any(view.spread.values()):
        return {name: float(view.spread.get(name, 0.0)) for name in view.observed}
    noise = view.knowledge.noise_std.value
    return dict.fromkeys(view.observed, float(noise)) if noise else {}


def errors_of(view: View) -> dict[str, float]:
    """As `noise_of`, rounding to an interval (`View.slack`) taken for noise uniform over it, and every
    error at least the share `EXACT_SHARE` of the largest, so that it can be divided by."""
    noise = noise_of(view)
    squares = {name: noise.get(name, 0.0) ** 2 for name in view.observed}
    if view.slack is not None:
        for name, half in view.slack.items():
            squares[name] += float(half.double().square().mean()) / 3
    largest = max(squares.values(), default=0.0)
    if not largest > 0:
        return {}
    return {name: max(square, EXACT_SHARE**2 * largest) ** 0.5 for name, square in squares.items()}


def likely_length(view: View) -> float:
    """The most likely length of the undisturbed update: the observed one without that of known noise."""
    square = float(view.observed.to(dtype=torch.float64).norm().square())
    noise = sum(std**2 * view.observed[name].numel() for name, std in noise_of(view).items())
    return float(max(square - noise, LEAST_LENGTH**2 * square) ** 0.5)


@dataclass(frozen=True)
class Comparison:
    """How the simulated update is seen before a distance to the observed one is taken.

    Attributes:
        length: to scale the simulated update to, > 0; None where its length means something.
        factors: for the tensors of both updates, by maximum likelihood; empty for 1 each.
        slack: half widths of the intervals in which the undisturbed numbers lie, or None.
    """

    length: float | None
    factors: Mapping[str, float]
    slack: Update | None

    @classmethod
    def of(cls, view: View) -> Comparison:
        """Rounding is an interval only where no noise blurs it."""
        noise = noise_of(view)
        factors = {name: 1 / error for name, error in errors_of(view).items()} if noise else {}
        return cls(
            likely_length(view) if view.scale_free else None,
            _same_length(factors, view.observed),
            None if noise else view.slack,
        )

    def __call__(self, simulated: Update, observed: Update) -> tuple[Update, Update]:
        """(simulated, observed), ready for a distance."""
        simulated = self.sized(simulated)
        if self.slack is not None:
            simulated = outside(simulated, observed, self.slack, PULL)
        if self.factors:
            simulated, observed = (
                Update({name: self.factors[name] * tensor for name, tensor in update.items()})
                for update in (simulated, observed)
            )
        return simulated, observed

    def sized(self, simulated: Update) -> Update:
        """The simulated update, scaled where its own length means nothing."""
        return simulated if self.length is None else fitted(simulated, self.length)


def _same_length(factors: Mapping[str, float], observed: Update) -> dict[str, float]:
    """The factors times what keeps the length of the observed update."""
    if not factors:
        return {}
    squares = {name: float(tensor.double().square().sum()) for name, tensor in observed.items()}
    weighted = sum(factors[name] ** 2 * square for name, square in squares.items())
    common = (sum(squares.values()) / weighted) ** 0.5 if weighted > 0 else 1.0
    return {name: common * factor for name, factor in factors.items()}
