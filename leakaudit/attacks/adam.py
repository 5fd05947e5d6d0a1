"""Adam's whole iteration as one function of tensors, so that one graph can hold all of it.

Loss and gradients, the sign where it is asked for, the update, its schedule and the projection: state in, state out.
Every operation on the state goes number by number, so the same function moves one candidate or many at once, whose
tensors then have one more dimension in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import Function

BETAS = (0.9, 0.999)
EPSILON = 1e-8
DECAY = 0.1
MILESTONES = (3 / 8, 5 / 8, 7 / 8)
BUFFERED = 16
"""Steps after which a GPU is waited for, so that its losses can be read."""


def rates(iterations: int, learning_rate: float, cosine_decay: bool = False) -> list[float]:
    """The learning rate of every iteration: a half cosine, or steps by `DECAY` after `MILESTONES` of them."""
    if cosine_decay:
        return [learning_rate * (1 + math.cos(math.pi * step / iterations)) / 2 for step in range(iterations)]
    milestones = [math.ceil(iterations * share) for share in MILESTONES]
    factors = [DECAY ** milestones.count(step) for step in range(1, iterations)]
    return list(accumulate([learning_rate, *factors], lambda rate, factor: rate * factor))[:iterations]


def schedule(learning_rates: Sequence[float], like: Tensor) -> Tensor:
    """(iterations + 1, 2): the step size and the square root of the second moment's bias, ready for `iteration`.

    Formed in float64, as `torch.optim.Adam` does, and stored as `like`.  The last row, of an iteration whose
    candidate nobody asks for, repeats the one before it.
    """
    first, second = BETAS
    rows = [
        (rate / (1 - first**count), (1 - second**count) ** 0.5)
        for count, rate in enumerate(learning_rates, 1)
    ]
    rows.append(rows[-1] if rows else (0.0, 1.0))
    return torch.tensor(rows, dtype=torch.float64).to(like)


@dataclass(frozen=True)
class State:
    """Where Adam stands.

    Attributes:
        variables: what it moves: x, and logits where labels are free.
        means, squares: first and second moments of the gradients, of the same shapes.
    """

    variables: tuple[Tensor, ...]
    means: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]

    @classmethod
    def starting(cls, *variables: Tensor) -> State:
        """Without any moments; no tensor twice, because a recording would take two of them for one."""
        plain = tuple(variable.detach() for variable in variables)
        means, squares = (tuple(map(torch.zeros_like, plain)) for _ in range(2))
        return cls(plain, means, squares)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> State:
        """From its `tensors`."""
        count = len(tensors) // 3
        return cls(tuple(tensors[:count]), tuple(tensors[count : 2 * count]), tuple(tensors[2 * count :]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.variables, *self.means, *self.squares)

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        return State.of([function(tensor) for tensor in self.tensors])


@dataclass(frozen=True)
class Rule:
    """How an iteration moves a candidate.

    Attributes:
        signed: take the sign of x's gradient first.
        project: applied to x after every step; None for nothing.
    """

    signed: bool = False
    project: Callable[[Tensor], Tensor] | None = None


def iteration(differentiated: Function, rule: Rule, free: bool) -> Function:
    """Adam's iteration (Kingma and Ba 2015, algorithm 1) as a function without side effects.

    Args:
        differentiated: (x, second) -> loss and the gradients to x and, where labels are `free`, to second.

    What is returned takes (row, second, *others, *state): a row (2,) of `schedule`, the labels, whatever else
    `differentiated` takes after them, and the tensors of a `State`; where labels are free, no labels, as the logits
    are in the state.  It gives (loss, *gradients, *state), the loss and its gradients at the state it got.
    The operations and their order are those of `torch.optim.Adam`.
    """
    moved = 2 if free else 1

    def advance(row: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, state = tensors[: -3 * moved], State.of(tensors[-3 * moved :])
        arguments = (*state.variables, *given)
        loss, *gradients = differentiated(*arguments)
        directions = [gradients[0].sign() if rule.signed else gradients[0], *gradients[1:]]
        means = [m.lerp(g, 1 - BETAS[0]) for m, g in zip(state.means, directions, strict=True)]
        squares = [
            (v * BETAS[1]).addcmul(g, g, value=1 - BETAS[1])
            for v, g in zip(state.squares, directions, strict=True)
        ]
        variables = [
            x - row[0] * m / (v.sqrt() / row[1] + EPSILON)
            for x, m, v in zip(state.variables, means, squares, strict=True)
        ]
        if rule.project is not None:
            variables[0] = rule.project(variables[0])
        return loss, *gradients, *variables, *means, *squares

    return advance


class Watch:
    """Hands measured candidates to a monitor in their order, and a GPU's several at a time.

    Reading a loss waits for the device; reading `BUFFERED` of them at once leaves it busy.  The monitor sees every
    candidate, as it would one by one; what was computed after the one at which it stops is dropped.
    """

    def __init__(self, monitor: Monitor, every: int) -> None:
        self._monitor, self._every = monitor, every
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    @classmethod
    def on(cls, monitor: Monitor, device: torch.device) -> Watch:
        return cls(monitor, BUFFERED if device.type == "cuda" else 1)

    def step(self, loss: Tensor, x: Tensor, y: Tensor) -> bool:
        """Whether to stop.  None of the three may be written to afterwards."""
        self._waiting.append((loss, x, y))
        return len(self._waiting) >= self._every and self.flush()

    def flush(self) -> bool:
        """Hand over what is left; whether to stop."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return False
        losses = torch.stack([loss for loss, _, _ in waiting]).tolist()
        return any(self._monitor.step(loss, x, y) for loss, (_, x, y) in zip(losses, waiting, strict=True))
