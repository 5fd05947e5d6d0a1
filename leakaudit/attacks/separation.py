"""The examples of a batch, told apart in the last layer: exact features and labels.

The last layer's gradient over N examples is N dW = sum_i g_i f_i^T and N db = sum_i g_i with
g_i = softmax(W f_i + b) - onehot(y_i).  With independent g_i, that is N <= K - 1, the features lie
in the row space of dW, f_i = V z_i, which leaves N^2 unknowns for (K - 1)(N + 1) equations.  For
the right labels a damped Gauss-Newton iteration solves them to rounding from most random starts;
so a solution fixes the labels and gives every example's features.  That wrong labels fit too is
excluded by counting equations, not by a theorem: in our trials they left a residual of 0.4 or
more, against a tolerance of at most 0.04, and no label accepted so was wrong.
Examples of which the model is certain leave nothing in the gradient; the others are separated.

The columns of the equations differ in size by the singular values of dW.  Solving them first as
they are, then scaled half-way, then to equal length finds solutions that equal columns miss.

The equations are those of any gradient inversion, restricted to the last layer.  Dang et al. 2021
(RLG) use the same row and column spaces to find the set of labels by linear programs, without counts
and without features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.attacks.head import HeadGradient, effective_rank

MOST_EXAMPLES = 12
MOST_SEARCHED = 8
STARTS = 32
SWAP_STARTS = 6
MOST_ERROR = 0.01
MOST_PUSH = 1.001
"""Each g_i pulls one class down, by at most 1: so does their mean, or the gradient is not a mean."""
SURPLUS = 1.2
"""Equations needed for each unknown; with fewer, wrong labels might fit as well."""
STAGES = ((0.0, 20), (0.5, 30), (1.0, 50))
"""(power of the columns' scaling, iterations)"""
WORK = 4e9
"""Multiplications allowed for one set of label vectors."""


@dataclass(frozen=True)
class Separation:
    """One reading of the last layer's gradient as a sum over examples.

    Attributes:
        labels: (n,) int64, ascending; features: (n, F) float64, in the same order; n <= N, because
            examples of which the model is certain stay hidden.
            Their error is of the order of `tolerance` for the weakest example.
        residual: relative distance to the observed gradient, singular directions weighted equally.
        tolerance: what rounding explains of it.
    """

    labels: Tensor
    features: Tensor
    residual: float
    tolerance: float

    @property
    def proven(self) -> bool:
        return self.residual <= self.tolerance


def separate(
    head: HeadGradient, guesses: Iterable[Tensor], typical: Tensor, generator: torch.Generator
) -> Separation | None:
    """Search for labels and features that make up the last layer's gradient (mean over the examples).

    Args:
        head: with weight, bias gradient and scale.
        guesses: label vectors (N,) to begin with; single labels are then exchanged.
        typical: (M, F) features of random inputs, for starts of the right size.

    Returns the best reading, or None when the gradient cannot tell the examples apart: a batch
    above `MOST_EXAMPLES` or the number of classes minus one, or an update with noise.
    """
    wanted = [torch.as_tensor(guess) for guess in guesses]
    problem = _pose(head, len(wanted[0]), typical, generator)
    if problem is None:
        return None
    unique = {problem.visible(guess) for guess in wanted}
    best = problem.solve(sorted(unique), STARTS, generator)
    tried = set(unique)
    while best is not None and not best.proven and len(best.labels) <= MOST_SEARCHED:
        neighbours = _exchanged(best.labels, problem.likely) - tried
        tried |= neighbours
        found = problem.solve(sorted(neighbours), SWAP_STARTS, generator)
        if found is None or found.residual >= best.residual:
            break
        best = found
    return best


def _exchanged(labels: Tensor, likely: list[int]) -> set[tuple[int, ...]]:
    """All label vectors with one label exchanged for a likely one."""
    current = labels.tolist()
    return {
        tuple(sorted([*current[:index], label, *current[index + 1 :]]))
        for index, label in itertools.product(range(len(current)), likely)
    }


@dataclass(frozen=True)
class _Problem:
    """Find z (n, n) with S^T sum_i g_i (z_i, 1)^T = target, columns scaled to length one.

    Attributes:
        slope (K, n), offset (K,): logits of z.
        sketch (K, R): S, orthonormal columns; the column space of dW and random directions beside it.
        target (R, n + 1), scales (n + 1,): N times the reduced gradient, and the columns' scales.
        basis (F, N): V, from z to features.
        starts (K + 1, N): typical z, and a hint for each class.
        directions (K, N): weight rows that raise a class's score by about 1.
        likely: classes to try, most likely first.
    """

    slope: Tensor
    offset: Tensor
    sketch: Tensor
    target: Tensor
    scales: Tensor
    basis: Tensor
    starts: Tensor
    directions: Tensor
    likely: list[int]
    tolerance: float

    def visible(self, guess: Tensor) -> tuple[int, ...]:
        """As many labels of `guess` as there are examples here: of each class one first, likely ones first."""
        order = {label: rank for rank, label in enumerate(self.likely)}
        seen: dict[int, int] = {}
        ranked = []
        for label in guess.tolist():
            ranked.append((seen.get(label, 0), order.get(label, len(order)), label))
            seen[label] = seen.get(label, 0) + 1
        return tuple(sorted(label for _, _, label in sorted(ranked)[: self.basis.shape[1]]))

    def solve(
        self, guesses: list[tuple[int, ...]], starts: int, generator: torch.Generator
    ) -> Separation | None:
        """The best of random starts for each guess; None when there is nothing to try or too much work."""
        cost = self.target.numel() * self.basis.shape[1] ** 4 * sum(count for _, count in STAGES)
        starts = min(starts, int(WORK / (cost * max(1, len(guesses)))))
        if not guesses or starts < 2:
            return None
        labels = torch.tensor(guesses).repeat(starts, 1)
        limit = max(4, 4_000_000 // (self.target.numel() * self.basis.shape[1] ** 2))
        limit = min(limit, max(8, 2 * len(guesses)))
        best: Separation | None = None
        for first in range(0, len(labels), limit):
            chunk = labels[first : first + limit]
            found = self._solve_from(chunk, self._start(chunk, generator))
            if best is None or found.residual < best.residual:
                best = found
            if best.proven:
                break
        return best

    def _start(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """(H, N, N): class hints or typical features; every other start moved towards the labels' rows."""
        shape = (*labels.shape, 1)
        device = generator.device

        def uniform() -> Tensor:
            return torch.rand(shape, generator=generator, device=device).cpu().double()

        noise = (
            torch.randn((*labels.shape, labels.shape[1]), generator=generator, device=device).cpu().double()
        )
        noise = noise * self.starts[-1].norm() / labels.shape[1] ** 0.5
        hints = torch.where(uniform() < 0.75, self.starts[labels], self.starts[-1])
        far = (0.5 + uniform()) * hints + 15 * uniform() * self.directions[labels] + 0.1 * noise
        near = self.starts[labels] + 0.02 * noise
        return torch.where(torch.arange(len(labels))[:, None, None] % 2 == 0, near, far)

    def _solve_from(self, labels: Tensor, z: Tensor) -> Separation:
        """The best solution for labels (H, n) from starts (H, n, n), through the stages."""
        cost = torch.zeros(len(z))
        for power, iterations in STAGES:
            scales = self.scales**power * self.scales.max() ** (1 - power)
            target = 0.1 * self.tolerance if power == 1 else 0.01
            z, cost = self._iterate(labels, z, scales, iterations, target)
        best = int(cost.argmin())
        return Separation(labels[best], z[best] @ self.basis.T, float(cost[best]), self.tolerance)

    def _iterate(
        self, labels: Tensor, z: Tensor, scales: Tensor, iterations: int, target: float
    ) -> tuple[Tensor, Tensor]:
        """Levenberg-Marquardt with Marquardt's scaling on every run at once; ends when one reaches `target`."""
        onehot = F.one_hot(labels, len(self.offset)).double()
        damping = torch.full((len(z),), 0.1, dtype=torch.float64)
        error, jacobian = self._linearise(z, onehot, scales)
        cost = error.square().sum(1)
        for _ in range(iterations):
            normal = jacobian.mT @ jacobian
            gradient = (jacobian.mT @ error[..., None])[..., 0]
            diagonal = normal.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
            damped = normal + torch.diag_embed(damping[:, None] * diagonal)
            step, failed = torch.linalg.solve_ex(damped, gradient)
            trial = z - step.reshape(z.shape)
            trial_error, trial_jacobian = self._linearise(trial, onehot, scales)
            trial_cost = trial_error.square().sum(1)
            better = (trial_cost < cost) & (failed == 0)
            z = torch.where(better[:, None, None], trial, z)
            error = torch.where(better[:, None], trial_error, error)
            jacobian = torch.where(better[:, None, None], trial_jacobian, jacobian)
            cost = torch.where(better, trial_cost, cost)
            damping = torch.where(better, damping / 5, damping * 5).clamp(1e-12, 1e8)
            if float(cost.min()) < target**2:
                break
        return z, cost.sqrt()

    def _linearise(self, z: Tensor, onehot: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Errors (H, R (n+1)) and their Jacobian (H, R (n+1), n n)."""
        runs, count, width = z.shape
        p = (z @ self.slope.T + self.offset).softmax(-1)
        g = (p - onehot) @ self.sketch
        extended = torch.cat([z, z.new_ones(runs, count, 1)], -1)
        error = (torch.einsum("hnr,hnm->hrm", g, extended) - self.target) / scales
        change = p[..., None] * (self.slope - (p @ self.slope)[..., None, :])
        change = torch.einsum("hnkj,kr->hnrj", change, self.sketch)
        unit = torch.eye(width, width + 1, dtype=z.dtype)
        jacobian = torch.einsum("hnrj,hnm->hrmnj", change, extended) + torch.einsum("hnr,jm->hrmnj", g, unit)
        jacobian = jacobian / scales[:, None, None]
        return error.flatten(1), jacobian.reshape(runs, error[0].numel(), count * width)


def _pose(head: HeadGradient, count: int, typical: Tensor, generator: torch.Generator) -> _Problem | None:
    """The problem in the row space of dW; None when the N examples cannot be told apart."""
    weight, gradient, bias_gradient = head.weight, head.weight_gradient, head.bias_gradient
    if weight is None or gradient is None or bias_gradient is None:
        return None
    classes = len(weight)
    if float(-bias_gradient.clamp(max=0).sum()) > MOST_PUSH:
        return None
    if not 2 <= count <= min(MOST_EXAMPLES, classes - 1, weight.shape[1]):
        return None
    if effective_rank(gradient, head.epsilon) > count:
        return None
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    fit = _visible_examples(values, count, head.epsilon)
    if fit is None or (classes - 1) * (fit[0] + 1) < SURPLUS * fit[0] ** 2:
        return None
    visible, tolerance = fit
    basis = right[:visible].T
    reduced = torch.cat([gradient @ basis, bias_gradient[:, None]], 1)
    beside = (
        torch.randn((classes, 2 * visible + 4), generator=generator, device=generator.device).cpu().double()
    )
    sketch = torch.linalg.qr(torch.cat([left[:, :visible], beside], 1))[0]
    centred = weight - weight.mean(0)
    hints = gradient / torch.where(bias_gradient == 0, 1.0, bias_gradient)[:, None]
    mean = typical.mean(0)
    hints = hints * (mean.norm() / hints.norm(dim=1, keepdim=True).clamp(min=1e-300) * 3).clamp(max=1.0)
    return _Problem(
        slope=weight @ basis,
        offset=head.bias if head.bias is not None else torch.zeros(classes, dtype=torch.float64),
        sketch=sketch,
        target=count * sketch.T @ reduced,
        scales=count * reduced.norm(dim=0),
        basis=basis,
        starts=torch.cat([hints, mean[None]]) @ basis,
        directions=centred / centred.square().sum(1, keepdim=True).clamp(min=1e-12) @ basis,
        likely=bias_gradient.argsort()[:20].tolist(),
        tolerance=tolerance,
    )


def _visible_examples(values: Tensor, most: int, epsilon: float) -> tuple[int, float] | None:
    """How many examples stand out of rounding, and the relative error that the rest leaves in the weakest."""
    for count in range(most, 0, -1):
        rest = float(values[count]) if len(values) > count else 0.0
        error = max(rest, 2 * epsilon * float(values[0])) / max(float(values[count - 1]), 1e-300)
        if error < MOST_ERROR:
            return count, 1e-5 + 4 * error
    return None
