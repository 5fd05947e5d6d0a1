"""Asynchronous SGD: against an independent event loop, and what the server sees."""

from __future__ import annotations

import heapq
from dataclasses import replace

import pytest
import torch
from small_worlds import simulation, task
from torch.testing import assert_close

from leakaudit.federated.asynchronous import rate
from leakaudit.federated.cost import dense_bytes
from leakaudit.federated.options import AsynchronousSGD, SynchronousSGD
from leakaudit.federated.simulation import Simulation
from leakaudit.rounds import client_update


def reference(
    run: Simulation, options: AsynchronousSGD, steps: int
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The same training by a heap of arrivals and torch's autograd; the model, and every staleness."""
    victim, train = run.task.victim, run.task.train
    model, version, found = dict(victim.params), 0, []
    size = dense_bytes(model)
    heap: list[tuple[float, int, int, dict[str, torch.Tensor]]] = []

    def begin(now: float, index: int) -> None:
        device = run.clients[index].device
        heapq.heappush(heap, (now + 2 * device.transfer(size) + device.compute(1), index, version, model))

    for index in range(len(run.clients)):
        begin(0.0, index)
    while version < steps:
        now, index, downloaded, base = heapq.heappop(heap)
        leaves = {name: p.clone().requires_grad_() for name, p in base.items()}
        rows = run.batch(run.clients[index], options.batch_size)
        victim.loss(leaves, train.x[rows], train.y[rows]).backward()
        staleness = version - downloaded
        eta = options.learning_rate / max(1, staleness) ** options.damping
        model = {name: model[name] - eta * leaf.grad for name, leaf in leaves.items()}
        version += 1
        found.append(staleness)
        begin(now, index)
    return model, found


@pytest.mark.parametrize("damping", [0.0, 1.0, 0.5])
def test_it_is_the_rule_on_the_order_of_arrivals(damping: float) -> None:
    options = AsynchronousSGD(learning_rate=0.3, damping=damping, batch_size=3)
    world = task(clients=5, speed_spread=0.7, bandwidth=1e4)
    run = simulation(world, steps=40)
    run.run(options)
    model, stale = reference(simulation(world), options, 40)
    assert_close(run.params, model)
    assert len(set(stale)) > 3, "the workers differ in pace"
    assert run.counters == {f"staleness {tau}": stale.count(tau) for tau in dict.fromkeys(stale)}
    assert [seen.members[0].staleness for seen in run.seen.kept] == stale


def test_one_worker_is_sgd_and_is_never_stale() -> None:
    world = task(clients=1, each=40)
    runs = [simulation(world, steps=10) for _ in range(2)]
    runs[0].run(AsynchronousSGD(learning_rate=0.2, damping=1.0, batch_size=8))
    runs[1].run(SynchronousSGD(learning_rate=0.2, batch_size=8))
    assert all(torch.equal(p, runs[1].params[name]) for name, p in runs[0].params.items())
    assert runs[0].env.now == runs[1].env.now
    assert runs[0].counters == {"staleness 0": 10}


def test_workers_alike_are_stale_by_all_the_others() -> None:
    run = simulation(task(clients=4), steps=20)
    run.run(AsynchronousSGD(batch_size=2))
    assert run.counters == {"staleness 0": 1, "staleness 1": 1, "staleness 2": 1, "staleness 3": 17}
    device, size = run.clients[0].device, dense_bytes(run.params)
    assert run.env.now == pytest.approx(5 * (2 * device.transfer(size) + 0.3)), "four steps at a time"


def test_the_server_sees_each_gradient_with_the_model_it_sent() -> None:
    world = task(clients=4, speed_spread=0.7)
    run = simulation(world, steps=12)
    history = [run.params]
    run.on_step = lambda *_: history.append(run.params)
    run.run(AsynchronousSGD(batch_size=3, learning_rate=0.5))
    assert len(run.seen.kept) == 12
    for seen in run.seen.kept:
        (member,) = seen.members
        assert member.base is seen.base is history[seen.step - member.staleness]
        batch = world.train.rows(member.rows)
        assert_close(
            dict(seen.update), dict(client_update(world.victim, seen.base, member.round, batch.x, batch.y))
        )


def test_the_rate_of_a_stale_gradient() -> None:
    options = AsynchronousSGD(learning_rate=0.6, damping=1.0)
    assert [rate(options, tau) for tau in (0, 1, 2, 6)] == pytest.approx([0.6, 0.6, 0.3, 0.1])
    assert rate(replace(options, damping=0.0), 9) == 0.6
    with pytest.raises(ValueError, match=r"damping must be at least 0 and finite, got -1"):
        AsynchronousSGD(damping=-1)
