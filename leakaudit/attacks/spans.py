"""Membership tests: is this vector among those an attention layer saw?  (DAGER, Petrov et al. 2024.)

The gradient of a linear layer's weight is a sum of outer products delta_p x_p^T over the places p of the
batch, so its rows span the inputs x_p, as long as these are fewer than the layer is wide.  A vector is a
candidate when its distance from that span is rounding error.  Query, key and value share their input and
are stacked.  With LoRA (Hu et al. 2022) the trained factors tell less: the gradient of B spans A x_p in r
dimensions, that of A spans at most r of the x_p for each adapted projection.

Where an absolute position is added to the word, x(i, t) is a scaled w_t + p_i, and candidates close cycles:
with (i, s), (j, s) and (j, t) true, (i, t) passes too.  First-layer tests of such models narrow tokens down;
the second layer, which sees whole sentences, decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from leakaudit.attacks.head import storage_precision
from leakaudit.models.architectures import is_conv1d
from leakaudit.models.language import LanguageVictim
from leakaudit.models.lora import LoraLinear
from leakaudit.update import Update

ROUNDING = 16.0
"""Rounding error of a gradient's numbers, in units of their precision times their root mean square."""
FLAT = 0.2
"""Smallest singular value over the median one, above which the lower half is noise."""
MANY = 32
"""Singular values from which on this is no accident, as it is for the few dimensions of an adapter."""


@dataclass(frozen=True)
class Test:
    """One span: `basis` (r, k) orthonormal, in the coordinates `mapping` (k, H) takes inputs to; None: as they are."""

    basis: Tensor
    mapping: Tensor | None = None

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    def distance(self, inputs: Tensor) -> Tensor:
        """(...,) relative distance of (..., H) inputs, in [0, 1]."""
        basis = self.basis.to(inputs.dtype)
        points = inputs if self.mapping is None else inputs @ self.mapping.to(inputs.dtype).T
        away = points - (points @ basis.T) @ basis
        return away.norm(dim=-1) / points.norm(dim=-1).clamp(min=torch.finfo(points.dtype).tiny)


@dataclass(frozen=True)
class Span:
    """All tests of one attention layer.

    Attributes:
        tests: those that exclude something: spans that do not fill their space.
        rank: dimensions of the largest span, a lower bound on the distinct inputs.
        width: dimensions they could fill at most.
        tolerance: distance that rounding and noise may cause for a true input.
    """

    tests: tuple[Test, ...]
    rank: int
    width: int
    tolerance: float

    def distance(self, inputs: Tensor) -> Tensor:
        """(...,) the largest distance over the tests, for (..., H) inputs."""
        return torch.stack([test.distance(inputs) for test in self.tests]).amax(dim=0)


def attention_span(
    victim: LanguageVictim, update: Update, layer: int, noise: float = 0.0, whole: Update | None = None
) -> Span | None:
    """The span of what enters block `layer`; None where nothing of it was shared.

    Args:
        whole: what the client shared, where `update` is what is left of it: it holds the rounding of the larger
            numbers that were taken out.
    """
    kinds = list(gradients(victim, update, layer))
    if not kinds:
        return None
    edges = [edge_of(matrix, noise) for matrix, _ in gradients(victim, whole or update, layer)]
    floor = max(edges) if len(edges) != len(kinds) else 0.0  # a factor of an adapter that is all gone
    tests, rank, width, tolerance = [], 0, 0, 0.0
    for i, (matrix, mapping) in enumerate(kinds):
        basis, loose = _row_space(matrix, floor or edges[i])
        room = min(matrix.shape)
        rank, width = max(rank, len(basis)), max(width, room)
        if 0 < len(basis) < room:  # a span that fills its room may hold part of the inputs only
            tests.append(Test(basis, mapping))
            tolerance = max(tolerance, loose)
    return Span(tuple(tests), rank, width, tolerance)


def gradients(victim: LanguageVictim, update: Update, layer: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(gradient (m, n) in float64 with inputs along its rows, map (n, H) from inputs to its columns; None: as
    they are) for every test of a layer."""
    whole, factors = [], []
    for name, module in victim.projections(layer):
        if isinstance(module, LoraLinear):
            down = f"{name}.lora_A.weight"
            up = f"{name}.lora_B.weight"
            if up in update and bool(update[up].any()):
                yield update[up].double(), {**victim.params, **victim.frozen}[down].double()
            if down in update and bool(update[down].any()):
                factors.append(update[down].double())
        elif f"{name}.weight" in update:
            gradient = update[f"{name}.weight"].double()
            whole.append(gradient.T if is_conv1d(module) else gradient)
    for stack in (whole, factors):
        if stack and bool(torch.cat(stack).any()):
            yield torch.cat(stack), None


def _row_space(matrix: Tensor, edge: float) -> tuple[Tensor, float]:
    """Orthonormal rows whose singular values exceed those of noise, `edge`, and the distance that it may add to a
    true row.

    Where every singular value lies above the known noise and the lower half is flat, as noise or quantisation
    of unknown size makes it, the threshold follows the median (Gavish and Donoho 2014, equation 11).
    """
    short = torch.linalg.qr(matrix, mode="r").R if matrix.shape[0] > matrix.shape[1] else matrix
    _, sizes, rows = torch.linalg.svd(short, full_matrices=False)
    if len(sizes) >= MANY and float(sizes[-1]) > max(edge, FLAT * float(sizes.median())):
        ratio = min(matrix.shape) / max(matrix.shape)
        shrunk = 8 * ratio / (ratio + 1 + math.sqrt(ratio**2 + 14 * ratio + 1))
        edge = noise_of(sizes, matrix) * math.sqrt(max(matrix.shape) * (2 * (ratio + 1) + shrunk))
    rank = int((sizes > edge).sum())
    weakest = float(sizes[rank - 1]) if rank else math.inf
    return rows[:rank], min(0.5, edge / weakest)


def edge_of(matrix: Tensor, noise: float) -> float:
    """The largest singular value that noise of this deviation per number, and rounding, give (m, n) numbers:
    s (sqrt m + sqrt n), the edge of Marchenko and Pastur 1967; rounding is taken as such noise."""
    size = float(matrix.square().mean().sqrt())
    spread = math.hypot(noise, ROUNDING * storage_precision(matrix.float()) * size)
    return spread * (math.sqrt(matrix.shape[0]) + math.sqrt(matrix.shape[1]))


def noise_of(sizes: Tensor, matrix: Tensor, inputs: int = 0) -> float:
    """Deviation per number of the noise in a gradient, from its singular values (k,), falling.

    It follows from the middle one of those that the `inputs` cannot account for (Gavish and Donoho 2014,
    section III-E, where `inputs` is 0); 0 where they account for all.
    """
    if inputs >= len(sizes):
        return 0.0
    short, long = sorted(matrix.shape)
    middle = inputs + (len(sizes) - inputs) // 2
    share = (len(sizes) - middle - 0.5) / len(sizes)
    return float(sizes[middle]) / math.sqrt(long * _marchenko_pastur(short / long, share))


def _marchenko_pastur(ratio: float, share: float) -> float:
    """The eigenvalue below which `share` of those of W W^T / n lie, W (ratio n, n) standard normal."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    grid = torch.linspace(low, high, 4002, dtype=torch.float64)[1:-1]
    below = (((high - grid) * (grid - low)).sqrt() / grid).cumsum(0)
    return float(grid[int(torch.searchsorted(below, share * below[-1]))])
