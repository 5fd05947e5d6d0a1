"""Clients with stated devices, and updates computed a second time, for the tests of federated learning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from small_worlds import task

from leakaudit.federated.cost import Device
from leakaudit.federated.participation import ABANDONED, FATES, SAMPLED
from leakaudit.federated.seen import Member
from leakaudit.federated.simulation import Simulation
from leakaudit.federated.task import Task
from leakaudit.models.victim import Params
from leakaudit.update import Update


def paced(*seconds: float, each: int = 12, dropout: float = 0.0, availability: float = 1.0) -> Task:
    """A client for every number of seconds a local step, on a network without delay."""
    world = task(clients=len(seconds), each=each, dropout=dropout, availability=availability)
    clients = tuple(
        replace(client, device=Device(pace, latency=0.0, bandwidth=float("inf")))
        for client, pace in zip(world.clients, seconds, strict=True)
    )
    return replace(world, clients=clients)


def trained_by_torch(world: Task, base: Params, member: Member) -> Update:
    """The same local training by torch.optim.SGD, as a difference of models over the learning rate."""
    named = {name: p.clone().requires_grad_() for name, p in base.items()}
    optimiser = torch.optim.SGD(named.values(), lr=member.round.learning_rate)
    batches = list(torch.split(member.rows, member.round.batch_size))
    for step in range(member.round.local_steps):
        part = world.train.rows(batches[step % len(batches)])
        optimiser.zero_grad()
        world.victim.loss(named, part.x, part.y).backward()
        optimiser.step()
    return Update({n: (base[n] - p.detach()) / member.round.learning_rate for n, p in named.items()})


def fates(run: Simulation) -> Counter[str]:
    """What became of the clients sent away; without zeros."""
    return Counter({what: n for what, n in run.counters.items() if n and what not in (SAMPLED, ABANDONED)})


def everyone_is_accounted_for(run: Simulation) -> bool:
    return set(fates(run)) <= set(FATES) and sum(fates(run).values()) == run.counters[SAMPLED]


def contributions(run: Simulation) -> list[tuple[int, ...]]:
    """Clients in every step of the server, in order."""
    return [tuple(m.client for m in seen.members) for seen in run.seen.kept if seen.observer is None]


def sums_hold(run: Simulation, tolerance: float = 1e-12) -> bool:
    """Everything that was seen is the weighted sum of its members' updates, made again by torch."""
    for seen in run.seen.kept:
        total: Sequence[Update] = [
            trained_by_torch(run.task, m.base or seen.base, m) * m.weight for m in seen.members
        ]
        difference = seen.update
        for update in total:
            difference = difference - update
        if float(difference.norm()) > tolerance * max(1.0, float(seen.update.norm())):
            return False
    return bool(run.seen.kept)
