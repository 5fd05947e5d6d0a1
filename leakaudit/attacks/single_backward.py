"""An objective's gradient without differentiating the model twice.

The gradient of D(g(x)), g(x) = d L(theta, x) / d theta, is that of <v, g(x)> with v = dD / dg held fixed, and so the
derivative of d L / d x along v in the parameters (Pearlmutter 1994, "Fast exact multiplication by the Hessian",
applied to the mixed second derivative):

    d D(g(x)) / d x  =  d/de  d L(theta + e v, x) / d x   at e = 0.

`forward_over_reverse` takes that derivative in forward mode, exactly; `central_difference` takes two ordinary
gradients in float64.  Both serve models with an operation whose backward pass has no derivative of its own, where
double backward, which is faster (docs/performance/maths.md), fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from leakaudit.attacks.compiling import Function
from leakaudit.rounds import client_update
from leakaudit.threat import View
from leakaudit.update import Update

STEP = 1e-9
"""Of the central difference, as a share of the parameters' length.

Rounding then leaves about 1e-8 of the gradient.  A longer step would leave less (1e-10 at 1e-5 on smooth models), but
a step in which a unit passes the kink of its ReLU is off by a factor of 100 and more: on a ResNet20 every step at
1e-5 did, one of four at 1e-8 and none of four at 1e-9.
"""


class OfUpdate(Protocol):
    """An objective that sees its candidate through the simulated update, besides priors.

    objective(x, y) = of_update(view.simulate(*client_input(x, y))) + prior(x, y).
    """

    @property
    def view(self) -> View: ...

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...

    def client_input(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the client trains on, differentiable in both."""
        ...

    def of_update(self, simulated: Update) -> Tensor:
        """What the simulated update contributes, a scalar."""
        ...

    def prior(self, x: Tensor, y: Tensor) -> Tensor | None:
        """What the candidate itself contributes, a scalar, or None for nothing."""
        ...


def sees_updates(objective: Callable[[Tensor, Tensor], Tensor]) -> TypeGuard[OfUpdate]:
    """Whether it is an `OfUpdate`."""
    return all(hasattr(objective, name) for name in ("view", "client_input", "of_update", "prior"))


def unsuitable(view: View) -> str | None:
    """Why an update is no gradient of one scalar function, or None when it is.

    Several local steps are not, nor is what a client with a defense shares.
    """
    if view.round.local_steps != 1:
        return f"{view.round.local_steps} local steps"
    if view.client is not client_update:
        return "a client that does more than one step of SGD"
    return None


def potential(view: View, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The scalar whose gradient for the parameters is the update of a round that is not `unsuitable`."""
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    first = 0
    for own, weight in zip(view.round.each(), view.round.each_weight(), strict=True):
        end = first + len(own.batch(0))
        total = total + weight * view.victim.loss(params, x[first:end], y[first:end])
        first += own.num_examples
    return total


NO_DERIVATIVE = re.compile(
    r"is not implemented|once_differentiable|forward AD|forward mode AD|does not support"
)
"""In what torch says of an operation that cannot be differentiated (again, or in forward mode)."""


def lacking(function: Function, point: Sequence[Tensor]) -> str | None:
    """What torch says of a derivative that the function lacks at this point; None when it works."""
    try:
        function(*point)
    except RuntimeError as error:
        if not NO_DERIVATIVE.search(str(error)):
            raise
        return str(error).splitlines()[0][:200]
    return None


def without_double_backward(
    objective: Callable[[Tensor, Tensor], Tensor], point: Sequence[Tensor], free: bool
) -> str | None:
    """Why the objective's gradients are not to be had by double backward at this point; None where they are.

    Costs one evaluation.  What a backward pass marked `once_differentiable` returns has no way back to the
    candidate; torch then leaves it out without a word where gradients of single tensors are asked for.
    """

    def twice(x: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        variables = [tensor.detach().requires_grad_() for tensor in ((x, second) if free else (x,))]
        with torch.enable_grad():
            loss = objective(variables[0], variables[1].softmax(dim=-1) if free else second)
            if _cut_off(loss):
                raise RuntimeError("one of its backward passes is marked once_differentiable")
            return torch.autograd.grad(loss, variables, materialize_grads=True)

    return lacking(twice, point)


def _cut_off(loss: Tensor) -> bool:
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if node.name() == "torch::autograd::Error":
                return True
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return False


def forward_over_reverse(objective: OfUpdate, free: bool) -> Function:
    """(x, labels or logits) -> the objective's value and its gradients, as `optimise.value_and_gradient`(`s`).

    Exact; about 9/7 of double backward's products.  Every operation of the model needs a forward-mode derivative,
    and one of its backward pass; attention runs in the only kernel that has them.
    """
    view = objective.view

    def mixed(variables: _Variables, direction: Mapping[str, Tensor]) -> list[Tensor]:
        with forward_ad.dual_level(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            duals = {name: _dual(view.victim.params[name], v) for name, v in direction.items()}
            gradients = variables.gradients(
                potential(view, view.victim.params | duals, *variables.client_input)
            )
            return [_tangent(gradient) for gradient in gradients]

    return _gradient(objective, free, mixed)


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, forward_ad).make_dual(primal, tangent))


def _tangent(dual: Tensor) -> Tensor:
    """Zero where the number does not depend on what has one."""
    tangent = cast(Any, forward_ad).unpack_dual(dual).tangent
    return torch.zeros_like(dual) if tangent is None else cast(Tensor, tangent)


def central_difference(objective: OfUpdate, free: bool) -> Function:
    """As `forward_over_reverse` from two gradients for the candidate, in float64; needs nothing but a backward pass.

    Five digits and more.  Far off at the rare point where a unit of the network passes a kink (ReLU, max pooling)
    within the step, and where "relative" weighs a tensor whose gradient is nothing but rounding.
    """
    view = objective.view.to(dtype=torch.float64)

    def mixed(variables: _Variables, direction: Mapping[str, Tensor]) -> list[Tensor]:
        variables = variables.to(torch.float64)
        along = Update(direction).to(dtype=torch.float64)
        length = Update(view.victim.params).select(direction).norm()
        step = STEP * length / along.norm().clamp_min(1e-300)

        def at(distance: Tensor) -> tuple[Tensor, ...]:
            moved = {name: view.victim.params[name] + distance * v for name, v in along.items()}
            with torch.enable_grad():
                scalar = potential(view, view.victim.params | moved, *variables.client_input)
                return variables.gradients(scalar)

        return [(above - below) / (2 * step) for above, below in zip(at(step), at(-step), strict=True)]

    return _gradient(objective, free, mixed)


@dataclass(frozen=True)
class _Variables:
    """What an objective is differentiated by: x, and the logits of free labels, beside fixed labels."""

    objective: OfUpdate
    tensors: tuple[Tensor, ...]
    labels: Tensor | None

    @classmethod
    def of(cls, objective: OfUpdate, x: Tensor, second: Tensor, free: bool) -> _Variables:
        tensors = (x, second) if free else (x,)
        return cls(objective, tuple(t.detach().requires_grad_() for t in tensors), None if free else second)

    def to(self, dtype: torch.dtype) -> _Variables:
        return replace(self, tensors=tuple(t.detach().to(dtype).requires_grad_() for t in self.tensors))

    @property
    def candidate(self) -> tuple[Tensor, Tensor]:
        """(x, y)."""
        return self.tensors[0], self.tensors[1].softmax(dim=-1) if self.labels is None else self.labels

    @property
    def client_input(self) -> tuple[Tensor, Tensor]:
        return self.objective.client_input(*self.candidate)

    def gradients(self, scalar: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(scalar, self.tensors, materialize_grads=True)


Mixed = Callable[[_Variables, Mapping[str, Tensor]], list[Tensor]]
"""(variables, direction) -> the gradient of <direction, g(variables)>."""


def _gradient(objective: OfUpdate, free: bool, mixed: Mixed) -> Function:
    def function(x: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        variables = _Variables.of(objective, x, second, free)
        loss, direction = _value_and_direction(objective, variables)
        gradients = [gradient.to(x.dtype) for gradient in mixed(variables, direction)]
        with torch.enable_grad():
            prior = objective.prior(*variables.candidate)
            if prior is not None and prior.requires_grad:
                loss = loss + prior.detach()
                own = variables.gradients(prior)
                gradients = [gradient + more for gradient, more in zip(gradients, own, strict=True)]
        return loss, *gradients

    return function


def _value_and_direction(objective: OfUpdate, variables: _Variables) -> tuple[Tensor, dict[str, Tensor]]:
    """What the update contributes, and its gradient for the update: one ordinary backward pass of the model."""
    with torch.no_grad():
        x, y = variables.client_input
        simulated = objective.view.simulate(x.detach(), y.detach())
    leaves = {name: gradient.detach().requires_grad_() for name, gradient in simulated.items()}
    with torch.enable_grad():
        loss = objective.of_update(Update(leaves))
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return loss.detach(), dict(zip(leaves, found, strict=True))
