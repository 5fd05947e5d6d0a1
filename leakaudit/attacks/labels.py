"""Labels from the gradient of the last layer, without optimising the inputs.

For cross-entropy the gradient of the logits of one example is g = p - onehot(y),
with p = softmax(W f + b); hence, over N examples (mean reduction),

    db = 1/N sum_i g_i            dW = 1/N sum_i g_i f_i^T.

Sources:
    Zhao, Mopuri, Bilen 2020 (iDLG), equations 3 to 5: one example; g is negative at its label only.
    Geng et al. 2021 and Wainakh et al. 2022 (LLG+): counts of a batch, n = N (mean p - db), with
        mean p estimated on random inputs.
    Ma et al. 2023 (iLRG), equations 7 to 12: features of a class dW_c / db_c, their softmax, and
        a linear system for the counts.
Deviations: counts are non-negative and sum to N (the nearest such integers); several estimates
are made and the one that explains db best is kept; a missing scale is fitted; where the batch is
smaller than the number of classes, `leakaudit.attacks.separation` corrects and proves the labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment, nnls
from torch import Tensor

from leakaudit.attacks.disturbance import errors_of
from leakaudit.attacks.head import HeadGradient, exact, head_gradient
from leakaudit.attacks.separation import Separation, separate
from leakaudit.errors import InputError
from leakaudit.models.victim import Victim, cross_entropy_sum
from leakaudit.threat import View

PROBES = 12
DOUBT = 4.0


@dataclass(frozen=True)
class LabelInference:
    """What the last layer's gradient says about the labels.

    Attributes:
        labels: (N,) int64, ascending.
        counts: (K,) int64, sums to N.
        method: the estimate that was kept.
        explained: share of the observed bias gradient that these counts explain, in [0, 1];
            1 when the sign pattern alone decides (one example).
        exact: the labels are proven: one example with an unbroken sign pattern, or a batch whose
            last-layer gradient follows from them to rounding.
        features: (N, F) float64, the last layer's input of every example in the order of `labels`,
            when they are exact; else None.
    """

    labels: Tensor
    counts: Tensor
    method: str
    explained: float
    exact: bool
    features: Tensor | None = None


def infer_labels(view: View, generator: torch.Generator, num_examples: int | None = None) -> LabelInference:
    """The labels behind an update.

    Args:
        generator: of the random inputs on which mean probabilities are estimated.
        num_examples: N; `view.round.num_examples` when None.

    Raises `InputError` when no layer next to the logits was shared.
    """
    count = view.round.num_examples if num_examples is None else num_examples
    head = head_gradient(view, _divisor(view, count))
    if head is None:
        raise InputError("labels cannot be inferred: the update holds no layer next to the class scores")
    if count == 1:
        return _single(view, head, generator)
    estimates = _estimates(view, head, count, generator)
    best = max(estimates, key=lambda estimate: estimate.explained)
    if not head.scaled or view.round.local_steps > 1 or head.bias_gradient is None:
        return best
    found = separate(
        head, [estimate.labels for estimate in estimates], probe_features(view, generator), generator
    )
    return best if found is None or not found.proven else _separated(found, best)


def likely_labels(view: View, most: int) -> list[int]:
    """The labels that the one example behind a disturbed update may have, likeliest first, `most` at most.

    The bias gradient p - onehot(y) is least at y.  All classes are in question whose number there is
    not above the least by more than `DOUBT` standard deviations of the difference of two, or not above
    half of it where the size of the errors is unknown.  [] when no bias next to the logits was shared.
    """
    head = head_gradient(view)
    if head is None or head.bias_gradient is None or view.victim.classifier() is None:
        return []
    values, errors = head.bias_gradient, errors_of(view)
    classifier = view.victim.classifier()
    assert classifier is not None
    error = errors.get(classifier.bias or "", 0.0)
    least = float(values.min())
    reach = DOUBT * math.sqrt(2) * error if error else max(-least / 2, 0.0)
    order = values.argsort(stable=True)
    return [int(label) for label in order if float(values[label]) <= least + reach][:most]


def match_labels(view: View, x: Tensor, generator: torch.Generator) -> tuple[Tensor, str]:
    """Labels (N,) for the inputs x (N, C, H, W), on their device, and where they come from.

    Known labels are taken, others inferred.  Which label belongs to which input follows from
    dW = 1/N sum_i (p_i - onehot(y_i)) f_i^T: with the features f_i of x, -dW pinv(f) is positive
    at (y_i, i) only; the best one-to-one assignment of the labels to the inputs is kept.
    """
    if view.knowledge.labels.value is not None:
        labels, source = view.knowledge.labels.value.cpu(), "known"
    else:
        inference = infer_labels(view, generator, len(x))
        labels, source = inference.labels, f"inferred: {inference.method}"
    gradient = head_gradient(view)
    if len(x) > 1 and gradient is not None and gradient.weight_gradient is not None:
        with torch.no_grad():
            features = exact(view.victim.features(x))
        scores = gradient.weight_gradient @ torch.linalg.pinv(features, rtol=1e-6)
        inputs, picks = linear_sum_assignment(scores[labels].T.numpy())
        labels = labels[torch.from_numpy(picks[inputs.argsort()])]
    return labels.to(x.device), source


def nearest_counts(estimate: Tensor, total: int) -> Tensor:
    """The non-negative integers (K,) that sum to `total` and lie nearest to `estimate` in least squares.

    The largest-remainder rule, extended to estimates that are negative or do not sum to `total`.  From far away it
    starts at the nearest real numbers rounded down, below which the nearest integers never lie.
    """
    counts = estimate.round().clamp(min=0)
    if abs(total - int(counts.sum())) > len(counts):
        estimate = estimate.double()
        counts = _on_simplex(estimate, total).floor()
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        cost = (counts + step - estimate).square() - (counts - estimate).square()
        cost[counts + step < 0] = math.inf
        counts[int(cost.argmin())] += step
    return counts.long()


def _on_simplex(values: Tensor, total: int) -> Tensor:
    """The nearest numbers (K,) >= 0 that sum to `total` (Held, Wolfe and Crowder 1974)."""
    ordered = values.sort(descending=True).values
    excess = (ordered.cumsum(0) - total) / torch.arange(1, len(values) + 1, device=values.device)
    return (values - excess[ordered > excess][-1]).clamp(min=0)


def _single(view: View, head: HeadGradient, generator: torch.Generator) -> LabelInference:
    if head.bias_gradient is not None:
        values = head.bias_gradient
        label, method = int(values.argmin()), "sign of the bias gradient"
        others = _without(values, label)
        unbroken = float(values[label]) < 0 and bool((others >= 0).all()) and bool((others > 0).any())
    else:
        assert head.weight_gradient is not None
        rows = head.weight_gradient
        label = _label_row(view, rows, generator)
        method = "sign of the rows of the weight gradient"
        products = rows @ rows[label]
        opposed = bool((_without(products, label) <= 0).all()) and bool(products[label] > 0)
        unbroken = opposed and len(rows) > 2
    classes = view.victim.num_classes
    labels = torch.tensor([label])
    return LabelInference(
        labels=labels,
        counts=labels.bincount(minlength=classes),
        method=method,
        explained=1.0 if unbroken else 0.0,
        exact=unbroken,
    )


def _label_row(view: View, rows: Tensor, generator: torch.Generator) -> int:
    """The row that points against all others; with two classes, against the features of random inputs."""
    if len(rows) == 2:
        return int((rows @ probe_features(view, generator).mean(0)).argmin())
    products = rows @ rows.T
    return int((products.sum(1) - 2 * products.diagonal()).argmin())


def _estimates(
    view: View, head: HeadGradient, count: int, generator: torch.Generator
) -> list[LabelInference]:
    """Every estimate of the counts of a batch, each with its share of db explained."""
    bias_gradient = head.bias_gradient
    note = ""
    if bias_gradient is None:
        assert head.weight_gradient is not None
        direction = probe_features(view, generator).mean(0)
        bias_gradient = head.weight_gradient @ direction / direction.square().sum()
        note = ", no bias: features of random inputs stand in"
    if not float(bias_gradient.norm()) > 0:
        raise InputError("labels cannot be inferred: the gradient of the last layer is zero")
    found = []
    for name, mean in _mean_probabilities(view.victim, generator).items():
        scale = 1.0 if head.scaled else _fit_scale(bias_gradient, mean, count)
        fractions = mean - bias_gradient / scale
        counts = nearest_counts(count * fractions, count)
        error = (mean - counts / count - bias_gradient / scale).norm() / (bias_gradient / scale).norm()
        found.append(_inference(counts, f"mean probabilities of {name}{note}", error))
        if head.weight_gradient is not None:
            found += _by_class_features(head, bias_gradient / scale, scale, mean, count, note)
    return found


def _by_class_features(
    head: HeadGradient, bias_gradient: Tensor, scale: float, mean: Tensor, count: int, note: str
) -> list[LabelInference]:
    """iLRG: the features of each class give its probabilities; a linear system gives the counts."""
    assert head.weight_gradient is not None
    classes = len(bias_gradient)
    usable = bias_gradient.abs() > 1e-6 * bias_gradient.abs().max()
    divisor = torch.where(usable, bias_gradient * scale, 1.0)
    probabilities = head.probabilities(head.weight_gradient / divisor[:, None])
    probabilities = torch.where(usable[:, None], probabilities, mean)
    system = probabilities.T - torch.eye(classes, dtype=torch.float64)
    estimate = _solve_counts(system, bias_gradient, count)
    counts = nearest_counts(estimate, count)
    error = (system @ counts.double() / count - bias_gradient).norm() / bias_gradient.norm()
    return [_inference(counts, f"class features{note}", error)]


def _solve_counts(system: Tensor, bias_gradient: Tensor, count: int) -> Tensor:
    """Non-negative least squares: system n = N db, with sum n = N as one more, heavy equation."""
    weight = 10.0
    left = torch.cat([system, torch.full((1, system.shape[1]), weight, dtype=torch.float64)])
    right = torch.cat([bias_gradient * count, torch.tensor([weight * count], dtype=torch.float64)])
    solution, _ = nnls(left.numpy(), right.numpy(), maxiter=30 * system.shape[1])
    return torch.from_numpy(np.asarray(solution))


def _fit_scale(bias_gradient: Tensor, mean: Tensor, count: int) -> float:
    """The factor s for which N (mean p - db / s) lies nearest to integers >= 0.

    Classes without an example have db = s p, so the ratios db / p of the classes with db > 0,
    of which most are absent from a batch smaller than the number of classes, are the candidates.  Where pruning
    left none of these, the sizes of all others must do.
    """
    sizes = bias_gradient if bool((bias_gradient > 0).any()) else -bias_gradient
    positive = sizes > 0
    ratios = (sizes[positive] / mean[positive].clamp(min=1e-12)).sort().values
    around = torch.logspace(-1, 1, 81, dtype=torch.float64) * (ratios[0] * ratios[-1]).sqrt()
    grid = torch.cat([ratios.median()[None], ratios, around])

    def distance(scale: Tensor) -> float:
        wanted = count * (mean - bias_gradient / scale)
        return float((nearest_counts(wanted, count) - wanted).norm())

    return float(min(grid, key=distance))


def _mean_probabilities(victim: Victim, generator: torch.Generator) -> dict[str, Tensor]:
    """Mean softmax (K,) over each kind of random inputs: noise, smooth noise, plain colours; or random tokens."""
    with torch.no_grad():
        return {
            name: exact(victim.logits(victim.params, inputs)).softmax(-1).mean(0)
            for name, inputs in _random_kinds(victim.sample(PROBES, generator)).items()
        }


def _random_kinds(noise: Tensor) -> dict[str, Tensor]:
    if not noise.is_floating_point():
        return {"random tokens": noise}
    size = noise.shape[-2:]
    coarse = F.adaptive_avg_pool2d(noise, (min(4, size[0]), min(4, size[1])))
    smooth = F.interpolate(coarse / coarse.std(), size=size, mode="bilinear", align_corners=False)
    plain = noise[..., :1, :1].expand_as(noise)
    return {"noise": noise, "smooth noise": smooth, "plain colours": plain}


def probe_features(view: View, generator: torch.Generator) -> Tensor:
    """Inputs of the last layer for random model inputs, (PROBES, F) float64."""
    victim = view.victim
    with torch.no_grad():
        return exact(victim.features(victim.sample(PROBES, generator)))


def _separated(found: Separation, estimate: LabelInference) -> LabelInference:
    """Proven labels; for examples that are hidden, because the model is certain of them, the estimate's."""
    classes, total = len(estimate.counts), len(estimate.labels)
    counts = found.labels.bincount(minlength=classes)
    hidden = total - len(found.labels)
    if hidden:
        counts = counts + nearest_counts((estimate.counts - counts).double(), hidden)
    return LabelInference(
        labels=torch.arange(classes).repeat_interleave(counts),
        counts=counts,
        method="separation of the examples"
        + (f"; {hidden} of {total} left no trace and were guessed" if hidden else ""),
        explained=1.0 - found.residual,
        exact=not hidden,
        features=None if hidden else found.features,
    )


def _inference(counts: Tensor, method: str, error: Tensor) -> LabelInference:
    return LabelInference(
        labels=torch.arange(len(counts)).repeat_interleave(counts),
        counts=counts,
        method=method,
        explained=max(0.0, 1.0 - float(error)),
        exact=False,
    )


def _divisor(view: View, count: int) -> float:
    """What makes a per-example mean of the observed sum: local steps, the clients' weights and,
    for a summed loss, a client's examples."""
    own = max(1, count // view.round.clients)
    examples = min(own, view.round.local_batch_size or own)
    weight = sum(view.round.each_weight())
    steps = view.round.local_steps * (weight if weight > 0 else 1.0)
    return steps * (examples if view.victim.loss_function is cross_entropy_sum else 1)


def _without(values: Tensor, index: int) -> Tensor:
    return torch.cat([values[:index], values[index + 1 :]])
