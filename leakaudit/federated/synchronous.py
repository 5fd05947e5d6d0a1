"""Synchronous SGD with a parameter server, or by all-reduce among peers.

    w_{i+1} = w_i - eta v_{i+1},   v_{i+1} = m v_i + mean_j g_j(w_i)

(Das et al. 2016; Chen et al. 2016).  A step is as slow as its slowest worker.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from leakaudit.federated.cost import all_reduce_seconds, dense_bytes
from leakaudit.federated.network import Message
from leakaudit.federated.options import SynchronousSGD
from leakaudit.federated.population import Client
from leakaudit.federated.seen import Member, Observation
from leakaudit.federated.simulation import Simulation, accelerate, descend, name_of
from leakaudit.federated.trainer import Pending
from leakaudit.rounds import Round
from leakaudit.update import Update, mean_of


def run(options: SynchronousSGD, simulation: Simulation) -> Generator[Any, Any, None]:
    round = Round(num_examples=options.batch_size)
    velocity: Update | None = None
    while not simulation.done:
        base = simulation.params
        pending = [
            simulation.trainer.submit(base, round, simulation.batch(client, options.batch_size))
            for client in simulation.clients
        ]
        if options.topology == "server":
            yield simulation.env.all_of(
                [simulation.env.process(_worker(client, simulation)) for client in simulation.clients]
            )
        else:
            yield from _all_reduce(simulation)
        mean = mean_of([p.result() for p in pending])
        observe(simulation, options.topology, pending, mean)
        velocity = accelerate(velocity, mean, options.momentum)
        simulation.apply(descend(base, velocity, options.learning_rate), len(pending))


def _worker(client: Client, simulation: Simulation) -> Generator[Any, Any, None]:
    size = dense_bytes(simulation.params)
    yield from simulation.download(client, size)
    yield simulation.env.timeout(client.device.compute(1))
    yield from simulation.upload(client, size)


def _all_reduce(simulation: Simulation) -> Generator[Any, Any, None]:
    """Computing, then a ring in which every worker sends 2 (n - 1) / n of the gradient; the slowest link counts."""
    devices = [client.device for client in simulation.clients]
    workers, size = len(devices), dense_bytes(simulation.params)
    yield simulation.env.timeout(max(device.compute(1) for device in devices))
    began = simulation.env.now
    yield simulation.env.timeout(max(all_reduce_seconds(size, workers, device) for device in devices))
    sent = round(2 * (workers - 1) * size / workers)
    for client, after in zip(
        simulation.clients, (*simulation.clients[1:], simulation.clients[0]), strict=True
    ):
        simulation.note(Message(began, simulation.env.now, name_of(client), name_of(after), "gradient", sent))


def observe(simulation: Simulation, topology: str, pending: list[Pending], mean: Update) -> None:
    """The server sees every worker's gradient; a peer sees the sum, from which it takes its own away."""
    if not simulation.seen.wants(simulation.step):
        return
    step, time, count = simulation.step, simulation.env.now, len(pending)
    members = [
        Member(client.index, p.round, p.rows, 1 / count)
        for client, p in zip(simulation.clients, pending, strict=True)
    ]
    base = pending[0].base

    def see(role: Any, update: Update, *who: Member, observer: int | None = None, note: str) -> None:
        simulation.seen.record(Observation(role, step, time, update, base, who, observer, note=note))

    if topology == "server":
        see("server", mean, *members, note="the mean of all gradients, which the server applies")
        for member, p in zip(members, pending, strict=True):
            alone = Member(member.client, member.round, member.rows)
            see(
                "server",
                p.result(),
                alone,
                observer=member.client,
                note="one worker's gradient, as it was sent",
            )
        return
    if count == 1:
        return
    own, *others = members
    rest = (mean * count - pending[0].result()) / (count - 1)
    who = [Member(m.client, m.round, m.rows, 1 / (count - 1)) for m in others]
    see(
        "peer",
        rest,
        *who,
        observer=own.client,
        note="the sum, less its own gradient: the mean of all the others",
    )
