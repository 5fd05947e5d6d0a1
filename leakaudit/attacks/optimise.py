"""The optimisation core that all first-order attacks share.

A candidate is a model input x, with labels that are fixed or found jointly as
softmax(logits).  An objective maps (x, y) to a scalar; `lbfgs` and `adam`
descend it under the eyes of a `Monitor`, `continuation` one objective after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import Function
from leakaudit.attacks.disturbance import Comparison
from leakaudit.attacks.matching import (
    Distance,
    cosine,
    relative,
    squared,
    statistics_distance,
    total_variation,
)
from leakaudit.attacks.quasi_newton import QuasiNewton
from leakaudit.threat import View, as_it_is

LEAST = 1e-9
"""Probability at which a class counts as excluded: its logit hardly feels a descent."""

DistanceName = Literal["squared", "cosine", "relative"]
DISTANCES: dict[DistanceName, Distance] = {"squared": squared, "cosine": cosine, "relative": relative}


class Candidate:
    """x (N, C, H, W) and its labels: given as (N,) integers, or free as (N, K) logits."""

    def __init__(self, x: Tensor, labels: Tensor | None = None, logits: Tensor | None = None) -> None:
        if (labels is None) == (logits is None):
            raise ValueError("a candidate has either labels or logits")
        self.x = x.clone().requires_grad_()
        self.labels = labels
        self.logits = None if logits is None else logits.clone().requires_grad_()

    @classmethod
    def starting(cls, x: Tensor, y: Tensor) -> Candidate:
        """Fixed labels for integers y (N,); free ones, beginning there, for probabilities y (N, K)."""
        if y.is_floating_point():
            return cls(x, logits=y.clamp_min(LEAST).log())
        return cls(x, labels=y)

    @property
    def y(self) -> Tensor:
        if self.logits is not None:
            return self.logits.softmax(dim=-1)
        assert self.labels is not None
        return self.labels

    @property
    def variables(self) -> list[Tensor]:
        return [self.x] if self.logits is None else [self.x, self.logits]

    def differentiate(self, loss: Tensor) -> None:
        """Put the gradient of `loss` where an optimizer finds it, and nowhere else."""
        self.descend_along(torch.autograd.grad(loss, self.variables))

    def descend_along(self, gradients: Sequence[Tensor]) -> None:
        """Put the gradient of every variable where an optimizer finds it."""
        for variable, gradient in zip(self.variables, gradients, strict=True):
            variable.grad = gradient.contiguous()

    @property
    def point(self) -> Tensor:
        """All variables as one vector (n,), a copy."""
        return torch.cat([variable.detach().flatten() for variable in self.variables])

    def move_to(self, point: Tensor) -> None:
        """Give the variables the numbers of a vector like `point`."""
        sizes = [variable.numel() for variable in self.variables]
        with torch.no_grad():
            for variable, numbers in zip(self.variables, torch.split(point, sizes), strict=True):
                variable.copy_(numbers.view_as(variable))

    def evaluated_at(self, point: Tensor, evaluate: Callable[[], Tensor]) -> tuple[float, Tensor]:
        """The value there and its gradient (n,), for what evaluates at the variables and leaves gradients there."""
        self.move_to(point)
        value = float(evaluate())
        gradients = [variable.grad for variable in self.variables]
        return value, torch.cat([g.flatten() for g in gradients if g is not None])


Objective = Callable[[Tensor, Tensor], Tensor]


def evaluation(
    candidate: Candidate, objective: Objective, monitor: Monitor, evaluations: int
) -> Callable[[], Tensor]:
    """What returns the objective's value at the candidate, a scalar, and leaves its gradient there.

    Compiled where `evaluations`, the most that will follow, are worth it to the monitor's compiler.
    """
    if candidate.logits is None:
        assert candidate.labels is not None
        arguments, differentiated = (candidate.x, candidate.labels), value_and_gradient(objective)
    else:
        arguments, differentiated = (candidate.x, candidate.logits), value_and_gradients(objective)
    quick = monitor.compiler.prepare(
        differentiated, [a.detach() for a in arguments], evaluations, monitor.seconds_left
    )

    def evaluate() -> Tensor:
        loss, *gradients = quick(*(argument.detach() for argument in arguments))
        candidate.descend_along(gradients)
        return loss

    return evaluate


def value_and_gradient(objective: Objective) -> Function:
    """(x, labels) -> the objective's value and its gradient to x."""

    def function(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = objective(x, labels)
            return loss.detach(), *torch.autograd.grad(loss, x)

    return function


def value_and_gradients(objective: Objective) -> Function:
    """(x, logits) -> the objective's value at the labels softmax(logits), and its gradients to x and logits."""

    def function(x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        x, logits = x.detach().requires_grad_(), logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = objective(x, logits.softmax(dim=-1))
            return loss.detach(), *torch.autograd.grad(loss, (x, logits))

    return function


def of_each(objective: Objective, free: bool) -> Function:
    """As `value_and_gradient`, or `value_and_gradients` where labels are `free`, of several candidates at once.

    Every argument and every result has one more dimension in front, over the candidates, which share nothing but
    the model: (R, N, C, H, W) and (R, N) -> (R,) and (R, N, C, H, W).
    """

    def one(x: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        def value(x: Tensor, second: Tensor) -> Tensor:
            return objective(x, second.softmax(dim=-1) if free else second)

        gradients, loss = grad_and_value(value, argnums=(0, 1) if free else (0,))(x, second)
        return loss, *gradients

    return vmap(one)


@dataclass(frozen=True)
class Matching:
    """distance(g(x), g*) + tv * TV(x) + statistics * BatchNorm distance, the first divided by `scale`.

    The BatchNorm term counts only when the adversary knows the batch's statistics.  What it knows of how
    the observed numbers were disturbed decides how they are compared (`leakaudit.attacks.disturbance`):
    under known noise "squared" and "relative" are both maximum likelihood, in units of |g*|^2 and of 1.
    """

    view: View
    distance: DistanceName
    tv: float = 0.0
    statistics: float = 0.0
    scale: float = 1.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.mismatch(x, y) / self.scale
        if self.tv:
            loss = loss + self.tv * total_variation(x)
        target = self.view.knowledge.statistics.value
        if self.statistics and target is not None:
            found = self.view.victim.batch_statistics(self.view.victim.params, x)
            loss = loss + self.statistics * statistics_distance(found, target)
        return loss

    def mismatch(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance alone, a scalar."""
        simulated, observed = self.comparison(self.view.simulate(x, y), self.view.observed)
        if self.distance == "relative" and self.comparison.factors:
            return squared(simulated, observed) / observed.norm().square()
        if self.distance == "relative":
            return relative(simulated, observed, self.comparison.slack)
        return DISTANCES[self.distance](simulated, observed)

    @cached_property
    def comparison(self) -> Comparison:
        """How updates are compared; by cosine they have no length anyway, and noise keeps its own weights."""
        if self.distance == "cosine":
            return Comparison(None, {}, None)
        return Comparison.of(self.view)


def lbfgs(
    candidate: Candidate,
    objective: Objective,
    monitor: Monitor,
    *,
    iterations: int,
    learning_rate: float = 1.0,
    inner: int = 20,
    history: int = 100,
    line_search: bool = True,
    target: float = 0.0,
    patience: int | None = None,
    shown: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = as_it_is,
    descents: int = 1,
) -> None:
    """`iterations` times at most `inner` steps of L-BFGS (`leakaudit.attacks.quasi_newton`).

    Stops when a step no longer changes the candidate, besides what the monitor asks for, which gets
    `shown(x, y)`.  It is one of so many `descents` that share a graph: what one of them would not pay for
    may be worth compiling for all.
    """
    evaluate = evaluation(candidate, objective, monitor, descents * iterations * inner)
    monitor.start(iterations, patience=patience, target=target)
    descent = QuasiNewton(
        lambda point: candidate.evaluated_at(point, evaluate),
        candidate.point,
        learning_rate=learning_rate,
        history=history,
        line_search=line_search,
    )
    for step in range(iterations + 1):
        candidate.move_to(descent.point)
        if (
            monitor.step(descent.value, *shown(candidate.x.detach(), candidate.y.detach()))
            or step == iterations
        ):
            return
        before = descent.point
        descent.advance(inner)
        if torch.equal(before, descent.point):
            monitor.stopped = "plateau"
            return


def continuation(
    x: Tensor,
    y: Tensor,
    objectives: Sequence[Objective],
    monitor: Monitor,
    *,
    iterations: int,
    patience: int,
    history: int = 100,
) -> tuple[Tensor, Tensor]:
    """`lbfgs` on one objective after another, each from where the one before it ended; the last one's end.

    Labels y are fixed, or free where they are probabilities (`Candidate.starting`).  Objectives that differ in the
    numbers of tensors alone share one compiled graph.

    Ends early when the monitor's time is up.
    """
    for objective in objectives:
        monitor.forget_best()  # the loss of another objective is another loss
        candidate = Candidate.starting(x, y)
        lbfgs(
            candidate,
            objective,
            monitor,
            iterations=iterations,
            patience=patience,
            history=history,
            descents=len(objectives),
        )
        if monitor.best_x is not None and monitor.best_y is not None:
            x, y = monitor.best_x, monitor.best_y
        if monitor.stopped == "budget":
            break
    return x, y


def geometric(first: float, last: float, count: int) -> list[float]:
    """`count` numbers from `first` to `last` at a constant ratio, in float32; both are above 0."""
    numbers: list[float] = torch.logspace(math.log10(first), math.log10(last), count).tolist()
    return numbers


def adam(
    candidate: Candidate,
    objective: Objective,
    monitor: Monitor,
    *,
    iterations: int,
    learning_rate: float,
    signed: bool = False,
    project: Callable[[Tensor], Tensor] | None = None,
    cosine_decay: bool = False,
    target: float = 0.0,
    patience: int | None = None,
) -> None:
    """Adam, with step decay by 0.1 after 3/8, 5/8 and 7/8 of the iterations, or a half cosine.

    `signed` takes the sign of the candidate's gradient first; `project` is applied after every step.
    """
    optimizer = torch.optim.Adam(candidate.variables, lr=learning_rate)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if cosine_decay:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    else:
        milestones = [math.ceil(iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    evaluate = evaluation(candidate, objective, monitor, iterations)
    monitor.start(iterations, patience=patience, target=target)
    for step in range(iterations + 1):
        loss = evaluate()
        if monitor.step(float(loss), candidate.x, candidate.y) or step == iterations:
            return
        if signed:
            assert candidate.x.grad is not None
            candidate.x.grad = candidate.x.grad.sign()
        optimizer.step()
        scheduler.step()
        if project is not None:
            with torch.no_grad():
                candidate.x.copy_(project(candidate.x))
