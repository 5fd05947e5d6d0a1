"""FedBuff: what it reduces to, staleness on a hand-worked schedule, and clients that fail."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from fleets import contributions, everyone_is_accounted_for, fates, paced, sums_hold
from small_worlds import simulation, task
from torch.testing import assert_close

from leakaudit.errors import InputError
from leakaudit.federated.fedbuff import STALENESS
from leakaudit.federated.options import FedBuff, FederatedAveraging, StalenessName
from leakaudit.federated.seen import Seen
from leakaudit.federated.simulation import Limits, Simulation
from leakaudit.federated.trainer import Pending, Trainer
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import Round, client_update
from leakaudit.update import Update


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_equal_devices_and_a_buffer_of_all_who_train_are_federated_averaging(weighting: str) -> None:
    shared = {"local_steps": 3, "momentum": 0.5, "server_learning_rate": 0.7, "weighting": weighting}
    runs = []
    for options in (FedBuff(buffer=4, concurrency=4, **shared), FederatedAveraging(cohort=4, **shared)):  # type: ignore[arg-type]
        run = simulation(task(clients=7, each=20, size_spread=0.5), steps=6)
        run.run(options)
        runs.append(run)
    buffered, averaged = runs
    assert contributions(buffered) == contributions(averaged)
    assert all(torch.equal(buffered.params[name], averaged.params[name]) for name in averaged.params)
    assert buffered.env.now == averaged.env.now
    assert all(member.staleness == 0 for seen in buffered.seen.kept for member in seen.members)


def test_one_client_and_a_buffer_of_one_are_local_sgd() -> None:
    world = paced(1.0)
    run = simulation(world, steps=4)
    run.run(FedBuff(buffer=1, concurrency=1, local_steps=1, batch_size=None, local_learning_rate=0.5))
    parameters = {name: p.clone().requires_grad_() for name, p in world.victim.params.items()}
    optimiser = torch.optim.SGD(parameters.values(), lr=0.5)
    for _ in range(4):
        optimiser.zero_grad()
        world.victim.loss(parameters, world.train.x, world.train.y).backward()
        optimiser.step()
    assert_close(list(run.params.values()), [p.detach() for p in parameters.values()])


def test_staleness_on_a_hand_worked_schedule() -> None:
    """Clients of 1 and of 2.5 seconds, K = 1.  Each is replaced by itself, for the other is away.

    time     1    2    2.5  3    4
    client   0    0    1    0    0
    version  0    1    0    2    4     that it downloaded
    step     0    1    2    3    4     that its update makes
    tau      0    0    2    1    0
    """
    run = simulation(paced(1.0, 2.5), steps=5)
    run.run(FedBuff(buffer=1, concurrency=2, local_steps=1))
    applied = [seen for seen in run.seen.kept if seen.observer is None]
    assert [seen.time for seen in applied] == [1.0, 2.0, 2.5, 3.0, 4.0]
    assert contributions(run) == [(0,), (0,), (1,), (0,), (0,)]
    assert [seen.members[0].staleness for seen in applied] == [0, 0, 2, 1, 0]
    assert [seen.members[0].weight for seen in applied] == pytest.approx([1, 1, 3**-0.5, 2**-0.5, 1])
    assert [seen.members[0].base is None for seen in applied] == [True, True, False, False, True]
    assert sums_hold(run)
    for before, after in pairwise(applied):
        moved = {name: before.base[name] - 0.1 * before.update[name] for name in before.base}
        assert_close(dict(after.base), moved)
    assert fates(run) == {"contributed": 5, "unfinished": 1}


def test_a_buffer_waits_and_its_stale_members_count_less() -> None:
    """Clients of 1 and of 2.5 seconds, K = 2: (0 at 1 s, 0 at 2 s), then (1 at 2.5 s, one step old, 0 at 3 s).

    Client 0 begins its third turn at 2 s, after the first step, so it is fresh.
    """
    run = simulation(paced(1.0, 2.5), steps=2)
    run.run(FedBuff(buffer=2, concurrency=2, local_steps=1))
    first, second = [seen for seen in run.seen.kept if seen.observer is None]
    assert contributions(run) == [(0, 0), (1, 0)]
    assert [m.staleness for m in first.members] == [0, 0]
    assert [m.staleness for m in second.members] == [1, 0]
    assert [m.weight for m in second.members] == pytest.approx([0.5 * 2**-0.5, 0.5])
    names = [seen.name for seen in run.seen.kept]
    assert names[:3] == ["round-0000", "round-0000-client-000", "round-0000-client-000-again-1"]
    assert len(set(names)) == len(names)
    assert sums_hold(run)


def test_the_weights_of_staleness() -> None:
    options = FedBuff(exponent=0.5, slope=10.0, threshold=4)
    table = {
        "sqrt": [1.0, 0.5, 1 / 3],
        "constant": [1.0, 1.0, 1.0],
        "polynomial": [1.0, 0.5, 1 / 3],
        "hinge": [1.0, 1.0, 1 / 41],
    }
    assert set(table) == set(STALENESS) == set(get_args(StalenessName))
    for name, expected in table.items():
        assert [STALENESS[name](tau, options) for tau in (0, 3, 8)] == pytest.approx(expected)


def test_too_stale_updates_are_dropped() -> None:
    """The schedule of the hand-worked test; client 1 brings an update two steps old at 2.5 s."""
    run = simulation(paced(1.0, 2.5), steps=4)
    run.run(FedBuff(buffer=1, concurrency=2, local_steps=1, max_staleness=1))
    assert contributions(run) == [(0,)] * 4
    assert run.env.now == 4.0
    assert fates(run) == {"contributed": 4, "too stale": 1, "unfinished": 1}


def test_many_clients_at_most_some_at_a_time_are_replaced_at_once() -> None:
    world = paced(*(1.0 + 0.37 * index for index in range(9)))
    run = simulation(world, steps=30)
    run.run(FedBuff(buffer=2, concurrency=4, local_steps=1))
    assert everyone_is_accounted_for(run)
    assert run.counters["sampled"] == 60 + 4 - 1, "60 came back and were replaced, but for the last one"
    assert run.counters["unfinished"] == 3
    assert len({client for clients in contributions(run) for client in clients}) == 9
    assert sums_hold(run)


def test_memory_grows_with_concurrency_not_with_clients() -> None:
    """Updates and model versions that are held at any time; 60 clients, of whom 5 train at a time."""
    world = paced(*(1.0 + 0.1 * index for index in range(60)), each=4)
    run = simulation(world, steps=40)
    submit, held = run.trainer.submit, []

    def counted(base: Params, round: Round, rows: torch.Tensor) -> Pending:
        pending = submit(base, round, rows)
        waiting = run.trainer._waiting.values()
        held.append((len(waiting), len({id(other.base) for other in waiting})))
        return pending

    run.trainer.submit = counted  # type: ignore[method-assign]
    run.run(FedBuff(buffer=2, concurrency=5, local_steps=1, batch_size=2))
    assert len({client for clients in contributions(run) for client in clients}) > 30
    assert max(waiting for waiting, _ in held) <= 5
    assert max(bases for _, bases in held) <= 5


def test_clients_that_drop_out_are_replaced() -> None:
    world = paced(*(1.0 + 0.37 * index for index in range(9)), dropout=0.4, availability=0.5)
    run = simulation(world, steps=20)
    run.run(FedBuff(buffer=3, concurrency=6, local_steps=2))
    assert run.step == 20
    assert everyone_is_accounted_for(run)
    assert run.counters["dropped out"] > 10
    assert len(run.trainer._waiting) == 0


@pytest.mark.parametrize("population", [{"dropout": 0.999999}, {"availability": 1e-9}])
def test_a_run_without_clients_that_report_ends_with_one_line(population: dict[str, float]) -> None:
    run = simulation(paced(1.0, 2.0, 3.0, **population), steps=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no buffer of 2 updates was filled in a long time"):
        run.run(FedBuff(buffer=2, concurrency=3, local_steps=1, patience=5))


def test_a_client_that_sends_nan_is_refused_and_replaced() -> None:
    world = paced(1.0, 1.5, 2.0)
    own = world.train.x[world.clients[0].rows]

    def client(victim: Victim, params: Params, round: Round, x: torch.Tensor, y: torch.Tensor) -> Update:
        update = client_update(victim, params, round, x, y)
        return update * float("nan") if any(bool((x[0] == other).all()) for other in own) else update

    run = Simulation(world, Trainer(world, client), Seen(lambda step: True), Limits(steps=6))
    run.run(FedBuff(buffer=2, concurrency=3, local_steps=1))
    assert run.counters["refused"] > 3
    assert all(0 not in clients for clients in contributions(run))
    assert everyone_is_accounted_for(run)
    assert all(p.isfinite().all() for p in run.params.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"buffer": 7}, "buffer must be at most the concurrency of 6, got 7"),
        ({"buffer": 0}, "buffer must be at least 1"),
        ({"staleness": "linear"}, "staleness must be sqrt or constant or polynomial or hinge, got linear"),
        ({"max_staleness": -1}, "max_staleness must be at least 0"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedBuff(**wrong)  # type: ignore[arg-type]


def test_who_is_away_when_the_time_is_up_is_unfinished() -> None:
    """Clients of 1 second train three at a time, K = 2, until 2.5 s: 6 reports, all applied, and 3 on their way."""
    run = simulation(paced(1.0, 1.0, 1.0, 1.0), steps=9)
    run.limits = Limits(steps=9, seconds=2.5)
    run.run(FedBuff(buffer=2, concurrency=3, local_steps=1))
    assert fates(run) == {"contributed": 6, "unfinished": 3}
    assert everyone_is_accounted_for(run)


def test_a_buffer_larger_than_the_population() -> None:
    with pytest.raises(InputError, match="buffer must be at most the 4 clients, got 5"):
        simulation().run(FedBuff(buffer=5))
    with pytest.raises(InputError, match="concurrency must be at most the 4 clients, got 6"):
        simulation().run(FedBuff())
