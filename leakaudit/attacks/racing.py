"""Many random starts of one descent at once, the worse half of which is given up again and again.

All candidates move together as one batch (`torch.vmap`), which shares the cost of launching every operation, and
successive halving by the attack's own matching loss (Karnin, Koren and Somekh 2013; Jamieson and Talwalkar 2016)
spends most iterations on the starts that lead somewhere.  No truth is involved.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from leakaudit.attacks.adam import Rule, State, Watch, iteration, rates, schedule
from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import AGREEMENT, Function
from leakaudit.attacks.optimise import Candidate, of_each, value_and_gradient, value_and_gradients
from leakaudit.attacks.single_backward import without_double_backward
from leakaudit.errors import InputError
from leakaudit.formats.phrases import first_line
from leakaudit.threat import View

Loss = Callable[..., Tensor]
"""(x, y, *others) -> a scalar, as `leakaudit.attacks.optimise.Objective`; `others` are a candidate's own."""

MEMORY = {"cpu": 2**28, "cuda": 2**34}
"""Bytes that the candidates of one batch may take together, as `bytes_of` estimates them.

Constants, because a look at what is free would let two runs of one seed differ in their roundings.  A CPU gains from
a batch only as long as launches cost more than arithmetic (docs/performance/restarts.md).
"""
LEAST = {"cpu": 4, "cuda": 2}
"""Candidates from which a batch is faster than one after another, as measured there."""
HELD = 6
"""Copies of activations and gradients that a double backward pass holds at its peak."""


# ------------------------------------------------------------------ the schedule


@dataclass(frozen=True)
class Rung:
    """So many candidates take so many iterations."""

    candidates: int
    iterations: int


def rungs(starts: int, iterations: int, survivors: int = 1) -> list[Rung]:
    """Halvings of `starts` candidates until `survivors` are left, who run to the end of the `iterations`.

    With k halvings, the first comes after 1/2^k of the iterations, each other one when twice as many have passed:
    every rung but the first costs as much as half a full descent, the first as much as a whole one.  An odd number
    is halved upwards.
    """
    counts = [starts]
    while counts[-1] > survivors:
        counts.append(max(survivors, -(-counts[-1] // 2)))
    ends = [math.ceil(iterations / 2 ** (len(counts) - 1 - place)) for place in range(len(counts))]
    return [Rung(n, end - begin) for n, begin, end in zip(counts, [0, *ends], ends, strict=False)]


# ------------------------------------------------------------------ the candidates


@dataclass(frozen=True)
class Field:
    """The candidates still in a race; every tensor has them as its first dimension, R.

    Attributes:
        numbers: (R,) which start each began as.
        state: where Adam stands with each.
        given: what the loss gets besides the state: fixed labels (R, N), then the `others`.
        losses: (R,) each one's smallest so far; infinite before the first and where none was finite.
        x, y: (R, N, C, H, W) and (R, N) or (R, N, K), where these were measured.
        frames: (iteration, losses (R,), x) to show the winner's way.
    """

    numbers: Tensor
    state: State
    given: tuple[Tensor, ...]
    losses: Tensor
    x: Tensor
    y: Tensor
    frames: tuple[tuple[int, Tensor, Tensor], ...] = ()

    @classmethod
    def starting(cls, x: Tensor, y: Tensor, others: Sequence[Tensor] = ()) -> Field:
        """From x (R, N, C, H, W), with labels y (N,) that stay or probabilities (N, K) to begin with."""
        every = y.expand(len(x), *y.shape).contiguous()
        free = y.is_floating_point()
        state = State.starting(*Candidate.starting(x, every).variables)
        return cls(
            torch.arange(len(x), device=x.device),
            state,
            tuple(others) if free else (every, *others),
            torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device),
            x,
            every,
        )

    @property
    def free(self) -> bool:
        """Whether labels are found too."""
        return len(self.state.variables) > 1

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        """(x, y) of the state."""
        x, *logits = self.state.variables
        return x, logits[0].softmax(dim=-1) if logits else self.given[0]

    def measured(self, losses: Tensor) -> Field:
        """With these losses of the candidates as they are."""
        x, y = self.at
        better = losses < self.losses

        def best(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(better.reshape(-1, *(1,) * (new.dim() - 1)), new, old)

        return replace(self, losses=best(losses, self.losses), x=best(x, self.x), y=best(y, self.y))

    def half(self, count: int) -> Field:
        """The `count` best by their smallest loss, in their order; of equals, those that began first."""
        losses = self.losses.tolist()
        ranked = sorted(range(len(losses)), key=lambda row: (losses[row], row))
        rows = torch.tensor(sorted(ranked[:count]), device=self.losses.device)

        def kept(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, rows)

        return Field(
            kept(self.numbers),
            self.state.map(kept),
            tuple(map(kept, self.given)),
            kept(self.losses),
            kept(self.x),
            kept(self.y),
            tuple((step, kept(losses), kept(x)) for step, losses, x in self.frames),
        )


# ------------------------------------------------------------------ moving them


def pieces(count: int, width: int, least: int = 1) -> list[int]:
    """`count` as so many times `width`, and what is left, as ones where that is less than `least`."""
    rest = count % width
    return [width] * (count // width) + ([1] * rest if rest < least else [rest])


@dataclass(frozen=True)
class Together:
    """Adam's iteration of any number of candidates, cut into batches that fit.

    Attributes:
        batched: as `iteration` makes it of `of_each`.
        single: the same of one candidate, without a dimension for several; faster for one.
        width: candidates of one batch at most.
        least: and at least; fewer move one after another.
        prepared: compiled ones by width.
    """

    batched: Function
    single: Function
    width: int
    least: int = 1
    prepared: Mapping[int, Function] = field(default_factory=dict)

    def __call__(self, row: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(row, *given, *state), each but the row (R, ...) -> (losses, *gradients, *state)."""
        widths = pieces(len(tensors[0]), self.width, self.least)
        parts = zip(*(torch.split(tensor, widths) for tensor in tensors), strict=True)
        outputs = [self._of(width)(row, *part) for width, part in zip(widths, parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else tuple(map(torch.cat, zip(*outputs, strict=True)))

    def _of(self, width: int) -> Function:
        """One function for all widths, as `batched`."""
        function = self.prepared.get(width, self.batched if width > 1 else self.single)
        return function if width > 1 else _lifted(function)

    def prepare(self, plan: Sequence[Rung], row: Tensor, racers: Field, monitor: Monitor) -> Together:
        """The same, compiled where that pays.

        On a CPU, candidates one after another when those are: a compiled step of one is as fast as each of an eager
        batch, and serves every rung.  Elsewhere, every width that comes up often enough.
        """
        if row.device.type == "cpu":
            steps = sum(rung.candidates * rung.iterations for rung in plan)
            quick = self._compiled(1, steps, row, racers, monitor)
            return self if quick is self.single else replace(self, width=1, prepared={1: quick})
        evaluations: Counter[int] = Counter()
        for rung in plan:
            for width in pieces(rung.candidates, self.width, self.least):
                evaluations[width] += rung.iterations
        widest_first = sorted(evaluations.items(), reverse=True)
        prepared = {
            width: self._compiled(width, count, row, racers, monitor) for width, count in widest_first
        }
        return replace(self, prepared=prepared)

    def _compiled(
        self, width: int, evaluations: int, row: Tensor, racers: Field, monitor: Monitor
    ) -> Function:
        tensors = (*racers.given, *racers.state.tensors)
        several = [tensor[:width] if width > 1 else tensor[0] for tensor in tensors]
        return monitor.compiler.prepare(
            self.batched if width > 1 else self.single,
            (row, *(tensor.clone() for tensor in several)),
            evaluations,
            monitor.seconds_left,
            compared=1 + len(racers.state.variables),
        )


def _lifted(single: Function) -> Function:
    """A function of one candidate as one of a batch of one."""

    def function(row: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.unsqueeze(0) for output in single(row, *(tensor[0] for tensor in tensors)))

    return function


def unbatchable(loss: Loss, racers: Field) -> str | None:
    """Why candidates cannot be evaluated as one batch, or None: the first two are, and the first is compared.

    Not every operation has a rule for `torch.vmap`.
    """
    together, alone = of_each(loss, racers.free), _alone(loss, racers.free)
    arguments = [tensor[:2] for tensor in (*racers.state.variables, *racers.given)]
    try:
        found = together(*arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        return first_line(error)
    expected = alone(*(tensor[0] for tensor in arguments))
    tolerance = AGREEMENT.get(racers.x.dtype, 5e-3)
    for one, several in zip(expected, found, strict=True):
        difference = float((one - several[0]).norm() / one.norm().clamp_min(1e-30))
        if not difference <= tolerance:
            return f"its numbers differ from those of one by {difference:.1e}"
    return None


def _require_double_backward(loss: Loss, racers: Field) -> None:
    """`optimise.differentiable` has other ways for one descent; none of them takes a batch."""
    x, *second = (tensor[0] for tensor in racers.state.variables)
    given = [tensor[0] for tensor in racers.given]
    point = (x, second[0] if racers.free else given[0])
    others = given if racers.free else given[1:]
    missing = without_double_backward(lambda x, y: loss(x, y, *others), point, racers.free)
    if missing is not None:
        raise InputError(f"starts cannot be raced, for double backward is not to be had ({missing});"
                         " accepted: inverting-gradients with starts=1")  # fmt: skip


def _alone(loss: Loss, free: bool) -> Function:
    return value_and_gradients(loss) if free else value_and_gradient(loss)


def bytes_of(view: View) -> int:
    """What one candidate's step takes at its peak, estimated from the sizes of the model and the round."""
    victim, round = view.victim, view.round
    activations = sum(output[0].numel() for _, _, _, output in victim.modules_in_order())
    parameters = sum(parameter.numel() for parameter in victim.params.values())
    numbers = parameters * round.local_steps + (activations + victim.space.unknowns) * round.passes
    return HELD * numbers * victim.dtype.itemsize


def width_of(size: int, device: torch.device) -> int:
    """How many candidates of so many bytes go into one batch: a power of two, so that pieces repeat."""
    fitting = MEMORY.get(device.type, MEMORY["cuda"]) // max(1, size)
    return 1 << max(0, fitting.bit_length() - 1)


# ------------------------------------------------------------------ the race


@dataclass(frozen=True)
class Race:
    """How candidates are raced.

    Attributes:
        iterations: of a descent from its start to its end.
        learning_rate, cosine_decay, patience: as for `leakaudit.attacks.optimise.adam`; the patience is with the
            best of all.
        rule: sign and projection.
        survivors: of the halving; as many as there are starts for none.
        size: bytes of one candidate's step, which decide how many share a batch.
    """

    iterations: int
    learning_rate: float
    rule: Rule
    size: int
    cosine_decay: bool = False
    patience: int | None = None
    survivors: int = 1

    def run(self, racers: Field, loss: Loss, monitor: Monitor) -> Field:
        """Those left at the end, or when the monitor said stop; it is given the best candidate of each iteration.

        The monitor's film strip becomes the winner's.  Where candidates cannot form a batch, each iteration moves
        one after the other, and the compiler's `step` says so.  Raises `InputError` where the loss cannot be
        differentiated through the model's own gradients.
        """
        x = racers.x
        _require_double_backward(loss, racers)
        width = width_of(self.size, x.device)
        reason = unbatchable(loss, racers) if min(len(x), width) > 1 else None
        together = Together(
            iteration(of_each(loss, racers.free), self.rule, racers.free),
            iteration(_alone(loss, racers.free), self.rule, racers.free),
            1 if reason else width,
            LEAST.get(x.device.type, LEAST["cuda"]),
        )
        plan = rungs(len(x), self.iterations, self.survivors)
        rows = schedule(rates(self.iterations, self.learning_rate, self.cosine_decay), x)
        together = together.prepare(plan, rows[0], racers, monitor)
        if reason:
            monitor.compiler.step += f"; one start after another: {reason}"
        monitor.start(self.iterations, patience=self.patience)
        first, shown = monitor.iteration, len(monitor.strip)
        racers = self._course(racers, together, plan, rows, monitor)
        winner = int(racers.losses.argmin())
        monitor.strip[shown:] = [
            (first + step, float(losses[winner]), x[winner].cpu()) for step, losses, x in racers.frames
        ]
        return racers

    def _course(
        self, racers: Field, together: Together, plan: Sequence[Rung], rows: Tensor, monitor: Monitor
    ) -> Field:
        """The racers at the end of the last rung, or where the monitor stops."""
        watch = Watch.on(monitor, rows.device)
        frames, step, moved = monitor.spaced(self.iterations), 0, len(racers.state.variables)
        for place, rung in enumerate(plan):
            racers = racers.half(rung.candidates) if rung.candidates < len(racers.numbers) else racers
            last = place == len(plan) - 1
            for row in rows[step : step + rung.iterations + last]:
                losses, *tensors = together(row, *racers.given, *racers.state.tensors)
                losses = torch.where(losses.isfinite(), losses, math.inf)
                racers = racers.measured(losses)
                x, y = racers.at
                if step in frames:
                    racers = replace(racers, frames=(*racers.frames, (step, losses, x)))
                if watch.step(losses.min(), *(_leader(losses, values) for values in (x, y))):
                    return racers
                racers = replace(racers, state=State.of(tensors[moved:]))
                step += 1
        watch.flush()
        return racers


def _leader(losses: Tensor, values: Tensor) -> Tensor:
    """The candidate of the smallest loss, without waiting for a GPU to say which it is."""
    return values.index_select(0, losses.argmin().reshape(1))[0]
