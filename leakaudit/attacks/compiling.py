"""When a descent is worth compiling, and what it falls back to.

A `Compiler` lives as long as its owner wants compiled graphs to live: an audit, a worker of a sweep.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor

from leakaudit.errors import InputError

if TYPE_CHECKING:
    from leakaudit.attacks.graphs import Compiled, Recorded

Mode = Literal["auto", "always", "never"]
Function = Callable[..., tuple[Tensor, ...]]
"""Of tensors of fixed shapes, without side effects."""

VARIABLE = "LEAKAUDIT_COMPILE"
EAGER = "eager"
FEW = 1000
"""Evaluations below which nothing is even recorded."""
AGREEMENT = {torch.float32: 5e-3, torch.float64: 1e-6}
"""Largest relative difference between compiled and eager gradients; 1e-6 and 1e-14 are usual, and a ReLU near its
kink may differ by more."""


@dataclass(frozen=True)
class Costs:
    """Of one evaluation and of compiling it, in seconds, as measured on the machines docs/performance.md names.

    They decide what is compiled, so they are constants: a clock would make two runs of one seed differ.

    Attributes:
        operation: of each operation when eager, its launch.
        flop: of each floating point operation.
        compiling: of each operation when compiled; half of what the first time takes, because TorchInductor keeps
            what it made on disk and later processes need a tenth of that.
        saved: share of an eager evaluation that compiling saves.
    """

    operation: float
    flop: float
    compiling: float
    saved: float

    def worthwhile(self, recorded: Recorded, evaluations: int) -> bool:
        eager = recorded.operations * self.operation + recorded.flops * self.flop
        return evaluations * eager * self.saved > self.seconds(recorded)

    def seconds(self, recorded: Recorded) -> float:
        """That compiling takes."""
        return recorded.operations * self.compiling


COSTS = {
    "cpu": Costs(operation=8e-6, flop=3e-11, compiling=0.02, saved=0.6),
    "cuda": Costs(operation=1e-5, flop=5e-14, compiling=0.02, saved=0.8),
}


@dataclass
class Compiler:
    """Turns functions that are evaluated often into compiled graphs, where that pays and gives the same numbers.

    Attributes:
        mode: "always" and "never" mean what they say; "auto" compiles what saves more than compiling costs.
        seconds: spent on compiling so far.
        step: how the last function asked for is evaluated, in a few words, with the reason where it cannot be
            compiled.
    """

    mode: Mode = "auto"
    seconds: float = 0.0
    step: str = EAGER
    _compiled: dict[str, Compiled] = field(default_factory=dict)
    _refused: dict[object, str] = field(default_factory=dict)

    @classmethod
    def of(cls, mode: str | None = None) -> Compiler:
        """With this mode; None for what the variable LEAKAUDIT_COMPILE says, "auto" where it is not set.

        Raises `InputError` for anything else.
        """
        chosen = mode or os.environ.get(VARIABLE) or "auto"
        if chosen not in get_args(Mode):
            source = "compile" if mode else VARIABLE
            raise InputError(f"{source} is {chosen!r}; accepted: {', '.join(get_args(Mode))}")
        return cls(cast(Mode, chosen))

    def begin(self) -> None:
        """Forget what could not be compiled, and how the last function was evaluated: another attempt begins."""
        self.step = EAGER
        self._refused.clear()

    def prepare(
        self,
        function: Function,
        arguments: Sequence[Tensor],
        evaluations: int,
        seconds_left: float | None = None,
        compared: int | None = None,
    ) -> Function:
        """`function` itself, or a faster one with the same values.

        Args:
            arguments: at which it may be evaluated; their shapes stay.
            evaluations: at most so many follow.
            seconds_left: until a deadline; compiling that would take a quarter of it is left out.
            compared: so many of the first values must agree; None for all.  Others may follow from them by
                operations that make much of a rounding, such as a sign.
        """
        self.step = EAGER
        if self.mode == "never" or (self.mode == "auto" and evaluations < FEW):
            return function
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in arguments)
        if shapes in self._refused:
            self.step = self._refused[shapes]
            return function
        from leakaudit.attacks.graphs import Untraceable, record  # here, because they take a second to import

        try:
            recorded = record(function, arguments)
            if not self._pays(recorded, evaluations, seconds_left):
                return function
            quick = self._bound(recorded, arguments)
            _check(function, quick, arguments, compared)
        except Untraceable as error:
            self._refused[shapes] = self.step = f"eager, not compiled: {error}"
            return function
        self.step = "compiled"
        return quick

    def _pays(self, recorded: Recorded, evaluations: int, seconds_left: float | None) -> bool:
        """Whatever is compiled already: else results would depend on what ran before."""
        if self.mode == "always":
            return True
        device = recorded.device
        costs = COSTS.get(device, COSTS["cuda"])
        late = seconds_left is not None and costs.seconds(recorded) > seconds_left / 4
        return not late and costs.worthwhile(recorded, evaluations)

    def _bound(self, recorded: Recorded, arguments: Sequence[Tensor]) -> Function:
        """The compiled graph, a new one where there is none yet, with the recorded constants."""
        from leakaudit.attacks.graphs import bind, compile_graph

        compiled = self._compiled.get(recorded.key)
        if compiled is None:
            compiled = self._compiled[recorded.key] = compile_graph(recorded, arguments)
            self.seconds += compiled.seconds
        return bind(compiled, recorded.constants, arguments)


def _check(eager: Function, compiled: Function, arguments: Sequence[Tensor], compared: int | None) -> None:
    """`Untraceable` unless both agree in what is compared at two points, near the arguments and far from them.

    One point would not show a branch that was taken while recording.
    """
    from leakaudit.attacks.graphs import Untraceable

    generator = torch.Generator(arguments[0].device).manual_seed(0)
    for distance in (0.1, 1.0):
        point = [_moved(tensor, distance, generator) for tensor in arguments]
        pairs = zip(eager(*point), compiled(*point), strict=True)
        for expected, found in islice(pairs, compared):
            difference = float((expected - found).norm() / expected.norm().clamp_min(1e-30))
            if not difference <= AGREEMENT.get(expected.dtype, 5e-3):
                raise Untraceable(f"its numbers differ from the eager ones by {difference:.1e}")


def _moved(tensor: Tensor, distance: float, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)
    return tensor.detach() + distance * noise
