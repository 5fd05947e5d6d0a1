"""What a server or a peer makes of the messages of delayed training: the workers' models, replayed.

Delay hides nothing from who sees every message.  A worker's model is what it began with, less its own gradients
and the corrections, and all of these were sent: the server computes every local model, and so every base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leakaudit.federated.exchange import Part
from leakaudit.federated.seen import Member, Observation, Role
from leakaudit.federated.simulation import Simulation, accelerate, descend
from leakaudit.models.victim import Params
from leakaudit.update import Update

if TYPE_CHECKING:
    from leakaudit.federated.delayed import Plan

Seer = Callable[[list[Part], Update], None]
"""Called with all parts of a block and their mean, block after block."""


@dataclass
class Replay:
    """A worker's model at the start of a block, from what was sent.

    Exactly the worker's own (up to rounding where a block has several steps) unless what was sent is compressed:
    then what the worker took of its own steps, and dropped at the correction, is taken to be what it sent.
    """

    params: Params
    learning_rate: float
    momentum: float = 0.0
    velocity: Update | None = None

    def advance(self, sent: Update, corrections: Iterable[tuple[Update, Update]] = ()) -> None:
        """Past a block: the sum of its gradients, and (what was sent, the mean) for each correction in it."""
        direction = sent
        for own, mean in corrections:
            direction = direction - own + mean
        self.velocity = accelerate(self.velocity, direction, self.momentum)
        self.params = descend(self.params, self.velocity, self.learning_rate)


class MeanModel:
    """The mean of models as they come; of equal models, exactly those."""

    def __init__(self, models: Iterable[Params] = ()) -> None:
        self.count = 0
        self._first: Params = {}
        self._beyond: Update | None = None
        for model in models:
            self.add(model)

    def add(self, model: Params) -> None:
        self.count += 1
        if self.count == 1:
            self._first = model
            return
        beyond = Update(model) - Update(self._first)
        self._beyond = beyond if self._beyond is None else self._beyond + beyond

    def value(self) -> Params:
        if self._beyond is None:
            return self._first
        return {name: self._first[name] + part / self.count for name, part in self._beyond.items()}


def seer(plan: Plan, simulation: Simulation) -> Seer:
    """Who sees what: every message, at a server or where sparse parts are gathered; else their sum."""
    every = plan.topology == "server" or plan.sparse
    return (_SeesMessages if every else _SeesSum)(plan, simulation).saw


class _Sees:
    """Base: keeps what corrections will need, and asks whether a block is wanted."""

    def __init__(self, plan: Plan, simulation: Simulation) -> None:
        self.plan, self.simulation = plan, simulation
        self._history: dict[int, tuple[list[Part], Update]] = {}

    def saw(self, parts: list[Part], mean: Update) -> None:
        block = parts[0].block
        self._history[block] = parts, mean
        first = block * self.plan.period
        wanted = [s for s in range(first, first + self.plan.period) if self.simulation.seen.wants(s)]
        if wanted:
            self.record(wanted[0], parts, mean)
        dues = self.plan.corrections(block)
        self.advance(parts, mean, [self._history.pop(due) for due in dues])

    def record(self, step: int, parts: list[Part], mean: Update) -> None:
        raise NotImplementedError

    def advance(
        self, parts: list[Part], mean: Update, corrections: Sequence[tuple[list[Part], Update]]
    ) -> None:
        raise NotImplementedError

    def new_replay(self) -> Replay:
        return Replay(self.simulation.task.victim.params, self.plan.learning_rate, self.plan.momentum)

    def steady(self, block: int) -> bool:
        """Whether no correction changes the model between the first and the last gradient of a block."""
        steps = range(block * self.plan.period, (block + 1) * self.plan.period - 1)
        return all(self.plan.due(step) is None for step in steps)

    def defenses(self, step: int) -> tuple[str, ...]:
        """What was done to the sum of a block's gradients, without what memory added."""
        if self.plan.compression is None:
            return ()
        compression = self.plan.compression(step)
        specs = []
        if compression.clip is not None:
            specs.append(f"clip:max_grad_norm={compression.clip / math.sqrt(compression.nodes):g}")
        if compression.keep < 1:
            specs.append(f"top-k:keep={compression.keep:g}")
        return tuple(specs)

    def member(self, part: Part, weight: float, base: Params) -> Member:
        return Member(part.client, self.plan.round, part.rows, weight, base, self.plan.delay)


class _SeesMessages(_Sees):
    """Every worker's message: the server, or the first worker where all gather all."""

    def __init__(self, plan: Plan, simulation: Simulation) -> None:
        super().__init__(plan, simulation)
        self._replays = [self.new_replay() for _ in simulation.clients]

    def record(self, step: int, parts: list[Part], mean: Update) -> None:
        server = self.plan.topology == "server"
        exact, note = self._certainty(parts[0].block)
        bases = [replay.params for replay in self._replays]
        defenses, now, see = (
            self.defenses(parts[0].step),
            self.simulation.env.now,
            self.simulation.seen.record,
        )
        if server:
            members = [self.member(p, 1 / len(parts), b) for p, b in zip(parts, bases, strict=True)]
            applied = f"the mean of all messages, which the server sends back; {note}"
            base = MeanModel(bases).value()
            see(Observation("server", step, now, mean, base, tuple(members), None, defenses, exact, applied))
        role: Role = "server" if server else "peer"
        for part, base in zip(parts, bases, strict=True):
            if not server and part is parts[0]:
                continue
            observer, sender = (part.client, None) if server else (parts[0].client, part.client)
            who = (self.member(part, 1.0, base),)
            one = f"one worker's message, as it was sent; {note}"
            see(Observation(role, step, now, part.sent, base, who, observer, defenses, exact, one, sender))

    def _certainty(self, block: int) -> tuple[bool, str]:
        base = "its base is the local model, replayed from all messages"
        if block and self.plan.compression is not None:
            return False, f"{base}, of which some numbers were not sent; it holds a residual of older steps"
        if not self.steady(block):
            return False, f"{base}; a correction moved the model between its steps"
        return True, base

    def advance(
        self, parts: list[Part], mean: Update, corrections: Sequence[tuple[list[Part], Update]]
    ) -> None:
        for index, replay in enumerate(self._replays):
            own = [(sent[index].sent, average) for sent, average in corrections]
            replay.advance(parts[index].sent, own)


class _SeesSum(_Sees):
    """The first worker of a ring: the mean of all, and what is its own.

    It knows its own model, and by the means that of all workers on average, so that of the others on average.
    """

    def __init__(self, plan: Plan, simulation: Simulation) -> None:
        super().__init__(plan, simulation)
        self._own, self._all = self.new_replay(), self.new_replay()

    def record(self, step: int, parts: list[Part], mean: Update) -> None:
        own, *others = parts
        if not others:
            return
        rest = (mean * len(parts) - own.sent) / len(others)
        spread = Update(self._all.params) - Update(self._own.params)
        base = descend(self._all.params, spread, -1 / len(others))
        exact, note = self._certainty(own.block, len(others))
        self.simulation.seen.record(
            Observation(
                "peer",
                step,
                self.simulation.env.now,
                rest,
                base,
                tuple(self.member(part, 1 / len(others), base) for part in others),
                own.client,
                self.defenses(own.step),
                exact,
                f"the sum, less its own part: the mean of all the others; {note}",
            )
        )

    def _certainty(self, block: int, others: int) -> tuple[bool, str]:
        if block and self.plan.compression is not None and self.plan.delay:
            return False, "its base is a guess, the others' mean model, as if nothing had been clipped"
        if not self.steady(block):
            return False, "its base is the others' mean model; a correction moved theirs between their steps"
        if block and self.plan.delay and others > 1:
            return False, "its base is a guess: the others' mean model, as their own models are unknown"
        return True, "its base is the model of each of them"

    def advance(
        self, parts: list[Part], mean: Update, corrections: Sequence[tuple[list[Part], Update]]
    ) -> None:
        self._own.advance(parts[0].sent, [(sent[0].sent, average) for sent, average in corrections])
        self._all.advance(mean)
