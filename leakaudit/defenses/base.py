"""What a defense is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor

from leakaudit.models.victim import Params, Victim
from leakaudit.plugins import instance
from leakaudit.rounds import ClientUpdate, Round
from leakaudit.threat import View
from leakaudit.update import Update


class Defense(ABC):
    """One family; a preset is an instance of a frozen dataclass.

    Only `wrap` is needed.  A defense that changes what the client does before there is an update overrides
    `round` or `victim`; one whose knowledge helps the adversary overrides `adapt`.
    """

    remembers: ClassVar[bool] = False
    """Whether a client's update holds more than its round after the first of a `training`: a residual."""

    @abstractmethod
    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        """The client that defends its update before sharing it; randomness comes from `generator`."""

    def round(self, round: Round) -> Round:
        """What the client does instead of `round`: more examples, more steps, more clients."""
        return round

    def victim(self, victim: Victim) -> Victim:
        """The model as the client trains it: with fewer trainable parameters where layers are frozen."""
        return victim

    def adapt(self, view: View) -> View:
        """The view of an adversary who knows the defense and its options, but not its random numbers.

        It may simulate the defense too (`View.client`), know how the observed numbers were disturbed
        (`View.spread`, `View.slack`, `Knowledge.scale`), leave parameters out (`View.observed`), or know how to
        get from what the client trained on back to the private data (`View.decode`).
        """
        return view

    def training(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        """As `wrap`, for the many rounds of a training: what a client keeps from round to round (a residual)
        may live in the function returned."""
        return self.wrap(client, generator)

    def poisson_rate(self, round: Round) -> float | None:
        """Probability with which each of a client's own examples takes part in a local step, each independently
        drawn by the defense itself; None where batches follow one after the other as the round says."""
        return None

    def epsilon(self, *, sample_rate: float, steps: int, delta: float) -> float | None:
        """Epsilon of differential privacy at `delta` after `steps` updates, each of a share `sample_rate` in (0, 1]
        of the client's data; None where the defense guarantees nothing."""
        return None


def apply(client: ClientUpdate, defenses: Iterable[Defense], generator: torch.Generator) -> ClientUpdate:
    """Wrap `client` in every defense, the first one innermost (applied first)."""
    for defense in defenses:
        client = defense.wrap(client, generator)
    return client


def adapt(view: View, defenses: Iterable[Defense]) -> View:
    """The view of an adversary who knows all the defenses, given in the order they were applied."""
    for defense in defenses:
        view = defense.adapt(view)
    return view


def after(client: ClientUpdate, change: Callable[[Update], Update]) -> ClientUpdate:
    """The client whose update goes through `change`."""

    def defended(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        return change(client(victim, params, round, x, y))

    return defended


def preset(name: str, loaded: object) -> Defense:
    """What an installed package offers as the defense `name`; `ValueError` unless it is one."""
    found = instance(loaded)
    if not isinstance(found, Defense) or not dataclasses.is_dataclass(found):
        raise ValueError(
            f"it is a {type(found).__name__}; accepted: a frozen dataclass derived from leakaudit.defenses.Defense"
        )
    return found
