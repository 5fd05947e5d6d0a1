"""Damped least-squares steps from products with the Jacobian, instead of the matrix.

    (J^T J + P + damping) step = -(J^T r + P u)

is solved by conjugate gradients (Hestenes and Stiefel 1952) with J and J^T as two products of a
few milliseconds.  What makes them few is a preconditioner: the Cholesky factor, in float32, of the same
matrix at an *earlier* point with an earlier damping, improved by pairs that the solve before it
left behind (Morales and Nocedal 2000, "Automatic preconditioning by limited memory quasi-Newton updating",
section 2).  The products are in the precision of the problem, so a factor in float32 only costs
iterations, never accuracy.  It is made anew, as dear as hundreds of iterations, when they grow many.

Where there are fewer equations than unknowns and no prior, J J^T + damping is solved instead, and
the step is J^T of the answer; there the factor is made at every point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leakaudit.attacks.jacobian import Products, System

TOLERANCE = 3e-3
"""Of the residual of a solve against its start, in the norm of the preconditioner."""
WIDE_TOLERANCE = 1e-9
"""The same with J J^T."""
LEAST_DAMPING = 1e-6
"""Of the mean squared column norm, in a float32 factor: what rounding leaves positive definite."""
KEPT_PAIRS = 20
NEAR = 30.0
"""A factor serves dampings up to so many times its own, and down to one so-manieth of it."""
UNKNOWNS_A_SOLVE = {"cpu": 25.0}
UNKNOWNS_ELSEWHERE = 150.0
"""Iterations worth one new factor, at most: so many of its rows for each."""
FEWEST = 10


@dataclass(frozen=True)
class Pair:
    """A direction p and what the matrix made of it, A p, with p^T A p > 0."""

    direction: Tensor
    image: Tensor
    curvature: float


@dataclass(frozen=True)
class Preconditioner:
    """Cholesky factor of gram + damping.

    Attributes:
        gram: lower triangle of J^T J (with the prior), (n, n), or of J J^T, (m, m); float32 or float64.
        factor: lower triangular, of gram + damping.
        damping: in `factor`, which is positive definite.
        scale: mean squared norm of the columns of J, for n unknowns.
        pairs: improve it, newest last.
    """

    gram: Tensor
    factor: Tensor
    damping: float
    scale: float
    pairs: tuple[Pair, ...] = ()

    @property
    def finite(self) -> bool:
        """False where the Jacobian overflowed, as that of a steep activation can."""
        return bool(self.gram.diagonal().isfinite().all())

    @property
    def least(self) -> float:
        """Dampings below this are rounding."""
        return self.scale * (LEAST_DAMPING if self.gram.dtype == torch.float32 else 1e-15)

    def serves(self, damping: float) -> bool:
        """Whether the factor is near enough to that of another damping."""
        return self.damping / NEAR <= max(damping, self.least) <= self.damping * NEAR

    def damped(self, damping: float) -> Preconditioner:
        """The same with another damping, raised where the factor would not exist."""
        damping = max(damping, self.least)
        while True:
            matrix = self.gram.clone()
            matrix.diagonal().add_(damping)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not failed or not self.finite:
                return replace(self, factor=factor, damping=damping)
            damping *= 10

    def __call__(self, vector: Tensor) -> Tensor:
        """About the inverse of the matrix times `vector`, in its precision."""
        vector = vector.clone()
        weights = []
        for pair in reversed(self.pairs):
            weight = (pair.direction @ vector) / pair.curvature
            vector -= weight * pair.image
            weights.append(weight)
        half = torch.linalg.solve_triangular(self.factor, vector.to(self.factor)[:, None], upper=False)
        found = torch.linalg.solve_triangular(self.factor.T, half, upper=True)[:, 0].to(vector)
        for pair, weight in zip(self.pairs, reversed(weights), strict=True):
            found += pair.direction * (weight - (pair.image @ found) / pair.curvature)
        return found


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found, and the pairs they leave for the next solve."""

    vector: Tensor
    iterations: int
    converged: bool
    pairs: tuple[Pair, ...]


def conjugate_gradients(
    matrix: Callable[[Tensor], Tensor],
    right: Tensor,
    inverse: Callable[[Tensor], Tensor],
    limit: int,
    tolerance: float,
) -> Solution:
    """Solve matrix(v) = right from v = 0, (n,).

    Args:
        matrix: symmetric positive definite.
        inverse: about its inverse, symmetric positive definite.
        limit: iterations, at most.
        tolerance: of sqrt(r^T inverse(r)) against that of `right`.

    Every iterate lowers v^T matrix(v) / 2 - right^T v, so one that did not converge is a descent step too.
    """
    found, rest = torch.zeros_like(right), right.clone()
    direction = moved = inverse(rest)
    length = start = float(rest @ moved)
    pairs: list[Pair] = []
    stride = 1
    for count in range(1, limit + 1):
        if not length > 0:
            return Solution(found, count - 1, length == 0, tuple(pairs))
        image = matrix(direction)
        curvature = float(direction @ image)
        if not 0 < curvature < float("inf"):
            return Solution(found, count, False, tuple(pairs))
        if count % stride == 0:
            pairs.append(Pair(direction, image, curvature))
        if len(pairs) == 2 * KEPT_PAIRS:
            pairs, stride = pairs[1::2], 2 * stride
        found = found + (length / curvature) * direction
        rest = rest - (length / curvature) * image
        moved = inverse(rest)
        length, before = float(rest @ moved), length
        if length <= tolerance**2 * start:
            return Solution(found, count, True, tuple(pairs))
        direction = moved + (length / before) * direction
    return Solution(found, limit, False, tuple(pairs))


@dataclass(frozen=True)
class Linear:
    """The linearised problem at one point.

    Attributes:
        point: u, (N, D).
        products: J there.
        residual: r, (m,).
        prior: P of one example, (D, D), or None.
    """

    point: Tensor
    products: Products
    residual: Tensor
    prior: Tensor | None

    @property
    def wide(self) -> bool:
        """Whether J J^T is the smaller matrix and serves."""
        return self.prior is None and len(self.residual) < self.point.numel()

    def pull(self, vector: Tensor) -> Tensor:
        """P v, (n,)."""
        assert self.prior is not None
        return (vector.view(self.point.shape) @ self.prior).reshape(-1)

    def gradient(self) -> Tensor:
        """Half of the objective's gradient, (n,)."""
        gradient = self.products.transposed(self.residual)
        return gradient if self.prior is None else gradient + self.pull(self.point.reshape(-1))

    def curvature(self, vector: Tensor) -> Tensor:
        """(J^T J + P) v, (n,), or J J^T v, (m,), where `wide`."""
        if self.wide:
            return self.products.forward(self.products.transposed(vector))
        curved = self.products.transposed(self.products.forward(vector))
        return curved if self.prior is None else curved + self.pull(vector)

    def fall(self, step: Tensor) -> float:
        """By how much the linear model lowers |r|^2 + u^T P u."""
        ahead = self.products.forward(step)
        fall = -2 * (self.residual @ ahead) - ahead @ ahead
        if self.prior is not None:
            fall = fall - (2 * self.point.reshape(-1) + step) @ self.pull(step)
        return float(fall)


@dataclass
class Work:
    """What solves have cost: Jacobians formed and factored, and pairs of products with J and J^T."""

    jacobians: int = 0
    products: int = 0


class Solver:
    """Damped steps along one descent, with one preconditioner for as long as it serves.

    Args:
        coarse: the system in float32.
        exact: the same in float64, for a preconditioner where one in float32 does not lead to
            convergence; None where that would not fit into memory.
        damping: of the first factor, as a share of the mean squared column norm.
        work: is counted up.
    """

    def __init__(self, coarse: System, exact: System | None, damping: float, work: Work) -> None:
        self._coarse, self._exact = coarse, exact
        self._system = coarse
        self._made_at: Linear | None = None
        self._last = 0
        self.preconditioner: Preconditioner | None = None
        self._damping, self._work = damping, work

    @property
    def limit(self) -> int:
        """Iterations of one solve, before a new factor is cheaper."""
        assert self.preconditioner is not None
        gram = self.preconditioner.gram
        rows = UNKNOWNS_A_SOLVE.get(gram.device.type, UNKNOWNS_ELSEWHERE)
        return max(FEWEST, int(len(gram) / rows))

    def prepare(
        self, linear: Linear, damping: float | None = None, *, near: bool = False, ending: bool = False
    ) -> Preconditioner:
        """The preconditioner, made at `linear` when there is none or the last solve found it stale.

        Args:
            near: the solution is near, where J J^T, which is close to singular, wants float64.
            ending: the last steps follow, for which a stale one is cheaper than a new one.
        """
        stale = self._last > self.limit // 2 and not ending if self.preconditioner is not None else True
        if linear.wide and near and self._exact is not None:
            self._system = self._exact
        if stale or (linear.wide and self._made_at is not linear):
            self._make(linear, damping)
        assert self.preconditioner is not None
        return self.preconditioner

    def step(self, linear: Linear, damping: float) -> tuple[Tensor, float]:
        """The damped step (n,), to `TOLERANCE`, and the fall of the objective that the linear model predicts."""
        step = self._wide_step(linear, damping) if linear.wide else self._tall_step(linear, damping)
        return step, linear.fall(step)

    def _tall_step(self, linear: Linear, damping: float) -> Tensor:
        right = -linear.gradient()
        solution = self._solve(linear, right, damping)
        if not solution.converged and self._made_at is not linear:
            self._make(linear, damping)
            solution = self._solve(linear, right, damping)
        if not solution.converged and self._system is not self._exact and self._exact is not None:
            self._system = self._exact
            self._make(linear, damping)
            solution = self._solve(linear, right, damping)
        return solution.vector

    def _wide_step(self, linear: Linear, damping: float) -> Tensor:
        """With a new factor and its damping each time: of r, the part that no step can change dominates an
        inexact solution, whatever its step is worth."""
        if self._made_at is not linear:
            self._make(linear, damping)
        assert self.preconditioner is not None
        if self.preconditioner.damping != damping:
            self.preconditioner = self.preconditioner.damped(damping)
        damping = self.preconditioner.damping
        vector = self._solve(linear, -linear.residual, damping, tolerance=WIDE_TOLERANCE).vector
        return linear.products.transposed(vector)

    def deficient(self, linear: Linear, generator: torch.Generator) -> bool:
        """Whether some direction leaves all equations unchanged, to a share of 1e-6 of the largest.

        By inverse iteration on J^T J (Golub and Van Loan 2013, section 8.2): |J v| / |v| is an upper bound on
        the least singular value for any v, so a full-rank Jacobian is never called deficient.
        """
        if linear.wide:
            return True
        largest = float(self.prepare(linear, 0.0, ending=True).gram.diagonal().max())
        vector = torch.randn(linear.point.numel(), generator=generator, device=generator.device).to(
            linear.point
        )
        for _ in range(2):
            vector = self._solve(linear, vector / vector.norm(), 1e-13 * largest, 2).vector
            ahead = linear.products.forward(vector / vector.norm())
            if float(ahead @ ahead) < 1e-12 * largest:
                return True
        return False

    def _solve(
        self,
        linear: Linear,
        right: Tensor,
        damping: float,
        patience: int = 1,
        tolerance: float = TOLERANCE,
    ) -> Solution:
        assert self.preconditioner is not None
        if not self.preconditioner.serves(damping):
            self.preconditioner = self.preconditioner.damped(damping)
        solution = conjugate_gradients(
            lambda vector: linear.curvature(vector) + damping * vector,
            right,
            self.preconditioner,
            patience * self.limit,
            tolerance,
        )
        if len(solution.pairs) > KEPT_PAIRS // 2 and not linear.wide:
            self.preconditioner = replace(self.preconditioner, pairs=solution.pairs)
        self._last = solution.iterations
        self._work.products += solution.iterations
        return solution

    def _make(self, linear: Linear, damping: float | None) -> None:
        self.preconditioner = None  # its memory is needed now
        point = linear.point.to(self._system.target.dtype)
        gram = self._system.outer_gram(point) if linear.wide else self._system.gram(point)
        if linear.prior is not None:
            size = len(linear.prior)
            for start in range(0, len(gram), size):
                gram[start : start + size, start : start + size] += linear.prior.to(gram.dtype)
        scale = float(gram.diagonal().sum(dtype=torch.float64)) / linear.point.numel()
        damping = self._damping * scale if damping is None else damping
        self.preconditioner = Preconditioner(gram, gram, 0.0, scale).damped(damping)
        self._made_at, self._last = linear, 0
        self._work.jacobians += 1
