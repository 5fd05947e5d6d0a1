"""What each party of a system sees: plain values, kept in memory by `Seen`, written to files elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from leakaudit.models.victim import Params
from leakaudit.rounds import Round
from leakaudit.update import Update

Role = Literal["server", "peer", "network", "enclave-host"]


@dataclass(frozen=True)
class Member:
    """One client's part in what is seen: weight * client_update(base, batch).

    Attributes:
        client: its index.
        round: what it did (one client's).
        rows: (n,) int64, the truth: its examples, in the order of local steps.
        weight: of its pseudo-gradient in the sum that is seen.
        base: the model it trained from, as far as this party can tell; None for the one of the observation.
        staleness: server steps between its download and the use of its update, >= 0.
    """

    client: int
    round: Round
    rows: Tensor
    weight: float = 1.0
    base: Params | None = None
    staleness: int = 0


@dataclass(frozen=True)
class Observation:
    """One update that a party sees.

    Attributes:
        role: who sees it; observer: which of them, such as a worker's index; None for the server.
        step: of the server (the round), from 0.
        time: of the virtual clock, seconds.
        update: the pseudo-gradient as this party can compute it; sum of weight * client_update over members, plus
            what defenses or compression did to it.
        base: the model the party takes the clients to have trained from.
        members: whose updates are in it; one for a message of a single client.
        defenses: specs of `leakaudit.defenses` that describe what was done to it, such as "top-k:keep=0.01".
        exact: False where the update holds more than the members' rounds, such as a residual of older steps.
        note: one sentence: how the party comes by it.
        sender: whose message it is, where a party other than the server sees those of several clients.
        repeat: 0, or how many updates of this observer were seen before at the same step.
    """

    role: Role
    step: int
    time: float
    update: Update
    base: Params
    members: tuple[Member, ...]
    observer: int | None = None
    defenses: tuple[str, ...] = ()
    exact: bool = True
    note: str = ""
    sender: int | None = None
    repeat: int = 0

    @property
    def name(self) -> str:
        """Of its files: round-0012 for what the server applied, round-0012-client-003, round-0012-peer-1,
        round-0012-peer-1-client-003 for one sender's message."""
        name = f"round-{self.step:04d}"
        if self.role != "server":
            name += f"-{self.role}" + ("" if self.observer is None else f"-{self.observer}")
        elif self.observer is not None:
            name += f"-client-{self.observer:03d}"
        if self.sender is not None:
            name += f"-client-{self.sender:03d}"
        return name + (f"-again-{self.repeat}" if self.repeat else "")


class Seen:
    """The observations of the steps that are wanted; a `sink` gets each instead of keeping it in memory.

    Systems ask `wants(step)` before they build an observation.
    """

    def __init__(
        self, steps: Callable[[int], bool], sink: Callable[[Observation], None] | None = None
    ) -> None:
        self.wants = steps
        self.kept: list[Observation] = []
        self._sink = sink or self.kept.append

    def record(self, observation: Observation) -> None:
        if self.wants(observation.step):
            self._sink(observation)
