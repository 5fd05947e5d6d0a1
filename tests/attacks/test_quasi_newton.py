"""L-BFGS by its compact representation against the two loops, torch's optimizer and scipy's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from leakaudit.attacks.quasi_newton import FLATTER, History, QuasiNewton, Trial, strong_wolfe

Value = Callable[[Tensor], Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


def bowl(size: int, condition: float) -> Value:
    generator = torch.Generator().manual_seed(size)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    widths = torch.logspace(0, np.log10(condition), size, dtype=torch.float64)
    return lambda x: 0.5 * (widths * (basis @ (x - 1)).square()).sum()


def differentiated(value: Value) -> Callable[[Tensor], tuple[float, Tensor]]:
    def function(x: Tensor) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        loss = value(x)
        return float(loss.detach()), torch.autograd.grad(loss, x)[0]

    return function


def by_torch(value: Value, start: Tensor, steps: int, history: int, line_search: bool = True) -> Tensor:
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=steps,
        max_eval=10**9,
        history_size=history,
        line_search_fn="strong_wolfe" if line_search else None,
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach()


def two_loops(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """Nocedal and Wright 2006, algorithm 7.4, negated."""
    q, kept = gradient.clone(), []
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        kept.append(alpha)
        q = q - alpha * y
    s, y = pairs[-1]
    q = q * (s @ y) / (y @ y)
    for (s, y), alpha in zip(pairs, reversed(kept), strict=True):
        q = q + s * (alpha - (y @ q) / (s @ y))
    return -q


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 40), length=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_direction_is_that_of_the_two_loops(steps: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64) / 5
    hessian = root @ root.T + 0.1 * torch.eye(30, dtype=torch.float64)
    pairs = [(s, hessian @ s) for s in torch.randn(steps, 30, generator=generator, dtype=torch.float64)]
    gradient = torch.randn(30, generator=generator, dtype=torch.float64)
    history = History(gradient, length)
    for s, y in pairs:
        history.append(s, y)
    assert len(history) == min(steps, length)
    wanted = two_loops(pairs[-length:], gradient)
    torch.testing.assert_close(history.direction(gradient), wanted, rtol=1e-6, atol=1e-8)


def test_nothing_remembered_is_steepest_descent() -> None:
    gradient = torch.tensor([1.0, -2.0])
    assert torch.equal(History(gradient, 3).direction(gradient), -gradient)


@pytest.mark.parametrize("line_search", [True, False])
@pytest.mark.parametrize("history", [3, 100])
def test_steps_are_those_of_torch(history: int, line_search: bool) -> None:
    value = bowl(20, 50.0)
    start = torch.zeros(20, dtype=torch.float64)
    for steps in (1, 2, 5, 12):
        own = QuasiNewton(differentiated(value), start, history=history, line_search=line_search)
        own.advance(steps)
        wanted = by_torch(value, start, steps, history, line_search)
        torch.testing.assert_close(own.point, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [2, 10, 50])
def test_minimum_of_rosenbrock_is_that_of_torch_and_scipy(size: int) -> None:
    function = differentiated(rosenbrock)
    start = torch.zeros(size, dtype=torch.float64)
    own = QuasiNewton(function, start)
    for _ in range(20):
        own.advance(50)
    found = minimize(
        lambda x: tuple(np.asarray(part) for part in function(torch.from_numpy(x))),
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "ftol": 1e-16, "gtol": 1e-12, "maxfun": 10**5},
    )
    np.testing.assert_allclose(own.point.numpy(), found.x, atol=1e-5)
    torch.testing.assert_close(own.point, by_torch(rosenbrock, start, 500, 100), rtol=0, atol=1e-5)
    assert own.value < 1e-12


def test_an_ill_conditioned_bowl_in_float32_is_no_worse_than_by_torch() -> None:
    plain = bowl(60, 1e6)
    start = torch.zeros(60)

    def value(x: Tensor) -> Tensor:
        return plain(x.double()).float()

    own = QuasiNewton(differentiated(value), start)
    for _ in range(15):
        own.advance(20)
    assert own.value <= 2 * float(value(by_torch(value, start, 300, 100))) + 1e-6


def test_going_on_is_the_same_as_going_at_once() -> None:
    function, start = differentiated(rosenbrock), torch.zeros(6, dtype=torch.float64)
    once, parts = QuasiNewton(function, start), QuasiNewton(function, start)
    once.advance(12)
    while parts.evaluations < once.evaluations:
        parts.advance(1)
    assert torch.equal(once.point, parts.point)
    assert once.evaluations == parts.evaluations


@settings(max_examples=40, deadline=None)
@given(first=st.floats(1e-3, 1e3), shift=st.floats(0.2, 50.0), wave=st.floats(0.0, 3.0))
def test_a_line_search_ends_where_both_conditions_hold(first: float, shift: float, wave: float) -> None:
    def trial(length: float) -> Trial:
        t = torch.tensor(length, dtype=torch.float64, requires_grad=True)
        value = (t - shift).square() / shift + wave * torch.sin(3 * t)
        (slope,) = torch.autograd.grad(value, t)
        return Trial(length, float(value.detach()), slope, float(slope))

    here = trial(0.0)
    if here.slope >= 0:
        return
    search = strong_wolfe(here, first, 1.0)
    asked = next(search)
    for _ in range(60):
        try:
            asked = search.send(trial(asked))
        except StopIteration as end:
            found = end.value
            break
    assert found.value <= here.value + 1e-4 * found.length * here.slope
    assert abs(found.slope) <= -FLATTER * here.slope


def test_what_is_not_a_number_is_walked_around() -> None:
    def function(x: Tensor) -> tuple[float, Tensor]:
        value, gradient = differentiated(lambda x: (x.square() - x.log()).sum())(x)
        return value, gradient

    own = QuasiNewton(function, torch.tensor([3.0, 5.0], dtype=torch.float64), learning_rate=20.0)
    for _ in range(10):
        own.advance(10)
    torch.testing.assert_close(own.point, torch.full((2,), 0.5**0.5, dtype=torch.float64))


def test_the_end_is_where_nothing_changes() -> None:
    own = QuasiNewton(differentiated(lambda x: x.square().sum()), torch.zeros(3))
    own.advance(5)
    assert own.evaluations == 1
    assert torch.equal(own.point, torch.zeros(3))
