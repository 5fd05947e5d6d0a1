"""Distributed training across the world: its special cases, and the whole of it against a plain version."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_worlds import Model, simulation, task, trained
from torch.testing import assert_close

from leakaudit.defenses import DEFENSES, apply
from leakaudit.federated.cost import dense_bytes, sparse_bytes
from leakaudit.federated.options import SYSTEMS, AcrossTheWorld, DelayedSGD, SynchronousSGD
from leakaudit.federated.seen import Observation
from leakaudit.federated.simulation import descend
from leakaudit.federated.task import Task
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.spec import parse
from leakaudit.update import Update

DENSE = AcrossTheWorld(delay=0, period=1, keep=1.0, momentum=0.0, learning_rate=0.3, batch_size=4)


def same_bits(ours: list[Model], theirs: list[Model]) -> bool:
    return all(torch.equal(p, b[name]) for a, b in zip(ours, theirs, strict=True) for name, p in a.items())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_nothing_delayed_or_dropped_it_is_synchronous_sgd(momentum: float) -> None:
    """Of all that is sent the momentum is masked, so it has no effect."""
    world = task(clients=3)
    ours = trained(replace(DENSE, momentum=momentum), world, together=1)[1]
    theirs = trained(SynchronousSGD(learning_rate=0.3, batch_size=4), world, together=1)[1]
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_with_a_period_of_one_and_nothing_dropped_it_is_delayed_sgd(delay: int) -> None:
    world = task(clients=3, speed_spread=0.4)
    ours = trained(replace(DENSE, delay=delay), world)[1]
    theirs = trained(DelayedSGD(delay, learning_rate=0.3, batch_size=4), world)[1]
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_without_delay_and_with_nothing_dropped_it_is_fedavg(period: int) -> None:
    world = task(clients=4)
    run, history = trained(replace(DENSE, period=period), world)
    again = simulation(world)
    round = Round(4 * period, period, 4, 0.3)
    model = world.victim.params
    for end in range(period, 13, period):
        updates = []
        for client in world.clients:
            rows = torch.cat([again.batch(client, 4) for _ in range(period)])
            batch = world.train.rows(rows)
            updates.append(client_update(world.victim, model, round, batch.x, batch.y))
        mean = sum(updates[1:], updates[0]) / len(updates)
        seen = next(o for o in run.seen.kept if o.step == end - period and o.observer is None)
        assert seen.exact
        assert {member.round for member in seen.members} == {round}
        assert_close(dict(seen.base), dict(model))
        assert_close(dict(seen.update), dict(mean))
        model = descend(model, mean, 0.3)
        assert_close(history[end], dict(model))


def plain(world: Task, options: AcrossTheWorld, steps: int) -> tuple[list[Model], list[list[Update]]]:
    """The whole scheme in one loop without clocks: mean models by step, and what was sent by block and worker."""
    run, workers = simulation(world), len(world.clients)
    names = list(world.victim.params)
    zeros = {name: torch.zeros_like(p) for name, p in world.victim.params.items()}
    models = [dict(world.victim.params) for _ in range(workers)]
    velocity, residual = ([dict(zeros) for _ in range(workers)] for _ in range(2))
    sums = [dict(zeros) for _ in range(workers)]
    blocks: list[list[Model]] = []
    sent: list[list[Model]] = []
    history = [dict(world.victim.params)]
    for step in range(steps):
        for j, client in enumerate(world.clients):
            rows = run.batch(client, options.batch_size)
            leaves = {name: p.clone().requires_grad_() for name, p in models[j].items()}
            world.victim.loss(leaves, world.train.x[rows], world.train.y[rows]).backward()
            for name in names:
                models[j][name] = models[j][name] - options.learning_rate * leaves[name].grad
                sums[j][name] = sums[j][name] + leaves[name].grad
        if (step + 1) % options.period == 0:
            blocks.append(sums)
            sent.append([])
            keep = options.keep_at(step)
            for j in range(workers):
                length = math.sqrt(sum(float((t**2).sum()) for t in sums[j].values()))
                bound = math.inf if options.clip is None else options.clip / math.sqrt(workers)
                sent[-1].append({})
                for name in names:
                    velocity[j][name] = options.momentum * velocity[j][name] + sums[j][name] * min(
                        1.0, bound / length
                    )
                    residual[j][name] = residual[j][name] + velocity[j][name]
                    flat = residual[j][name].abs().flatten()
                    least = flat.sort().values[-math.ceil(keep * len(flat))]
                    chosen = residual[j][name].abs() >= least
                    sent[-1][j][name] = torch.where(chosen, residual[j][name], 0.0)
                    velocity[j][name] = torch.where(chosen, 0.0, velocity[j][name])
                    residual[j][name] = torch.where(chosen, 0.0, residual[j][name])
            sums = [dict(zeros) for _ in range(workers)]
        ended = step - options.delay
        if ended >= 0 and (ended + 1) % options.period == 0:
            block = (ended + 1) // options.period - 1
            for j in range(workers):
                for name in names:
                    mean = sum(part[name] for part in sent[block]) / workers
                    models[j][name] = models[j][name] - options.learning_rate * (
                        mean - blocks[block][j][name]
                    )
        history.append({name: sum(model[name] for model in models) / workers for name in names})
    return history, [[Update(part) for part in parts] for parts in sent]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(1, 4),
    st.floats(0.02, 1.0),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([None, 0.5]),
    st.sampled_from([0, 7]),
    st.sampled_from(["server", "all-reduce"]),
)
def test_it_is_the_scheme_written_plainly(
    delay: int,
    period: int,
    keep: float,
    momentum: float,
    clip: float | None,
    warmup: int,
    topology: str,
) -> None:
    world = task(clients=3, speed_spread=0.4)
    options = AcrossTheWorld(
        delay,
        period,
        keep,
        momentum,
        clip,
        warmup,
        0.1,
        4,
        topology,  # type: ignore[arg-type]
    )
    run, ours = trained(options, world)
    theirs, sent = plain(world, options, 12)
    for model, other in zip(ours, theirs, strict=True):
        assert_close(model, other)
    for seen in run.seen.kept:
        client = seen.sender if seen.role == "peer" else seen.observer
        if client is not None and len(seen.members) == 1:
            assert_close(dict(seen.update), dict(sent[seen.step // period][client]))


def test_dgc_is_its_case_without_delay() -> None:
    options = SYSTEMS["dgc"]
    assert isinstance(options, AcrossTheWorld)
    assert (options.delay, options.period, options.keep, options.momentum) == (0, 1, 0.001, 0.9)
    options = replace(options, warmup=8)
    assert [options.keep_at(step) for step in range(10)] == [
        *(share for share in (1 / 4, 1 / 16, 1 / 64, 1 / 256) for _ in range(2)),
        0.001,
        0.001,
    ]
    sparsity = [round(100 * (1 - 0.25**level), 1) for level in (1, 2, 3, 4)]
    assert sparsity == [75, 93.8, 98.4, 99.6], "Lin et al. 2018: 75, 93.75, 98.4375, 99.6 %, then 99.9 %"
    assert replace(options, keep=0.1).keep_at(5) == 0.1, "never less than is kept in the end"
    assert replace(options, warmup=0).keep_at(0) == 0.001


def test_messages_are_as_large_as_what_is_not_zero() -> None:
    world = task(clients=3)
    options = replace(DENSE, delay=2, period=2, keep=0.05)
    run, _ = trained(options, world)
    _, sent = plain(world, options, 12)
    uploads = [m for m in run.messages if m.kind == "update"]
    dense = dense_bytes(world.victim.params)
    for message in uploads:
        block = round(message.sent / 0.6) - 1
        part = sent[block][int(message.sender[-3:])]
        assert message.size == sparse_bytes(part) < dense / 5
    means = [m for m in run.messages if m.kind == "mean"]
    assert len(uploads) == 3 * 5
    assert len(means) == 3 * 5, "the last block ends with the run"
    for message in means:
        mean = sum(sent[0][1:], sent[0][0]) / 3
        assert max(map(sparse_bytes, sent[0])) <= message.size
        assert message.size == sparse_bytes(mean) or message.sent > 0.7
    assert {m.size for m in trained(DENSE, world)[0].messages} == {dense}


def described(world: Task, seen: Observation) -> Update:
    """What an observation of one worker's message says it is."""
    (member,) = seen.members
    batch = world.train.rows(member.rows)
    named = [parse(spec, DEFENSES, "defense") for spec in seen.defenses]
    client = apply(client_update, named, fork(0, "x"))
    assert member.base is not None
    return client(world.victim, member.base, member.round, batch.x, batch.y)


@pytest.mark.parametrize("topology", ["server", "all-reduce"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_what_is_seen_is_described_where_it_says_so(topology: str, clip: float | None) -> None:
    world = task(clients=3)
    options = AcrossTheWorld(2, 2, 0.1, 0.9, clip, 0, 0.1, 4, topology)  # type: ignore[arg-type]
    run, _ = trained(options, world)
    single = [seen for seen in run.seen.kept if len(seen.members) == 1]
    assert len({seen.name for seen in run.seen.kept}) == len(run.seen.kept)
    assert {seen.exact for seen in single} == {True, False}
    for seen in single:
        assert seen.defenses[-1] == "top-k:keep=0.1"
        assert (seen.step == 0) == seen.exact
        found = described(world, seen)
        same = all(torch.allclose(t, found[name], atol=1e-12) for name, t in seen.update.items())
        assert same == seen.exact, "later ones hold a residual"
    who = [(seen.role, seen.observer, seen.sender) for seen in single][:3]
    if topology == "server":
        assert who == [("server", j, None) for j in range(3)]
    else:  # sparse parts are gathered, so a peer sees every other worker's
        assert who[:2] == [("peer", 0, j) for j in (1, 2)]
        assert single[0].name == "round-0000-peer-0-client-001"


@pytest.mark.parametrize(
    ("delay", "period", "exact"), [(4, 2, True), (3, 3, True), (3, 2, False), (1, 3, False)]
)
def test_a_correction_between_the_local_steps_is_told(delay: int, period: int, exact: bool) -> None:
    world = task(clients=3)
    run, _ = trained(replace(DENSE, delay=delay, period=period), world)
    single = [seen for seen in run.seen.kept if len(seen.members) == 1]
    assert all(seen.exact for seen in single if seen.step == 0)
    late = [seen for seen in single if seen.step > delay]
    assert late
    assert {seen.exact for seen in late} == {exact}
    for seen in single:
        found = described(world, seen)
        same = all(torch.allclose(t, found[name], atol=1e-12) for name, t in seen.update.items())
        assert same == seen.exact


def test_a_block_is_seen_where_any_of_its_steps_is_wanted() -> None:
    world = task(clients=2)
    run = simulation(world, steps=12)
    run.seen.wants = lambda step: step in (1, 2, 9)
    run.run(replace(DENSE, period=4, delay=2))
    assert [seen.step for seen in run.seen.kept if seen.observer is None] == [1]
    run = simulation(world, steps=16)
    run.seen.wants = lambda step: step in (1, 2, 9)
    run.run(replace(DENSE, period=4, delay=2))
    assert [seen.step for seen in run.seen.kept if seen.observer is None] == [1, 9]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        ({"period": 0}, "period must be at least 1, got 0"),
        ({"clip": 0.0}, "clip must be positive and finite, got 0.0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"momentum": -0.5}, r"momentum must be in \[0, 1\), got -0.5"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AcrossTheWorld(**wrong)  # type: ignore[arg-type]
