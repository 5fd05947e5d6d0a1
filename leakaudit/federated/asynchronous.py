"""Asynchronous SGD with a parameter server: nobody waits for anybody.

    w_{i+1} = w_i - eta / max(1, tau)^p  g_j(w_{i - tau})

tau, the staleness, counts the steps of the server between a worker's download and the use of its gradient.
p = 0 is plain asynchronous SGD (Recht et al. 2011; Dean et al. 2012, without AdaGrad), p = 1 divides the rate
by the staleness (Zhang, Gupta, Lian and Liu 2016).  A step of the simulation is one gradient of one worker.
Workers of distributed training are there from beginning to end: `Client.dropout` and `availability` are not used.

The server sent the model that a gradient was made with, so it attacks each gradient with its own base.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from leakaudit.federated.cost import dense_bytes
from leakaudit.federated.options import AsynchronousSGD
from leakaudit.federated.population import Client
from leakaudit.federated.seen import Member, Observation
from leakaudit.federated.simulation import Simulation, descend
from leakaudit.federated.trainer import Pending
from leakaudit.rounds import Round


def run(options: AsynchronousSGD, simulation: Simulation) -> Generator[Any, Any, None]:
    """Every worker by itself, until one of them finds that the run is done."""
    workers = [simulation.env.process(_worker(options, simulation, client)) for client in simulation.clients]
    yield simulation.env.any_of(workers)


def rate(options: AsynchronousSGD, staleness: int) -> float:
    """Learning rate of a gradient that is `staleness` >= 0 steps old."""
    return float(options.learning_rate / max(1, staleness) ** options.damping)


def _worker(options: AsynchronousSGD, simulation: Simulation, client: Client) -> Generator[Any, Any, None]:
    round = Round(options.batch_size)
    while not simulation.done:
        base, version = simulation.params, simulation.step
        rows = simulation.batch(client, options.batch_size)
        pending = simulation.trainer.submit(base, round, rows)
        size = dense_bytes(base)
        yield from simulation.download(client, size)
        yield simulation.env.timeout(client.device.compute(1))
        yield from simulation.upload(client, size)
        if simulation.done:
            return
        staleness = simulation.step - version
        _observe(simulation, client, pending, staleness)
        simulation.count(f"staleness {staleness}")
        simulation.apply(descend(simulation.params, pending.result(), rate(options, staleness)), 1)


def _observe(simulation: Simulation, client: Client, pending: Pending, staleness: int) -> None:
    if not simulation.seen.wants(simulation.step):
        return
    simulation.seen.record(
        Observation(
            "server",
            simulation.step,
            simulation.env.now,
            pending.result(),
            pending.base,
            (Member(client.index, pending.round, pending.rows, base=pending.base, staleness=staleness),),
            observer=client.index,
            note="one worker's gradient as it arrives; the server sent the model it was made with",
        )
    )
