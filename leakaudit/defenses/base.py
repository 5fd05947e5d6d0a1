"""What a defense is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import ClientUpdate, Round
from leakaudit.update import Update


class Defense(Protocol):
    """One family; a preset is an instance of a frozen dataclass."""

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        """The client that defends its update before sharing it; randomness comes from `generator`."""


def apply(client: ClientUpdate, defenses: Iterable[Defense], generator: torch.Generator) -> ClientUpdate:
    """Wrap `client` in every defense, the first one innermost (applied first)."""
    for defense in defenses:
        client = defense.wrap(client, generator)
    return client


def after(client: ClientUpdate, change: Callable[[Update], Update]) -> ClientUpdate:
    """The client whose update goes through `change`."""

    def defended(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        return change(client(victim, params, round, x, y))

    return defended
