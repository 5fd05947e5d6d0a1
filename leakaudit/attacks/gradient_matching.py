"""First-order gradient matching: find the input whose simulated update looks like the observed one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leakaudit.attacks.base import (
    Monitor,
    Reconstruction,
    require_at_least_one,
    require_falling,
    require_positive,
)
from leakaudit.attacks.labels import infer_labels
from leakaudit.attacks.matching import cosine, variation
from leakaudit.attacks.optimise import Candidate, Matching, Objective, adam, continuation, geometric, lbfgs
from leakaudit.threat import View


def assumed_labels(view: View, generator: torch.Generator) -> Tensor:
    """The labels the adversary goes by: known, or inferred from the last layer's gradients; (N,) int64."""
    if view.knowledge.labels.value is not None:
        return torch.as_tensor(view.knowledge.labels.value, device=view.victim.device)
    return infer_labels(view, generator).labels.to(view.victim.device)


def needs_scale(view: View) -> str | None:
    """Why a distance that depends on length cannot be used, or None."""
    if view.scale_free:
        return "the update has no known scale (its learning rate is unknown); this attack compares lengths"
    return None


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
        return needs_scale(view)

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        count, dtype = view.round.num_examples, view.victim.dtype
        x = view.victim.space.sample(count, generator, dtype)
        if self.labels == "joint":
            shape = (count, view.victim.num_classes)
            logits = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
            candidate = Candidate(x, logits=logits)
        else:
            candidate = Candidate(x, labels=assumed_labels(view, generator))
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

    def applies(self, view: View) -> str | None:
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        labels = assumed_labels(view, generator)
        start = view.victim.space.sample(view.round.num_examples, generator, view.victim.dtype)
        if self.tv is not None:
            self._descend(view, start, labels, self.tv, self.iterations, monitor)
            return monitor.result()
        distances = {}
        for tv in TV_WEIGHTS:
            trial = monitor.rehearsal()
            self._descend(view, start, labels, tv, self.tuning, trial)
            found = trial.result()
            with torch.no_grad():
                distances[tv] = float(cosine(view.simulate(found.x, found.y), view.observed))
            if trial.stopped == "budget":
                break
        best = min(distances, key=lambda tv: distances[tv])
        self._descend(view, start, labels, best, self.iterations, monitor)
        return monitor.result(
            details={"tv": best, "cosine distance by tv": {str(k): v for k, v in distances.items()}}
        )

    def _descend(
        self, view: View, start: Tensor, labels: Tensor, tv: float, iterations: int, monitor: Monitor
    ) -> None:
        adam(
            Candidate(start, labels=labels),
            Matching(view, "cosine", tv=tv, statistics=self.statistics),
            monitor,
            iterations=iterations,
            learning_rate=self.learning_rate,
            signed=self.signed,
            project=view.victim.space.project,
            patience=self.patience,
        )


TV_WEIGHTS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class TotalVariationPath:
    """L-BFGS on the layer-wise relative distance plus `variation`, the prior weakened in stages.

    For batches that share their update with other inputs: the prior is strong while the picture forms
    and only chooses among the inputs that remain at the end (a continuation method, cf. Hale, Yin,
    Zhang 2008).  Each stage starts where the one before it ended.

    Attributes:
        first, last: weights of the prior's mean over pixels, > 0, in geometric steps.
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
        return needs_scale(view)

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        labels = assumed_labels(view, generator)
        x = view.victim.space.sample(view.round.num_examples, generator, view.victim.dtype)
        objectives = [_with_prior(view, weight) for weight in geometric(self.first, self.last, self.stages)]
        monitor.expect(self.stages * (self.iterations + 1))
        patience = self.iterations // 2
        continuation(x, labels, objectives, monitor, iterations=self.iterations, patience=patience)
        return monitor.result()


def _with_prior(view: View, weight: float) -> Objective:
    distance, space = Matching(view, "relative"), view.victim.space
    pixels = view.unknowns / space.shape[0]
    return lambda x, y: distance(x, y) + weight * variation(space.decode(x)) / pixels


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
