"""The last layer and its gradient: what one example, one checkpoint and one scale leave there.

For cross-entropy the gradient of the logits of one example is g = p - onehot(y), with
p = softmax(W f + b), and the last layer's gradients are db = g and dW = g f^T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.models.victim import Victim
from leakaudit.threat import View


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
        weight=exact(params[head.weight]),
        bias=None if head.bias is None else exact(params[head.bias]),
    )


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
    error = epsilon * rms(matrix)
    return int((values > 2 * error * (matrix.shape[0] ** 0.5 + matrix.shape[1] ** 0.5)).sum())


def storage_precision(tensor: Tensor) -> float:
    """The relative precision of the coarsest float type that holds every number of `tensor` unchanged."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float64).eps


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64 on the CPU, detached."""
    return tensor.detach().to("cpu", torch.float64)


def rms(tensor: Tensor) -> float:
    """The root of the mean square of all its numbers, in float64; NaN when it has none."""
    return float(tensor.detach().double().square().mean().sqrt())


def _build(view: View, weight: str | None, bias: str | None, divisor: float, scaled: bool) -> HeadGradient:
    observed = [view.observed[name] for name in (weight, bias) if name is not None]
    return HeadGradient(
        weight=None,
        bias=None,
        weight_gradient=None if weight is None else exact(view.observed[weight]) / divisor,
        bias_gradient=None if bias is None else exact(view.observed[bias]) / divisor,
        scaled=scaled,
        epsilon=max(relative_precision(view, tensor) for tensor in observed),
    )


def relative_precision(view: View, tensor: Tensor) -> float:
    """Relative precision of the numbers of a shared tensor, by their storage and by `view.rounding`."""
    error = view.rounding * float(view.observed.norm()) / view.observed.numel() ** 0.5
    size = rms(tensor)
    return max(storage_precision(tensor), error / size if size > 0 else 0.0)


def _monotone_output_bias(victim: Victim) -> str | None:
    """Name of the last bias (K,) that moves every logit by itself and never downwards, else None."""
    name = next((n for n in reversed(victim.params) if victim.params[n].shape == (victim.num_classes,)), None)
    if name is None:
        return None
    probe = victim.probe()
    with torch.no_grad():
        if victim.logits(victim.params, probe).shape != (len(probe), victim.num_classes):
            return None

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
