"""Layer by layer from the last layer to the input: the recursive gradient attack.

For cross-entropy the last layer's gradient gives each example's features h and the gradient of
the loss there.  Below, one affine layer z = A a at a time: an activation with a known output has a
known input z and hands the gradient of the loss down to it; then both A a = z and the layer's weight
gradient, sum_n d<delta_n, A a_n> / dA, are linear equations in a.  Where they determine a, a least
squares problem takes the place of the optimisation, down to the picture.

Where they do not (a batch, a ReLU, max-pooling, a residual block), what is known at that cut
replaces the layers above it: the picture is sought that meets it, with the weight gradients of the
layers below, and that is the smoothest among those (`leakaudit.attacks.matching.variation`).

Sources: Zhu and Blaschko 2021 (R-GAP), equations 6 to 10: one example, one layer at a time.
Deviations: the features come from the last layer's gradient in least squares (Phong et al. 2017) or,
for a batch, from separating its examples (`leakaudit.attacks.separation`), where R-GAP takes one
example and the logit's root; errors are carried down and weigh the equations; numbers known only
to lie in an interval (behind an inactive ReLU) are kept as such; and the rest is left to a prior,
where R-GAP stops at rank deficient layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from leakaudit.attacks.base import Monitor, Reconstruction, require_at_least_one, require_falling
from leakaudit.attacks.chain import Link, links, pieces, tensors_of
from leakaudit.attacks.convolution import Convolution, ConvolutionEquations
from leakaudit.attacks.head import head_consistency, head_gradient, relative_precision, rms
from leakaudit.attacks.jacobian import Buckets, Piece, lower_gram, whole
from leakaudit.attacks.labels import infer_labels
from leakaudit.attacks.matching import variation
from leakaudit.attacks.optimise import Objective, continuation, geometric
from leakaudit.attacks.smoothing import RoundCorners
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import cross_entropy_sum
from leakaudit.randomness import fork
from leakaudit.threat import View

WIDEST = 1e-2
"""An interval this narrow, relative to the numbers' size, is an equation."""
CERTAIN = 1e-4
"""Length of the logits' gradient below which float32 probabilities say little."""
SAFETY = 4.0
"""Standard deviations assumed for each unit of rounding."""
ROUND_WEIGHTS = (3e-1, 1e-3)
SHARPNESS = (5.0, 500.0)
"""Prior's weight and sharpness of corners, from the first stage with round corners to the last."""
EXACTLY = 1024
"""Unknowns of which the standard errors are computed; of more, they are estimated."""
SAMPLES = 256
"""For estimates of standard errors."""
CHUNK_NUMBERS = 2**24
"""Numbers of gradients to hold at once."""


@dataclass(frozen=True)
class Cut:
    """What is known of the values that pass one place of the network.

    Attributes:
        low, high: (N, *shape) float64, bounds of each number; infinite where nothing is known.
        gradient: (N, *shape) float64, the gradient of the loss there.
    """

    low: Tensor
    high: Tensor
    gradient: Tensor

    @classmethod
    def around(cls, value: Tensor, error: Tensor | float, gradient: Tensor) -> Cut:
        return cls(value - error, value + error, gradient)

    @property
    def scale(self) -> float:
        """Rms of the known numbers."""
        middle = (self.low + self.high) / 2
        finite = middle[middle.isfinite()]
        return rms(finite) if len(finite) else 1.0


@dataclass(frozen=True)
class Recursive:
    """`recursive`: layer by layer from the last layer's gradient down to the input.

    Attributes:
        unknowns: largest system to solve at once, numbers of the whole batch.
        first, last: weights of the prior where the equations leave directions open, in geometric `stages`.
        rounded: stages with round corners before them, where there are ReLUs or max-pooling.
        iterations: calls of L-BFGS a stage, of 20 inner steps each.
    """

    unknowns: int = 8192
    first: float = 1e-2
    last: float = 1e-8
    stages: int = 5
    rounded: int = 8
    iterations: int = 30
    restarts: int = 1

    def __post_init__(self) -> None:
        require_falling(self.first, self.last)
        require_at_least_one(self, "unknowns", "stages", "rounded", "iterations", "restarts")

    def applies(self, view: View) -> str | None:
        if view.round.local_steps > 1:
            return "more than one local step: the layers' gradients are sums over several models"
        head = head_gradient(view)
        if head is None or head.weight_gradient is None or head.bias_gradient is None or head.weight is None:
            return "the model does not end in a fully connected layer with a bias, both shared"
        if view.round.num_examples > 1 and view.scale_free:
            return "a batch without a known scale cannot be separated"
        try:
            pieces(view.victim)
        except ValueError as error:
            return str(error)
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        """Raises `RuntimeError` when the last layer's gradient does not give the features away."""
        view = view.to(dtype=torch.float64)
        chain = links(view.victim)
        cut, labels, factor = features(view, generator)
        layers = Layers(view, chain, factor, self.unknowns, generator)
        solved = layers.descend(cut)
        details: dict[str, Any] = {
            "links": len(chain),
            "solved": len(chain) - solved.left,
            "error by layer": solved.errors,
        }
        if solved.left == 0:
            candidates = [(solved.cut.low + solved.cut.high) / 2]
        else:
            candidates = self._smoothest(layers, solved, labels, monitor)
        stopped = monitor.stopped
        monitor.forget_best()
        monitor.start(len(candidates))
        for x in candidates:
            monitor.step(view.residual(x, labels), x, labels)
        return monitor.result(stopped=stopped, details=details | {"prior": solved.left > 0})

    def _smoothest(self, layers: Layers, solved: Descent, labels: Tensor, monitor: Monitor) -> list[Tensor]:
        """The smoothest x that meet what is known at the cut, the prior weakened in stages; one a pass."""
        space = layers.view.victim.space
        grey = torch.full((len(labels), *space.shape), 0.5, dtype=torch.float64, device=labels.device)
        start, count = space.encode(grey), self.iterations
        passes = self._passes(layers, solved)
        monitor.expect((count + 1) * sum(map(len, passes)) + len(passes))
        found: list[Tensor] = []
        for stages in passes:
            objectives = [_with_prior(layers.misfit(solved, stage), stage.weight, space) for stage in stages]
            end, _ = continuation(
                start, labels, objectives, monitor, iterations=count, patience=5, history=30
            )
            found.append(end)
            if monitor.stopped == "budget":
                break
        return found

    def _passes(self, layers: Layers, solved: Descent) -> list[list[Stage]]:
        """The stages of each pass.

        Behind a ReLU or max-pooling the weight gradients jump where it switches, so two passes lead to the
        neighbourhood of the solution: one with round corners, sharpened in stages, one with only those
        equations that are continuous in x (the weight gradients right below the cut).
        """
        top, every = layers.names_at_top(solved), layers.names(solved)
        weights = geometric(self.first, self.last, self.stages)
        if not layers.has_corners(solved):
            return [[Stage(every, weight) for weight in weights]]
        pairs = zip(geometric(*ROUND_WEIGHTS, self.rounded), geometric(*SHARPNESS, self.rounded), strict=True)
        rounded = [Stage(every, weight, sharpness) for weight, sharpness in pairs]
        rounded += [Stage(every, weight) for weight in weights[len(weights) // 2 :]]
        continuous = [Stage(top, weight) for weight in weights]
        return [rounded, continuous] if 0 < len(top) < len(every) else [rounded]


@dataclass(frozen=True)
class Stage:
    """One descent: the weight gradients used, the prior's weight, and how sharp corners are; None for as they are."""

    names: list[str]
    weight: float
    sharpness: float | None = None


def _with_prior(misfit: Callable[[Tensor], Tensor], weight: float, space: Pixels) -> Objective:
    # a tensor, so that one compiled graph serves all weights
    strength = torch.tensor(weight, dtype=torch.float64)
    return lambda x, _: misfit(x) + strength.to(x) * variation(space.decode(x))


def features(view: View, generator: torch.Generator) -> tuple[Cut, Tensor, float]:
    """What is known at the classifier layer's input, the labels (N,), and the update's factor.

    The factor is that between the update and the gradient of the loss.
    Raises `RuntimeError` when the gradient of the last layer does not give the features.
    """
    head = head_gradient(view)
    assert head is not None
    assert head.weight is not None
    assert head.weight_gradient is not None
    assert head.bias_gradient is not None
    factor = 1.0
    if view.round.num_examples == 1:
        found, label, factor = _single(view, head.bias_gradient)
        labels = torch.tensor([label])
        logit_gradient = head.bias_gradient[None] / factor
    else:
        inference = infer_labels(view, generator)
        if inference.features is None:
            raise RuntimeError(
                "the last layer's gradient does not tell the examples of the batch apart: "
                "too many, noise, or examples of which the model is certain"
            )
        found, labels = inference.features, inference.labels
        logit_gradient = head.probabilities(found) - F.one_hot(labels, len(head.weight))
        if view.victim.loss_function is not cross_entropy_sum:
            logit_gradient = logit_gradient / view.round.num_examples
    explained = factor * logit_gradient.T @ found
    misfit = rms(explained - head.weight_gradient)
    error = SAFETY * max(head.epsilon * rms(head.weight_gradient), misfit) / abs(factor)
    arithmetic = 4 * SAFETY * head.epsilon * rms(found)  # of a client that computes in the file's precision
    # dW = g^T h, so an error of dW reaches h through the pseudo-inverse of g^T
    spread = torch.linalg.inv(logit_gradient @ logit_gradient.T).diagonal().clamp(min=0).sqrt()
    device = view.victim.device
    bounds = (error * spread).clamp(min=arithmetic)[:, None].to(device)
    cut = Cut.around(found.to(device), bounds, (logit_gradient @ head.weight).to(device))
    return cut, labels.to(device), factor


def _single(view: View, bias_gradient: Tensor) -> tuple[Tensor, int, float]:
    """Features (1, F), label and factor of one example.

    A model that is certain of its example leaves probabilities within rounding of 1, and so nothing to
    check the checkpoint by; the gradient of the logits is what the client computed all the same.
    """
    single = head_consistency(view)
    certain = not view.scale_free and float(bias_gradient.norm()) < CERTAIN
    if single is None or not single.single_example or not (single.belongs or certain):
        raise RuntimeError(
            "the last layer's gradient is not exactly that of one example and this checkpoint: "
            "several examples, noise, or another model"
        )
    if single.belongs:
        return single.features[None], single.label, single.factor
    return single.features[None], int(bias_gradient.argmin()), 1.0


@dataclass(frozen=True)
class Descent:
    """How far the layers could be solved: the links above the cut are done, `left` below it are not."""

    left: int
    cut: Cut
    errors: list[float]


class Layers:
    """The equations of one update, link by link.

    Args:
        factor: the update over the gradient of the loss.
        limit: largest number of unknowns to solve for at once.
        generator: of the buckets in which gradients are added up.
    """

    def __init__(
        self, view: View, chain: list[Link], factor: float, limit: int, generator: torch.Generator
    ) -> None:
        self.view, self._chain, self._limit, self._generator = view, chain, limit, generator
        self._tensors = tensors_of(view.victim)
        self._observed = {name: tensor / factor for name, tensor in view.observed.items()}

    def descend(self, cut: Cut) -> Descent:
        """Solve affine layers and invert activations for as long as the equations determine the values."""
        left, errors = len(self._chain), list[float]()
        while left > 0:
            lower = self.step(left, cut)
            if lower is None:
                break
            if self._chain[left - 1].kind == "affine":
                errors.append(float(f"{rms(lower.high - lower.low) / 2:.2g}"))
            left, cut = self.below(left), lower
        return Descent(left, cut, errors)

    def below(self, left: int) -> int:
        """Links left once the topmost of `left` is solved; affine ones in a row are solved together."""
        first = self._run_below(left)
        return first if first < left else left - 1

    def step(self, left: int, cut: Cut) -> Cut | None:
        """From the cut above link `left` to the one at `below(left)`; None when that is not determined."""
        link, run = self._chain[left - 1], self._chain[self._run_below(left) : left]
        if run:
            return self._solve(run, cut)
        if link.kind == "elementwise":
            return invert(lambda z: link(self._tensors, z), cut)
        return None

    def names(self, solved: Descent) -> list[str]:
        """The shared parameters below the cut."""
        return self._names(self._chain[: solved.left])

    def names_at_top(self, solved: Descent) -> list[str]:
        """Those of the affine layer right below the cut."""
        return self._names(self._chain[self._run_below(solved.left) : solved.left])

    def has_corners(self, solved: Descent) -> bool:
        """Whether a ReLU or max-pooling lies below the cut."""
        corners = RoundCorners(1.0)
        with torch.no_grad(), corners:
            self._run(self._chain[: solved.left], {}, self.view.victim.probe(1))
        return corners.met > 0

    def misfit(self, solved: Descent, stage: Stage) -> Callable[[Tensor], Tensor]:
        """x -> half the squared relative error at the cut and in the stage's weight gradients, a scalar."""
        chain, cut, names = self._chain[: solved.left], solved.cut, stage.names
        size = cut.scale

        def value(x: Tensor) -> Tensor:
            leaves = {name: self._tensors[name].detach().requires_grad_() for name in names}
            corners = nullcontext() if stage.sharpness is None else RoundCorners(stage.sharpness)
            with corners:
                output = self._run(chain, leaves, x)
            outside = F.relu(cut.low - output) + F.relu(output - cut.high)
            total = (outside / size).square().sum()
            if names:
                paired = (output * cut.gradient).sum()
                gradients = torch.autograd.grad(
                    paired, list(leaves.values()), create_graph=x.requires_grad, materialize_grads=True
                )
                for name, gradient in zip(names, gradients, strict=True):
                    wanted = self._observed[name]
                    scale = wanted.square().mean().clamp(min=1e-300)
                    total = total + ((gradient - wanted).square() / scale).sum()
            return total / 2

        return value

    def _run(self, chain: list[Link], leaves: dict[str, Tensor], x: Tensor) -> Tensor:
        tensors = {**self._tensors, **leaves}
        for link in chain:
            x = link(tensors, x)
        return x

    def _names(self, chain: list[Link]) -> list[str]:
        """The shared parameters that the links use."""
        return [name for link in chain for name in link.parameters(self._observed)]

    def _run_below(self, left: int) -> int:
        """The first of the affine links that end at `left`."""
        while left > 0 and self._chain[left - 1].kind == "affine":
            left -= 1
        return left

    def _solve(self, run: list[Link], cut: Cut) -> Cut | None:
        """The input of an affine run by least squares; None when that does not determine it to 1 %."""
        shape, count = run[0].incoming, len(cut.low)
        size = shape.numel()
        names = self._names(run)
        known = (cut.high - cut.low) / 2 < WIDEST * cut.scale
        equations = int(known.sum()) + sum(self._observed[name].numel() for name in names)
        if count * size > self._limit or equations < count * size:
            return None
        systems: Sequence[Equations] = self._convolved(run, cut, known)
        if not systems:
            basis = torch.eye(size, dtype=cut.low.dtype, device=cut.low.device).reshape(size, *shape)
            systems = [*self._forward(run, basis, cut, known), *self._backward(run, names, basis, cut)]
        solution = _least_squares(systems, cut.low.new_zeros(count * size))
        if solution is None:
            return None
        value, error = (numbers.reshape(count, *shape) for numbers in solution)
        if not rms(error) < WIDEST * rms(value):
            return None
        leaf = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self._run(run, {}, leaf), leaf, cut.gradient)
        return Cut.around(value, SAFETY * error, gradient)

    def _convolved(self, run: list[Link], cut: Cut, known: Tensor) -> list[ConvolutionEquations]:
        """The equations of a run that is one convolution; none for another one."""
        convolution = Convolution.of(run[0], self._tensors) if len(run) == 1 else None
        if convolution is None:
            return []
        zero = cut.low.new_zeros(1, *run[0].incoming)
        with torch.no_grad():
            output = (cut.low + cut.high) / 2 - self._run(run, {}, zero)
        weight = torch.where(known, 2 / (cut.high - cut.low).clamp(min=1e-300), 0.0)
        gradient, error = None, math.inf
        if convolution.name in self._observed:
            gradient = self._observed[convolution.name]
            surplus = gradient.numel() / (len(cut.low) * zero.numel())
            # what exceeds the unknowns is not taken to add precision: the gradient handed down has errors too
            error = self._error(convolution.name) * math.sqrt(max(1.0, surplus))
        return [ConvolutionEquations(convolution, output, weight, cut.gradient, gradient, 1 / error)]

    def _forward(self, run: list[Link], basis: Tensor, cut: Cut, known: Tensor) -> list[DenseEquations]:
        """A a = z for the numbers known at the cut, an entry for each example."""
        with torch.no_grad():
            offset = self._run(run, {}, 0 * basis[:1])
            matrix = (self._run(run, {}, basis) - offset).flatten(1).T
        size, found = len(basis), []
        for row, (low, high, use) in enumerate(zip(cut.low, cut.high, known, strict=True)):
            weight = 2 / (high - low).clamp(min=1e-300)[use]
            target = ((low + high) / 2 - offset[0])[use] * weight
            left = matrix[use.flatten()] * weight[:, None]
            found.append(DenseEquations(left, target, slice(row * size, (row + 1) * size)))
        return found

    def _backward(self, run: list[Link], names: list[str], basis: Tensor, cut: Cut) -> list[DenseEquations]:
        """The weight gradients, which are affine in the input: one system for the whole batch.

        Far more of them than unknowns are added up in signed random buckets.
        """
        if not names:
            return []
        pieces = self._pieces(names, 4 * len(basis) * len(cut.low))
        targets = {name: pieces[name](self._observed[name]) for name in names}
        target = torch.cat(list(targets.values()))
        weights = torch.cat([torch.full_like(t, 1 / self._error(name)) for name, t in targets.items()])
        numbers = sum(self._observed[name].numel() for name in names)
        blocks = []
        for delta in cut.gradient:

            def gradients(a: Tensor, delta: Tensor = delta) -> Tensor:
                def paired(leaves: dict[str, Tensor]) -> Tensor:
                    return (self._run(run, leaves, a[None])[0] * delta).sum()

                found = torch.func.grad(paired)({name: self._tensors[name] for name in names})
                return torch.cat([pieces[name](found[name]) for name in names])

            constant = gradients(0 * basis[0])
            target = target - constant
            columns = vmap(gradients, chunk_size=max(1, CHUNK_NUMBERS // numbers))(basis) - constant
            blocks.append(columns.T * weights[:, None])
        return [DenseEquations(torch.cat(blocks, 1), target * weights, slice(None))]

    def _error(self, name: str) -> float:
        """Standard error of a number of this gradient: rounding, and the noise that is known."""
        observed = self.view.observed[name]
        rounding = SAFETY * relative_precision(self.view, observed) * rms(observed)
        return max(math.hypot(rounding, self.view.knowledge.noise_std.value or 0.0), 1e-300)

    def _pieces(self, names: list[str], limit: int) -> dict[str, Piece]:
        """How each gradient becomes equations, about `limit` of them in all."""
        numbers = sum(self._observed[name].numel() for name in names)
        if numbers <= limit:
            return dict.fromkeys(names, whole)
        counts = {name: max(64, limit * self._observed[name].numel() // numbers) for name in names}
        return {
            name: Buckets.of(
                self._observed[name], min(counts[name], self._observed[name].numel()), self._generator
            )
            for name in names
        }


class Equations(Protocol):
    """J a = t, each divided by its standard error, for unknowns a (U,)."""

    def add_to(self, normal: Tensor) -> None:
        """Add J^T J, of which the lower triangle is enough, to (U, U)."""

    def pull(self, value: Tensor) -> Tensor:
        """J^T (t - J a) at a = `value`, (U,) -> (U,)."""


@dataclass(frozen=True)
class DenseEquations:
    """matrix (E, u) @ a[columns] = target (E,)."""

    matrix: Tensor
    target: Tensor
    columns: slice

    def add_to(self, normal: Tensor) -> None:
        normal[self.columns, self.columns] += lower_gram(self.matrix.T)

    def pull(self, value: Tensor) -> Tensor:
        found = torch.zeros_like(value)
        found[self.columns] = self.matrix.T @ (self.target - self.matrix @ value[self.columns])
        return found


def _least_squares(systems: Sequence[Equations], start: Tensor) -> tuple[Tensor, Tensor] | None:
    """The solution (U,), from `start`, and its standard errors (U,) by the equations' own; None when singular."""
    normal = start.new_zeros(len(start), len(start))
    for system in systems:
        system.add_to(normal)
    scale = normal.diagonal().clamp(min=1e-300).rsqrt()
    factor, failed = torch.linalg.cholesky_ex(normal.mul_(scale[:, None]).mul_(scale))
    if int(failed):
        return None
    value = start
    for _ in range(2):  # the second time it refines the first
        rest = torch.stack([system.pull(value) for system in systems]).sum(0)
        value = value + torch.cholesky_solve((rest * scale)[:, None], factor)[:, 0] * scale
    variance = _inverse_diagonal(factor) * scale.square()
    return (value, variance.sqrt()) if bool((variance > 0).all()) else None


def _inverse_diagonal(factor: Tensor) -> Tensor:
    """That of (L L^T)^-1 for the lower triangle L (n, n); for many rows to 9 %.

    L^-T e with independent signs e has the wanted covariance, and `SAMPLES` of them its diagonal.
    """
    if len(factor) <= EXACTLY:
        return torch.cholesky_inverse(factor).diagonal()
    generator = fork(0, "standard errors", factor.device)
    shape = (len(factor), SAMPLES)
    signs = torch.randint(0, 2, shape, generator=generator, device=factor.device).to(factor) * 2 - 1
    return torch.linalg.solve_triangular(factor.T, signs, upper=True).square().mean(1)


def invert(function: Callable[[Tensor], Tensor], cut: Cut, reach: float = 40.0) -> Cut | None:
    """The cut before an elementwise `function`, by bisection; None when it falls anywhere in +-`reach`.

    A bound that the function does not come down or up to becomes infinite.
    """
    grid = torch.linspace(-reach, reach, 8001, dtype=cut.low.dtype, device=cut.low.device)
    values = function(grid)
    if bool((values.diff() < 0).any()):
        return None
    least, most = values[0], values[-1]
    low = _bisect(lambda z: function(z) < cut.low.minimum(most), cut.low, reach)
    high = _bisect(lambda z: function(z) <= cut.high.maximum(least), cut.high, reach)
    low = torch.where(low <= -reach * 0.999, -math.inf, low)
    high = torch.where(high >= reach * 0.999, math.inf, high)
    middle = torch.where(low.isinf(), high - 1, torch.where(high.isinf(), low + 1, (low + high) / 2))
    middle = torch.where(middle.isfinite(), middle, 0.0).requires_grad_()
    (slope,) = torch.autograd.grad(function(middle).sum(), middle)
    return Cut(low, high, cut.gradient * slope)


def _bisect(below: Callable[[Tensor], Tensor], like: Tensor, reach: float) -> Tensor:
    """Where a monotone test changes from true to false within +-`reach`."""
    left, right = torch.full_like(like, -reach), torch.full_like(like, reach)
    for _ in range(60):
        middle = (left + right) / 2
        true = below(middle)
        left, right = torch.where(true, middle, left), torch.where(true, right, middle)
    return (left + right) / 2
