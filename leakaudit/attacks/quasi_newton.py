"""L-BFGS whose steps cost a few matrix products, for functions that are cheap to evaluate.

torch.optim.LBFGS walks through its history twice a step, in Python, with two operations an entry: about 1.5 ms for
3,072 unknowns and 100 entries, more than a compiled LeNet's value and gradient.  The compact representation of the
same matrix (Byrd, Nocedal and Schnabel 1994, theorem 2.2 and equation 3.1) needs two products with the history and
two triangular systems of its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

Evaluated = tuple[float, Tensor]
"""A function's value and its gradient (n,)."""
Function = Callable[[Tensor], Evaluated]
"""Of a point (n,)."""

CURVATURE = 1e-10
"""Least s . y of a step that is remembered."""
DECREASE, FLATTER = 1e-4, 0.9
"""c1 and c2 of the strong Wolfe conditions (Nocedal and Wright 2006, equation 3.7)."""
SEARCHES = 25
"""Evaluations of a line search at most, besides the first."""
NOTHING = 1e-9
"""A bracket in which no number changes by more ends a line search."""
NARROW = 0.1
"""A trial this near to an end of the bracket, as a share of it, twice in a row is moved away."""


class History:
    """The last steps s and changes of the gradient y, and the inverse Hessian they imply.

    Args:
        like: a point (n,), of the dtype and on the device of all others.
        length: steps to remember.
    """

    def __init__(self, like: Tensor, length: int) -> None:
        self._length = length
        room = length + max(8, length // 4)  # the window slides; it is moved back when it meets the end
        self._steps = like.new_zeros(2, room, len(like))
        self._first = self._last = 0
        self._sy, self._yy = (like.new_zeros(length, length, dtype=torch.float64) for _ in range(2))

    def __len__(self) -> int:
        return self._last - self._first

    def append(self, s: Tensor, y: Tensor) -> None:
        """Remember a step and its change of the gradient; forgets the oldest one when full."""
        if len(self) == self._length:
            self._first += 1
            self._sy, self._yy = self._sy.roll((-1, -1), (0, 1)), self._yy.roll((-1, -1), (0, 1))
        if self._last == self._steps.shape[1]:
            self._steps[:, : len(self)] = self._steps[:, self._first : self._last].clone()
            self._first, self._last = 0, len(self)
        self._steps[0, self._last], self._steps[1, self._last] = s, y
        self._last += 1
        new, size = len(self) - 1, len(self)
        steps, changes = self._window
        self._sy[:size, new] = steps @ y
        self._yy[:size, new] = self._yy[new, :size] = (changes @ y).double()

    def direction(self, gradient: Tensor) -> Tensor:
        """-H g for a gradient (n,); H is the identity where nothing is remembered.

        With R the upper triangle of S^T Y, D its diagonal, u = R^-1 S^T g and c = s.y / y.y of the last step,
        H g = c g + S R^-T ((D + c Y^T Y) u - c Y^T g) - c Y u.
        """
        size = len(self)
        if size == 0:
            return -gradient
        (steps, changes), sy, yy = self._window, self._sy[:size, :size], self._yy[:size, :size]
        of_s, of_y = (steps @ gradient).double(), (changes @ gradient).double()
        scale = sy[-1, -1] / yy[-1, -1]
        u = torch.linalg.solve_triangular(sy, of_s[:, None], upper=True)
        right = sy.diagonal()[:, None] * u + scale * (yy @ u - of_y[:, None])
        v = torch.linalg.solve_triangular(sy.T, right, upper=False)[:, 0]
        like = gradient.dtype
        found = scale.to(like) * gradient + steps.T @ v.to(like) - changes.T @ (scale * u[:, 0]).to(like)
        return -found

    @property
    def _window(self) -> tuple[Tensor, Tensor]:
        """Steps and changes, (size, n) each, the oldest first."""
        steps, changes = self._steps[:, self._first : self._last]
        return steps, changes


@dataclass(frozen=True)
class Trial:
    """A point on the line: its length, value, gradient (n,) and slope along the line."""

    length: float
    value: float
    gradient: Tensor
    slope: float


class QuasiNewton:
    """L-BFGS from one point, as far as it is asked to go.

    As torch.optim.LBFGS with its tolerances at 0: the same first step, line search, remembered steps and ends.
    Deviation: the point it stands on is not evaluated a second time when it goes on.

    Args:
        function: to be minimised.
        start: (n,).
        learning_rate: length of the first trial of a line search, or of every step without one.
        history: steps to remember.
        line_search: for the strong Wolfe conditions.

    Attributes:
        point: (n,), where it stands.
        value: of the function there.
    """

    def __init__(
        self,
        function: Function,
        start: Tensor,
        *,
        learning_rate: float = 1.0,
        history: int = 100,
        line_search: bool = True,
    ) -> None:
        self._function, self._rate, self._line_search = function, learning_rate, line_search
        self._history = History(start, history)
        self.point = start.detach().clone()
        self.value, self._gradient = function(self.point)
        self._begun = False
        self.evaluations = 1

    def advance(self, steps: int) -> None:
        """At most so many steps, or a quarter more evaluations; fewer where a step changes nothing."""
        limit = self.evaluations + steps * 5 // 4
        for _ in range(steps):
            if not self._step() or self.evaluations >= limit:
                return

    def _step(self) -> bool:
        """One step; False when the point is where it was, or not a number."""
        direction = self._history.direction(self._gradient)
        slope = float(self._gradient @ direction)
        if not slope < 0:
            return False
        length = self._rate
        if not self._begun:
            length *= min(1.0, 1.0 / float(self._gradient.abs().sum()))
            self._begun = True
        here, start = Trial(0.0, self.value, self._gradient, slope), self.point
        found = self._searched(here, direction, length) if self._line_search else None
        if found is None:
            found = self._trial(direction, length)
        step = direction * found.length
        change = found.gradient - self._gradient
        self.point = start + step
        self.value, self._gradient = found.value, found.gradient
        if not math.isfinite(self.value):
            return False
        if float(change @ step) > CURVATURE:
            self._history.append(step, change)
        return bool(step.abs().max() > 0)

    def _searched(self, here: Trial, direction: Tensor, length: float) -> Trial:
        search = strong_wolfe(here, length, float(direction.abs().max()))
        try:
            asked = next(search)
            while True:
                asked = search.send(self._trial(direction, asked))
        except StopIteration as end:
            found: Trial = end.value
            return found

    def _trial(self, direction: Tensor, length: float) -> Trial:
        value, gradient = self._function(self.point + length * direction)
        self.evaluations += 1
        return Trial(length, value, gradient, float(gradient @ direction))


Search = Generator[float, Trial, Trial]
"""Yields lengths to try, is sent the trials, returns the one to take."""


def strong_wolfe(here: Trial, length: float, widest: float) -> Search:
    """A step that meets the strong Wolfe conditions, or the best one found.

    Nocedal and Wright 2006, algorithms 3.5 and 3.6, with cubic interpolation and the safeguards of torch.optim.LBFGS.

    Args:
        here: where the line begins, of negative slope.
        length: to try first.
        widest: the direction's largest number; a bracket too narrow to change anything ends the search.
    """
    previous = here
    trial = yield length
    for count in range(SEARCHES + 1):
        if _too_high(trial, here) or (count > 0 and trial.value >= previous.value):
            return (yield from _zoom(here, previous, trial, widest, SEARCHES - count))
        if abs(trial.slope) <= -FLATTER * here.slope:
            return trial
        if trial.slope >= 0:
            return (yield from _zoom(here, previous, trial, widest, SEARCHES - count))
        if count == SEARCHES:
            break
        least = trial.length + 0.01 * (trial.length - previous.length)
        following = _interpolated(previous, trial, least, 10 * trial.length)
        previous, trial = trial, (yield following)
    return trial if trial.value < here.value else here


def _too_high(trial: Trial, here: Trial) -> bool:
    """Whether the value has not fallen enough; so does what is not a number count."""
    return not trial.value <= here.value + DECREASE * trial.length * here.slope


def _zoom(here: Trial, first: Trial, second: Trial, widest: float, tries: int) -> Search:
    """Between two lengths that hold a step to take; the lower end when none was found."""
    low, high = (second, first) if second.value < first.value else (first, second)
    near_end = False
    for _ in range(tries):
        width = abs(high.length - low.length)
        if width * widest < NOTHING:
            break
        left, right = sorted((low.length, high.length))
        length = _interpolated(low, high, left, right)
        if min(right - length, length - left) < NARROW * width:
            if near_end or not left < length < right:
                length = right - NARROW * width if right - length < length - left else left + NARROW * width
                near_end = False
            else:
                near_end = True
        else:
            near_end = False
        trial = yield length
        if _too_high(trial, here) or trial.value >= low.value:
            high = trial
        elif abs(trial.slope) <= -FLATTER * here.slope:
            return trial
        else:
            if trial.slope * (high.length - low.length) >= 0:
                high = low
            low = trial
    return low


def _interpolated(first: Trial, second: Trial, least: float, most: float) -> float:
    """Where the cubic through two trials is least (Nocedal and Wright 2006, equation 3.59), within bounds."""
    if first.length > second.length:
        first, second = second, first
    span = second.length - first.length
    middle = (least + most) / 2
    if span <= 0 or not math.isfinite(second.value) or not math.isfinite(first.value):
        return middle
    one = first.slope + second.slope - 3 * (first.value - second.value) / (first.length - second.length)
    square = one * one - first.slope * second.slope
    if not square >= 0:
        return middle
    two = math.sqrt(square)
    bottom = second.slope - first.slope + 2 * two
    if bottom == 0 or not math.isfinite(bottom):
        return middle
    found = second.length - span * ((second.slope + two - one) / bottom)
    return min(max(found, least), most)
