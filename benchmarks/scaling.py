"""What one inner step costs against unknowns, parameters and batch size, with fitted exponents.

    python benchmarks/scaling.py --quick --threads 1          # under a minute on a CPU
    python benchmarks/scaling.py --threads 1 --json out.json  # some minutes
    python benchmarks/scaling.py --device cuda                # larger sizes as well

Three inner steps, on random pixels at a random candidate:

    factor      what `levenberg-marquardt` does two to five times an attack: Jacobian, Gram matrix, Cholesky factor
    iteration   one of its conjugate-gradient iterations: J v, J^T w in float64, and the preconditioner
    evaluation  what first-order attacks do thousands of times: `Matching(view, "cosine", tv=1e-4)` and its
                gradient to the candidate, in float32

Sweeps: image size with the LeNet, width with ResNet-20 at 16x16, batch size with the LeNet.  Every time is a median
over rounds in which the three take turns.  An exponent is the slope of log seconds against log of what is swept, by
least squares over all sizes, so fixed costs of a call pull it down.  Quality beside the times: `rest`, the true
residual |A s - b| / |b| in float64 of one damped step with that factor, `solve`, its iterations, and `gradient`, the
relative difference of the evaluation's gradient to the same in float64.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from measuring import options, peak_memory, seconds, show
from torch import Tensor

from leakaudit.attacks.jacobian import System
from leakaudit.attacks.krylov import Linear, Preconditioner, Solver, Work
from leakaudit.attacks.optimise import Matching
from leakaudit.formats.manifest import Normalisation
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known

PLAIN = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
DAMPING = 1e-3
STEPS = ("factor", "iteration", "evaluation")
"""Columns of the table, in milliseconds."""


@dataclass(frozen=True)
class Case:
    """One point of a sweep."""

    model: str
    size: int
    batch: int = 1
    classes: int = 100


@dataclass(frozen=True)
class Sweep:
    """Cases along one axis, and what is put on it, from the columns of the table."""

    axis: str
    cases: tuple[Case, ...]


LENET = "lenet:init=uniform"


def resnet(width: int) -> str:
    return f"resnet20:activation=gelu,width={width}"


def sweeps(quick: bool, cuda: bool) -> list[Sweep]:
    """Image sizes, widths and batches that fit the time."""
    sizes = (8, 12, 16, 24) if quick else (8, 12, 16, 24, 32)
    widths = (4, 8) if quick else (4, 8, 16)
    batches = (1, 2, 4) if quick else (1, 2, 4, 8)
    side = 16
    if cuda and not quick:
        sizes, widths, side = (*sizes, 48), (*widths, 32), 32
    return [
        Sweep("unknowns", tuple(Case(LENET, size) for size in sizes)),
        Sweep("parameters", tuple(Case(resnet(width), 8 if quick else 16) for width in widths)),
        Sweep("batch", tuple(Case(LENET, side, batch) for batch in batches)),
    ]


def view_of(case: Case, device: str) -> tuple[View, Tensor]:
    """Random pixels behind the case's model, labels told, and another candidate."""
    shape = (3, case.size, case.size)
    victim = load_victim(case.model, num_classes=case.classes, input_shape=shape, normalisation=PLAIN)
    x, candidate = torch.rand(2, case.batch, *shape, generator=fork(0, "pixels"))
    y = torch.randint(case.classes, (case.batch,), generator=fork(0, "labels"))
    round = Round(case.batch)
    observed = client_update(victim, victim.params, round, x, y).detach()
    view = View(victim, round, observed, Knowledge(labels=known(y.to(device), "benchmark")))
    return view.to(device), candidate.to(device)


@dataclass(frozen=True)
class Inner:
    """The three inner steps of one case, ready to be called."""

    system: System
    linear: Linear
    coarse: System
    preconditioner: Preconditioner
    matching: Matching
    candidate: Tensor
    y: Tensor

    @classmethod
    def of(cls, case: Case, device: str) -> Inner:
        view, candidate = view_of(case, device)
        y = view.knowledge.labels.value
        system = System.of(view.to(dtype=torch.float64), y, fork(0, "system", device))
        point = system.point(candidate.double())
        linear = Linear(point, system.linearise(point), system.residual(point), None)
        coarse = system.to(torch.float32)
        made = Solver(coarse, None, DAMPING, Work()).prepare(linear)
        return cls(system, linear, coarse, made, Matching(view, "cosine", tv=1e-4), candidate, y)

    def factor(self) -> None:
        Solver(self.coarse, None, DAMPING, Work()).prepare(self.linear)

    def iteration(self) -> None:
        vector = self.linear.residual if self.linear.wide else self.linear.point.reshape(-1)
        self.preconditioner(self.linear.curvature(vector))

    def evaluation(self) -> None:
        self.slope(self.matching, self.candidate)

    def slope(self, matching: Matching, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(matching(x, self.y), x)
        return gradient

    def quality(self) -> dict[str, Any]:
        """How exact the step and the gradient are."""
        work = Work()
        solver = Solver(self.coarse, None, DAMPING, work)
        damping = DAMPING * solver.prepare(self.linear).scale
        step, _ = solver.step(self.linear, damping)
        products, right = self.linear.products, -self.linear.gradient()
        rest = products.transposed(products.forward(step)) + damping * step - right
        narrow = self.slope(self.matching, self.candidate).double()
        wide = self.slope(replace(self.matching, view=self.system.view), self.candidate.double())
        return {
            "rest": float(rest.norm() / right.norm()),
            "solve": work.products,
            "gradient": float((narrow - wide).norm() / wide.norm()),
        }


def measure(case: Case, device: str, most: int, budget: float) -> dict[str, Any]:
    """One row: sizes, median seconds of the three steps, quality, peak memory."""
    inner = Inner.of(case, device)
    steps: dict[str, Callable[[], None]] = {name: getattr(inner, name) for name in STEPS}
    for function in steps.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    while len(times["factor"]) < most and sum(map(sum, times.values())) < budget:
        for name, function in steps.items():
            times[name].append(seconds(function))
    view = inner.matching.view
    return {
        "model": case.model.partition(":")[0],
        "size": case.size,
        "batch": case.batch,
        "unknowns": inner.system.unknowns,
        "equations": len(inner.system.target),
        "parameters": sum(tensor.numel() for tensor in view.observed.values()),
        **{name: 1e3 * statistics.median(found) for name, found in times.items()},
        **inner.quality(),
        "rounds": len(times["factor"]),
        **peak_memory(),
    }


def exponent(sizes: Sequence[float], found: Sequence[float]) -> float:
    """The slope of log(found) against log(sizes), by least squares."""
    x, y = [math.log(value) for value in sizes], [math.log(value) for value in found]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rounds, budget = (3, 3.0) if given.quick else (7, 20.0)
    rows: list[dict[str, Any]] = []
    for sweep in sweeps(given.quick, given.device == "cuda"):
        found = [{"sweep": sweep.axis, **measure(case, given.device, rounds, budget)} for case in sweep.cases]
        slopes = {
            name: exponent([row[sweep.axis] for row in found], [row[name] for row in found]) for name in STEPS
        }
        rows += [*found, {"sweep": sweep.axis, "model": "slope", **slopes}]
    show("milliseconds of one inner step against unknowns, parameters and batch size", rows, given.json)


if __name__ == "__main__":
    main()
