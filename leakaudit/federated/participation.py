"""Clients of federated learning as the server meets them: asked, sent away with the model, back or not.

What becomes of every client that was sent the model is counted in `Simulation.counters`, one of `FATES`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import simpy
import torch

from leakaudit.federated.acceptance import RefusedUpdate, accept
from leakaudit.federated.cost import dense_bytes
from leakaudit.federated.options import LocalTraining, Weighting
from leakaudit.federated.population import Client
from leakaudit.federated.seen import Member, Observation
from leakaudit.federated.simulation import Simulation, accelerate, descend
from leakaudit.federated.trainer import Pending
from leakaudit.models.victim import Params
from leakaudit.rounds import Round
from leakaudit.update import Update

SAMPLED = "sampled"
CONTRIBUTED = "contributed"
CANCELLED = "cancelled"
DROPPED_OUT = "dropped out"
TOO_LATE = "too late"
TOO_STALE = "too stale"
REFUSED = "refused"
DISCARDED = "discarded"
UNFINISHED = "unfinished"
ABANDONED = "abandoned rounds"
FATES = (CONTRIBUTED, CANCELLED, DROPPED_OUT, TOO_LATE, TOO_STALE, REFUSED, DISCARDED, UNFINISHED)
"""Of a client that was sampled: its update was applied; the cohort was full without it; it dropped out; it came
after the cut-off; its update was older than allowed; it was no update; it came, but its round was abandoned; the
run ended."""


def local_round(
    examples: int, batch_size: int | None, learning_rate: float, steps: int, epochs: int | None = None
) -> Round:
    """What a client with so many examples does: every step takes a full batch.

    Args:
        batch_size: of a step, at most; None for all the examples.
        epochs: passes, in place of so many steps.

    A client passes over the whole batches among its (shuffled) examples, at most as many as it takes steps;
    those left over come first in its next round.  So in place of one kind of round for every size of data there
    are at most `steps` of them, and one for each size below batch_size, which takes all it has: clients of
    one kind train together (`Trainer`).
    """
    batch = min(batch_size or examples, examples)
    whole = examples // batch
    if epochs is not None:
        steps = epochs * whole
    else:
        whole = min(steps, whole)
    return Round(whole * batch, steps, batch, learning_rate)


@dataclass(eq=False)
class Assignment:
    """A client that was sent the model.

    Attributes:
        version: of the model, the server's step.
        pending: its update; None for a client that drops out.
        process: ends when the client has reported, or is known to have dropped out.
        ended: when, in seconds; inf before that.
    """

    client: Client
    version: int
    base: Params
    pending: Pending | None
    process: simpy.Process
    ended: float = float("inf")


@dataclass(frozen=True)
class Report:
    """An accepted update.

    Attributes:
        staleness: steps of the server since the download, >= 0.
        time: it arrived.
    """

    client: Client
    pending: Pending
    update: Update
    staleness: int
    time: float


class Dispatcher:
    """Sends clients away with the model and takes in what they bring.

    A client that drops out does so after a share of its computing, uniform in [0, 1); the server notices its
    lost connection at once.  A client that is called back before it has reported uploads nothing.
    """

    def __init__(self, options: LocalTraining, simulation: Simulation) -> None:
        self._options, self._simulation = options, simulation
        self._selection = simulation.generator("selection")
        self._dropouts = simulation.generator("dropouts")
        self._size = dense_bytes(simulation.params)

    def send_out(self, candidates: Sequence[Client], wanted: int) -> list[Assignment]:
        """Up to `wanted` of the candidates, asked in random order; those that are not available are passed over."""
        if wanted < 1 or not candidates:
            return []
        order = torch.randperm(len(candidates), generator=self._selection).tolist()
        luck = torch.rand(len(candidates), generator=self._selection).tolist()
        there = [
            candidates[i] for i, drawn in zip(order, luck, strict=True) if drawn < candidates[i].availability
        ]
        return [self._begin(client) for client in there[:wanted]]

    def _begin(self, client: Client) -> Assignment:
        simulation, options = self._simulation, self._options
        simulation.count(SAMPLED)
        work = local_round(
            client.examples,
            options.batch_size,
            options.local_learning_rate,
            options.local_steps,
            options.local_epochs,
        )
        luck, share = torch.rand(2, generator=self._dropouts, dtype=torch.float64).tolist()
        seconds = client.device.compute(work.local_steps)
        pending = None
        if luck < client.dropout:
            seconds *= share
        else:
            rows = simulation.batch(client, work.num_examples)
            pending = simulation.trainer.submit(simulation.params, work, rows)
        process = simulation.env.process(self._away(client, seconds, reports=pending is not None))
        assignment = Assignment(client, simulation.step, simulation.params, pending, process)
        assert process.callbacks is not None
        process.callbacks.append(lambda _: setattr(assignment, "ended", simulation.env.now))
        return assignment

    def _away(self, client: Client, seconds: float, reports: bool) -> Generator[Any, Any, None]:
        simulation = self._simulation
        try:
            yield from simulation.download(client, self._size)
            yield simulation.env.timeout(seconds)
            if reports:
                yield from simulation.upload(client, self._size)
        except simpy.Interrupt:
            return

    def wait(
        self, working: Iterable[Assignment], *others: simpy.Event
    ) -> Generator[Any, Any, list[Assignment]]:
        """Until somebody is back, or another of the events; then all that is to happen at that instant happens.

        Returns who is back, in order.
        """
        env = self._simulation.env
        working = list(working)
        yield env.any_of([*(assignment.process for assignment in working), *others])
        while env.peek() <= env.now:
            yield env.timeout(0)
        return sorted((a for a in working if a.process.processed), key=lambda a: a.ended)

    def take(self, assignment: Assignment) -> Report | None:
        """What a client that is back brings; None, and counted, where it dropped out or sent no update."""
        if assignment.pending is None:
            self._simulation.count(DROPPED_OUT)
            return None
        update = assignment.pending.result()
        try:
            accept(update, assignment.base)
        except RefusedUpdate:
            self._simulation.count(REFUSED)
            return None
        staleness = self._simulation.step - assignment.version
        return Report(assignment.client, assignment.pending, update, staleness, assignment.ended)

    def call_back(self, assignments: Iterable[Assignment], fate: str) -> None:
        """They need not report any more."""
        for assignment in assignments:
            if assignment.process.is_alive:
                assignment.process.interrupt()
            if assignment.pending is not None:
                assignment.pending.cancel()
            self._simulation.count(fate)


class Server:
    """Applies reports: params - server_lr * local_lr * v with v = momentum * v + sum of weight * update."""

    def __init__(self, options: LocalTraining, simulation: Simulation) -> None:
        self._options, self._simulation = options, simulation
        self._velocity: Update | None = None

    def apply(self, reports: Sequence[Report], weights: Sequence[float]) -> None:
        """One step of the server; everybody sees what there is to see."""
        options, simulation = self._options, self._simulation
        total = reduce(
            Update.__add__, (r.update * weight for r, weight in zip(reports, weights, strict=True))
        )
        observe(simulation, reports, weights, total)
        self._velocity = accelerate(self._velocity, total, options.momentum)
        rate = options.server_learning_rate * options.local_learning_rate
        simulation.count(CONTRIBUTED, len(reports))
        simulation.apply(descend(simulation.params, self._velocity, rate), len(reports))


def shares(reports: Sequence[Report], weighting: Weighting) -> list[float]:
    """Weights that come to 1: n_k / n (McMahan et al. 2017, algorithm 1), or equal."""
    parts = [report.client.examples if weighting == "examples" else 1 for report in reports]
    return [part / sum(parts) for part in parts]


def observe(
    simulation: Simulation, reports: Sequence[Report], weights: Sequence[float], total: Update
) -> None:
    """The server sees what it applies, and every client's update on the way."""
    step = simulation.step
    if not simulation.seen.wants(step):
        return
    members = tuple(
        Member(
            report.client.index,
            report.pending.round,
            report.pending.rows,
            weight,
            report.pending.base if report.staleness else None,
            report.staleness,
        )
        for report, weight in zip(reports, weights, strict=True)
    )
    simulation.seen.record(
        Observation(
            "server",
            step,
            simulation.env.now,
            total,
            simulation.params,
            members,
            note="the weighted sum of the clients' updates, which the server applies",
        )
    )
    before: dict[int, int] = {}
    for report in reports:
        client = report.client.index
        repeat = before[client] = before.get(client, -1) + 1
        alone = Member(client, report.pending.round, report.pending.rows, staleness=report.staleness)
        simulation.seen.record(
            Observation(
                "server",
                step,
                report.time,
                report.update,
                report.pending.base,
                (alone,),
                observer=client,
                repeat=repeat,
                note="one client's update, as it was sent",
            )
        )
