"""`Update`: what a client shares, as an immutable, ordered map from parameter name to tensor.

An `Update` is always the *pseudo-gradient*, pointing where the gradient points.
For one step of SGD it is the gradient; for a model delta it is
(before - after) / learning_rate.  The conversion happens once, where a file is
read (`leakaudit.formats`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Numbers that are looked at together where precision is raised, so that they stay in a processor's cache."""


class Update(Mapping[str, Tensor]):
    """An ordered name -> tensor map with vector arithmetic.

    Tensors are floating point and of any shape.  Two updates combine only when
    they hold the same names; a `KeyError` says which differ.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Update({len(self)} tensors, {self.numel():,} numbers)"

    def __add__(self, other: Update) -> Update:
        return self.combine(other, torch.add)

    def __sub__(self, other: Update) -> Update:
        return self.combine(other, torch.sub)

    def __mul__(self, factor: float) -> Update:
        return self.map(lambda tensor: tensor * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Update:
        return self.map(lambda tensor: tensor / divisor)

    def combine(self, other: Update, operation: Callable[[Tensor, Tensor], Tensor]) -> Update:
        """Apply `operation` tensor by tensor; both sides must hold the same names."""
        if self.keys() != other.keys():
            raise KeyError(f"updates differ in {sorted(self.keys() ^ other.keys())}")
        return Update({name: operation(tensor, other[name]) for name, tensor in self.items()})

    def map(self, function: Callable[[Tensor], Tensor]) -> Update:
        return Update({name: function(tensor) for name, tensor in self.items()})

    def select(self, names: Iterable[str]) -> Update:
        """The named part, in the order of `names`; `KeyError` for one that is missing."""
        return Update({name: self[name] for name in names})

    def to(self, *args: object, **kwargs: object) -> Update:
        """As `torch.Tensor.to`, on every tensor."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))  # type: ignore[call-overload]

    def detach(self) -> Update:
        return self.map(Tensor.detach)

    def dot(self, other: Update) -> Tensor:
        """Inner product over all numbers, a scalar tensor."""
        return torch.stack([(tensor * other[name]).sum() for name, tensor in self.items()]).sum()

    def norm(self) -> Tensor:
        """Euclidean norm over all numbers, a scalar tensor."""
        return torch.stack([tensor.square().sum() for tensor in self.values()]).sum().sqrt()

    def blocks(self, other: Update) -> Iterator[tuple[Tensor, Tensor]]:
        """All numbers of both, flat and in float64, a block at a time: neither is copied as a whole."""
        for name, tensor in self.items():
            parts = (torch.split(each.reshape(-1), BLOCK) for each in (tensor, other[name]))
            for ours, theirs in zip(*parts, strict=True):
                yield ours.double(), theirs.double()

    def distance(self, other: Update, factor: float = 1.0) -> float:
        """|factor * self - other| / |other|, in float64."""
        pairs = ((factor * ours - theirs, theirs) for ours, theirs in self.blocks(other))
        sums = torch.stack([torch.stack([away.dot(away), theirs.dot(theirs)]) for away, theirs in pairs])
        away, whole = sums.sum(dim=0)
        return float((away / whole).sqrt())

    def fit(self, other: Update) -> float:
        """The factor that brings this nearest to another update, in float64; NaN for one of zeros."""
        pairs = self.blocks(other)
        sums = torch.stack([torch.stack([ours.dot(theirs), ours.dot(ours)]) for ours, theirs in pairs])
        along, whole = sums.sum(dim=0)
        return float(along / whole)

    def rms(self) -> float:
        """The root of the mean square of all numbers, in float64."""
        return float(self.detach().to(torch.float64).norm()) / math.sqrt(self.numel())

    def flat(self) -> Tensor:
        """All numbers as one vector, in order."""
        return torch.cat([tensor.reshape(-1) for tensor in self.values()])

    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.values())

    def is_finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self.values())


def mean_of(updates: Sequence[Update]) -> Update:
    """Of at least one update; all must hold the same names."""
    return reduce(Update.__add__, updates) / len(updates)
