"""From mixtures of images and labels back to the images: the adversary's side of `leakaudit.defenses.mixup`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.defenses.pixels import slopes
from leakaudit.models.spaces import Pixels

PRESENT = 0.02
"""Share of a mixture's label below which a class is not in it."""
RIDGE = 1e-9
"""Relative weight of the least-norm solution, against errors in what was recovered."""
SINGULAR = 1e3
"""Condition number above which mixtures are left as they are."""
STRAY = 0.1
"""Total share of labels that a guess of who is mixed with whom may leave unexplained, an example."""
GRID = 9
"""Coefficients to try, evenly spaced in (0, 1), where the labels say nothing."""
REFINEMENTS = 5
MOST_GUESSES = 2000
FREEDOM, WIDTH = 0.5, 0.03
"""Of the slopes of photographs, in pixels of [0, 1]."""
OUTSIDE = 100.0
"""Minus the log-likelihood of a pixel that lies 1 outside [0, 1]."""


def unmix(x: Tensor, y: Tensor, space: Pixels, partners: int) -> tuple[Tensor, Tensor]:
    """The images (N, C, H, W) and labels (N,) behind mixtures x with soft labels y, (N, K) floating point.

    y = M onehot(labels), each row of M with `partners` coefficients that sum to 1.  Where N classes are seen, M is
    y without the other columns, but for the order of the images, and x = M^-1 x'.  Where labels repeat, the guesses
    of M that explain y are tried for two partners and few examples: the one whose images have the rarest slopes and
    stay in the box is kept.  The mixtures and their labels come back as they are when nothing explains y, M
    is close to singular, or y is not soft.
    """
    if not y.is_floating_point() or len(x) < 2:
        return x, y
    found = _recovered(space.decode(x.detach()).double().cpu(), y.detach().double().cpu(), partners)
    if found is None or float(torch.linalg.cond(found[0])) > SINGULAR:
        return x, y
    weights, classes = found
    return space.project(solved(weights.to(x.device), x)), classes.to(y.device)


def _recovered(pixels: Tensor, y: Tensor, partners: int) -> tuple[Tensor, Tensor] | None:
    """M (N, N) and labels (N,), or None."""
    if int((y.amax(0) > PRESENT).sum()) >= len(y):
        return _distinct(y)
    return _repeated(pixels, y) if partners == 2 else None


def solved(weights: Tensor, x: Tensor) -> Tensor:
    """The images (N, C, H, W) of which x = weights @ images, by ridge regression; for weights (..., N, N) also
    (..., N, C, H, W)."""
    flat = x.detach().double().flatten(1)
    left = weights.mT @ weights
    scale = left.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(len(x), dtype=torch.float64, device=x.device)
    images: Tensor = torch.linalg.solve(left + RIDGE * scale * eye, weights.mT @ flat)
    return images.view(*images.shape[:-1], *x.shape[1:]).to(x.dtype)


def _distinct(y: Tensor) -> tuple[Tensor, Tensor]:
    """M (N, N) and labels (N,) where every example has a class of its own."""
    classes = y.sum(0).topk(len(y)).indices.sort().values
    weights = y[:, classes]
    return weights / weights.sum(1, keepdim=True), classes


# ------------------------------------------------------------------ repeated labels


def _repeated(pixels: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """The likeliest M, (N, N), and labels (N,), of pairwise mixtures; None when nothing explains y or there are
    too many guesses."""
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for partner, labels, own, free in _structures(y):
        tried = GRID ** int(free.sum())
        if tried > MOST_GUESSES:
            return None
        score, weights = _settled(pixels, partner, own, free)
        if best is None or score < best[0]:
            best = score, weights, labels, free
    return None if best is None else (best[1], best[2])


def _structures(y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Every guess that explains y: partner of each example (N,), labels (N,), own coefficients (N,), and where
    they are free (N,) because partner and example have the same label."""
    count = len(y)
    present = (y.amax(0) > PRESENT).nonzero().flatten()
    if len(present) ** count * count > MOST_GUESSES:
        return
    rows = torch.arange(count)
    for order in permutations(range(1, count)):
        cycle = torch.tensor([0, *order])
        partner = torch.empty_like(cycle)
        partner[cycle] = cycle.roll(-1)
        for picks in product(present.tolist(), repeat=count):
            labels = torch.tensor(picks)
            if len(set(picks)) < len(present):
                continue
            own, other = y[rows, labels], y[rows, labels[partner]]
            free = labels == labels[partner]
            explained = torch.where(free, own, own + other)
            if float((1 - explained).sum()) < STRAY * count:
                yield partner, labels, own / (own + other), free


def _settled(pixels: Tensor, partner: Tensor, own: Tensor, free: Tensor) -> tuple[float, Tensor]:
    """The best score and its M: all free coefficients on a grid, then each by itself on finer ones."""
    places = free.nonzero().flatten()
    width = 1 / (GRID + 1)
    grid = torch.arange(1, GRID + 1, dtype=torch.float64) * width
    points = torch.cartesian_prod(*[grid] * len(places)).view(-1, len(places)) if len(places) else None
    tried = own.repeat(1 if points is None else len(points), 1)
    if points is not None:
        tried[:, places] = points
    score, own = _best_of(pixels, partner, tried)
    for _ in range(REFINEMENTS if len(places) else 0):
        for place in places:
            around = own[place] + torch.linspace(-width, width, 9, dtype=torch.float64)
            tried = own.repeat(len(around), 1)
            tried[:, place] = around.clamp(0, 1)
            score, own = _best_of(pixels, partner, tried)
        width /= 4
    return score, _pairwise(partner, own[None])[0]


def _best_of(pixels: Tensor, partner: Tensor, tried: Tensor, at_once: int = 64) -> tuple[float, Tensor]:
    """The least `_unlikeliness` of the images behind `pixels` for own coefficients `tried` (T, N), and which."""
    weights = _pairwise(partner, tried)
    sound = torch.linalg.cond(weights) <= SINGULAR
    weights = torch.where(sound[:, None, None], weights, torch.eye(len(partner), dtype=weights.dtype))
    scores = torch.cat([_unlikeliness(solved(part, pixels), part) for part in torch.split(weights, at_once)])
    scores = torch.where(sound, scores, torch.inf)
    best = int(scores.argmin())
    return float(scores[best]), tried[best]


def _pairwise(partner: Tensor, own: Tensor) -> Tensor:
    """(T, N, N) mixtures of every example with its partner, for own coefficients (T, N)."""
    itself = torch.eye(len(partner), dtype=own.dtype)
    return own[..., None] * itself + (1 - own)[..., None] * F.one_hot(partner).to(own)


def _unlikeliness(pixels: Tensor, weights: Tensor) -> Tensor:
    """Minus the log-likelihood of the mixtures, (T,), for the images (T, N, C, H, W) behind them and M (T, N, N).

    The slopes at a pixel are Student t distributed (`FREEDOM`, `WIDTH`; heavy-tailed as those of photographs), values
    lie in [0, 1], and the determinant weighs that mixing makes slopes smaller (as in independent component
    analysis, MacKay 1996).
    """
    channels, points = pixels.shape[2], pixels[0, 0, 0].numel()
    squares = slopes(pixels).square() / (2 * FREEDOM * WIDTH**2)
    tails = (channels + FREEDOM) / 2 * squares.log1p().sum((1, 2, 3))
    outside = (pixels - pixels.clamp(0, 1)).abs().sum((1, 2, 3, 4))
    return tails + channels * points * torch.linalg.slogdet(weights).logabsdet + OUTSIDE * outside
