"""Inexact solves against dense algebra: the damped equations, their preconditioner, and lost directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from leakaudit.attacks.jacobian import Columns
from leakaudit.attacks.krylov import (
    KEPT_PAIRS,
    Linear,
    Preconditioner,
    Solver,
    Work,
    conjugate_gradients,
)
from leakaudit.randomness import fork


class Matrix:
    """A system whose Jacobian is the same everywhere."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.target = matrix, matrix.new_zeros(len(matrix))

    def gram(self, point: Tensor) -> Tensor:
        return self.matrix.T @ self.matrix

    def outer_gram(self, point: Tensor) -> Tensor:
        return self.matrix @ self.matrix.T


def draw(*shape: int, name: str = "draw") -> Tensor:
    return torch.randn(shape, generator=fork(0, name), dtype=torch.float64)


def prior_of(size: int) -> Tensor:
    root = draw(size, size, name="prior")
    return root @ root.T


def solver_of(matrix: Tensor, exact: bool = True) -> Solver:
    return Solver(Matrix(matrix.float()), Matrix(matrix) if exact else None, 1e-3, Work())  # type: ignore[arg-type]


def linear_of(matrix: Tensor, prior: Tensor | None = None, examples: int = 1) -> Linear:
    point = draw(examples, matrix.shape[1] // examples, name="point")
    return Linear(point, Columns(matrix), draw(len(matrix), name="residual"), prior)


@pytest.mark.parametrize("condition", [1e1, 1e3])
def test_conjugate_gradients_solve(condition: float) -> None:
    root = torch.linalg.qr(draw(30, 30)).Q
    matrix = root @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10(), 30).double()) @ root.T
    right = draw(30, name="right")
    found = conjugate_gradients(lambda v: matrix @ v, right, lambda v: v, 200, 1e-10)
    assert found.converged
    assert torch.allclose(found.vector, torch.linalg.solve(matrix, right), rtol=1e-6, atol=1e-8)
    few = conjugate_gradients(lambda v: matrix @ v, right, lambda v: v, 2, 1e-10)
    assert (few.iterations, few.converged) == (2, False)
    assert float(few.vector @ matrix @ few.vector / 2 - right @ few.vector) < 0


def test_right_side_of_zero_and_a_matrix_that_overflows() -> None:
    zero = conjugate_gradients(lambda v: v, torch.zeros(3), lambda v: v, 5, 1e-3)
    assert (zero.converged, zero.vector.tolist()) == (True, [0.0, 0.0, 0.0])
    broken = conjugate_gradients(lambda v: v * float("nan"), torch.ones(3), lambda v: v, 5, 1e-3)
    assert (broken.converged, broken.vector.tolist()) == (False, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("shape", [(30, 12), (8, 12)], ids=["tall", "wide"])
@pytest.mark.parametrize("prior", [False, True])
def test_step_solves_the_damped_normal_equations(shape: tuple[int, int], prior: bool) -> None:
    matrix = draw(*shape)
    block = prior_of(6) if prior else None
    linear = linear_of(matrix, block, examples=2)
    whole = torch.block_diag(block, block) if block is not None else torch.zeros(12, 12)
    gradient = matrix.T @ linear.residual + whole.double() @ linear.point.reshape(-1)
    expected = -torch.linalg.solve(matrix.T @ matrix + whole + 0.3 * torch.eye(12), gradient)
    solver = solver_of(matrix)
    solver.prepare(linear)
    step, fall = solver.step(linear, 0.3)
    assert linear.wide == (shape == (8, 12) and not prior)
    assert float((step - expected).norm() / expected.norm()) < 3e-3

    def objective(point: Tensor, residual: Tensor) -> Tensor:
        return residual.square().sum() + point @ whole.double() @ point

    point = linear.point.reshape(-1)
    before = objective(point, linear.residual)
    after = objective(point + step, linear.residual + matrix @ step)
    assert fall == pytest.approx(float(before - after), rel=1e-9)


def test_float32_factor_of_another_damping_and_point_costs_iterations_not_accuracy() -> None:
    matrix = draw(60, 40)
    gram = (matrix.T @ matrix).float()
    stale = gram + 0.1 * (draw(40, 40, name="other").T @ draw(40, 40, name="other")).float()
    right = draw(40, name="right")
    expected = torch.linalg.solve(matrix.T @ matrix + 0.01 * torch.eye(40), right)
    counts = []
    for given in (gram, stale):
        inverse = Preconditioner(given, given, 0.0, float(given.diagonal().mean())).damped(0.02)
        found = conjugate_gradients(lambda v: matrix.T @ (matrix @ v) + 0.01 * v, right, inverse, 100, 1e-10)
        assert torch.allclose(found.vector, expected, rtol=1e-6, atol=1e-9)
        counts.append(found.iterations)
    assert counts[0] < 10 < counts[1]


def test_pairs_of_a_solve_spare_the_next_one_iterations_and_keep_the_inverse_symmetric() -> None:
    matrix = torch.diag(torch.logspace(0, 4, 60, dtype=torch.float64))
    eye = torch.eye(60)
    plain = Preconditioner(eye, eye, 1.0, 1.0)
    first = conjugate_gradients(lambda v: matrix @ v, draw(60), plain, 200, 3e-3)
    assert KEPT_PAIRS <= len(first.pairs) < 2 * KEPT_PAIRS
    better = replace(plain, pairs=first.pairs)
    right = draw(60, name="next")
    one, two = (conjugate_gradients(lambda v: matrix @ v, right, p, 200, 3e-3) for p in (plain, better))
    assert two.iterations < 0.8 * one.iterations
    inverse = torch.stack([better(row) for row in torch.eye(60, dtype=torch.float64)])
    assert torch.allclose(inverse, inverse.T, rtol=1e-4, atol=1e-6)
    assert float(torch.linalg.eigvalsh((inverse + inverse.T) / 2)[0]) > 0


def test_singular_matrices_raise_the_damping_of_the_factor() -> None:
    gram = torch.ones(3, 3)
    made = Preconditioner(gram, gram, 0.0, 1.0).damped(0.0)
    assert made.damping >= made.least > 0
    assert bool(made(torch.ones(3, dtype=torch.float64)).isfinite().all())
    assert made.serves(made.damping * 29)
    assert not made.serves(made.damping * 31)


@pytest.mark.parametrize("exact", [False, True])
def test_what_float32_cannot_factor_is_factored_in_float64(exact: bool) -> None:
    """A spectrum over eight decades: only the float64 factor leads to convergence within the limit."""
    left, right = torch.linalg.qr(draw(80, 60)).Q, torch.linalg.qr(draw(60, 60, name="right")).Q
    matrix = left @ torch.diag(torch.logspace(0, -6, 60, dtype=torch.float64)) @ right.T
    linear = linear_of(matrix)
    solver = solver_of(matrix, exact)
    solver.prepare(linear)
    step, _ = solver.step(linear, 1e-12)
    expected = -torch.linalg.solve(
        matrix.T @ matrix + 1e-12 * torch.eye(60, dtype=torch.float64), linear.gradient()
    )
    assert (float((step - expected).norm() / expected.norm()) < 1e-2) == exact
    assert solver.preconditioner is not None
    assert (solver.preconditioner.gram.dtype == torch.float64) == exact


def test_stale_preconditioner_is_made_anew() -> None:
    matrix = draw(200, 150)
    coarse = Matrix(matrix.float())
    work = Work()
    solver = Solver(coarse, None, 1e-3, work)  # type: ignore[arg-type]
    first = linear_of(matrix)
    solver.prepare(first)
    solver.step(first, 1e-3)
    assert work.jacobians == 1
    other = draw(200, 150, name="other")
    coarse.matrix = other.float()
    second = linear_of(other)
    solver.prepare(second)
    step, _ = solver.step(second, 1e-3)
    assert work.jacobians == 2
    expected = -torch.linalg.solve(other.T @ other + 1e-3 * torch.eye(150), second.gradient())
    assert float((step - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("least", [0.0, 1e-8, 1e-4, 1.0])
def test_lost_directions_are_noticed(least: float) -> None:
    left, right = torch.linalg.qr(draw(80, 60)).Q, torch.linalg.qr(draw(60, 60, name="right")).Q
    values = torch.ones(60, dtype=torch.float64)
    values[-3:] = least
    linear = linear_of(left @ torch.diag(values) @ right.T)
    solver = solver_of(linear.products.matrix)  # type: ignore[attr-defined]
    assert solver.deficient(linear, fork(0, "null")) == (least < 1e-6)
    assert solver_of(draw(3, 5)).deficient(linear_of(draw(3, 5)), fork(0, "null"))
