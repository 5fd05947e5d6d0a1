"""A race is successive halving, and candidates that share a batch go where each would go alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_audits import victim_of, view_of
from torch import Tensor
from torch.autograd.function import once_differentiable

from leakaudit.attacks.adam import Rule
from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import Compiler
from leakaudit.attacks.gradient_matching import TV_WEIGHTS, InvertingGradients
from leakaudit.attacks.matching import cosine
from leakaudit.attacks.optimise import Candidate, Matching, adam
from leakaudit.attacks.racing import MEMORY, Field, Loss, Race, bytes_of, pieces, rungs, width_of
from leakaudit.errors import InputError
from leakaudit.randomness import fork
from leakaudit.rounds import Round
from leakaudit.threat import View, known

ITERATIONS = 16
MANY, ONE = 1, 2**60
"""Bytes of a candidate that put all into one batch, or none."""


def world(model: str = "smooth", count: int = 1, mode: str = "eval") -> View:
    return view_of(victim_of(model, mode), Round(count))  # type: ignore[arg-type]


def start(starts: int, count: int = 1) -> Tensor:
    return torch.randn(starts, count, 3, 8, 8, generator=fork(0, "starts"))


def race(view: View, size: int = MANY, survivors: int = 1, signed: bool = False) -> Race:
    return Race(ITERATIONS, 0.1, Rule(signed, view.victim.space.project), size, survivors=survivors)


def labels(count: int, free: bool) -> Tensor:
    return torch.full((count, 5), 0.2) if free else torch.arange(1, count + 1)


# ------------------------------------------------------------------ the schedule


@given(st.integers(1, 70), st.integers(1, 5000), st.integers(1, 70))
def test_rungs_halve_down_to_the_survivors_and_fill_the_iterations(
    starts: int, iterations: int, survivors: int
) -> None:
    plan = rungs(starts, iterations, survivors)
    counts = [rung.candidates for rung in plan]
    assert counts[0] == starts
    assert counts[-1] == min(starts, survivors)
    assert all(b == max(survivors, -(-a // 2)) for a, b in pairwise(counts))
    assert sum(rung.iterations for rung in plan) == iterations
    assert all(rung.iterations >= 0 for rung in plan)


def test_sixteen_starts_cost_three_descents() -> None:
    plan = rungs(16, 4800)
    assert [(rung.candidates, rung.iterations) for rung in plan] == [
        (16, 300), (8, 300), (4, 600), (2, 1200), (1, 2400),
    ]  # fmt: skip
    assert sum(rung.candidates * rung.iterations for rung in plan) == 3 * 4800
    assert rungs(16, 4800, survivors=16) == [rungs(16, 4800, survivors=99)[0]]


def test_pieces() -> None:
    assert pieces(16, 16) == [16]
    assert pieces(16, 64) == [16]
    assert pieces(11, 4) == [4, 4, 3]
    assert pieces(3, 1) == [1, 1, 1]
    assert pieces(11, 4, least=4) == [4, 4, 1, 1, 1]
    assert pieces(3, 16, least=4) == [1, 1, 1]


def test_fewer_candidates_share_a_batch_the_larger_they_are() -> None:
    small, large = (bytes_of(world(model)) for model in ("narrow", "norm"))
    assert small < large < bytes_of(world("norm", count=4))
    cpu = torch.device("cpu")
    widths = [width_of(size, cpu) for size in (2**10, 2**20, 2**26, 2**27 + 1, 2**40)]
    assert widths == [MEMORY["cpu"] >> 10, MEMORY["cpu"] >> 20, 4, 1, 1]


# ------------------------------------------------------------------ the candidates


def alone(view: View, loss: Loss, x: Tensor, y: Tensor) -> tuple[list[float], Tensor]:
    """(smallest loss by iteration, the best x) of one start by itself."""
    seen: list[float] = []
    monitor = Monitor(lambda _, __, value: seen.append(min([value, *seen[-1:]])))
    adam(
        Candidate.starting(x, y), loss, monitor, iterations=ITERATIONS, learning_rate=0.1,
        project=view.victim.space.project,
    )  # fmt: skip
    return seen, monitor.result().x


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("model", "mode"), [("smooth", "eval"), ("norm", "train")])
@pytest.mark.parametrize("size", [MANY, MEMORY["cpu"] // 3, ONE])
def test_a_race_is_halving_by_the_losses_of_starts_alone(
    free: bool, model: str, mode: str, size: int
) -> None:
    """In one batch, in batches of two, and one by one."""
    view, x = world(model, 2, mode), start(5, 2)
    loss, y = Matching(view, "cosine", tv=1e-3), labels(2, free)
    ways = [alone(view, loss, begin, y) for begin in x]
    left, done = list(range(5)), 0
    for rung, following in zip(rungs(5, ITERATIONS), rungs(5, ITERATIONS)[1:], strict=False):
        done += rung.iterations
        left = sorted(left, key=lambda n: (ways[n][0][done - 1], n))[: following.candidates]
    monitor = Monitor()
    end = race(view, size).run(Field.starting(x, y), loss, monitor)
    assert end.numbers.tolist() == left
    found = monitor.result()
    torch.testing.assert_close(found.x, ways[left[0]][1], rtol=1e-2, atol=2e-3)
    assert found.loss == pytest.approx(ways[left[0]][0][-1], rel=1e-2)
    assert float(end.losses) == found.loss
    assert torch.equal(end.x[0], found.x)


def test_without_halving_every_start_reaches_its_own_end() -> None:
    view, x, y = world(), start(3), labels(1, False)
    loss = Matching(view, "cosine")
    end = race(view, survivors=3).run(Field.starting(x, y), loss, Monitor())
    for begin, found, best in zip(x, end.x, end.losses, strict=True):
        losses, expected = alone(view, loss, begin, y)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3)
        assert float(best) == pytest.approx(losses[-1], rel=1e-2)


def test_candidates_may_have_a_loss_of_their_own() -> None:
    x = torch.zeros(3, 1, 1, 2, 2)
    centres = torch.tensor([0.1, 0.2, -0.3])

    def loss(x: Tensor, y: Tensor, centre: Tensor) -> Tensor:
        return (x - centre).square().sum()

    end = Race(400, 0.05, Rule(), MANY, cosine_decay=True, survivors=3).run(
        Field.starting(x, torch.zeros(1, dtype=torch.int64), [centres]), loss, Monitor()
    )
    torch.testing.assert_close(
        end.x, centres.reshape(3, 1, 1, 1, 1).expand_as(x).contiguous(), atol=1e-3, rtol=0
    )


def slope(x: Tensor, y: Tensor) -> Tensor:
    return 100 + x.sum()


def test_of_equals_those_that_began_first_stay_and_what_is_not_finite_goes() -> None:
    y = torch.zeros(1, dtype=torch.int64)
    same = torch.zeros(5, 1, 1, 2, 2)
    assert Race(8, 0.1, Rule(), MANY).run(Field.starting(same, y), slope, Monitor()).numbers.tolist() == [0]
    same[0] = math.nan
    end = Race(8, 0.1, Rule(), MANY).run(Field.starting(same, y), slope, Monitor())
    assert end.numbers.tolist() == [1]


def test_a_race_without_any_finite_loss_has_diverged() -> None:
    monitor = Monitor()
    Race(8, 0.1, Rule(), MANY).run(
        Field.starting(torch.full((2, 1, 1, 2, 2), math.nan), torch.zeros(1, dtype=torch.int64)),
        slope,
        monitor,
    )
    assert monitor.stopped == "diverged"


def test_a_monitor_sees_one_descent_and_the_strip_is_the_winners() -> None:
    view, x, y = world(), start(4), labels(1, False)
    seen: list[tuple[int, int]] = []
    monitor = Monitor(lambda iteration, total, _: seen.append((iteration, total)))
    loss = Matching(view, "cosine")
    end = race(view).run(Field.starting(x, y), loss, monitor)
    assert seen == [(step, ITERATIONS) for step in range(ITERATIONS + 1)]
    winner = int(end.numbers)
    step, value, frame = monitor.strip[0]
    assert (step, value) == (0, pytest.approx(float(loss(x[winner], y)), rel=1e-4))
    assert torch.equal(frame, x[winner])
    assert [frame[0] for frame in monitor.strip] == sorted(monitor.spaced(ITERATIONS))


def test_a_race_ends_with_the_time_and_keeps_the_best() -> None:
    view = world()
    monitor = Monitor(deadline=0.0)
    race(view).run(Field.starting(start(4), labels(1, False)), Matching(view, "cosine"), monitor)
    assert (monitor.stopped, monitor.iteration) == ("budget", 1)
    assert monitor.best_x is not None


def test_what_cannot_be_batched_runs_one_by_one_and_says_so() -> None:
    view, x, y = world(), start(4), labels(1, False)
    matching = Matching(view, "cosine")

    def branching(x: Tensor, y: Tensor) -> Tensor:
        return matching(x, y) if float(x.detach().sum()) < 1e9 else x.sum()

    compiler = Compiler("never")
    found = race(view).run(Field.starting(x, y), branching, Monitor(compiler=compiler))
    expected = race(view).run(Field.starting(x, y), matching, Monitor())
    assert found.numbers.tolist() == expected.numbers.tolist()
    torch.testing.assert_close(found.x, expected.x, rtol=1e-2, atol=2e-3)
    assert compiler.step.startswith("eager; one start after another: ")
    assert "\n" not in compiler.step


# ------------------------------------------------------------------ the attack


def test_one_start_is_a_descent_of_its_own() -> None:
    view = world()
    attack = InvertingGradients(iterations=ITERATIONS)
    found = attack.run(view, fork(3, "a"), Monitor())
    generator, monitor = fork(3, "a"), Monitor()
    y = torch.tensor([1])
    adam(
        Candidate(view.victim.space.sample(1, generator), labels=y),
        Matching(view, "cosine", tv=1e-4, statistics=1e-2),
        monitor,
        iterations=ITERATIONS,
        learning_rate=0.1,
        signed=True,
        project=view.victim.space.project,
    )
    assert torch.equal(found.x, monitor.result().x)
    assert found.details == {}


def test_raced_starts_begin_with_the_only_one_and_end_no_worse() -> None:
    view = view_of(victim_of("smooth"), labels=known(torch.tensor([1]), "test"))
    single = InvertingGradients(iterations=60, signed=False).run(view, fork(0, "a"), Monitor())
    attack = InvertingGradients(iterations=60, signed=False, starts=8)
    raced = attack.run(view, fork(0, "a"), Monitor())
    again = attack.run(view, fork(0, "a"), Monitor())
    assert raced.loss < single.loss
    assert raced.details["starts"] == 8
    assert 1 <= raced.details["start kept"] <= 8
    assert torch.equal(raced.x, again.x)
    torch.testing.assert_close(raced.strip[0][2].shape, single.strip[0][2].shape)


def test_at_least_one_start() -> None:
    with pytest.raises(ValueError, match="starts"):
        InvertingGradients(starts=0)


def test_weights_tried_at_once_are_those_tried_one_after_another() -> None:
    """The loop that the batch replaces, from the same start: the same distances, the same winner."""
    view = view_of(victim_of("smooth"), labels=known(torch.tensor([1]), "test"))
    attack = InvertingGradients(tv=None, iterations=5, tuning=30, signed=False)
    found = attack.run(view, fork(0, "a"), Monitor()).details
    begin, expected = view.victim.space.sample(1, fork(0, "a")), {}
    for tv in TV_WEIGHTS:
        monitor = Monitor()
        adam(
            Candidate(begin, labels=torch.tensor([1])), Matching(view, "cosine", tv=tv), monitor,
            iterations=30, learning_rate=0.1, project=view.victim.space.project,
        )  # fmt: skip
        best = monitor.result()
        expected[str(tv)] = float(cosine(view.simulate(best.x, best.y).detach(), view.observed))
    assert found["cosine distance by tv"] == pytest.approx(expected, rel=1e-2)
    assert str(found["tv"]) == min(expected, key=lambda tv: expected[tv])


@pytest.mark.slow
def test_a_compiled_race_is_the_eager_one() -> None:
    view, x, y = world(), start(2), labels(1, False)
    loss, compiler = Matching(view, "cosine"), Compiler("always")
    eager = race(view).run(Field.starting(x, y), loss, Monitor())
    compiled = race(view).run(Field.starting(x, y), loss, Monitor(compiler=compiler))
    assert compiler.step == "compiled"
    assert compiled.numbers.tolist() == eager.numbers.tolist()
    torch.testing.assert_close(compiled.x, eager.x, rtol=1e-2, atol=2e-3)


def test_a_model_without_double_backward_is_not_raced() -> None:
    """torch leaves such a backward pass out without a word, and the descent would go astray."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.clone()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        weight = torch.ones((), requires_grad=True)
        (gradient,) = torch.autograd.grad(Once.apply(weight * x).square().sum(), weight, create_graph=True)
        return gradient

    with pytest.raises(InputError, match="accepted: inverting-gradients with starts=1"):
        race(world()).run(Field.starting(start(2), labels(1, False)), loss, Monitor())
