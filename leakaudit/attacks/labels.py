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
are made and the one that explains db best is kept; a missing scale is fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment, nnls
from torch import Tensor

from leakaudit.errors import InputError
from leakaudit.models.victim import Victim, cross_entropy_sum
from leakaudit.threat import View

PROBES = 64


@dataclass(frozen=True)
class LabelInference:
    """What the last layer's gradient says about the labels.

    Attributes:
        labels: (N,) int64, ascending.
        counts: (K,) int64, sums to N.
        method: the estimate that was kept.
        explained: share of the observed bias gradient that these counts explain, in [0, 1];
            1 when the sign pattern alone decides (one example).
        exact: the labels are proven: one example with an unbroken sign pattern.
    """

    labels: Tensor
    counts: Tensor
    method: str
    explained: float
    exact: bool


@dataclass(frozen=True)
class HeadConsistency:
    """Does the last layer's gradient come from one example and this checkpoint?

    Attributes:
        factor: the update is `factor` times the gradient of one example; 1 for an unscaled
            gradient, -1 for a flipped sign, S for S tiny local steps.
        residual: |db - factor (p - onehot)| / |db|, >= 0; near 0 only when the checkpoint belongs
            to the update (with two classes it is always 0, and only a `factor` of 1 speaks).
        rank_residual: |dW - db f^T| / |dW|, in [0, 1]; near 0 only for one example (or
            examples with the same features).
        tolerance: what float rounding explains of either residual.
        features: (F,) float64, the input of the last layer.
        label: its class.
        classes: number of classes, K.
    """

    factor: float
    residual: float
    rank_residual: float
    tolerance: float
    features: Tensor
    label: int
    classes: int

    @property
    def single_example(self) -> bool:
        """The gradient of the last layer has rank one, as that of one example has."""
        return self.rank_residual <= self.tolerance

    @property
    def belongs(self) -> bool | None:
        """True or False: the checkpoint belongs to this update or not; None: this test cannot tell."""
        if not self.single_example:
            return None
        if self.classes > 2:
            return self.residual <= self.tolerance
        return True if self.unscaled else None

    @property
    def unscaled(self) -> bool:
        return self.residual <= self.tolerance and abs(self.factor - 1) <= self.tolerance


@dataclass(frozen=True)
class HeadGradient:
    """The last layer and its observed gradient, in float64 on the CPU; what is missing is None.

    Attributes:
        weight (K, F), bias (K,): the checkpoint's.
        weight_gradient (K, F), bias_gradient (K,): as observed, over a divisor.
        scaled: whether the lengths of the gradients mean anything.
        epsilon: relative precision of the numbers observed.
    """

    weight: Tensor | None
    bias: Tensor | None
    weight_gradient: Tensor | None
    bias_gradient: Tensor | None
    scaled: bool
    epsilon: float

    def probabilities(self, features: Tensor) -> Tensor:
        """softmax(W f + b) for features (..., F)."""
        assert self.weight is not None
        return F.linear(features, self.weight, self.bias).softmax(-1)


def head_gradient(view: View, divisor: float = 1.0) -> HeadGradient | None:
    """The last layer of `view.victim` with its observed gradient over `divisor`.

    When the model does not end in a `Linear`, the last layer with a bias that moves each logit
    by itself and upwards (a 1x1 convolution before global pooling, as in SqueezeNet) stands in,
    with its bias gradient only and no scale.  None when neither was shared.
    """
    head = view.victim.classifier()
    if head is None:
        name = _monotone_output_bias(view.victim)
        if name is None or name not in view.observed:
            return None
        return _build(view, None, name, divisor, scaled=False)
    weight = head.weight if head.weight in view.observed else None
    bias = head.bias if head.bias is not None and head.bias in view.observed else None
    if weight is None and bias is None:
        return None
    gradient = _build(view, weight, bias, divisor, scaled=not view.scale_free)
    params = {**view.victim.frozen, **view.victim.params}
    return replace(
        gradient,
        weight=_exact(params[head.weight]),
        bias=None if head.bias is None else _exact(params[head.bias]),
    )


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
    return max(estimates, key=lambda estimate: estimate.explained)


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
            features = _exact(view.victim.features(x))
        scores = gradient.weight_gradient @ torch.linalg.pinv(features, rtol=1e-6)
        inputs, picks = linear_sum_assignment(scores[labels].T.numpy())
        labels = labels[torch.from_numpy(picks[inputs.argsort()])]
    return labels.to(x.device), source


def head_consistency(view: View) -> HeadConsistency | None:
    """Test the hypothesis "one example, one step, this checkpoint" on the last layer.

    The features follow from f = dW^T db / |db|^2 (Phong et al. 2017, in least squares over all
    rows), which no common factor changes; p = softmax(W f + b) then fixes db up to that factor.
    None when the model does not end in a `Linear` with bias, both shared and not all zero.
    """
    head = head_gradient(view)
    if head is None or head.weight_gradient is None or head.bias_gradient is None:
        return None
    weight_gradient, bias_gradient = head.weight_gradient, head.bias_gradient
    length, size = float(bias_gradient.norm()), float(weight_gradient.norm())
    if not length > 0 or not size > 0:
        return None
    features = bias_gradient @ weight_gradient / length**2
    rank_residual = float((weight_gradient - torch.outer(bias_gradient, features)).norm()) / size
    fits = []
    for label in {int(bias_gradient.argmin()), int(bias_gradient.argmax())}:
        expected = head.probabilities(features)
        expected[label] -= 1
        factor = float(bias_gradient @ expected) / max(float(expected.square().sum()), 1e-300)
        fits.append((float((bias_gradient - factor * expected).norm()) / length, -factor, label))
    residual, negative_factor, label = min(fits)
    return HeadConsistency(
        factor=-negative_factor,
        residual=residual,
        rank_residual=rank_residual,
        tolerance=_tolerance(head, abs(negative_factor)),
        features=features,
        label=label,
        classes=len(bias_gradient),
    )


def effective_rank(matrix: Tensor, epsilon: float) -> int:
    """Singular values of (K, F) `matrix` that rounding errors of relative size `epsilon` cannot make.

    Independent errors of rms e have singular values up to e (sqrt K + sqrt F); twice that is the threshold.
    """
    values = torch.linalg.svdvals(matrix.double())
    rms = float(values.square().sum() / matrix.numel()) ** 0.5
    return int((values > 2 * epsilon * rms * (matrix.shape[0] ** 0.5 + matrix.shape[1] ** 0.5)).sum())


def storage_precision(tensor: Tensor) -> float:
    """The relative precision of the coarsest float type that holds every number of `tensor` unchanged."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float64).eps


def nearest_counts(estimate: Tensor, total: int) -> Tensor:
    """The non-negative integers (K,) that sum to `total` and lie nearest to `estimate` in least squares.

    The largest-remainder rule, extended to estimates that are negative or do not sum to `total`.
    """
    counts = estimate.round().clamp(min=0)
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        cost = (counts + step - estimate).square() - (counts - estimate).square()
        cost[counts + step < 0] = math.inf
        counts[int(cost.argmin())] += step
    return counts.long()


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
        return int((rows @ _probe_features(view.victim, generator).mean(0)).argmin())
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
        direction = _probe_features(view.victim, generator).mean(0)
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
    of which most are absent from a batch smaller than the number of classes, are the candidates.
    """
    positive = bias_gradient > 0
    ratios = (bias_gradient[positive] / mean[positive].clamp(min=1e-12)).sort().values
    around = torch.logspace(-1, 1, 81, dtype=torch.float64) * (ratios[0] * ratios[-1]).sqrt()
    grid = torch.cat([ratios.median()[None], ratios, around])

    def distance(scale: Tensor) -> float:
        wanted = count * (mean - bias_gradient / scale)
        return float((nearest_counts(wanted, count) - wanted).norm())

    return float(min(grid, key=distance))


def _mean_probabilities(victim: Victim, generator: torch.Generator) -> dict[str, Tensor]:
    """Mean softmax (K,) over three kinds of random inputs: noise, smooth noise, plain colours."""
    noise = victim.space.sample(PROBES, generator).to(victim.device, victim.dtype)
    size = noise.shape[-2:]
    coarse = F.adaptive_avg_pool2d(noise, (min(4, size[0]), min(4, size[1])))
    smooth = F.interpolate(coarse / coarse.std(), size=size, mode="bilinear", align_corners=False)
    plain = noise[..., :1, :1].expand_as(noise)
    kinds = {"noise": noise, "smooth noise": smooth, "plain colours": plain}
    with torch.no_grad():
        return {
            name: _exact(victim.logits(victim.params, inputs)).softmax(-1).mean(0)
            for name, inputs in kinds.items()
        }


def _probe_features(victim: Victim, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        return _exact(victim.features(victim.space.sample(PROBES, generator).to(victim.device, victim.dtype)))


def _inference(counts: Tensor, method: str, error: Tensor) -> LabelInference:
    return LabelInference(
        labels=torch.arange(len(counts)).repeat_interleave(counts),
        counts=counts,
        method=method,
        explained=max(0.0, 1.0 - float(error)),
        exact=False,
    )


def _divisor(view: View, count: int) -> float:
    """What makes a per-example mean of the observed sum: local steps and, for a summed loss, examples."""
    examples = min(count, view.round.local_batch_size or count)
    return view.round.local_steps * (examples if view.victim.loss_function is cross_entropy_sum else 1)


def _build(view: View, weight: str | None, bias: str | None, divisor: float, scaled: bool) -> HeadGradient:
    observed = [view.observed[name] for name in (weight, bias) if name is not None]
    return HeadGradient(
        weight=None,
        bias=None,
        weight_gradient=None if weight is None else _exact(view.observed[weight]) / divisor,
        bias_gradient=None if bias is None else _exact(view.observed[bias]) / divisor,
        scaled=scaled,
        epsilon=max(_precision(view, tensor) for tensor in observed),
    )


def _precision(view: View, tensor: Tensor) -> float:
    """Relative precision of the numbers of a shared tensor, by their storage and by `view.rounding`."""
    error = view.rounding * float(view.observed.norm()) / view.observed.numel() ** 0.5
    size = float(tensor.double().square().mean().sqrt())
    return max(storage_precision(tensor), error / size if size > 0 else 0.0)


def _monotone_output_bias(victim: Victim) -> str | None:
    """Name of the last bias (K,) that moves every logit by itself and never downwards, else None."""
    name = next((n for n in reversed(victim.params) if victim.params[n].shape == (victim.num_classes,)), None)
    if name is None:
        return None
    probe = victim.space.sample(2, torch.Generator().manual_seed(0)).to(victim.device, victim.dtype)

    def logits(bias: Tensor) -> Tensor:
        return victim.logits({**victim.params, name: bias}, probe).sum(0)

    pull = torch.func.vjp(logits, victim.params[name])[1]
    ones = torch.ones_like(victim.params[name])
    ramp = torch.arange(1, len(ones) + 1, dtype=ones.dtype, device=ones.device)
    slopes, weighted = pull(ones)[0], pull(ramp)[0]
    own = bool((slopes >= 0).all()) and bool((slopes > 0).any())
    return name if own and torch.allclose(weighted, slopes * ramp, rtol=1e-3) else None


def _tolerance(head: HeadGradient, factor: float) -> float:
    """Relative error to expect of p - onehot: the file's, and that of float32 arithmetic on probabilities.

    The latter is absolute, some 1e-6, so it weighs more when the model is already sure of the label.
    """
    assert head.bias_gradient is not None
    largest = float(head.bias_gradient.abs().max()) / max(factor, 1e-300)
    return min(0.1, 2 * head.epsilon + 7e-6 * (8 + 1 / max(largest, 1e-300)))


def _without(values: Tensor, index: int) -> Tensor:
    return torch.cat([values[:index], values[index + 1 :]])


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
