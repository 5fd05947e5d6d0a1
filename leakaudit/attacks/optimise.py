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

from leakaudit.attacks.adam import Rule, State, Watch, iteration, rates, schedule
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
from leakaudit.attacks.single_backward import (
    central_difference,
    forward_over_reverse,
    lacking,
    sees_updates,
    unsuitable,
    without_double_backward,
)
from leakaudit.errors import InputError
from leakaudit.threat import View, as_it_is
from leakaudit.update import Update

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

    def take(self, variables: Sequence[Tensor]) -> None:
        """Take these values for every variable."""
        with torch.no_grad():
            for variable, value in zip(self.variables, variables, strict=True):
                variable.copy_(value)

    def differentiate(self, loss: Tensor) -> None:
        """Put the gradient of `loss` where an optimizer finds it, and nowhere else."""
        for variable, gradient in zip(self.variables, torch.autograd.grad(loss, self.variables), strict=True):
            variable.grad = gradient.contiguous()

    @property
    def point(self) -> Tensor:
        """All variables as one vector (n,), a copy."""
        return torch.cat([variable.detach().flatten() for variable in self.variables])

    def parts(self, point: Tensor) -> list[Tensor]:
        """The numbers of a vector like `point` in the shapes of the variables."""
        flat = torch.split(point, [variable.numel() for variable in self.variables])
        return [part.view_as(own) for own, part in zip(self.variables, flat, strict=True)]


Objective = Callable[[Tensor, Tensor], Tensor]


def evaluation(
    candidate: Candidate, objective: Objective, monitor: Monitor, evaluations: int
) -> Callable[[Tensor], tuple[float, Tensor]]:
    """What takes a vector like `Candidate.point` to the objective's value there and its gradient (n,).

    Compiled where `evaluations`, the most that will follow, are worth it to the monitor's compiler.
    """
    free = candidate.logits is not None
    labels = () if candidate.labels is None else (candidate.labels,)
    here = [tensor.detach() for tensor in (*candidate.variables, *labels)]
    differentiated, how = differentiable(objective, here, free)
    quick = monitor.compiler.prepare(differentiated, here, evaluations, monitor.seconds_left)
    if how:
        monitor.compiler.step += f", {how}"

    def evaluate(point: Tensor) -> tuple[float, Tensor]:
        loss, *gradients = quick(*candidate.parts(point), *labels)
        return float(loss), torch.cat([gradient.flatten() for gradient in gradients])

    return evaluate


def differentiable(objective: Objective, point: Sequence[Tensor], free: bool) -> tuple[Function, str]:
    """The objective's value and gradients by what works at `point`, and in a few words how, where that is not plain.

    Double backward is tried first, then what does without one (`leakaudit.attacks.single_backward`), where the
    objective sees the candidate through an update that is the gradient of one function.

    Raises `InputError` when nothing works.
    """
    plain = value_and_gradients(objective) if free else value_and_gradient(objective)
    if not sees_updates(objective) or unsuitable(objective.view):
        return plain, ""
    missing = without_double_backward(objective, point, free)
    if missing is None:
        return plain, ""
    for make, name in (
        (forward_over_reverse, "forward over reverse"),
        (central_difference, "central differences"),
    ):
        function = make(objective, free)
        if lacking(function, point) is None:
            return function, f"{name}, for double backward is not to be had ({missing})"
    raise InputError(f"the model cannot be differentiated as often as gradient matching needs: {missing}")


def value_and_gradient(objective: Callable[..., Tensor]) -> Function:
    """(x, labels) -> the objective's value and its gradient to x; the objective gets what else is given."""

    def function(x: Tensor, labels: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = objective(x, labels, *others)
            return loss.detach(), *torch.autograd.grad(loss, x)

    return function


def value_and_gradients(objective: Callable[..., Tensor]) -> Function:
    """(x, logits) -> the objective's value at the labels softmax(logits), and its gradients to x and logits.

    The objective gets what else is given.
    """

    def function(x: Tensor, logits: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        x, logits = x.detach().requires_grad_(), logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = objective(x, logits.softmax(dim=-1), *others)
            return loss.detach(), *torch.autograd.grad(loss, (x, logits))

    return function


def of_each(objective: Callable[..., Tensor], free: bool) -> Function:
    """As `value_and_gradient`, or `value_and_gradients` where labels are `free`, of several candidates at once.

    Every argument and every result has one more dimension in front, over the candidates, which share nothing but
    the model: (R, N, C, H, W) and (R, N) -> (R,) and (R, N, C, H, W).  What follows these two, the objective gets
    as each candidate's own.
    """

    def one(x: Tensor, second: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        def value(x: Tensor, second: Tensor) -> Tensor:
            return objective(x, second.softmax(dim=-1) if free else second, *others)

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
        loss, prior = self.of_update(self.view.simulate(x, y)), self.prior(x, y)
        return loss if prior is None else loss + prior

    def client_input(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y

    def prior(self, x: Tensor, y: Tensor) -> Tensor | None:
        """What the candidate itself contributes, a scalar; None for nothing."""
        terms = []
        if self.tv:
            terms.append(self.tv * total_variation(x))
        target = self.view.knowledge.statistics.value
        if self.statistics and target is not None:
            found = self.view.victim.batch_statistics(self.view.victim.params, x)
            terms.append(self.statistics * statistics_distance(found, target))
        return sum(terms[1:], terms[0]) if terms else None

    def of_update(self, simulated: Update) -> Tensor:
        """What the simulated update contributes, a scalar."""
        return self._distance(simulated) / self.scale

    def mismatch(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance alone, a scalar."""
        return self._distance(self.view.simulate(x, y))

    def _distance(self, simulated: Update) -> Tensor:
        simulated, observed = self.comparison(simulated, self.view.observed)
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
    evaluated = evaluation(candidate, objective, monitor, descents * iterations * inner)
    monitor.start(iterations, patience=patience, target=target)
    descent = QuasiNewton(
        evaluated,
        candidate.point,
        learning_rate=learning_rate,
        history=history,
        line_search=line_search,
    )
    for step in range(iterations + 1):
        candidate.take(candidate.parts(descent.point))
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

    `signed` takes the sign of the candidate's gradient first; `project` is applied after every step.  A whole
    iteration is one graph where the monitor's compiler finds that worth it.
    """
    free = candidate.logits is not None
    labels: tuple[Tensor, ...] = () if candidate.labels is None else (candidate.labels,)
    point = [tensor.detach() for tensor in (*candidate.variables, *labels)]
    differentiated, how = differentiable(objective, point, free)
    state = State.starting(*candidate.variables)
    rows = schedule(rates(iterations, learning_rate, cosine_decay), candidate.x)
    moved = len(state.variables)
    advance = monitor.compiler.prepare(
        iteration(differentiated, Rule(signed, project), free),
        (rows[0], *labels, *state.tensors),
        iterations,
        monitor.seconds_left,
        compared=1 + moved,
    )
    if how:
        monitor.compiler.step += f", {how}"
    monitor.start(iterations, patience=patience, target=target)
    watch = Watch.on(monitor, candidate.x.device)
    for row in rows:
        measured, (loss, *tensors) = state.variables, advance(row, *labels, *state.tensors)
        if watch.step(loss, measured[0], measured[1].softmax(dim=-1) if free else labels[0]):
            break
        state = State.of(tensors[moved:])
    else:
        watch.flush()
    candidate.take(measured)
