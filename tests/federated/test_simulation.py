"""The seam of all systems: population, cost, trainer, clock, what is seen; and synchronous SGD in it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small_worlds import simulation, task
from torch.testing import assert_close

from leakaudit.errors import InputError
from leakaudit.federated.cost import Device, all_reduce_seconds, dense_bytes, sparse_bytes
from leakaudit.federated.options import SYSTEMS, SynchronousSGD
from leakaudit.federated.population import PopulationOptions, draw_population
from leakaudit.federated.seen import Seen
from leakaudit.federated.simulation import Limits, Simulation
from leakaudit.federated.trainer import Trainer
from leakaudit.rounds import Round, client_update
from leakaudit.update import Update


def test_clients_share_all_the_data_among_them() -> None:
    labels = torch.arange(200) % 5
    for options in (
        PopulationOptions(clients=7),
        PopulationOptions(clients=7, size_spread=1.5, label_skew=0.1, speed_spread=0.5, slow_with_data=1.0),
    ):
        clients = draw_population(options, labels, seed=3)
        assert sorted(torch.cat([client.rows for client in clients]).tolist()) == list(range(200))
        assert min(client.examples for client in clients) >= 1
    from_the_fastest = sorted(clients, key=lambda client: client.device.step_seconds)
    sizes = [client.examples for client in from_the_fastest]
    assert all(more >= less - 1 for less, more in pairwise(sizes)), "rounded shares"
    assert sizes[-1] > 3 * sizes[0]
    with pytest.raises(ValueError, match="3 examples cannot be shared by 4 clients"):
        draw_population(PopulationOptions(clients=4), torch.arange(3), seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"clients": 0}, {"latency": -0.1}, {"bandwidth": 0.0}, {"dropout": 1.0}, {"slow_with_data": 2.0}],
)
def test_a_population_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        PopulationOptions(**wrong)  # type: ignore[arg-type]


def test_cost_is_latency_and_bytes_over_bandwidth() -> None:
    device = Device(step_seconds=0.3, latency=0.24, bandwidth=1e6)
    assert device.transfer(2e6) == pytest.approx(2.24)
    assert device.compute(4) == pytest.approx(1.2)
    assert all_reduce_seconds(4e6, 4, device) == pytest.approx(6 * (0.24 + 1.0))
    assert all_reduce_seconds(4e6, 1, device) == 0.0
    update = Update({"w": torch.tensor([0.0, 0.0, 0.0, 2.0])})
    assert dense_bytes(update) == 16
    assert sparse_bytes(update) == 8
    assert sparse_bytes(Update({"w": torch.ones(4)})) == 16


def test_clients_trained_together_get_what_they_get_alone() -> None:
    world = task()
    trainer = Trainer(world, together=8)
    bases = [world.victim.params, {n: p * 1.1 for n, p in world.victim.params.items()}]
    rounds = [*[Round(6, 3, 2, 0.1)] * 5, Round(4)]
    for params in (bases[:1] * 6, [*bases, *bases, *bases]):
        waiting = [
            trainer.submit(base, round, torch.arange(round.num_examples) + 6 * index)
            for index, (base, round) in enumerate(zip(params, rounds, strict=True))
        ]
        for pending in waiting:
            batch = world.train.rows(pending.rows)
            alone = client_update(world.victim, pending.base, pending.round, batch.x, batch.y)
            assert_close(dict(pending.result()), dict(alone))


def test_synchronous_sgd_is_sgd_on_all_batches_together() -> None:
    world = task(clients=4, each=12)
    options = replace(SynchronousSGD(), batch_size=12, learning_rate=0.5, momentum=0.9)
    run = simulation(world, steps=6)
    run.run(options)
    module = world.victim.module
    reference = [p.clone().requires_grad_() for p in world.victim.params.values()]
    optimiser = torch.optim.SGD(reference, lr=0.5, momentum=0.9)
    for _ in range(6):
        optimiser.zero_grad()
        named = dict(zip(world.victim.params, reference, strict=True))
        world.victim.loss(named, world.train.x, world.train.y).backward()
        optimiser.step()
    assert_close([*run.params.values()], reference, check_stride=False)
    assert module is world.victim.module
    assert run.curve[-1].quality["all"].loss < run.curve[0].quality["all"].loss


@pytest.mark.parametrize("topology", ["server", "all-reduce"])
def test_the_virtual_time_of_a_step(topology: str) -> None:
    world = task(clients=4, step_seconds=0.3, latency=0.1, bandwidth=1e4)
    run = simulation(world, steps=5)
    run.run(replace(SynchronousSGD(), topology=topology, batch_size=2))  # type: ignore[arg-type]
    size = dense_bytes(world.victim.params)
    device = world.clients[0].device
    moving = 2 * device.transfer(size) if topology == "server" else all_reduce_seconds(size, 4, device)
    assert run.env.now == pytest.approx(5 * (0.3 + moving))


def test_a_server_sees_every_gradient_and_a_peer_the_mean_of_the_others() -> None:
    for topology, role in (("server", "server"), ("all-reduce", "peer")):
        run = simulation(steps=2)
        run.run(replace(SynchronousSGD(), topology=topology, batch_size=3))  # type: ignore[arg-type]
        assert {seen.role for seen in run.seen.kept} == {role}
        assert len({seen.name for seen in run.seen.kept}) == len(run.seen.kept)
        for seen in run.seen.kept:
            expected = []
            for member in seen.members:
                batch = run.task.train.rows(member.rows)
                update = client_update(run.task.victim, seen.base, member.round, batch.x, batch.y)
                expected.append(update * member.weight)
            total = expected[0]
            for update in expected[1:]:
                total = total + update
            assert_close(dict(seen.update), dict(total))


def test_limits_end_a_run() -> None:
    world = task()
    run = Simulation(world, Trainer(world), Seen(lambda step: False), Limits(steps=50, seconds=3.0, every=1))
    run.run(SynchronousSGD(batch_size=2))
    assert 0 < run.step < 50
    assert run.env.now == 3.0
    eager = Simulation(
        world, Trainer(world), Seen(lambda step: False), Limits(steps=50, accuracy=0.0, every=1)
    )
    eager.run(SynchronousSGD(batch_size=2))
    assert eager.step == 0


def test_a_batch_larger_than_a_clients_data() -> None:
    with pytest.raises(InputError, match="client 0 holds 12 examples, fewer than a batch of 13"):
        simulation().run(SynchronousSGD(batch_size=13))


def test_a_diverged_model_ends_the_run_with_one_line() -> None:
    run = simulation()
    with pytest.raises(InputError, match="not finite after step 1 at 0 s; lower the learning rate"):
        run.apply({name: p * float("nan") for name, p in run.params.items()}, 1)


def test_a_model_whose_loss_is_not_finite_ends_the_run_with_one_line() -> None:
    run = simulation(every=1)
    huge = {name: torch.full_like(p, 1e308) for name, p in run.params.items()}
    with pytest.raises(InputError, match=r"the held-out loss is (nan|inf) after step 1 at 0 s"):
        run.apply(huge, 1)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_runs_and_repeats(name: str) -> None:
    """Contract: real training on a real (small) task; the same seed gives the same model, curve and messages."""
    runs = []
    for _ in range(2):
        run = simulation(
            task(clients=6, each=40, size_spread=0.3, speed_spread=0.3), steps=8, every=4, seed=5
        )
        run.run(SYSTEMS[name])
        runs.append(run)
    first, second = runs
    assert first.step > 0
    assert first.env.now > 0
    assert first.curve == second.curve
    assert first.messages == second.messages
    assert all(torch.equal(first.params[n], second.params[n]) for n in first.params)
    assert any(not torch.equal(first.params[n], p) for n, p in first.task.victim.params.items())
    assert first.seen.kept
