"""What differential privacy costs: epsilon of DP-SGD, by the accountants of Opacus."""

from __future__ import annotations

import math
import warnings
from typing import Literal

from leakaudit.errors import InputError

Accountant = Literal["prv", "rdp"]
EPSILON_ERROR = 0.01
"""Of the PRV accountant, which adds it to what it reports, up to an epsilon of 2; above, 0.5 % of epsilon."""
LARGEST_GRID = 4_000_000
LARGEST_PRV = 500.0
"""Epsilon above which the PRV accountant is not asked: exp(epsilon) overflows at 709, and what it then reports
is far too small."""


def epsilon_spent(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> tuple[float, Accountant]:
    """An upper bound on epsilon at `delta` of the Poisson-subsampled Gaussian mechanism, composed `steps` times.

    By Opacus' PRV accountant (Gopi, Lee and Wutschitz 2021), or by its RDP accountant (Mironov, Talwar and
    Zhang 2019) where that is smaller or PRV fails: little noise needs a grid too large for it, and overflows above
    an epsilon of `LARGEST_PRV`.  Neighbouring data differ by one example added or removed.

    Args:
        noise_multiplier: > 0, standard deviation of the noise over the clipping bound.
        sample_rate: in (0, 1].
        steps: >= 1.
        delta: in (0, 1).

    Raises `InputError` for a value out of range.
    """
    check_mechanism(noise_multiplier, sample_rate, steps)
    if not 0 < delta < 1:
        raise InputError(f"delta={delta}: accepted are numbers between 0 and 1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upper, order = _rdp(noise_multiplier, sample_rate, steps, delta)
        error = EPSILON_ERROR * max(1.0, upper / 2)
        # What the accountant's domain and mesh will be (Gopi et al. 2021, theorem 5.5): its time is the grid's.
        width = 2 * (upper + math.log(1000) / (order - 1))
        grid = width / error * math.sqrt(steps * math.log(12_000 / delta) / 2)
        if not grid < LARGEST_GRID or upper > LARGEST_PRV:
            return upper, "rdp"
        tighter = _prv(noise_multiplier, sample_rate, steps, delta, error)
    return (tighter, "prv") if tighter <= upper else (upper, "rdp")


def check_mechanism(noise_multiplier: float, sample_rate: float, steps: int) -> None:
    """`InputError` unless these make a Poisson-subsampled Gaussian mechanism with noise."""
    if not 0 < noise_multiplier < math.inf:
        raise InputError(f"noise_multiplier={noise_multiplier}: accepted are numbers above 0")
    if not 0 < sample_rate <= 1:
        raise InputError(f"sample_rate={sample_rate}: accepted are numbers above 0, up to 1")
    if steps < 1:
        raise InputError(f"steps={steps}: accepted are 1 and above")


def _rdp(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> tuple[float, float]:
    """Epsilon and the order that gives it."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    epsilon, order = accountant.get_privacy_spent(delta=delta)
    return float(epsilon), float(order)


def _prv(noise_multiplier: float, sample_rate: float, steps: int, delta: float, error: float) -> float:
    """Infinite where the accountant fails."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    try:
        found = float(accountant.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError, ArithmeticError, MemoryError):
        return math.inf
    return found if math.isfinite(found) else math.inf
