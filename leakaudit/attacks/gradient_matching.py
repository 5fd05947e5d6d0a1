"""First-order gradient matching: find the input whose simulated update looks like the observed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from leakaudit.attacks.adam import Rule
from leakaudit.attacks.base import (
    Monitor,
    Reconstruction,
    require_at_least_one,
    require_falling,
    require_positive,
)
from leakaudit.attacks.disturbance import errors_of
from leakaudit.attacks.labels import infer_labels, likely_labels
from leakaudit.attacks.matching import cosine, total_variation, variation
from leakaudit.attacks.optimise import Candidate, Matching, Objective, adam, continuation, geometric, lbfgs
from leakaudit.attacks.racing import Field, Race, bytes_of
from leakaudit.rounds import client_update
from leakaudit.threat import View
from leakaudit.update import Update


def assumed_labels(view: View, generator: torch.Generator) -> Tensor:
    """The labels the adversary goes by, (N,) int64: known, or inferred from the last layer's gradients.

    Of mixtures, (N, K) probabilities to begin with: even among the classes that may be in them.
    Where a known defense leaves several labels in question for one example, each is tried (`most_fitting`).
    """
    if view.soft is not None:
        even = (view.soft / view.soft.sum()).to(view.victim.device, view.victim.dtype)
        return even.expand(view.round.num_examples, -1)
    if view.knowledge.labels.value is not None:
        return torch.as_tensor(view.knowledge.labels.value, device=view.victim.device)
    disturbed = bool(errors_of(view)) or view.client is not client_update
    if disturbed and view.round.num_examples == 1 and view.round.local_steps == 1:
        likely = likely_labels(view, CANDIDATES)
        if likely:
            return most_fitting(view, likely, generator)
    return infer_labels(view, generator).labels.to(view.victim.device)


def most_fitting(view: View, labels: list[int], generator: torch.Generator) -> Tensor:
    """The one of several labels for one example, (1,) int64, with which the update is matched best.

    Each gets `TRIAL` calls of L-BFGS with a little of the prior, from the same start.
    """
    options = [torch.tensor([label], device=view.victim.device) for label in labels]
    if len(options) == 1:
        return options[0]
    objective = WithVariation(Matching(view, "relative"), TRIAL_PRIOR)
    start = view.victim.space.sample(1, generator, view.victim.dtype)
    losses = []
    for label in options:
        monitor = Monitor()
        lbfgs(Candidate(start, labels=label), objective, monitor, iterations=TRIAL)
        losses.append(monitor.best_loss)
    return options[min(range(len(options)), key=losses.__getitem__)]


CANDIDATES = 10
TRIAL = 4
TRIAL_PRIOR = 1e-2


@dataclass(frozen=True)
class DeepLeakage:
    """L-BFGS on the squared distance.

    Attributes:
        labels: "joint" finds soft labels with the image (DLG); "inferred" takes them
            from the last layer first (iDLG).
        iterations: calls of L-BFGS, of 20 inner steps each.
        line_search: strong Wolfe; the authors' code steps blindly and often diverges.
        target: stop at this relative residual.
        patience: stop after this many iterations without a gain of 1 %.
    """

    labels: Literal["joint", "inferred"] = "joint"
    iterations: int = 300
    learning_rate: float = 1.0
    line_search: bool = True
    target: float = 1e-4
    patience: int = 15
    restarts: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "iterations", "learning_rate", "patience", "restarts")

    def applies(self, view: View) -> str | None:
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        count, dtype = view.round.num_examples, view.victim.dtype
        x = view.victim.space.sample(count, generator, dtype)
        if self.labels == "joint":
            shape = (count, view.victim.num_classes)
            logits = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
            candidate = Candidate(x, logits=logits)
        else:
            candidate = Candidate.starting(x, assumed_labels(view, generator))
        lbfgs(
            candidate,
            Matching(view, "squared"),
            monitor,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            line_search=self.line_search,
            target=float(view.observed.norm().square()) * self.target**2,
            patience=self.patience,
        )
        return monitor.result()


@dataclass(frozen=True)
class InvertingGradients:
    """Adam on the signed gradient of cosine distance plus total variation, inside the pixel box.

    Attributes:
        tv: weight of the total variation; None lets the matching loss choose among `TV_WEIGHTS`:
            each gets `tuning` iterations from the same start, and the smallest cosine distance,
            counted without the prior, wins.  No truth is involved.
        starts: random starts raced against each other (`leakaudit.attacks.racing`): all begin, the half with the
            smaller loss goes on, again and again, until the best one is left.  16 cost about three descents, less
            where they share a batch.  `restarts`, in contrast, come one after another, each to its end.
        statistics: weight of the BatchNorm statistics, used only when the adversary knows them.
        learning_rate: in model-input units.
    """

    iterations: int = 4800
    learning_rate: float = 0.1
    tv: float | None = 1e-4
    tuning: int = 200
    statistics: float = 1e-2
    signed: bool = True
    patience: int | None = None
    restarts: int = 1
    starts: int = 1

    def __post_init__(self) -> None:
        require_at_least_one(self, "starts")

    def applies(self, view: View) -> str | None:
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        labels = assumed_labels(view, generator)
        count, dtype = view.round.num_examples, view.victim.dtype
        starts = torch.stack([view.victim.space.sample(count, generator, dtype) for _ in range(self.starts)])
        if self.tv is not None:
            objective = Matching(view, "cosine", tv=self.tv, statistics=self.statistics)
            return monitor.result(details=self._descend(view, objective, starts, labels, monitor))
        distances = self._distances(view, starts[0], labels, monitor.rehearsal())
        best = min(distances, key=lambda tv: distances[tv])
        weight = torch.tensor(best, dtype=dtype, device=starts.device)
        weighted = _with_total_variation(Matching(view, "cosine", statistics=self.statistics))
        details = self._descend(view, lambda x, y: weighted(x, y, weight), starts, labels, monitor)
        tried = {str(tv): distance for tv, distance in distances.items()}
        return monitor.result(details={"tv": best, "cosine distance by tv": tried, **details})

    def _descend(
        self, view: View, objective: Objective, starts: Tensor, labels: Tensor, monitor: Monitor
    ) -> dict[str, Any]:
        """To the end from the only start, or from the best; what there is to say of that."""
        if len(starts) == 1:
            adam(
                Candidate.starting(starts[0], labels),
                objective,
                monitor,
                iterations=self.iterations,
                learning_rate=self.learning_rate,
                signed=self.signed,
                project=view.victim.space.project,
                patience=self.patience,
            )
            return {}
        race = self._race(view, self.iterations, survivors=1)
        winner = race.run(Field.starting(starts, labels), objective, monitor)
        return {"starts": len(starts), "start kept": int(winner.numbers[0]) + 1}

    def _distances(self, view: View, start: Tensor, labels: Tensor, trial: Monitor) -> dict[float, float]:
        """Weight of the prior -> cosine distance after `tuning` iterations from `start`, all at once."""
        weights = torch.tensor(TV_WEIGHTS, dtype=start.dtype, device=start.device)
        same = start.expand(len(weights), *start.shape).contiguous()
        race = self._race(view, self.tuning, survivors=len(weights))
        objective = _with_total_variation(Matching(view, "cosine", statistics=self.statistics))
        found = race.run(Field.starting(same, labels, [weights]), objective, trial)
        with torch.no_grad():
            return {
                tv: float(cosine(view.simulate(x, y), view.observed))
                for tv, x, y in zip(TV_WEIGHTS, found.x, found.y, strict=True)
            }

    def _race(self, view: View, iterations: int, survivors: int) -> Race:
        return Race(
            iterations,
            self.learning_rate,
            Rule(self.signed, view.victim.space.project),
            bytes_of(view),
            patience=self.patience if survivors == 1 else None,  # different losses share no plateau
            survivors=survivors,
        )


def _with_total_variation(matching: Matching) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, y, weight) -> the matching loss with the total variation at this weight, a scalar tensor."""
    return lambda x, y, weight: matching(x, y) + weight * total_variation(x)


TV_WEIGHTS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class TotalVariationPath:
    """L-BFGS on the layer-wise relative distance plus `variation`, the prior weakened in stages.

    For batches that share their update with other inputs: the prior is strong while the picture forms
    and only chooses among the inputs that remain at the end (a continuation method, cf. Hale, Yin,
    Zhang 2008).  Each stage starts where the one before it ended.

    Where the noise in the update is known, the distance is that of maximum likelihood and the prior ends
    at the weight a photograph gives it (`PHOTOGRAPHIC`), which makes this the maximum a posteriori
    attack: the stronger the noise, the more the prior decides.  While the update is still explained
    worse than the noise explains (the discrepancy principle, Morozov 1966), up to `STAGES_BEYOND` more
    stages weaken the prior further.

    Attributes:
        first, last: weights of the prior's mean over pixels, > 0, in geometric steps; known noise
            replaces `last`.
        stages: number of weights.
        iterations: calls of L-BFGS a stage, of 20 inner steps each.
    """

    first: float = 1e-1
    last: float = 1e-6
    stages: int = 5
    iterations: int = 40
    restarts: int = 1

    def __post_init__(self) -> None:
        require_falling(self.first, self.last)
        require_at_least_one(self, "stages", "iterations", "restarts")

    def applies(self, view: View) -> str | None:
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        y = assumed_labels(view, generator)
        x = view.victim.space.sample(view.round.num_examples, generator, view.victim.dtype)
        distance = Matching(view, "relative")
        beyond = STAGES_BEYOND if distance.comparison.factors else 0
        monitor.expect((self.stages + beyond) * (self.iterations + 1))
        weights = geometric(self.first, min(self.first, self._last(distance)), self.stages)
        x, y = self._stages(distance, x, y, weights, monitor)
        used = weights[-1]
        for _ in range(beyond):
            if monitor.stopped == "budget" or _explained(distance, x, y):
                break
            used /= WEAKER
            x, y = self._stages(distance, x, y, [used], monitor)
        return monitor.result(details={"prior": used})

    def _last(self, distance: Matching) -> float:
        """The weight to end with."""
        view, errors = distance.view, errors_of(distance.view)
        if not distance.comparison.factors:
            return self.last
        likelihood = sum(float((g / errors[name]).square().sum()) for name, g in view.observed.items()) / 2
        return PHOTOGRAPHIC * _pixels(view) / likelihood

    def _stages(
        self, distance: Matching, x: Tensor, y: Tensor, weights: list[float], monitor: Monitor
    ) -> tuple[Tensor, Tensor]:
        objectives = [WithVariation(distance, weight) for weight in weights]
        patience = self.iterations // 2
        return continuation(x, y, objectives, monitor, iterations=self.iterations, patience=patience)


PHOTOGRAPHIC = 3.0
"""Nats of prior for each unit of `variation`.

A density exp(-b V) with V homogeneous of degree q in n numbers has E V = n / (q b); the mean of `variation`
over CIFAR-10 training images, 0.36 a pixel of three numbers at q = 0.8, thus gives b = 10.  Maximum a
posteriori pictures of such sparse priors are flatter than photographs; on the first training images a
third of it was better at every noise tried, from 0.1 % to 100 % of the update's rms.
"""
STAGES_BEYOND = 3
WEAKER = 3.0


def _pixels(view: View) -> float:
    """Over all examples."""
    return view.unknowns / view.victim.space.shape[0]


@dataclass(frozen=True)
class WithVariation:
    """A distance plus `weight` times the mean of `variation` over pixels."""

    distance: Matching
    weight: float

    @property
    def view(self) -> View:
        return self.distance.view

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.distance(x, y) + self._variation(x)

    def client_input(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.distance.client_input(x, y)

    def of_update(self, simulated: Update) -> Tensor:
        return self.distance.of_update(simulated)

    def prior(self, x: Tensor, y: Tensor) -> Tensor:
        own = self.distance.prior(x, y)
        return self._variation(x) if own is None else own + self._variation(x)

    @cached_property
    def _strength(self) -> Tensor:
        """Of the prior's sum, as a tensor, so that one compiled graph serves all weights."""
        victim = self.view.victim
        return torch.tensor(self.weight / _pixels(self.view), dtype=victim.dtype, device=victim.device)

    def _variation(self, x: Tensor) -> Tensor:
        return self._strength * variation(self.view.victim.space.decode(x))


def _explained(distance: Matching, x: Tensor, y: Tensor) -> bool:
    """Whether the update is matched up to noise: chi-square within a standard deviation of its mean."""
    view, errors = distance.view, errors_of(distance.view)
    with torch.no_grad():
        simulated = distance.comparison.sized(view.simulate(x, y))
    departure = simulated - view.observed
    chi_square = sum(float((g.double() / errors[name]).square().sum()) for name, g in departure.items())
    numbers = view.observed.numel()
    return bool(chi_square <= numbers + (2 * numbers) ** 0.5)


# Zhu, Liu, Han 2019, "Deep Leakage from Gradients", algorithm 1.  Deviations: a strong Wolfe line
# search, a stop at the float32 floor, and a restart; line_search=false,patience=300 gives the paper's.
DLG = DeepLeakage()

# Zhao, Mopuri, Bilen 2020, "iDLG: Improved Deep Leakage from Gradients".  For batches the labels
# come from the bias-corrected counts of `leakaudit.attacks.labels`.
IDLG = DeepLeakage(labels="inferred")

# Geiping, Bauermeister, Droege, Moeller 2020, "Inverting Gradients", section 5 and its code:
# learning rate 0.1, 4,800 iterations, decay by 0.1 at 3/8, 5/8 and 7/8, box projection, tv 1e-4.
# Deviation: one start by default (the paper's trained networks use 16 for some figures).
INVERTING_GRADIENTS = InvertingGradients()

# Ours: the same with the weight of the prior chosen by the matching loss, which on ReLU networks
# gains several dB over any fixed weight (docs/results.md).
TUNED_INVERTING_GRADIENTS = InvertingGradients(tv=None, iterations=2400)

# Ours, for batches of smooth networks (docs/levenberg-marquardt.md says why they need a prior).
TV_PATH = TotalVariationPath()
