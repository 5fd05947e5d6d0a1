"""Federated averaging against SGD and against a second implementation; stragglers on hand-worked schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fleets import contributions, everyone_is_accounted_for, fates, paced, sums_hold
from hypothesis import given
from hypothesis import strategies as st
from small_worlds import simulation, task
from torch import Tensor
from torch.testing import assert_close

from leakaudit.errors import InputError
from leakaudit.federated.acceptance import RefusedUpdate, accept
from leakaudit.federated.cost import dense_bytes
from leakaudit.federated.options import CutOff, FederatedAveraging, OverSelection
from leakaudit.federated.participation import local_round
from leakaudit.federated.seen import Seen
from leakaudit.federated.simulation import Limits, Simulation
from leakaudit.federated.task import Task
from leakaudit.federated.trainer import Trainer
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import Round, client_update
from leakaudit.update import Update

ONE_STEP = FederatedAveraging(local_steps=1, batch_size=None, local_learning_rate=0.5)


def sgd_on_the_union(world: Task, steps: int, rate: float, momentum: float) -> list[Tensor]:
    parameters = {name: p.clone().requires_grad_() for name, p in world.victim.params.items()}
    optimiser = torch.optim.SGD(parameters.values(), lr=rate, momentum=momentum)
    for _ in range(steps):
        optimiser.zero_grad()
        world.victim.loss(parameters, world.train.x, world.train.y).backward()
        optimiser.step()
    return [p.detach() for p in parameters.values()]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_one_local_step_on_all_data_is_the_gradient_of_the_union(momentum: float, spread: float) -> None:
    """Weighting by examples makes that true of unequal clients too (McMahan et al. 2017, section 2)."""
    run = simulation(task(clients=4, each=12, size_spread=spread), steps=5)
    run.run(replace(ONE_STEP, momentum=momentum))
    assert_close([*run.params.values()], sgd_on_the_union(run.task, 5, 0.5, momentum))


def test_the_server_learning_rate_and_equal_weights() -> None:
    world = task(clients=4, each=12, size_spread=0.8)
    run = simulation(world, steps=1)
    run.run(replace(ONE_STEP, server_learning_rate=0.3, weighting="equal"))
    parts = [world.train.rows(client.rows) for client in world.clients]
    assert len({len(part) for part in parts}) > 1
    for name, before in world.victim.params.items():
        means = [
            client_update(world.victim, world.victim.params, Round(len(p)), p.x, p.y)[name] for p in parts
        ]
        assert_close(run.params[name], before - 0.3 * 0.5 * torch.stack(means).mean(0))


@pytest.mark.parametrize("local", [{"local_steps": 7}, {"local_epochs": 2}], ids=["steps", "epochs"])
def test_what_is_seen_is_what_torchs_own_sgd_makes_of_the_members(local: dict[str, int]) -> None:
    world = task(clients=6, each=20, size_spread=0.6)
    run = simulation(world, steps=3)
    run.run(FederatedAveraging(cohort=5, batch_size=6, local_learning_rate=0.3, **local))  # type: ignore[arg-type]
    assert sums_hold(run)
    assert all(len(clients) == len(set(clients)) == 5 for clients in contributions(run))
    whole = [seen for seen in run.seen.kept if seen.observer is None]
    assert len(whole) == 3
    assert len(run.seen.kept) == len({seen.name for seen in run.seen.kept}) == 3 * 6
    assert all(sum(m.weight for m in seen.members) == pytest.approx(1) for seen in whole)
    assert len({m.round for seen in whole for m in seen.members}) > 1, "clients of several kinds"
    last = whole[-1]
    assert_close(dict(run.params), {n: last.base[n] - 0.3 * last.update[n] for n in last.update})


@given(st.integers(1, 500), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 40)))
def test_the_round_of_a_client_takes_full_batches_of_its_own_data(
    examples: int, steps: int, batch: int | None
) -> None:
    made = local_round(examples, batch, 0.1, steps)
    assert 1 <= made.num_examples <= examples
    assert made.local_steps == steps
    assert {len(made.batch(step)) for step in range(steps)} == {min(batch or examples, examples)}
    assert made.examples_used == made.num_examples
    kinds = {local_round(n, batch, 0.1, steps) for n in range(batch or 1, 500)}
    assert batch is None or len(kinds) <= steps
    epochs = local_round(examples, batch, 0.1, steps, epochs=3)
    assert epochs.local_steps * epochs.batch_size == 3 * epochs.num_examples
    assert epochs.num_examples > examples - (batch or 1)


def test_over_selection_takes_the_fastest_and_cancels_the_rest() -> None:
    """Six clients of 1 .. 6 seconds a step, all asked, two wanted: every round takes as long as the second."""
    run = simulation(paced(6.0, 5.0, 4.0, 3.0, 2.0, 1.0), steps=3)
    run.run(OverSelection(cohort=2, over_selection=2.0, local_steps=1))
    assert contributions(run) == [(5, 4)] * 3
    assert run.env.now == 3 * 2.0
    assert fates(run) == {"contributed": 6, "cancelled": 12}
    size = dense_bytes(run.params)
    assert run.downloaded == 18 * size
    assert run.uploaded == 6 * size, "who was cancelled sent nothing"
    assert run.updates == 6


def test_a_cut_off_takes_those_in_time_and_ends_the_round() -> None:
    """Clients of 1 .. 4 seconds and a cut-off of 3: one that reports at that very instant is in time."""
    run = simulation(paced(1.0, 2.0, 3.0, 4.0), steps=2)
    run.run(CutOff(cohort=4, cut_off=3.0, local_steps=1))
    assert contributions(run) == [(0, 1, 2)] * 2
    assert run.env.now == 6.0
    assert fates(run) == {"contributed": 6, "too late": 2}
    assert everyone_is_accounted_for(run)


def test_a_full_cohort_does_not_wait_for_the_cut_off() -> None:
    run = simulation(paced(1.0, 2.0, 3.0, 4.0), steps=2)
    run.run(CutOff(cohort=4, cut_off=9.0, local_steps=1))
    assert run.env.now == 8.0
    assert fates(run) == {"contributed": 8}


def test_too_few_reports_abandon_a_round() -> None:
    """Of 1, 2 and 3 seconds two clients are asked, both within 2.5 seconds: only clients 0 and 1 together do."""
    run = simulation(paced(1.0, 2.0, 3.0), steps=4, seed=1)
    run.run(CutOff(cohort=2, minimum=2, cut_off=2.5, local_steps=1, retry=10.0))
    assert {frozenset(clients) for clients in contributions(run)} == {frozenset({0, 1})}
    abandoned = run.counters["abandoned rounds"]
    assert abandoned > 0, "else another seed shows more"
    assert run.env.now == 4 * 2.0 + abandoned * (2.5 + 10.0)
    assert fates(run) == {"contributed": 8, "too late": abandoned, "discarded": abandoned}


def test_who_is_away_when_the_time_is_up_is_unfinished() -> None:
    """Of 1, 2 and 3 seconds: one round of 3 s, then one report of the second round until 4.5 s, and two to come."""
    run = simulation(paced(1.0, 2.0, 3.0), steps=9)
    run.limits = Limits(steps=9, seconds=4.5)
    run.run(FederatedAveraging(cohort=3, local_steps=1))
    assert fates(run) == {"contributed": 3, "unfinished": 3}
    assert everyone_is_accounted_for(run)


@pytest.mark.parametrize("seconds", [None, 1e9])
def test_a_run_in_which_no_round_can_be_completed_ends_with_one_line(seconds: float | None) -> None:
    world = paced(4.0, 5.0)
    run = Simulation(world, Trainer(world), Seen(lambda step: False), Limits(steps=3, seconds=seconds))
    with pytest.raises(
        InputError,
        match=r"^7 rounds in a row had fewer than 1 report, by .* \(14 sampled, 14 too late.*later cut-off",
    ):
        run.run(CutOff(cohort=2, cut_off=1.0, local_steps=1, patience=7))
    assert run.step == 0
    assert run.curve[0].step == 0


def test_all_clients_drop_out() -> None:
    run = simulation(paced(1.0, 1.0, 1.0, dropout=0.999999), steps=3)
    with pytest.raises(InputError, match=r"\(12 sampled, 12 dropped out, 4 abandoned rounds"):
        run.run(FederatedAveraging(cohort=3, local_steps=1, patience=4))
    assert run.env.now > 30.0, "the clock moves on"
    assert all(p.isfinite().all() for p in run.params.values())


def test_nobody_is_available() -> None:
    run = simulation(paced(1.0, 1.0, availability=1e-9), steps=3)
    with pytest.raises(InputError, match="4 rounds in a row"):
        run.run(FederatedAveraging(cohort=2, patience=4))


@pytest.mark.parametrize(
    "options",
    [
        FederatedAveraging(cohort=5, local_steps=2),
        OverSelection(cohort=5, over_selection=0.5, local_steps=2),
        CutOff(cohort=5, over_selection=0.5, cut_off=3.0, minimum=2, local_steps=2),
    ],
)
def test_every_client_sampled_meets_one_fate(options: FederatedAveraging) -> None:
    world = paced(*(0.5 + 0.25 * index for index in range(10)), dropout=0.3, availability=0.7)
    run = simulation(world, steps=12)
    run.run(options)
    assert everyone_is_accounted_for(run)
    assert run.counters["dropped out"] > 0
    assert run.counters["contributed"] == run.updates == sum(map(len, contributions(run)))
    assert len(run.trainer._waiting) == 0, "nothing is kept of clients that are gone"


def spoiling(spoil: float | str, victims: set[int]) -> tuple[Task, Trainer]:
    """Clients 0 .. 3; those in `victims` send something else than an update."""
    world = paced(1.0, 1.5, 2.0, 2.5)
    spoiled = torch.cat([world.train.x[world.clients[index].rows] for index in victims])

    def client(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        update = client_update(victim, params, round, x, y)
        if not any(bool((x[0] == other).all()) for other in spoiled):
            return update
        if spoil == "shape":
            return update.map(lambda tensor: tensor[:1])
        if spoil == "names":
            return update.select(list(update)[1:])
        return update.map(lambda tensor: tensor * float(spoil))

    return world, Trainer(world, client)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), "shape", "names"])
def test_a_client_that_sends_no_update_is_refused_and_counted(spoil: float | str) -> None:
    world, trainer = spoiling(spoil, {0})
    run = Simulation(world, trainer, Seen(lambda step: True), Limits(steps=3))
    run.run(FederatedAveraging(cohort=4, local_steps=1))
    assert fates(run) == {"contributed": 9, "refused": 3}
    assert contributions(run) == [(1, 2, 3)] * 3
    assert sums_hold(run)


def test_a_refused_update_does_not_count_towards_the_cohort() -> None:
    world, trainer = spoiling(float("nan"), {0})
    run = Simulation(world, trainer, Seen(lambda step: True), Limits(steps=2))
    run.run(OverSelection(cohort=2, over_selection=1.0, local_steps=1))
    assert contributions(run) == [(1, 2)] * 2
    assert fates(run) == {"contributed": 4, "refused": 2, "cancelled": 2}
    assert run.env.now == 2 * 2.0


def test_accept_says_what_is_wrong() -> None:
    like = {"w": torch.zeros(2), "b": torch.zeros(1)}
    accept(Update(like), like)
    for wrong, message in (
        ({"w": torch.zeros(2)}, "names differ in 'b'"),
        ({"w": torch.zeros(3), "b": torch.zeros(1)}, r"w has shape \(3,\), the model has \(2,\)"),
        ({"w": torch.tensor([0.0, float("nan")]), "b": torch.zeros(1)}, "w is not finite"),
    ):
        with pytest.raises(RefusedUpdate, match=message):
            accept(wrong, like)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cohort": 0}, "cohort must be at least 1"),
        ({"local_steps": 0}, "local_steps must be at least 1"),
        ({"local_learning_rate": 0.0}, "local_learning_rate must be positive"),
        ({"over_selection": -0.1}, "over_selection must be at least 0"),
        ({"cut_off": 0.0}, "cut_off must be positive"),
        ({"minimum": 5}, "minimum must be at most the cohort of 4, got 5"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"weighting": "loud"}, "weighting must be examples or equal, got loud"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedAveraging(**wrong)  # type: ignore[arg-type]


def test_a_cohort_larger_than_the_population() -> None:
    with pytest.raises(InputError, match="cohort must be at most the 4 clients, got 5"):
        simulation().run(FederatedAveraging(cohort=5))
