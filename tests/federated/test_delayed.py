"""Delayed synchronous SGD: its recurrence, its case d = 0, its time, and what a server or a peer can replay."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_worlds import Model, simulation, task, trained
from torch.testing import assert_close

from leakaudit.errors import InputError
from leakaudit.federated.cost import all_reduce_seconds, dense_bytes
from leakaudit.federated.options import AsynchronousSGD, DelayedSGD, SynchronousSGD, SystemOptions, Topology
from leakaudit.federated.replay import MeanModel
from leakaudit.federated.task import Task
from leakaudit.rounds import client_update
from leakaudit.update import Update


def by_hand(
    world: Task, rows: list[list[torch.Tensor]], delay: int, rate: float, momentum: float = 0.0
) -> tuple[list[list[Model]], list[list[Model]]]:
    """The recurrence as it is printed, worker by worker, with torch's autograd.

    rows: of step i and worker j.  Returns models w[i][j] and gradients g[i][j].
    """
    workers = len(rows[0])
    models = [[dict(world.victim.params) for _ in range(workers)]]
    gradients: list[list[Model]] = []
    velocity = [
        {name: torch.zeros_like(p) for name, p in world.victim.params.items()} for _ in range(workers)
    ]
    for step, batches in enumerate(rows):
        gradients.append([])
        for base, batch in zip(models[step], batches, strict=True):
            leaves = {name: p.clone().requires_grad_() for name, p in base.items()}
            world.victim.loss(leaves, world.train.x[batch], world.train.y[batch]).backward()
            gradients[-1].append({name: leaf.grad for name, leaf in leaves.items()})
        after = []
        for j in range(workers):
            moved = {}
            for name, p in models[step][j].items():
                v = gradients[step][j][name]
                if step >= delay:
                    past = gradients[step - delay]
                    v = v - past[j][name] + sum(g[name] for g in past) / workers
                velocity[j][name] = momentum * velocity[j][name] + v
                moved[name] = p - rate * velocity[j][name]
            after.append(moved)
        models.append(after)
    return models, gradients


def drawn(world: Task, steps: int, batch: int) -> list[list[torch.Tensor]]:
    """The rows that a simulation with seed 0 draws."""
    run = simulation(world)
    return [[run.batch(client, batch) for client in run.clients] for _ in range(steps)]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.6]),
    st.sampled_from(["server", "all-reduce"]),
)
def test_it_is_the_recurrence(delay: int, workers: int, momentum: float, topology: Topology) -> None:
    world = task(clients=workers, speed_spread=0.5)
    options = DelayedSGD(delay, 0.3, momentum, batch_size=4, topology=topology)
    _, history = trained(options, world, steps=9)
    models, gradients = by_hand(world, drawn(world, 9, 4), delay, 0.3, momentum)
    for model, local in zip(history, models, strict=True):
        assert_close(model, {name: sum(w[name] for w in local) / workers for name in model})
    if not momentum:  # on average the workers follow synchronous SGD with local gradients, whatever the delay
        for step in range(9):
            for name, after in history[step + 1].items():
                mean = sum(g[name] for g in gradients[step]) / workers
                assert_close(after, history[step][name] - 0.3 * mean)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("topology", ["server", "all-reduce"])
@pytest.mark.parametrize("workers", [1, 3, 4])
def test_without_delay_it_is_synchronous_sgd_bit_by_bit(
    workers: int, topology: Topology, momentum: float
) -> None:
    world = task(clients=workers)
    # one client after the other: vmap rounds differently where clients share a model
    delayed, ours_by_step = trained(DelayedSGD(0, 0.3, momentum, 4, topology), world, steps=9, together=1)
    synchronous, theirs_by_step = trained(
        SynchronousSGD(0.3, momentum, 4, topology), world, steps=9, together=1
    )
    for ours, theirs in zip(ours_by_step, theirs_by_step, strict=True):
        assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    assert_close(
        trained(DelayedSGD(0, 0.3, momentum, 4, topology), world, steps=9)[0].params, synchronous.params
    )
    assert delayed.env.now == pytest.approx(synchronous.env.now)
    seen_by_name, others = ({o.name: o for o in run.seen.kept} for run in (delayed, synchronous))
    assert seen_by_name.keys() == others.keys()
    for name, seen in seen_by_name.items():
        other = others[name]
        assert seen.exact
        assert seen.time == pytest.approx(other.time if topology == "all-reduce" else seen.time)
        assert_close(dict(seen.update), dict(other.update))
        assert_close(dict(seen.base), dict(other.base))
        for member, peer in zip(seen.members, other.members, strict=True):
            assert (member.client, member.round, member.weight) == (peer.client, peer.round, peer.weight)
            assert torch.equal(member.rows, peer.rows)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("delay", [1, 4])
def test_a_server_replays_every_local_model(delay: int, momentum: float) -> None:
    """Delay protects nothing: from the messages alone come the bases, and with them the gradients' equations."""
    world = task(clients=3)
    run, _ = trained(DelayedSGD(delay, 0.3, momentum, batch_size=4), world, steps=9)
    models, gradients = by_hand(world, drawn(world, 9, 4), delay, 0.3, momentum)
    single = [seen for seen in run.seen.kept if seen.observer is not None]
    # 0.3 s a step, 0.05 s a message: at the end of step 8, the gradient of step 8 has not arrived
    assert [(seen.step, seen.observer) for seen in single] == [(i, j) for i in range(8) for j in range(3)]
    for seen in single:
        (member,) = seen.members
        assert seen.exact
        assert_close(dict(seen.base), models[seen.step][seen.observer])
        assert_close(dict(seen.update), gradients[seen.step][seen.observer])
        batch = world.train.rows(member.rows)
        again = client_update(world.victim, seen.base, member.round, batch.x, batch.y)
        assert_close(dict(again), dict(seen.update))
    apart = models[5][0]["1.weight"] - models[5][1]["1.weight"]
    assert float(apart.norm()) > 1e-3, "the local models differ"
    for seen in run.seen.kept:
        if seen.observer is None:
            assert_close(dict(seen.update), dict(total(world, seen)))


def total(world: Task, seen: object) -> Update:
    """What the members' own models and data make of an observation."""
    parts = []
    for member in seen.members:  # type: ignore[attr-defined]
        batch = world.train.rows(member.rows)
        update = client_update(world.victim, member.base, member.round, batch.x, batch.y)
        parts.append(update * member.weight)
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def test_a_peer_knows_the_others_models_on_average_only() -> None:
    world = task(clients=4)
    run, _ = trained(DelayedSGD(2, 0.3, batch_size=4, topology="all-reduce"), world, steps=9)
    models, gradients = by_hand(world, drawn(world, 9, 4), 2, 0.3)
    assert [seen.step for seen in run.seen.kept] == list(range(7)), "a ring of 6 messages takes 0.3 s"
    for seen in run.seen.kept:
        assert (seen.role, seen.observer, len(seen.members)) == ("peer", 0, 3)
        others = models[seen.step][1:]
        for name, base in seen.base.items():
            assert_close(base, sum(w[name] for w in others) / 3)
            assert_close(seen.update[name], sum(g[name] for g in gradients[seen.step][1:]) / 3)
        assert seen.exact == (seen.step == 0)
        assert ("guess" in seen.note) == (seen.step > 0)


def test_a_peer_of_one_knows_the_others_model() -> None:
    world = task(clients=2)
    run, _ = trained(DelayedSGD(3, 0.3, batch_size=4, topology="all-reduce"), world, steps=9)
    models, _ = by_hand(world, drawn(world, 9, 4), 3, 0.3)
    for seen in run.seen.kept:
        assert seen.exact
        assert_close(dict(seen.base), models[seen.step][1])
        assert_close(dict(seen.update), dict(total(world, seen)))


@pytest.mark.parametrize("topology", ["server", "all-reduce"])
@pytest.mark.parametrize("latency", [0.1, 1.2, 7.0])
@pytest.mark.parametrize("delay", [0, 1, 5])
def test_computing_hides_an_exchange_of_at_most_the_delay(
    delay: int, latency: float, topology: Topology
) -> None:
    world = task(clients=3, step_seconds=0.5, latency=latency, bandwidth=1e5)
    run, _ = trained(DelayedSGD(delay, batch_size=2, topology=topology), world, steps=20)
    device, size = world.clients[0].device, dense_bytes(world.victim.params)
    exchange = 2 * device.transfer(size) if topology == "server" else all_reduce_seconds(size, 3, device)
    if exchange <= delay * 0.5:
        assert run.env.now == pytest.approx(20 * 0.5)
    else:  # d + 1 steps take the computing of one and the exchange; the first d wait for nothing
        blocks, rest = divmod(20, delay + 1)
        assert run.env.now == pytest.approx(blocks * (0.5 + exchange) + rest * 0.5)


def test_a_link_that_is_too_slow_is_not_hidden_by_any_delay() -> None:
    """The bytes of 40 gradients need 40 times as long, however long one may be under way."""
    world = task(clients=2, step_seconds=0.1, latency=0.0, bandwidth=1e3)
    run, _ = trained(DelayedSGD(30, batch_size=2), world, steps=160)
    busy = dense_bytes(world.victim.params) / 1e3
    assert busy > 0.5
    uploads = [m for m in run.messages if m.kind == "update" and m.sender == "client-000"]
    assert all(after.sent >= m.sent + busy * (1 - 1e-9) for m, after in pairwise(uploads))
    assert run.env.now > (160 - 32) * busy


def test_equal_models_have_that_mean_exactly() -> None:
    model = {"w": torch.tensor([0.1, 1 / 3, 1e30, -7e-9], dtype=torch.float64)}
    for count in range(1, 30):
        assert torch.equal(MeanModel([model] * count).value()["w"], model["w"])
    assert float(MeanModel([{"w": torch.tensor(k)} for k in (1.0, 2.0, 6.0)]).value()["w"]) == 3.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delay": -1}, "delay must be at least 0, got -1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"topology": "star"}, "topology must be server or all-reduce, got star"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DelayedSGD(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [DelayedSGD(batch_size=13), AsynchronousSGD(batch_size=13)])
def test_a_batch_larger_than_a_workers_data(options: SystemOptions) -> None:
    with pytest.raises(InputError, match=r"client \d holds 12 examples, fewer than a batch of 13"):
        simulation().run(options)
