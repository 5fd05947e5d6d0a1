from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_audits import CLASSES, SPACE, build, private_batch, victim_of
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Mode, Victim
from leakaudit.rounds import Round, client_update, from_own_bases, parameter_gradient, trained_buffers
from leakaudit.update import Update


def sgd(module: nn.Module, round: Round, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """(before - after) / lr of a plain loop over a plain module, which is trained in place."""
    before = copy.deepcopy(dict(module.named_parameters()))
    optimiser = torch.optim.SGD(module.parameters(), lr=round.learning_rate)
    for step in range(round.local_steps):
        rows = round.batch(step)
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
        optimiser.step()
    return {n: (before[n] - p).detach() / round.learning_rate for n, p in module.named_parameters()}


def assert_close(update: Update, expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(update) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(update[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 5),
    steps=st.integers(1, 6),
    size=st.integers(1, 5),
    rate=st.floats(0.01, 0.5),
    mode=st.sampled_from(["train", "eval"]),
)
def test_a_round_is_a_plain_sgd_loop(count: int, steps: int, size: int, rate: float, mode: Mode) -> None:
    round = Round(count, steps, min(size, count), rate)
    victim = victim_of("norm", mode).to(dtype=torch.float64)
    x, y = private_batch(count)
    module = build("norm").double().train(mode == "train")
    update = client_update(victim, victim.params, round, x.double(), y)
    assert_close(update, sgd(module, round, x.double(), y), 1e-9)


def test_one_step_of_fedavg_is_fedsgd_whatever_the_learning_rate() -> None:
    victim = victim_of("smooth")
    x, y = private_batch(3)
    gradient = parameter_gradient(victim, victim.params, x, y)
    for rate in (1e-3, 1.0, 50.0):
        update = client_update(victim, victim.params, Round(3, learning_rate=rate), x, y)
        assert all(torch.equal(update[name], gradient[name]) for name in update)


def test_partial_last_batches_follow_the_order_given() -> None:
    round = Round(num_examples=5, local_steps=4, local_batch_size=2)
    assert [round.batch(step) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert Round(3).batch(7) == [0, 1, 2]


@given(count=st.integers(1, 9), steps=st.integers(1, 9), size=st.integers(1, 9))
def test_examples_used_are_those_of_the_batches(count: int, steps: int, size: int) -> None:
    round = Round(count, steps, min(size, count))
    assert round.examples_used == len({row for step in range(steps) for row in round.batch(step)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_examples": 0},
        {"num_examples": 2, "local_steps": 0},
        {"num_examples": 2, "local_batch_size": 3},
        {"num_examples": 2, "learning_rate": 0.0},
        {"num_examples": 2, "learning_rate": float("nan")},
    ],
)
def test_rounds_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        Round(**wrong)  # type: ignore[arg-type]


def minute_victim() -> Victim:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    return Victim.of(module.float(), Pixels((1, 3, 3)), 3).to(dtype=torch.float64)


def test_gradients_through_three_local_steps() -> None:
    victim = minute_victim()
    round = Round(num_examples=3, local_steps=3, local_batch_size=2, learning_rate=0.3)
    x = torch.rand(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    y = torch.rand(3, 3, dtype=torch.float64).softmax(1).requires_grad_()

    def update(x: Tensor, y: Tensor) -> Tensor:
        return client_update(victim, victim.params, round, x, y).flat()

    assert torch.autograd.gradcheck(update, (x, y))


def test_both_ways_of_differentiating_agree() -> None:
    """Plain autograd, and torch.func inside jvp and vmap, through two local steps."""
    victim = minute_victim()
    round = Round(num_examples=2, local_steps=2, local_batch_size=1, learning_rate=0.5)
    x, y = torch.rand(2, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 2])

    def update(x: Tensor) -> Tensor:
        return client_update(victim, victim.params, round, x, y).flat()

    plain = torch.autograd.functional.jacobian(update, x).flatten(1)
    basis = torch.eye(18, dtype=torch.float64).view(18, 2, 1, 3, 3)
    value, _ = jvp(update, (x,), (basis[0],))
    forward = vmap(lambda direction: jvp(update, (x,), (direction,))[1])(basis).T
    torch.testing.assert_close(value, update(x))
    torch.testing.assert_close(forward, plain)


def test_train_mode_uses_the_batch_and_leaves_the_victim_alone() -> None:
    victim = victim_of("norm", "train")
    before = {name: tensor.clone() for name, tensor in {**victim.params, **victim.buffers}.items()}
    x, y = private_batch(4)
    update = client_update(victim, victim.params, Round(4, 3, learning_rate=0.1), x, y)
    assert_close(update, sgd(build("norm").train(), Round(4, 3, learning_rate=0.1), x, y), 1e-3)
    assert all(torch.equal(t, before[n]) for n, t in {**victim.params, **victim.buffers}.items())


@pytest.mark.parametrize("steps", [1, 4])
def test_trained_buffers_are_a_plain_modules(steps: int) -> None:
    victim = victim_of("norm", "train")
    x, y = private_batch(5)
    round = Round(5, steps, 2, 0.1)
    module = build("norm").train()
    sgd(module, round, x, y)
    found = trained_buffers(victim, round, x, y)
    expected = dict(module.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert int(found["1.num_batches_tracked"]) == steps


def test_dropout_is_off_in_both_modes() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, CLASSES))
    x, y = private_batch(2)
    updates = [
        client_update(victim, victim.params, Round(2), x, y).flat()
        for victim in (Victim.of(module, SPACE, CLASSES, mode) for mode in ("train", "eval"))
    ]
    assert torch.equal(*updates)


def test_frozen_parameters_are_not_shared() -> None:
    module = build("smooth")
    module[0].requires_grad_(False)
    victim = Victim.of(module, SPACE, CLASSES)
    x, y = private_batch()
    update = client_update(victim, victim.params, Round(1, 2, learning_rate=0.1), x, y)
    assert list(update) == ["2.weight", "2.bias", "5.weight", "5.bias"]


def test_the_update_is_taken_at_the_downloaded_weights() -> None:
    """Other params than the victim's own may be passed; the loss is that of `functional_call`."""
    victim = victim_of("smooth")
    x, y = private_batch(2)
    params = {name: p + 0.1 for name, p in victim.params.items()}
    module = build("smooth")
    module.load_state_dict(params)
    nn.functional.cross_entropy(module(x), y).backward()
    update = client_update(victim, params, Round(2), x, y)
    assert_close(update, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, 1e-6)
    torch.testing.assert_close(victim.logits(params, x), functional_call(module, params, (x,)))


def test_a_cohort_is_the_mean_of_its_clients() -> None:
    victim, (x, y) = victim_of("mlp"), private_batch(4)
    together = Round(4, clients=2, local_steps=2, learning_rate=0.1)
    apart = [
        client_update(victim, victim.params, Round(2, local_steps=2, learning_rate=0.1), x[part], y[part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    seen = client_update(victim, victim.params, together, x, y)
    assert torch.allclose(seen.flat(), ((apart[0] + apart[1]) / 2).flat(), atol=1e-7)
    whole = client_update(victim, victim.params, Round(4), x, y)
    cohort = client_update(victim, victim.params, Round(4, clients=4), x, y)
    assert torch.allclose(cohort.flat(), whole.flat(), atol=1e-7)  # one step: the gradient of the large batch


@pytest.mark.parametrize(("count", "clients"), [(4, 3), (4, 0), (2, 4)])
def test_clients_share_evenly(count: int, clients: int) -> None:
    with pytest.raises(ValueError, match="clients must"):
        Round(count, clients=clients)


def test_a_cohort_of_unequal_shares_is_the_weighted_sum_of_plain_sgd_loops() -> None:
    victim, (x, y) = victim_of("norm", "train").to(dtype=torch.float64), private_batch(6)
    x, weights = x.double(), (0.5, -0.25, 2.0)
    together = Round(6, 3, 2, 0.1, clients=3, sizes=(1, 3, 2), weights=weights, client_steps=(1, 3, 2))
    assert together.examples_used == 6
    assert together.passes == 1 + 3 * 2 + 2 * 2
    alone = [Round(1, 1, None, 0.1), Round(3, 3, 2, 0.1), Round(2, 2, 2, 0.1)]
    expected: dict[str, Tensor] = {}
    for own, weight, part in zip(alone, weights, (slice(0, 1), slice(1, 4), slice(4, 6)), strict=True):
        for name, delta in sgd(build("norm").double().train(), own, x[part], y[part]).items():
            expected[name] = expected.get(name, 0) + weight * delta
    assert_close(client_update(victim, victim.params, together, x, y), expected, 1e-9)


def test_one_step_of_fedavg_with_unequal_shares_is_the_gradient_of_all_examples() -> None:
    victim, (x, y) = victim_of("mlp"), private_batch(5)
    weighted = Round(5, clients=2, sizes=(1, 4), weights=(1 / 5, 4 / 5))
    torch.testing.assert_close(
        dict(client_update(victim, victim.params, weighted, x, y)),
        dict(client_update(victim, victim.params, Round(5), x, y)),
    )
    assert not weighted.uneven
    assert not Round(4, clients=2).uneven
    assert Round(5, clients=2, sizes=(1, 4)).uneven


def test_clients_that_start_from_models_of_their_own() -> None:
    victim, (x, y) = victim_of("mlp"), private_batch(3)
    older = {name: p * 0.9 for name, p in victim.params.items()}
    round = Round(3, 2, 1, 0.1, clients=2, sizes=(2, 1), weights=(0.7, 0.3))
    client = from_own_bases(client_update, [older, victim.params])
    expected = (
        client_update(victim, older, Round(2, 2, 1, 0.1), x[:2], y[:2]) * 0.7
        + client_update(victim, victim.params, Round(1, 2, 1, 0.1), x[2:], y[2:]) * 0.3
    )
    torch.testing.assert_close(dict(client(victim, victim.params, round, x, y)), dict(expected))
    one = client(victim, victim.params, Round(1), x[:1], y[:1])
    torch.testing.assert_close(dict(one), dict(client_update(victim, victim.params, Round(1), x[:1], y[:1])))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clients": 2, "sizes": (1, 2)}, "sizes must be at least 1 and come to 4"),
        ({"clients": 2, "sizes": (4, 0)}, "sizes must be at least 1"),
        ({"clients": 2, "sizes": (1, 1, 2)}, "sizes must be one number for each"),
        ({"weights": (2.0,)}, "weights must be one number for each of several clients"),
        ({"clients": 2, "weights": (math.nan, 1.0)}, "weights must be finite"),
        ({"clients": 2, "weights": (0.0, 0.0)}, "not all zero"),
        ({"clients": 2, "local_steps": 2, "client_steps": (1, 1)}, "client_steps must be at least 1"),
    ],
)
def test_shares_that_cannot_be(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Round(4, **wrong)
