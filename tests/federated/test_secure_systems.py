"""Training with secure aggregation: the plain mean within a step of fixed point, dropouts, and who sees what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from small_worlds import simulation, task
from torch import Tensor
from torch.testing import assert_close

from leakaudit.defenses.naming import parse_defense
from leakaudit.errors import InputError
from leakaudit.federated import secure_async, secure_sync
from leakaudit.federated.cost import dense_bytes
from leakaudit.federated.options import SecureAsync, SecureSync
from leakaudit.federated.secure.fixed_point import FixedPoint
from leakaudit.federated.seen import Observation, Seen
from leakaudit.federated.simulation import Limits, Simulation, descend
from leakaudit.federated.task import Task
from leakaudit.federated.trainer import Trainer
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import Round, client_update
from leakaudit.update import Update

SYNC = SecureSync(cohort=4, threshold=3)
ASYNC = SecureAsync(buffer=3, concurrency=4)


def plain(run: Simulation, seen: Observation) -> Update:
    """The weighted sum of the members' own updates, without rounding."""
    total = seen.update * 0
    for member in seen.members:
        base = seen.base if member.base is None else member.base
        batch = run.task.train.rows(member.rows)
        total = total + member.weight * client_update(run.task.victim, base, member.round, batch.x, batch.y)
    return total


def of(run: Simulation, role: str) -> list[Observation]:
    return [seen for seen in run.seen.kept if seen.role == role]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_a_round_is_the_weighted_mean_within_a_step(weighting: str, rounding: str) -> None:
    run = simulation(task(clients=5, each=20, size_spread=0.6, dropout=0.15), steps=6)
    options = replace(SYNC, weighting=weighting, rounding=rounding, bits=20)
    run.run(options)
    step = FixedPoint(4, 20).step * (0.5 if rounding == "nearest" else 1)
    most = max(client.examples for client in run.clients)
    for seen in of(run, "server"):
        assert 3 <= len(seen.members) <= 4
        assert sum(member.weight for member in seen.members) == pytest.approx(1)
        held = {member.client: run.clients[member.client].examples for member in seen.members}
        if weighting == "equal":
            allowed = step
            assert {member.weight for member in seen.members} == {1 / len(seen.members)}
        else:
            allowed = step * most * len(held) / sum(held.values())
            for member in seen.members:
                assert member.weight == pytest.approx(held[member.client] / sum(held.values()))
        assert_close(dict(seen.update), dict(plain(run, seen)), rtol=0, atol=1.001 * allowed)
        assert any(
            not torch.equal(a, b)
            for a, b in zip(seen.update.values(), plain(run, seen).values(), strict=True)
        )
    assert {len(seen.members) for seen in of(run, "server")} == {3, 4}, "with and without a dropout"


def test_the_trajectory_is_that_of_plain_fixed_point_sums() -> None:
    """Bit for bit: mean of what every survivor's rounded update is, by SecureAggregation, applied by hand."""
    run = simulation(task(clients=5, dropout=0.2), steps=6)
    run.run(replace(SYNC, server_learning_rate=0.5))
    params: Params = run.task.victim.params
    numbers = FixedPoint(4)
    for seen in of(run, "server"):
        assert all(torch.equal(params[name], seen.base[name]) for name in params)
        whole = torch.zeros(Update(params).numel(), dtype=torch.int64)
        for member in seen.members:
            batch = run.task.train.rows(member.rows)
            update = client_update(run.task.victim, params, member.round, batch.x, batch.y)
            whole += numbers._rounding.levels(update.flat()).long()
        exact = whole.double() * numbers.step / len(seen.members)
        assert torch.equal(seen.update.flat(), exact)
        params = descend(params, seen.update, 0.5 * 0.1)
    assert all(torch.equal(params[name], run.params[name]) for name in params)


def test_with_everybody_it_is_federated_averaging() -> None:
    run = simulation(task(clients=4), steps=5)
    run.run(replace(SYNC, bits=40, modulus_bits=48, batch_size=6, local_steps=3, learning_rate=0.3))
    params = {name: p.clone() for name, p in run.task.victim.params.items()}
    for seen in of(run, "server"):
        after = []
        for member in seen.members:
            local = {name: p.clone() for name, p in params.items()}
            batches = member.rows.split(6)
            for step in range(3):
                batch = run.task.train.rows(batches[step % len(batches)])
                leaves = {name: p.clone().requires_grad_() for name, p in local.items()}
                loss = run.task.victim.loss(leaves, batch.x, batch.y)
                grads = torch.autograd.grad(loss, list(leaves.values()))
                local = {n: p - 0.3 * g for (n, p), g in zip(local.items(), grads, strict=True)}
            after.append(local)
        params = {name: sum(local[name] for local in after) / 4 for name in params}  # type: ignore[misc]
    assert_close(dict(run.params), params, rtol=0, atol=1e-9)
    assert run.curve[-1].quality["all"].loss < run.curve[0].quality["all"].loss


@pytest.mark.parametrize("options", [SYNC, ASYNC])
def test_no_example_of_a_client_counts_twice(options: Any) -> None:
    """Four steps of 8 of 10 examples are four of the same 8, as in federated averaging, not 32 examples."""
    run = simulation(task(clients=5, each=10), steps=3)
    run.run(options)
    members = [member for seen in of(run, "server") for member in seen.members]
    assert {member.round for member in members} == {Round(8, 4, 8, 0.1)}
    assert all(len(member.rows.unique()) == 8 for member in of(run, "server")[0].members)


def test_the_time_of_a_round_is_that_of_its_messages() -> None:
    """Model, 4 messages up, 3 down, each latency + bytes / bandwidth, and the local steps."""
    world = task(clients=4, step_seconds=0.3, latency=0.1, bandwidth=1e4)
    run = simulation(world, steps=2)
    run.run(SYNC)
    numbers, model = Update(world.victim.params).numel(), dense_bytes(world.victim.params)
    up = [24 + 64, 24 + 32 + 3 * 96, 24 + 4 * numbers, 24 + 4 * 36]
    down = [24 + 4 * 68, 24 + 3 * 96, 24 + 4 * 4]
    seconds = 8 * 0.1 + (model + sum(up) + sum(down)) / 1e4 + 4 * 0.3
    assert run.env.now == pytest.approx(2 * seconds)
    assert run.uploaded == 2 * 4 * sum(up)
    assert run.downloaded == 2 * 4 * (model + sum(down))
    kinds = {message.kind for message in run.messages}
    assert kinds == {"model", *secure_sync.KINDS.values()}


def test_aborted_rounds_are_counted_and_cost_time() -> None:
    run = simulation(task(clients=4, dropout=0.4), steps=4)
    run.run(replace(SYNC, wait=7.0))
    aborted = run.counters["aborted rounds"]
    assert aborted > 0
    assert run.step == 4
    assert run.env.now > 7.0 * aborted
    assert run.counters["dropped out"] > aborted


@pytest.mark.parametrize("world", [{"dropout": 0.97}, {"availability": 0.01}])
def test_a_run_in_which_every_round_aborts_ends(world: dict[str, float]) -> None:
    run = simulation(task(clients=4, **world))
    with pytest.raises(InputError, match=r"6 rounds .* in a row were aborted.* clients are .*threshold of 3"):
        run.run(replace(SYNC, patience=6, wait=0.0))


def test_an_asynchronous_run_in_which_everybody_drops_out_ends() -> None:
    run = simulation(task(clients=4, dropout=0.99, step_seconds=0.0, latency=0.0, bandwidth=float("inf")))
    with pytest.raises(InputError, match=r"3\d contributions in a row were lost, .* dropped out"):
        run.run(replace(ASYNC, patience=30))


def broken(world: Task, wrong: Any) -> Simulation:
    """Clients whose rows hold the first example of client 0 send something else."""
    marked = world.train.x[world.clients[0].rows[0]]

    def client(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        update = client_update(victim, params, round, x, y)
        mine = any(torch.equal(example, marked) for example in x)
        return update.map(wrong) if mine else update

    return Simulation(world, Trainer(world, client), Seen(lambda step: True), Limits(steps=4))


@pytest.mark.parametrize("options", [replace(SYNC, batch_size=12), replace(ASYNC, batch_size=12)])
@pytest.mark.parametrize(
    "wrong", [lambda tensor: tensor * float("nan"), lambda tensor: tensor.reshape(-1)[:-1]]
)
def test_clients_that_send_nan_or_a_wrong_shape_count_as_dropped(options: Any, wrong: Any) -> None:
    run = broken(task(clients=4), wrong)
    run.run(options)
    assert run.counters["refused clients"] >= 1
    assert run.step == 4
    assert 0 not in {member.client for seen in of(run, "server") for member in seen.members}
    assert all(bool(p.isfinite().all()) for p in run.params.values())


def test_a_population_of_nan_ends_with_the_reason() -> None:
    world = task(clients=4)
    run = Simulation(
        world,
        Trainer(world, lambda *given: client_update(*given) * float("nan")),
        Seen(lambda step: True),
    )
    with pytest.raises(InputError, match=r"20 rounds .* aborted.* 0 clients are left.* not finite"):
        run.run(SYNC)
    with pytest.raises(InputError, match=r"20\d contributions in a row were lost.* not finite"):
        Simulation(
            world,
            Trainer(world, lambda *given: client_update(*given) * float("nan")),
            Seen(lambda step: True),
        ).run(ASYNC)


def test_numbers_beyond_the_limit_are_counted() -> None:
    run = simulation(steps=2)
    run.run(replace(SYNC, limit=0.01))
    assert run.counters["numbers clamped to the limit"] > 0
    assert all(float(seen.update.flat().abs().max()) <= 0.01 for seen in of(run, "server"))


@pytest.mark.parametrize("exponent", [0.5, 0.0])
def test_a_buffer_is_the_weighted_mean_of_stale_updates(exponent: float) -> None:
    quick = {"latency": 0.0, "bandwidth": float("inf")}
    run = simulation(task(clients=6, each=20, speed_spread=0.7, dropout=0.1, **quick), steps=10)
    run.run(replace(ASYNC, staleness_exponent=exponent))
    stale = 0
    for seen in of(run, "server"):
        assert len(seen.members) == 3
        assert_close(dict(seen.update), dict(plain(run, seen)), rtol=0, atol=FixedPoint(3).step)
        for member in seen.members:
            stale += member.staleness > 0
            assert (member.base is None) == (member.staleness == 0)
            assert member.weight == pytest.approx((1 + member.staleness) ** -exponent / 3), "sent in no time"
    assert stale
    assert run.curve[-1].quality["all"].loss < run.curve[0].quality["all"].loss
    assert run.counters["dropped out"] >= 1


def test_the_host_of_the_enclave_sees_uniform_numbers() -> None:
    run = simulation(task(clients=4), steps=8)
    run.run(ASYNC)
    seen = of(run, "enclave-host")
    assert len(seen) == 8
    assert len({s.name for s in run.seen.kept}) == len(run.seen.kept)
    assert all("SIMULATED" in s.note and not s.exact for s in run.seen.kept if s.role == "enclave-host")
    numbers = FixedPoint(3)
    span = numbers.step * 2**31
    values = torch.cat([s.update.flat() for s in seen])
    assert kstest(values.numpy(), "uniform", (-span, 2 * span)).pvalue > 1e-3
    truth = torch.cat([plain(run, s).flat() for s in seen])
    correlation = torch.corrcoef(torch.stack([values, truth]))[0, 1]
    assert abs(float(correlation)) < 4 / len(values) ** 0.5


@pytest.mark.parametrize("options", [SYNC, ASYNC])
def test_the_server_sees_one_sum_a_step_and_the_rounding_has_a_name(options: Any) -> None:
    run = simulation(task(clients=4), steps=3)
    run.run(options)
    assert [seen.name for seen in of(run, "server")] == ["round-0000", "round-0001", "round-0002"]
    for seen in of(run, "server"):
        assert len(seen.members) >= 3
        [(spec, defense)] = parse_defense(seen.defenses[0])
        assert spec == "secure-aggregation:clients=1"
        assert defense.round(seen.members[0].round) == seen.members[0].round, "clients are not multiplied"
    assert {seen.role for seen in run.seen.kept} <= {"server", "enclave-host"}


def test_an_enclave_of_its_own_process_gives_the_same_model() -> None:
    runs = []
    for isolated in (False, True):
        run = simulation(task(clients=4), steps=3)
        run.run(replace(ASYNC, isolated=isolated))
        runs.append(run)
    first, second = runs
    assert all(torch.equal(first.params[name], second.params[name]) for name in first.params)
    assert first.messages == second.messages
    for one, other in zip(of(first, "enclave-host"), of(second, "enclave-host"), strict=True):
        assert torch.equal(one.update.flat(), other.update.flat())


def test_the_enclave_is_closed_when_a_run_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Watched(secure_async.SimulatedEnclave):
        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(secure_async, "SimulatedEnclave", Watched)
    world = task(clients=4, dropout=0.99)
    with pytest.raises(InputError):
        simulation(world).run(replace(ASYNC, patience=3))
    assert closed == [True]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (SecureSync(cohort=5), "cohort must be at most the 4 clients, got 5"),
        (SecureSync(cohort=4, threshold=5), "threshold must be more than half of the 4 clients .* got 5"),
        (SecureSync(cohort=4, threshold=2), "threshold must be more than half of the 4 clients .* got 2"),
        (SecureSync(cohort=4, bits=30), "wraps around modulo 2.32; accepted: a modulus of 33 bits"),
        (SecureSync(cohort=4, bits=1), "bits must be between 2 and 48"),
        (SecureSync(cohort=4, limit=0.0), "limit must be positive"),
        (SecureAsync(buffer=5, concurrency=4), "buffer must be at most the 4 clients, got 5"),
        (SecureAsync(buffer=4, concurrency=5), "concurrency must be at most the 4 clients, got 5"),
        (SecureAsync(buffer=3, concurrency=4, modulus_bits=22), "wraps around"),
    ],
)
def test_options_that_do_not_fit_the_clients(options: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        simulation(task(clients=4)).run(options)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: SecureSync(cohort=1), "cohort must be at least 2, got 1"),
        (lambda: SecureSync(learning_rate=0.0), "learning_rate must be positive"),
        (lambda: SecureSync(wait=-1.0), "wait must be at least 0"),
        (lambda: SecureSync(weighting="size"), "weighting must be examples or equal, got size"),  # type: ignore[arg-type]
        (lambda: SecureSync(rounding="up"), "rounding must be nearest or stochastic, got up"),  # type: ignore[arg-type]
        (lambda: SecureAsync(buffer=1), "buffer must be at least 2, got 1"),
        (lambda: SecureAsync(staleness_exponent=-1.0), "staleness_exponent must be at least 0"),
    ],
)
def test_options_that_cannot_be(wrong: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        wrong()


def test_more_examples_than_a_number_of_the_vector_can_say() -> None:
    run = simulation(task(clients=4, each=12))
    with pytest.raises(InputError, match="12 examples, more than the 8 that a number of 4 bits can say"):
        run.run(replace(SYNC, weighting="examples", bits=4))
