"""Vectors masked by secure aggregation: integers modulo 2^b that say nothing by themselves.

A masked vector is its input plus a mask that is uniform modulo 2^b, so it is uniform itself, whatever the
input (Bonawitz et al. 2017, lemma 6.1).  Whether a file's numbers look so is tested with Kolmogorov and
Smirnov's test; looking uniform does not prove that a good generator made the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakaudit.errors import InputError
from leakaudit.formats.reading import RawFile

ENOUGH = 256
"""Numbers from which on integers that fill their range are taken for masked ones without being told."""
SAMPLE = 65_536
UNLIKELY = 1e-6
"""Probability of a test statistic as large under a uniform mask, below which it is not one."""


@dataclass(frozen=True)
class Masked:
    """Attributes:
    modulus: the numbers are integers modulo this.
    stated: whether the file says so; else it was seen.
    numbers: how many there are.
    p_value: of the test that they are uniform, in [0, 1].
    """

    modulus: int
    stated: bool
    numbers: int
    p_value: float

    @property
    def uniform(self) -> bool:
        return self.p_value >= UNLIKELY


def masked(raw: RawFile) -> Masked | None:
    """How the numbers of a file are masked; None where they are not.

    A file that does not state a modulus counts as masked when it holds nothing but integers, at least 256,
    which are uniform over 0 ... 2^b - 1 for some b of 16 and above.
    """
    tensors = [tensor for tensor in raw.entries.values() if tensor is not None]
    stated = None if raw.manifest.message is None else raw.manifest.message.modulus
    if stated is not None:
        return _tested(tensors, stated, stated=True)
    if any(tensor.is_floating_point() or tensor.dtype == torch.bool for tensor in tensors):
        return None
    numbers = _numbers(tensors)
    if len(numbers) < ENOUGH or float(numbers.min()) < 0:
        return None
    modulus = 1 << int(numbers.max()).bit_length()
    found = _tested(tensors, modulus, stated=False)
    return found if modulus >= 1 << 16 and found.uniform else None


def refuse_masked(raw: RawFile) -> None:
    """Raise `InputError` for a masked file: there is nothing to attack in it alone."""
    found = masked(raw)
    if found is not None:
        raise InputError(
            f"{raw.path} is masked by secure aggregation (integers modulo {found.modulus:,}): nothing to"
            " reconstruct from this message alone; accepted: the sum that the server unmasks, or the update"
            " before masking.  leakaudit inspect says what the message carries besides"
        )


def _tested(tensors: list[Tensor], modulus: int, *, stated: bool) -> Masked:
    numbers = _numbers(tensors)
    from scipy import stats  # half a second, which the other files do without

    sample = numbers[:: max(1, len(numbers) // SAMPLE)]
    p_value = float(stats.kstest((sample / modulus).numpy(), "uniform").pvalue) if len(sample) else 1.0
    return Masked(modulus, stated, len(numbers), p_value)


def _numbers(tensors: list[Tensor]) -> Tensor:
    """All numbers of vectors, float64; single numbers, such as a weight sent along, are left out."""
    vectors = [tensor.reshape(-1).double() for tensor in tensors if tensor.numel() > 1]
    return torch.cat(vectors) if vectors else torch.empty(0, dtype=torch.float64)
