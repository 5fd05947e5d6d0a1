"""What an attack is: `applies(view)` and `run(view, generator, monitor)`.

An attack sees a `View` and nothing else; it never learns the truth.  One `run`
is one attempt from one random start.  Restarts, time budgets, film strips and
keep-best live in the `Monitor` and in `leakaudit.execution`, the same for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from leakaudit.attacks.compiling import Compiler
from leakaudit.threat import View

Stop = Literal["converged", "finished", "plateau", "diverged", "budget", "interrupted"]
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Reconstruction:
    """What one attempt found.

    Attributes:
        x: (N, C, H, W) model inputs, the best by the attack's own matching loss.
        y: (N,) integer labels or (N, K) probabilities used with x.
        loss: the attack's matching loss at x (its own unit; compare attacks by `View.residual`).
        iterations: steps taken.
        stopped: why it ended.
        history: (iteration, loss), thinned.
        strip: (iteration, loss, x) film strip from the start to the end.
        details: what the attack learnt besides (rank, condition, ...), plain values only.
    """

    x: Tensor
    y: Tensor
    loss: float
    iterations: int
    stopped: Stop
    history: list[tuple[int, float]] = field(default_factory=list)
    strip: list[tuple[int, float, Tensor]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def require_positive(options: object, *names: str) -> None:
    """`ValueError` for the first of the named fields that is not above zero."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(options, name)}")


def require_at_least(options: object, least: int, name: str) -> None:
    """`ValueError` for a named field below `least`."""
    if getattr(options, name) < least:
        raise ValueError(f"{name} must be at least {least}, got {getattr(options, name)}")


def require_at_least_one(options: object, *names: str) -> None:
    """`ValueError` naming all these fields when one of them is below 1."""
    if min(getattr(options, name) for name in names) < 1:
        raise ValueError(f"{', '.join(names[:-1])} and {names[-1]} must be at least 1")


def require_falling(first: float, last: float) -> None:
    """`ValueError` for weights that do not go from `first` down, or level, to a positive `last`."""
    if not 0 < last <= first:
        raise ValueError(f"weights must be positive and fall, got {first} to {last}")


def needs_scale(view: View) -> str | None:
    """Why a distance that depends on length cannot be used, or None."""
    if view.scale_free:
        return "the update has no known scale (its learning rate is unknown); this attack compares lengths"
    return None


class Attack(Protocol):
    """One family a file; a preset is an instance with its citation above it."""

    @property
    def restarts(self) -> int:
        """Random starts to make; the best by residual is kept."""

    def applies(self, view: View) -> str | None:
        """None when the attack can run on this view, else the reason it cannot."""

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        """One attempt from one start drawn from `generator`."""


class Monitor:
    """Watches one attempt: keeps the best candidate, the loss curve and the film strip, and says when to stop.

    Args:
        on_step: called with (iteration, total, loss).
        deadline: value of `time.monotonic()` after which to stop; None for no limit.
        frames: film strip length at most, spaced by powers of a constant ratio.
        compiler: of what is evaluated often; None for evaluating everything eagerly.
    """

    def __init__(
        self,
        on_step: OnStep | None = None,
        deadline: float | None = None,
        frames: int = 12,
        history: int = 400,
        compiler: Compiler | None = None,
    ) -> None:
        self.compiler = compiler or Compiler("never")
        self.best_x: Tensor | None = None
        self.best_y: Tensor | None = None
        self.best_loss = math.inf
        self.iteration = 0
        self.stopped: Stop = "finished"
        self.history: list[tuple[int, float]] = []
        self.strip: list[tuple[int, float, Tensor]] = []
        self._on_step = on_step
        self._deadline = deadline
        self._frames = frames
        self._history = history
        self._last_gain = 0
        self._gain_loss = math.inf
        self._whole: tuple[int, int] | None = None

    @property
    def limited(self) -> bool:
        """Whether there is a deadline at all."""
        return self._deadline is not None

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self._deadline is not None and time.monotonic() > self._deadline

    @property
    def seconds_left(self) -> float | None:
        """Until the deadline; None where there is none."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def rehearsal(self) -> Monitor:
        """A monitor for a try-out: the same deadline, progress and compiler, nothing of it kept here."""
        return Monitor(self._on_step, self._deadline, compiler=self.compiler)

    def expect(self, total: int) -> None:
        """Several optimisations follow, of at most `total` iterations together: one progress bar, one film strip."""
        self._whole = (self.iteration, total)
        self._frame_steps = self.spaced(total)

    def forget_best(self) -> None:
        """Let the next candidate be the best: the loss is about to change its meaning."""
        self.best_loss = math.inf

    def start(
        self, total: int, patience: int | None = None, target: float = 0.0, min_gain: float = 1e-3
    ) -> None:
        """Begin an optimisation of `total` iterations.

        It counts as converged at a loss of `target`, as a plateau after `patience`
        iterations in which the best loss fell by less than the share `min_gain`.
        """
        self._total, self._patience, self._target, self._min_gain = total, patience, target, min_gain
        self._first = self.iteration
        if self._whole is None:
            self._frame_steps = self.spaced(total)
        self._last_gain, self._gain_loss = self.iteration, math.inf

    def step(self, loss: float, x: Tensor, y: Tensor) -> bool:
        """Record the candidate *at which* `loss` was measured; True when the attempt should stop."""
        first, total = self._whole or (self._first, self._total)
        local = min(self.iteration - first, total)
        if not math.isfinite(loss):
            self.stopped = "diverged"
            return True
        if loss < self.best_loss:
            self.best_loss, self.best_x, self.best_y = loss, x.detach().clone(), y.detach().clone()
        if loss < self._gain_loss * (1 - self._min_gain):
            self._gain_loss, self._last_gain = loss, self.iteration
        if local in self._frame_steps:
            self.strip.append((self.iteration, loss, x.detach().cpu().clone()))
        if local % max(1, total // self._history) == 0:
            self.history.append((self.iteration, loss))
        if self._on_step is not None:
            self._on_step(local, total, loss)
        self.iteration += 1
        if loss <= self._target:
            self.stopped = "converged"
        elif self._patience is not None and self.iteration - self._last_gain > self._patience:
            self.stopped = "plateau"
        elif self.late:
            self.stopped = "budget"
        else:
            return False
        return True

    def spaced(self, total: int) -> set[int]:
        """When a film strip has frames: at the first and the last of `total` steps, and some at a constant ratio."""
        steps = {round(total ** (i / max(self._frames - 2, 1))) for i in range(self._frames - 1)}
        return {0, total} | {step for step in steps if 0 < step < total}

    def result(self, stopped: Stop | None = None, details: dict[str, Any] | None = None) -> Reconstruction:
        """The best candidate seen; `RuntimeError` when every loss was NaN or infinite."""
        if self.best_x is None or self.best_y is None:
            raise RuntimeError("the matching loss was never finite")
        strip = [*self.strip]
        if not strip or not torch.equal(strip[-1][2], self.best_x.cpu()):
            strip.append((self.iteration, self.best_loss, self.best_x.cpu()))
        history = [*self.history]
        return Reconstruction(
            x=self.best_x,
            y=self.best_y,
            loss=self.best_loss,
            iterations=self.iteration,
            stopped=stopped or self.stopped,
            history=history,
            strip=strip,
            details=details or {},
        )
