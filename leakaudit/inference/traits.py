"""Properties of records that have nothing to do with their labels, as far as they are compared within a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from leakaudit.errors import InputError
from leakaudit.inference.base import Records
from leakaudit.models.spaces import NO_TOKEN, Pixels
from leakaudit.models.victim import Victim
from leakaudit.spec import suggest

Trait = Callable[[Tensor], Tensor]


def brightness(pixels: Tensor) -> Tensor:
    """(n,) mean of all pixels."""
    return pixels.flatten(1).mean(1)


def colour(pixels: Tensor) -> Tensor:
    """(n,) mean over pixels of the largest channel minus the smallest; 0 for grey pictures."""
    return (pixels.amax(1) - pixels.amin(1)).flatten(1).mean(1)


def length(tokens: Tensor) -> Tensor:
    """(n,) number of tokens."""
    return (tokens != NO_TOKEN).sum(1).double()


IMAGE_TRAITS: dict[str, Trait] = {"bright": brightness, "colourful": colour}
TEXT_TRAITS: dict[str, Trait] = {"long": length}


def traits_of(victim: Victim) -> Mapping[str, Trait]:
    """The properties of the victim's kind of records, the usual one first."""
    return IMAGE_TRAITS if isinstance(victim.space, Pixels) else TEXT_TRAITS


def has_trait(victim: Victim, records: Records, name: str) -> Tensor:
    """(n,) bool: whether each record is above the median of its own class in the named property.

    Comparing within a class leaves the labels saying nothing about it.  Records whose labels are tokens are
    compared with all.  Raises `InputError` for an unknown name.
    """
    known = traits_of(victim)
    if name not in known:
        raise InputError(f"unknown property {name!r}{suggest(name, known)}; known here: {', '.join(known)}")
    x = victim.space.decode(records.x) if isinstance(victim.space, Pixels) else records.x
    values = known[name](x).double()
    classes = records.y if records.y.dim() == 1 else torch.zeros_like(values, dtype=torch.int64)
    above = torch.zeros_like(values, dtype=torch.bool)
    for label in torch.unique(classes):
        rows = classes == label
        above[rows] = values[rows] > values[rows].quantile(0.5)
    return above
