"""Gradient inversion as nonlinear least squares.

The residual of the matching equations is driven to zero by damped Gauss-Newton
steps (Levenberg 1944, Marquardt 1963), the damping set by the gain ratio (Nielsen 1999,
equation 2.21).  Where the Jacobian has full rank this converges to machine precision.
First-order attacks on the same objective (Zhu et al. 2019) stop orders of magnitude above.

Steps are found by preconditioned conjugate gradients (`leakaudit.attacks.krylov`): an
explicit Jacobian, in float32, is formed two or three times an attack.

Deviations from Nielsen: damping may fall by 10 instead of 3 a step, steps are inexact (Dembo,
Eisenstat and Steihaug 1982), and candidates are projected into the pixel box after each step far
from the solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.attacks.base import Monitor, Reconstruction, Stop, require_positive
from leakaudit.attacks.disturbance import errors_of
from leakaudit.attacks.gradient_matching import assumed_labels
from leakaudit.attacks.jacobian import Columns, Spectrum, System, gram_gigabytes, plan
from leakaudit.attacks.krylov import Linear, Solver, Work
from leakaudit.attacks.labels import infer_labels
from leakaudit.attacks.optimise import Candidate, Matching, adam
from leakaudit.randomness import fork
from leakaudit.rounds import client_update
from leakaudit.threat import View

TRIES = 8
CONVERGED = 1e-11
COARSE = 1e-6
UNBOXED = 1e-4
PRIOR_WEIGHT = 1e-8
NEGLIGIBLE = 0.01
ANNEALING = (30.0, 10.0, 3.0)
"""How much larger the noise is taken to be, step by step, before its real size."""
ANNEALING_STEPS = 6
STALLED_AFTER = 5
MEASURE_EVERY = 10


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damped Gauss-Newton on g(x) = g*.

    Attributes:
        iterations: steps at most in one descent; there is a second descent after a warm start.
        damping: first damping, as a share of the mean squared column norm of the Jacobian.
        equations: how many equations to keep, as a multiple of the unknowns.
        warm_start: steps of cosine matching by Adam, run when the direct way stalls; 0 for never.
        smoothness: standard deviation, in pixels of [0, 1], of the difference between neighbours under
            a Gaussian prior.  It is used when the noise in the update is known, which makes this the
            maximum a posteriori attack, and to choose among the inputs that share an update when
            the Jacobian is rank deficient.  0 for no prior.
        box: keep pixels in [0, 1] after every step, until the relative residual is below 1 % (from
            there the equations alone decide, and projection would only slow them down).
        memory_gb: for the Gram matrix of a preconditioner in float32, its factor, and the Jacobian where
            that has to be held; one in float64, for systems where float32 does not lead to convergence, is
            made only where it fits as well.
        spectrum: compute rank, conditioning and the Cramer-Rao figure here too, of all equations where
            the noise is known, else for noise of 1 %.  An audit's verification reports the three for
            the best candidate at its own floor, from a Jacobian as dear as this one.
        restarts: random starts.
    """

    iterations: int = 100
    damping: float = 1e-3
    equations: float = 4.0
    warm_start: int = 1500
    smoothness: float = 0.1
    box: bool = True
    memory_gb: float = 4.0
    spectrum: bool = False
    restarts: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "iterations", "damping", "equations", "memory_gb", "restarts")
        for name in ("warm_start", "smoothness"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def applies(self, view: View) -> str | None:
        """None, or why not: the preconditioner would be too large."""
        planned = plan(view, self._limit(view))
        unknowns = self._unknowns(view)
        size = planned.gram_gigabytes(unknowns, torch.float32, self._has_prior(view))
        if size > self.memory_gb:
            return (
                f"a Jacobian of {planned.equations:,} equations in {unknowns:,} unknowns takes {size:.1f} GB "
                f"with its Gram matrix in float32, more than memory_gb={self.memory_gb:g}"
            )
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        """One attempt: from noise, and once more from a warm start where that stalled.

        The loss is |p(u) - t|^2 / |t|^2 over the compressed, weighted equations, plus the prior's
        share where the noise is known.
        """
        view = view.to(dtype=torch.float64)
        space = view.victim.space
        labels, source = choose_labels(view, generator)
        problem = self._problem(view, labels, generator)
        start = space.sample(view.round.num_examples, generator, torch.float64).to(view.victim.device)
        logits = None if labels is not None else start.new_zeros(len(start), view.victim.num_classes)
        end = self._anneal(problem, problem.system.point(start, logits), monitor)
        warm = end.stopped == "plateau" and self.warm_start > 0
        if warm:
            candidate = Candidate(space.project(start), labels, logits)
            point = warm_start(problem, candidate, self.warm_start, monitor)
            end = self._descend(problem, point, monitor)
        smoothed = self._smooth(problem, end, monitor)
        if smoothed is not None:
            monitor.forget_best()
            monitor.step(smoothed.loss, *problem.system.split(smoothed.point))
        found = monitor.result(stopped=end.stopped)
        details: dict[str, Any] = {"labels": source, "warm_start": warm, "smoothed": smoothed is not None}
        details |= {"equations": len(problem.system.target), "unknowns": problem.system.unknowns}
        details |= {"jacobians": problem.work.jacobians, "products": problem.work.products}
        if self.spectrum and end.stopped == "converged":
            details |= _spectrum(problem, found.x, labels)
        return replace(found, details=details)

    def _smooth(self, problem: Problem, end: End, monitor: Monitor) -> Iterate | None:
        """Where many inputs share the update, the smoothest of them near `end`; else None.

        First the prior decides what the equations leave open (and bends the rest a little), then
        steps of least length bring the equations back to the residual they had.
        """
        if not self.smoothness or problem.noisy or end.stopped != "converged":
            return None
        if not problem.fits(prior=True) or not end.solver.deficient(
            problem.linearise(end.here), fork(0, "null")
        ):
            return None
        prior = PRIOR_WEIGHT * smoothness_matrix(problem.system, self.smoothness)
        smooth = self._descend(replace(problem, prior=prior), end.here.point, monitor)
        polished = self._descend(problem, smooth.here.point, monitor)
        return polished.here if polished.here.loss < problem.floor else None

    def _limit(self, view: View) -> int:
        """Equations to keep; all of them under noise, where each one counts."""
        return view.observed.numel() if errors_of(view) else int(self.equations * view.unknowns)

    def _has_prior(self, view: View) -> bool:
        """Whether a prior takes part from the start."""
        return bool(errors_of(view)) and self.smoothness > 0

    def _unknowns(self, view: View) -> int:
        """Pixels, and label logits where labels may have to be found jointly."""
        joint = view.knowledge.labels.value is None and view.round.num_examples > 1
        return view.unknowns + (view.round.num_examples * view.victim.num_classes if joint else 0)

    def _problem(self, view: View, labels: Tensor | None, generator: torch.Generator) -> Problem:
        weights = {name: 1 / error for name, error in errors_of(view).items()}
        system = System.of(view, labels, generator, self._limit(view), weights or None)
        prior = smoothness_matrix(system, self.smoothness) if weights and self.smoothness else None
        return Problem(
            system,
            system.to(torch.float32),
            system.has_graph(fork(0, "graph", view.victim.device)),
            self.memory_gb,
            None if prior is None else prior / system.unit**2,
            bool(weights),
            view.victim.space.project if self.box else None,
        )

    def _anneal(self, problem: Problem, point: Tensor, monitor: Monitor) -> End:
        """A descent that starts as if the noise were larger, so that the prior leads while the picture forms.

        Without known noise, or without a prior, one descent.
        """
        if problem.prior is not None:
            for inflation in ANNEALING:
                inflated = replace(problem, prior=inflation**2 * problem.prior)
                end = self._descend(inflated, point, monitor, ANNEALING_STEPS)
                point = end.here.point
                monitor.forget_best()  # the next objective is another one
                if end.stopped == "budget":
                    break
        return self._descend(problem, point, monitor)

    def _descend(
        self, problem: Problem, point: Tensor, monitor: Monitor, iterations: int | None = None
    ) -> End:
        """Damped Gauss-Newton steps until they gain nothing, `iterations` at most; how it ended."""
        iterations = min(self.iterations, iterations or self.iterations)
        here, solver = problem.at(point), problem.solver(self.damping)
        damping, growth, idle = 0.0, 2.0, 0
        monitor.start(iterations)
        for _ in range(iterations):
            if monitor.step(here.loss, *problem.system.split(here.point)):
                return End(monitor.stopped, here, solver)
            linear = problem.linearise(here)
            near, ending = here.loss < COARSE, here.loss < problem.floor
            start = solver.prepare(linear, damping or None, near=near, ending=ending)
            if not start.finite:
                break
            damping = damping or self.damping * start.scale
            for _ in range(TRIES):
                trial, predicted = problem.step(here, linear, solver, damping)
                if trial.loss < here.loss:
                    break
                damping, growth = damping * growth, growth * 2
            else:
                break
            gain = (here.loss - trial.loss) / predicted
            damping, growth = damping * max(0.1, 1 - (2 * gain - 1) ** 3), 2.0
            idle = idle + 1 if trial.loss > (1 - NEGLIGIBLE) * here.loss else 0
            floor = here.loss < problem.floor and trial.loss > problem.enough * here.loss
            here = trial
            if floor or idle >= STALLED_AFTER or here.loss == 0:
                break
        monitor.step(here.loss, *problem.system.split(here.point))
        return End("converged" if here.loss < problem.floor else "plateau", here, solver)


# ------------------------------------------------------------------ the problem and one step


@dataclass(frozen=True)
class Iterate:
    """A point with its objective (over |t|^2) and residual."""

    point: Tensor
    loss: float
    residual: Tensor


@dataclass(frozen=True)
class End:
    """How and where a descent ended, and what solved for its steps."""

    stopped: Stop
    here: Iterate
    solver: Solver


@dataclass(frozen=True)
class Problem:
    """minimise |p(u) - t|^2 + u^T P u, u in the box.

    Attributes:
        coarse: the same system in float32, for preconditioners.
        graph: whether products with the Jacobian need no matrix.
        memory_gb: for preconditioners.
        prior: P for one example, (D, D), or None.
        noisy: errors are known and the equations are divided by their standard deviation.
        project: model inputs -> the nearest in the box, or None.
        work: counts what the attack's solves cost.
    """

    system: System
    coarse: System
    graph: bool
    memory_gb: float
    prior: Tensor | None
    noisy: bool
    project: Callable[[Tensor], Tensor] | None
    work: Work = field(default_factory=Work)

    @property
    def scale(self) -> float:
        """|t|^2, the loss of a candidate that predicts nothing."""
        return float(self.system.target.square().sum())

    @property
    def floor(self) -> float:
        """The loss below which a candidate explains the update: rounding, or 1.5 times the noise."""
        noise = 1.5 * len(self.system.target) / (self.scale * self.system.unit**2)
        return noise if self.noisy else CONVERGED

    @property
    def enough(self) -> float:
        """Below the floor, a step that leaves more than this share of the loss ends the descent."""
        return 0.5 if self.prior is None and not self.noisy else 0.999

    def keep(self, point: Tensor) -> Tensor:
        """The nearest point in the box."""
        if self.project is None:
            return point
        pixels = self.system.view.victim.space.unknowns
        x = point[:, :pixels].reshape(-1, *self.system.view.victim.space.shape)
        return torch.cat([self.project(x).flatten(1), point[:, pixels:]], dim=1)

    def at(self, point: Tensor, boxed: bool = True) -> Iterate:
        """`point`, moved into the box when `boxed`, with its objective."""
        point = self.keep(point) if boxed else point
        with torch.no_grad():
            residual = self.system.residual(point)
        value = residual.square().sum()
        if self.prior is not None:
            value = value + ((point @ self.prior) * point).sum()
        return Iterate(point, float(value) / self.scale, residual)

    def linearise(self, here: Iterate) -> Linear:
        """The linear model at `here`."""
        system = self.system
        products = system.linearise(here.point) if self.graph else Columns(system.jacobian(here.point))
        return Linear(here.point, products, here.residual, self.prior)

    def solver(self, damping: float) -> Solver:
        """For the steps of one descent, the first of which has this share of `Preconditioner.scale` as damping."""
        exact = self._size(torch.float64, self.prior is not None) <= self.memory_gb
        return Solver(self.coarse, self.system if exact else None, damping, self.work)

    def fits(self, prior: bool) -> bool:
        """Whether a preconditioner in float32 fits into memory, with a prior or without."""
        return self._size(torch.float32, prior) <= self.memory_gb

    def _size(self, dtype: torch.dtype, prior: bool) -> float:
        return gram_gigabytes(self.system.unknowns, len(self.system.target), dtype, prior)

    def step(self, here: Iterate, linear: Linear, solver: Solver, damping: float) -> tuple[Iterate, float]:
        """Where the step leads, and the fall of the objective that the linear model predicts."""
        step, fall = solver.step(linear, damping)
        boxed = here.loss > UNBOXED or self.noisy
        return self.at(here.point + step.view(here.point.shape), boxed), fall / self.scale


# ------------------------------------------------------------------ labels, prior, warm start, figures


def choose_labels(view: View, generator: torch.Generator) -> tuple[Tensor | None, str]:
    """(labels (N,) or None for "find them jointly", where they come from)."""
    fact = view.knowledge.labels
    if fact.value is not None:
        return fact.value.to(view.victim.device), f"{fact.status}: {fact.source}"
    if view.round.num_examples == 1 and view.victim.classifier() is not None:
        inference = infer_labels(view, generator)
        if inference.exact:
            return inference.labels.to(view.victim.device), inference.method
        if errors_of(view) or view.client is not client_update:
            return assumed_labels(view, generator), "best match of those left by the last bias gradient"
    return None, "found jointly"


def smoothness_matrix(system: System, deviation: float) -> Tensor:
    """P, (D, D): u^T P u is the sum over neighbours of (difference in pixels of [0, 1] / deviation)^2."""
    space = system.view.victim.space
    channels, height, width = space.shape
    like = system.target
    scale = torch.tensor(space.std or (1.0,) * channels, dtype=like.dtype, device=like.device) / deviation

    def differences(size: int) -> Tensor:
        steps = torch.diff(torch.eye(size, dtype=like.dtype, device=like.device), dim=0)
        return steps.T @ steps

    def unit(size: int) -> Tensor:
        return torch.eye(size, dtype=like.dtype, device=like.device)

    plane = torch.kron(differences(height), unit(width)) + torch.kron(unit(height), differences(width))
    pixels = torch.kron(torch.diag(scale.square()), plane)
    extra = system.width - len(pixels)
    return F.pad(pixels, (0, extra, 0, extra))


class _Relay(Monitor):
    """Passes the steps of a warm start on to `outer`, with the loss of `problem` in place of their own."""

    def __init__(self, outer: Monitor, problem: Problem) -> None:
        super().__init__(frames=2, compiler=outer.compiler)
        self._outer, self._problem, self._count = outer, problem, 0

    def start(
        self, total: int, patience: int | None = None, target: float = 0.0, min_gain: float = 1e-3
    ) -> None:
        super().start(total, patience, target, min_gain)
        self._outer.start(total // MEASURE_EVERY)

    def step(self, loss: float, x: Tensor, y: Tensor) -> bool:
        if super().step(loss, x, y):
            return True
        self._count += 1
        if self._count % MEASURE_EVERY:
            return False
        logits = y.detach().log() if self._problem.system.labels is None else None
        point = self._problem.system.point(x.detach(), logits)
        if self._outer.step(self._problem.at(point).loss, x, y):
            self.stopped = self._outer.stopped
            return True
        return False


def warm_start(problem: Problem, candidate: Candidate, steps: int, monitor: Monitor) -> Tensor:
    """A point found by cosine matching with a little total variation (Geiping et al. 2020), in float64.

    Deviation: plain Adam with cosine decay, because signs keep small pixels from settling.
    """
    view = problem.system.view
    relay = _Relay(monitor, problem)
    adam(
        candidate,
        Matching(view, "cosine", tv=1e-4),
        relay,
        iterations=steps,
        learning_rate=0.1,
        project=view.victim.space.project,
        cosine_decay=True,
    )
    x = candidate.x.detach() if relay.best_x is None else relay.best_x
    logits = None if candidate.logits is None else candidate.logits.detach()
    return problem.system.point(x, logits)


def _spectrum(problem: Problem, x: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Rank, conditioning and Cramer-Rao figure of the pixels at the solution.

    The last is the root mean square error per pixel, in units of [0, 1], below which no
    unbiased attack gets on average under Gaussian noise of the size named (Kay 1993, section 3.8).
    Singular values are per pixel of [0, 1] and weighted equation.
    """
    if labels is None:
        return {}
    system = problem.system
    spectrum = Spectrum.of(system.jacobian(system.point(x)) / system.pixel_scale)
    error = system.cramer_rao(spectrum)
    noise = bool(errors_of(system.view))
    return {
        "rank": spectrum.rank,
        "condition": spectrum.condition,
        "smallest_singular_value": spectrum.smallest,
        "largest_singular_value": spectrum.largest,
        "cramer_rao_rms": error if noise else 0.01 * error,
        "cramer_rao_noise": "the known noise" if noise else "noise of 1 % of the rms of each tensor",
    }
