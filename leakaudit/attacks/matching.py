"""Distances between a simulated and the observed update, and priors on images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from leakaudit.update import Update

Distance = Callable[[Update, Update], Tensor]


def squared(simulated: Update, observed: Update) -> Tensor:
    """sum |g - g*|^2 over all numbers, a scalar (Zhu et al. 2019, equation 4)."""
    return torch.stack([(g - observed[name]).square().sum() for name, g in simulated.items()]).sum()


def relative(simulated: Update, observed: Update) -> Tensor:
    """Mean over tensors of |g - g*|^2 / |g*|^2, so that every layer counts alike; a scalar."""
    terms = [
        (g - observed[name]).square().sum() / observed[name].square().sum().clamp_min(1e-30)
        for name, g in simulated.items()
    ]
    return torch.stack(terms).mean()


def cosine(simulated: Update, observed: Update) -> Tensor:
    """1 - cos(g, g*) over all numbers taken as one vector, in [0, 2] (Geiping et al. 2020, equation 4).

    Both are first divided by their largest number: a confident model's gradients are so small that
    their squares would underflow, and a descent would exploit it.
    """
    simulated, observed = _unit_size(simulated), _unit_size(observed)
    return 1 - simulated.dot(observed) / (simulated.norm() * observed.norm())


def _unit_size(update: Update) -> Update:
    largest = torch.stack([tensor.detach().abs().max() for tensor in update.values()]).max()
    return update.map(lambda tensor: tensor / largest)


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, anisotropic, of (N, C, H, W); a scalar.

    The sum of the horizontal and the vertical mean, as in the code of Geiping et al. 2020.
    """
    return (x[..., :, 1:] - x[..., :, :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def smooth_total_variation(x: Tensor, width: float = 1e-3) -> Tensor:
    """As `total_variation` with sqrt(d^2 + width^2) for |d|, for optimisers that need a second derivative."""
    across, down = x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
    return sum(((d.square() + width**2).sqrt().mean() for d in (across, down)), x.new_zeros(()))


def statistics_distance(
    found: Mapping[str, tuple[Tensor, Tensor]], target: Mapping[str, tuple[Tensor, Tensor]]
) -> Tensor:
    """Mean relative squared error of BatchNorm means and variances, a scalar.

    After the BatchNorm regularisation of Yin et al. 2021 (GradInversion, equation 6).  Deviation:
    each layer is divided by its target's variance, so that every layer counts alike.
    """
    terms = []
    for name, (mean, variance) in target.items():
        scale = variance.mean().clamp_min(1e-12)
        terms.append((found[name][0] - mean).square().mean() / scale)
        terms.append((found[name][1] - variance).square().mean() / scale.square())
    return torch.stack(terms).mean()
