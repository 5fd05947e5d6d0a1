"""Local training, put off until somebody needs a result, then done for all clients that wait at once.

A client's update depends on what it downloaded and on its own data, never on when it is computed, so a
simulation with a virtual clock may compute it at any time.  Small models train much faster together
(`torch.func.vmap` over clients) than one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import vmap

from leakaudit.federated.task import Task
from leakaudit.models.victim import Params
from leakaudit.rounds import ClientUpdate, Round, client_update
from leakaudit.update import Update

WORTHWHILE = 4
"""Clients below which one after the other is faster: vmap of two takes 1.3 to 1.6 times as long, of four 0.85 to
0.93 times, of 16 0.6 to 0.65 times (an MLP of 51,000 numbers, LeNet, a small language model; 5 steps of 8 examples
from different models, CPU seconds of one core).  ResNet-20 is no faster at any number: `together=1` suits it."""


@dataclass(eq=False)
class Pending:
    """The update of one client to come.

    Attributes:
        base: the parameters that the client downloaded.
        round: what it does with its rows.
        rows: (round.num_examples,) int64 of the training data, in the order of local steps.
    """

    base: Params
    round: Round
    rows: Tensor
    _trainer: Trainer = field(repr=False)
    _update: Update | None = field(default=None, repr=False)

    def result(self) -> Update:
        """The pseudo-gradient, (before - after) / learning_rate; computed the first time that it is asked for."""
        if self._update is None:
            self._trainer.compute(self)
        assert self._update is not None
        return self._update

    def cancel(self) -> None:
        """Nobody will ask: the client dropped out, or came too late."""
        self._trainer.forget(self)


class Trainer:
    """Args:
    task: model and data.
    client: the client's code, with its defense; anything but the plain one is run client by client.  A sequence
        gives every client of the task its own, which may keep something from round to round.
    together: most clients at once, >= 1; fewer than WORTHWHILE never use vmap.
    """

    def __init__(
        self, task: Task, client: ClientUpdate | Sequence[ClientUpdate] = client_update, together: int = 16
    ) -> None:
        self._task, self._client, self._together = task, client, together
        self._waiting: dict[int, Pending] = {}
        self._owners = (
            {int(row): c.index for c in task.clients for row in c.rows} if not callable(client) else {}
        )

    def submit(self, base: Params, round: Round, rows: Tensor) -> Pending:
        """The update that `client` makes of these rows from `base`, to be computed later."""
        if len(rows) != round.num_examples:
            raise ValueError(f"the round takes {round.num_examples} examples, got {len(rows)}")
        pending = Pending(base, round, rows, self)
        self._waiting[id(pending)] = pending
        return pending

    def forget(self, pending: Pending) -> None:
        self._waiting.pop(id(pending), None)

    def compute(self, first: Pending) -> None:
        """Compute `first`, and others that wait for the same kind of round."""
        alike = [p for p in self._waiting.values() if p.round == first.round and p is not first]
        limit = self._together if self._client is client_update else 1
        group = [first, *alike[: limit - 1]]
        if len(group) < WORTHWHILE:
            group = [first]
        for pending, update in zip(group, self._updates(group), strict=True):
            pending._update = update
            self.forget(pending)

    def _code(self, pending: Pending) -> ClientUpdate:
        if callable(self._client):
            return self._client
        return self._client[self._owners[int(pending.rows[0])]]

    def _updates(self, group: list[Pending]) -> list[Update]:
        victim = self._task.victim
        batches = [self._task.train.rows(pending.rows) for pending in group]
        if len(group) == 1:
            (pending,), (batch,) = group, batches
            code = self._code(pending)
            return [code(victim, pending.base, pending.round, batch.x, batch.y).detach()]
        round = group[0].round
        shared = all(pending.base is group[0].base for pending in group)
        base = (
            dict(group[0].base)
            if shared
            else {name: torch.stack([pending.base[name] for pending in group]) for name in group[0].base}
        )

        def one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return dict(client_update(victim, params, round, x, y))

        together = vmap(one, in_dims=(None if shared else 0, 0, 0))(
            base, torch.stack([batch.x for batch in batches]), torch.stack([batch.y for batch in batches])
        )
        return [
            Update({name: tensor[index].detach() for name, tensor in together.items()})
            for index in range(len(group))
        ]
