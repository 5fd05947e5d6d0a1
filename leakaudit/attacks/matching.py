"""Distances between a simulated and the observed update, and priors on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.update import Update

Distance = Callable[[Update, Update], Tensor]


def squared(simulated: Update, observed: Update) -> Tensor:
    """sum |g - g*|^2 over all numbers, a scalar (Zhu et al. 2019, equation 4)."""
    return torch.stack([(g - observed[name]).square().sum() for name, g in simulated.items()]).sum()


def relative(simulated: Update, observed: Update, doubt: Update | None = None) -> Tensor:
    """Mean over tensors of |g - g*|^2 / |g*|^2, so that every layer counts alike; a scalar.

    Where the observed numbers are in `doubt` by so much, |g*|^2 + |doubt|^2 takes the place of |g*|^2: what
    was rounded to zero is not known to be zero.
    """

    def size(name: str) -> Tensor:
        own = observed[name].square().sum()
        return own if doubt is None else own + doubt[name].square().sum()

    terms = [
        (g - observed[name]).square().sum() / size(name).clamp_min(1e-30) for name, g in simulated.items()
    ]
    return torch.stack(terms).mean()


def cosine(simulated: Update, observed: Update) -> Tensor:
    """1 - cos(g, g*) over all numbers taken as one vector, in [0, 2] (Geiping et al. 2020, equation 4).

    Both are first divided by their largest number: a confident model's gradients are so small that
    their squares would underflow, and a descent would exploit it.
    """
    found, target = (_same_size(_pieces(update, simulated)) for update in (simulated, observed))
    product = torch.stack([(g * t).sum() for g, t in zip(found, target, strict=True)]).sum()
    return 1 - product / (_length(found) * _length(target))


JOINED = 2**16
"""Tensors of fewer numbers are compared as one: fewer operations to launch, record and compile.  Larger ones would
only be copied (on a ResNet-18 in one piece an eager step's distance took five times as long)."""


def _pieces(update: Update, names: Iterable[str]) -> list[Tensor]:
    """All its small tensors as one vector, in the order of `names`, and the large ones as they are."""
    tensors = [update[name] for name in names]
    small = [tensor.reshape(-1) for tensor in tensors if tensor.numel() < JOINED]
    large = [tensor for tensor in tensors if tensor.numel() >= JOINED]
    return [torch.cat(small), *large] if small else large


def _same_size(pieces: list[Tensor]) -> list[Tensor]:
    """Divided by the largest number of all, which is a constant."""
    largest = torch.stack([piece.detach().abs().max() for piece in pieces]).max()
    return [piece / largest for piece in pieces]


def _length(pieces: list[Tensor]) -> Tensor:
    return torch.stack([piece.square().sum() for piece in pieces]).sum().sqrt()


def fitted(simulated: Update, length: float) -> Update:
    """The simulated update scaled to `length`, > 0, differentiably: how it is seen where lengths mean nothing."""
    simulated = Update(dict(zip(simulated, _same_size(list(simulated.values())), strict=True)))
    factor = length / simulated.norm()
    return simulated.map(lambda tensor: tensor * factor)


def outside(simulated: Update, observed: Update, slack: Update, pull: float = 0.0) -> Update:
    """The simulated update as far as it lies outside the intervals observed +- slack.

    g* + sign(g - g*) (max(|g - g*| - slack, 0) + pull min(|g - g*|, slack)), number by number: any
    distance to g* is then one to the interval, plus `pull`, in [0, 1], of what lies inside.
    """

    def beyond(name: str) -> Tensor:
        departure = simulated[name] - observed[name]
        inside = departure.clamp(-slack[name], slack[name])
        return observed[name] + (departure - inside) + pull * inside

    return Update({name: beyond(name) for name in simulated})


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, anisotropic, of (N, C, H, W); a scalar.

    The sum of the horizontal and the vertical mean, as in the code of Geiping et al. 2020.
    """
    return (x[..., :, 1:] - x[..., :, :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


OPPONENT = F.normalize(torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64), dim=1, eps=0.0)
"""Brightness and two colour differences of red, green and blue, as rows of length 1."""


def variation(
    pixels: Tensor, colour: float = 0.75, curvature: float = 2.0, power: float = 0.8, width: float = 1e-2
) -> Tensor:
    """How little (N, C, H, W) pixels of [0, 1] look like a photograph; summed over pixels, a scalar.

    Slopes and curvatures of brightness and of the two colour differences together, each as
    (length^2 + width^2)^(power / 2).  Photographs differ from their neighbours seldom, mostly along
    edges, and in colour less than in brightness.  Where there are not three channels, the first one
    stands for brightness, at its weight 1 - colour, and the others (two or four channels) do not count.

    Args:
        colour: weight of the colour differences, in [0, 1]; brightness has the rest.
        curvature: weight of second differences against first ones.
        power: below 1 favours few large differences over many small ones.
        width: differences below it count as none.

    Sources: Ono and Yamada 2014 (decorrelated vectorial total variation, equation 9); second
    differences as in Lysaker, Lundervold and Tai 2003; a power below 1 as in Chartrand 2007.  The
    defaults were chosen on CIFAR-10 training images.
    """
    coloured = pixels.shape[1] == 3
    pixels = torch.einsum("dc,nchw->ndhw", OPPONENT.to(pixels), pixels) if coloured else pixels[:, :1]
    across, down = pixels.diff(dim=-1), pixels.diff(dim=-2)
    slope = F.pad(across, (0, 1)).square() + F.pad(down, (0, 0, 0, 1)).square()
    bend = F.pad(across.diff(dim=-1), (0, 2)).square() + F.pad(down.diff(dim=-2), (0, 0, 0, 2)).square()
    bend = bend + 2 * F.pad(across.diff(dim=-2), (0, 1, 0, 1)).square()

    def length(squares: Tensor) -> Tensor:
        parts = ((1 - colour, squares[:, :1]), (colour, squares[:, 1:]))
        sums = [w * (part.sum(1) + width**2).pow(power / 2).sum() for w, part in parts if part.shape[1]]
        return torch.stack(sums).sum()

    return length(slope) + curvature * length(bend)


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
