"""The update as a system of equations: residual, explicit Jacobian, rank.

The candidate u (pixels, and label logits where labels are unknown) is sought from

    p(u) = t,    p = compression of the simulated update, t = that of the observed one.

Compression keeps what the equations say and drops what repeats it.  The weight
gradient of a fully connected layer is a sum of `rank` outer products
delta_b f_b^T, one for each row that passed through the layer, so its tangent space
at the observed gradient G is { U A + B V^T } with U, V the leading singular vectors of G
(Absil, Mahony and Sepulchre 2008, section 3.4 on fixed-rank matrices): U^T G and
(1 - U U^T) G V hold everything to first order.  Other tensors, when there are
far more numbers than unknowns, are added up in signed random buckets (CountSketch;
Charikar, Chen and Farach-Colton 2002; Clarkson and Woodruff 2013).  Every compression has
spectral norm at most 1, so singular values found here are lower bounds for the
whole Jacobian's: |S J v| <= |J v|.

Columns come from forward-mode differentiation of the gradient (Pearlmutter 1994),
many at a time; single products with the Jacobian from reverse mode, `Graph`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from leakaudit.randomness import fork
from leakaudit.rounds import client_update
from leakaudit.threat import View
from leakaudit.update import Update

Piece = Callable[[Tensor], Tensor]
CHUNK_BYTES = 256 * 2**20
SAME = 1e-9


# ------------------------------------------------------------------ compression of one tensor


@dataclass(frozen=True)
class LowRank:
    """(K, F) -> U^T G and (1 - U U^T) G V, as one vector of rank * (F + K) numbers.

    Attributes:
        left: U, (K, rank), orthonormal columns.
        right: V, (F, rank), orthonormal columns.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, observed: Tensor, rank: int) -> LowRank:
        if 4 * rank > min(observed.shape):
            left, _, right = torch.linalg.svd(observed, full_matrices=False)
            return cls(left[:, :rank].contiguous(), right[:rank].T.contiguous())
        with torch.random.fork_rng(devices=[]):  # a full SVD of 1024 x 3072 takes 8 s, this 0.1 s
            torch.manual_seed(0)
            left, _, right = torch.svd_lowrank(observed, q=2 * rank + 8, niter=4)
        return cls(left[:, :rank].contiguous(), right[:, :rank].contiguous())

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.join(self.left.T @ gradient, self.complement(gradient @ self.right))

    def complement(self, columns: Tensor) -> Tensor:
        """(1 - U U^T) columns, for (K, rank)."""
        return columns - self.left @ (self.left.T @ columns)

    @staticmethod
    def join(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.cat([rows.reshape(-1), columns.reshape(-1)])


@dataclass(frozen=True)
class Buckets:
    """Any tensor -> signed sums over `count` disjoint random buckets of equal size, divided by sqrt(size).

    Attributes:
        order: (count * size,) positions in the flattened tensor, zero padded.
        sign: (count, size), entries -1 and 1.
    """

    order: Tensor
    sign: Tensor

    @classmethod
    def of(cls, observed: Tensor, count: int, generator: torch.Generator) -> Buckets:
        size = math.ceil(observed.numel() / count)
        count = math.ceil(observed.numel() / size)
        device = generator.device
        order = torch.randperm(count * size, generator=generator, device=device).to(observed.device)
        sign = torch.randint(0, 2, (count, size), generator=generator, device=device).to(observed) * 2 - 1
        return cls(order, sign)

    def __call__(self, gradient: Tensor) -> Tensor:
        flat = gradient.reshape(-1)
        padded = F.pad(flat, (0, len(self.order) - len(flat)))
        sums: Tensor = (padded[self.order].view(self.sign.shape) * self.sign).sum(-1)
        return sums / math.sqrt(self.sign.shape[1])


@dataclass(frozen=True)
class Picked:
    """Any tensor -> some of its numbers, then as `rest` says.

    Attributes:
        index: positions in the flattened tensor, int64.
    """

    index: Tensor
    rest: Piece

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.rest(gradient.reshape(-1)[self.index])


def whole(gradient: Tensor) -> Tensor:
    """Any tensor -> all its numbers."""
    return gradient.reshape(-1)


def _cast(piece: Piece, dtype: torch.dtype) -> Piece:
    if isinstance(piece, Picked):
        return Picked(piece.index, _cast(piece.rest, dtype))
    if isinstance(piece, LowRank):
        return LowRank(piece.left.to(dtype), piece.right.to(dtype))
    return Buckets(piece.order, piece.sign.to(dtype)) if isinstance(piece, Buckets) else piece


@dataclass(frozen=True)
class Plan:
    """How much each shared tensor is compressed.

    Attributes:
        ranks: tensor name -> rank, for `LowRank`.
        counts: tensor name -> equations to keep, for all others.
        equations: in all.
        shared: tensor name -> positions of the numbers that a known mask lets through, where there is one;
            a masked number is no equation.
    """

    ranks: dict[str, int]
    counts: dict[str, int]
    equations: int
    shared: dict[str, Tensor]

    def gigabytes(self, unknowns: int) -> float:
        """Memory of the Jacobian and its Gram matrix in float64."""
        return 8 * _numbers(unknowns, self.equations) / 1e9

    def gram_gigabytes(self, unknowns: int, dtype: torch.dtype, prior: bool) -> float:
        """See the function of that name."""
        return gram_gigabytes(unknowns, self.equations, dtype, prior)


def gram_gigabytes(unknowns: int, equations: int, dtype: torch.dtype, prior: bool) -> float:
    """Memory of the smaller Gram matrix and what factoring it takes, in `dtype`.

    J J^T, for fewer equations than unknowns and no prior, is added up from blocks of columns; for J^T J the
    Jacobian is held as well.
    """
    wide = equations < unknowns and not prior
    side = equations if wide else unknowns
    return dtype.itemsize * ((0 if wide else unknowns * equations) + 3 * side**2) / 1e9


def _numbers(unknowns: int, equations: int) -> int:
    """In a Jacobian, its Gram matrix, and what factoring that takes."""
    return unknowns * equations + 3 * min(unknowns, equations) ** 2


def plan(view: View, limit: int) -> Plan:
    """About `limit` equations.

    Fully connected weights are compressed without loss (to first order) where that saves at least
    half; the rest share what is left of `limit` in proportion to their size, at least 64 each.
    """
    shapes = {name: tensor.shape for name, tensor in view.observed.items()}
    trial = None if view.client is client_update else _trial(view)
    ranks = {
        name: rank
        for name, rank in _linear_ranks(view).items()
        if 2 * rank * sum(shapes[name]) <= shapes[name].numel()
        and (trial is None or _has_rank(trial[name], rank))
    }
    shared = {} if trial is None else _shared(view.observed, trial, ranks)
    spent = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    sizes = {name: len(shared[name]) if name in shared else shape.numel() for name, shape in shapes.items()}
    rest = {name: size for name, size in sizes.items() if name not in ranks}
    share = max(limit - spent, limit // 2) / max(sum(rest.values()), 1)
    counts = {name: min(size, max(64, math.ceil(size * share))) for name, size in rest.items()}
    return Plan(ranks, counts, spent + sum(counts.values()), shared)


def _trial(view: View) -> Update:
    """The update of random examples: which form the known client gives to it."""
    generator = fork(0, "trial", view.victim.device)
    count = view.round.num_examples
    x = view.victim.space.sample(count, generator, view.victim.dtype)
    y = torch.arange(count, device=x.device) % view.victim.num_classes
    return view.simulate(x, y).detach()


def _has_rank(gradient: Tensor, rank: int) -> bool:
    """Whether (K, F) `gradient` has at most this rank, as no masked or rounded one has."""
    rest = gradient - gradient @ (right := LowRank.of(gradient, rank).right) @ right.T
    return bool(rest.norm() <= 1e-3 * gradient.norm())


def _shared(observed: Update, trial: Update, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Positions of the numbers that are not zero both as observed and as simulated, where some are."""
    through = {
        name: (tensor.reshape(-1) != 0) | (trial[name].reshape(-1) != 0) for name, tensor in observed.items()
    }
    return {
        name: kept.nonzero()[:, 0]
        for name, kept in through.items()
        if name not in ranks and bool(kept.any()) and not bool(kept.all())
    }


def compression(view: View, limit: int, generator: torch.Generator) -> dict[str, Piece]:
    """For every shared tensor, how it becomes equations, as `plan` says."""
    planned = plan(view, limit)
    pieces: dict[str, Piece] = {}
    for name, tensor in view.observed.items():
        if name in planned.ranks:
            pieces[name] = LowRank.of(tensor, planned.ranks[name])
        elif name in planned.shared:
            index = planned.shared[name]
            picked = tensor.reshape(-1)[index]
            pieces[name] = Picked(index, _summed(picked, planned.counts[name], generator))
        else:
            pieces[name] = _summed(tensor, planned.counts[name], generator)
    return pieces


def _summed(tensor: Tensor, count: int, generator: torch.Generator) -> Piece:
    """Buckets where there are more numbers than `count`."""
    return Buckets.of(tensor, count, generator) if count < tensor.numel() else whole


def _linear_ranks(view: View) -> dict[str, int]:
    """Weight name -> largest possible rank of its gradient, for fully connected layers called once."""
    rows: dict[str, int] = {}
    for name, module, inputs, _ in view.victim.modules_in_order():
        weight = f"{name}.weight" if name else "weight"
        if isinstance(module, nn.Linear) and weight in view.observed:
            per_example = inputs.numel() // (inputs.shape[-1] * 2)  # the probe has two examples
            rows[weight] = rows.get(weight, 0) + per_example * view.round.passes
    return rows


# ------------------------------------------------------------------ the whole system


class ProjectedLinear(nn.Module):
    """A fully connected layer whose gradient comes out already compressed by a `LowRank`.

    At rows = columns = 0 it computes what `linear` does; the gradients with respect to `rows`
    (rank, F) and `columns` (K, rank) are the two parts of the compressed weight gradient, and the
    (K, F) gradient itself, the dearest part of a Jacobian column, is never formed.
    """

    weight: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, linear: nn.Linear, piece: LowRank) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("left", piece.left)
        self.register_buffer("right", piece.right)
        self.bias = linear.bias
        self.rows = nn.Parameter(piece.right.new_zeros(piece.right.shape).T)
        self.columns = nn.Parameter(piece.left.new_zeros(piece.left.shape))

    def forward(self, inputs: Tensor) -> Tensor:
        through = (inputs @ self.right) @ self.columns.T
        return (
            F.linear(inputs, self.weight, self.bias)
            + (inputs @ self.rows.T) @ self.left.T
            + through
            - (through @ self.left) @ self.left.T
        )


def _projected(view: View, pieces: Mapping[str, Piece]) -> View:
    """The view with every `LowRank` layer replaced by its `ProjectedLinear`."""
    module = copy.deepcopy(view.victim.module)
    params, buffers = dict(view.victim.params), dict(view.victim.buffers)
    for name, piece in pieces.items():
        if not isinstance(piece, LowRank):
            continue
        owner, _, _ = name.rpartition(".")
        linear = module.get_submodule(owner)
        assert isinstance(linear, nn.Linear)
        layer = ProjectedLinear(linear, piece)
        if owner:
            module.set_submodule(owner, layer)
        else:
            module = layer
        del params[name]
        prefix = f"{owner}." if owner else ""
        params[f"{prefix}rows"], params[f"{prefix}columns"] = layer.rows.detach(), layer.columns.detach()
        buffers |= {f"{prefix}{key}": value for key, value in layer.named_buffers()}
    victim = replace(view.victim, module=module, params=params, buffers=buffers)
    return replace(view, victim=victim, observed=Update(params))


@dataclass(frozen=True)
class System:
    """p(u) = t in compressed, weighted equations.

    Build it with `System.of`.  A point u is (N, D) with D = C*H*W, plus K label logits when the
    labels are unknown; it has the dtype of `view`.

    Attributes:
        view: what is attacked.
        fast: the view whose simulation gives compressed layers directly, or None.
        labels: (N,) integers or (N, K) probabilities; None when they are part of u.
        pieces: compression a tensor.
        weights: factor a tensor.
        target: t, (m,).
        length: norm of the compressed, weighted observed update; `target` has unit length for a
            scale-free view and this length otherwise.
        mean_of: the factor c when the update is c * sum of single-example updates, else None.
    """

    view: View
    fast: View | None
    labels: Tensor | None
    pieces: dict[str, Piece]
    weights: dict[str, float]
    target: Tensor
    length: float
    mean_of: float | None

    @classmethod
    def of(
        cls,
        view: View,
        labels: Tensor | None,
        generator: torch.Generator,
        limit: int | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> System:
        """The system of `view`.

        Args:
            limit: about how many equations to keep; None for four times the unknowns.
            weights: factor for each shared tensor; None for `rms_weights`.
        """
        pieces = compression(view, limit or 4 * view.unknowns, generator)
        weights = dict(weights or rms_weights(view.observed))
        target = torch.cat([weights[name] * pieces[name](g) for name, g in view.observed.items()])
        plain = view.client is client_update and view.round.local_steps == 1
        fast = _projected(view, pieces) if plain and _has_low_rank(pieces) else None
        length = float(target.norm())
        if view.scale_free:
            target = target / length
        system = cls(view, None, labels, pieces, weights, target, length, None)
        if fast is not None and system._agrees(fast, generator):
            system = replace(system, fast=fast)
        return replace(system, mean_of=system._separation(generator))

    @property
    def unknowns(self) -> int:
        """Columns of the Jacobian."""
        return self.view.round.num_examples * self.width

    @property
    def width(self) -> int:
        """D, numbers a candidate has per example."""
        return self.view.victim.space.unknowns + (self.view.victim.num_classes if self.labels is None else 0)

    @property
    def bytes(self) -> int:
        """Memory of the Jacobian and its Gram matrix."""
        return _numbers(self.unknowns, len(self.target)) * self.target.element_size()

    @property
    def unit(self) -> float:
        """The length of the vectors in which p and t are measured: 1 unless the view is scale-free."""
        return self.length if self.view.scale_free else 1.0

    def cramer_rao(self, spectrum: Spectrum) -> float:
        """Least root mean square error per unknown of an unbiased attack on these equations when every
        weighted number carries Gaussian noise of unit size (Kay 1993, section 3.8); infinite below full
        rank.  `spectrum` is that of `jacobian`."""
        return math.sqrt(spectrum.inverse_squares / spectrum.unknowns) / self.unit

    @property
    def pixel_scale(self) -> Tensor:
        """Pixels of [0, 1] per model-input unit, for every pixel of the batch, (N * C*H*W,); ones
        without a normalisation."""
        space = self.view.victim.space
        std = torch.tensor(space.std or (1.0,) * space.shape[0]).to(self.target)
        return std.view(-1, 1, 1).expand(space.shape).reshape(-1).repeat(self.view.round.num_examples)

    def to(self, dtype: torch.dtype) -> System:
        """The same system in another precision."""
        return replace(
            self,
            view=self.view.to(dtype=dtype),
            fast=None if self.fast is None else self.fast.to(dtype=dtype),
            labels=self.labels
            if self.labels is None or not self.labels.is_floating_point()
            else self.labels.to(dtype),
            pieces={name: _cast(piece, dtype) for name, piece in self.pieces.items()},
            target=self.target.to(dtype),
        )

    def point(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """(N, C, H, W) and (N, K) -> u."""
        flat = x.flatten(1)
        return flat if logits is None else torch.cat([flat, logits], dim=1)

    def split(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """u -> x (N, C, H, W) and y, integers or probabilities."""
        pixels = self.view.victim.space.unknowns
        x = point[:, :pixels].reshape(-1, *self.view.victim.space.shape)
        return x, self.labels if self.labels is not None else point[:, pixels:].softmax(dim=-1)

    def predict(self, point: Tensor) -> Tensor:
        """p(u), (m,); of unit length for a scale-free view."""
        raw = self._raw(point)
        return raw / raw.norm() if self.view.scale_free else raw

    def residual(self, point: Tensor) -> Tensor:
        """p(u) - t, (m,)."""
        return self.predict(point) - self.target

    def jacobian(self, point: Tensor) -> Tensor:
        """dp/du at `point`, (m, N * D), the columns of the first example first."""
        whole = point.new_empty(point.numel(), len(self.target))
        start = 0
        for rows in self._transposed_blocks(point):
            whole[start : start + len(rows)] = rows
            start += len(rows)
        return whole.T

    def gram(self, point: Tensor) -> Tensor:
        """The lower triangle of J^T J, (n, n), in the precision of the system; zero above it, but for blocks."""
        return lower_gram(self.jacobian(point).T)

    def outer_gram(self, point: Tensor) -> Tensor:
        """The lower triangle of J J^T, (m, m), as `gram`, without ever holding J."""
        gram = point.new_zeros(len(self.target), len(self.target))
        for rows in self._transposed_blocks(point):
            add_lower_gram(gram, rows.T)
        return gram

    def linearise(self, point: Tensor) -> Products:
        """J at `point` as products."""
        return Graph.of(self.predict, point)

    def has_graph(self, generator: torch.Generator) -> bool:
        """Whether `linearise` works and agrees with forward mode, tried at a random point.

        Not behind a client whose update cannot be differentiated three times.
        """
        point, direction = self._random_point(generator), self._random_point(generator)
        try:
            found = self.linearise(point).forward(direction.reshape(-1))
        except RuntimeError:
            return False
        with sdpa_kernel(SDPBackend.MATH):
            expected = jvp(self.predict, (point,), (direction,))[1]
        return bool((found - expected).norm() <= math.sqrt(SAME) * expected.norm())

    def probe(self, point: Tensor) -> int:
        """Compute the first few columns and drop them; how many.  For timing."""
        part, start = (self, point) if self.mean_of is None else (self._only(0), point[:1])
        columns = next(part._columns(start))
        columns[-1].sum().item()  # a GPU answers only when it is done
        return len(columns)

    def seconds(self, point: Tensor) -> float:
        """About how long `jacobian` takes, from the first few columns."""
        began = time.monotonic()
        columns = self.probe(point)
        return (time.monotonic() - began) * self.unknowns / columns

    def _transposed_blocks(self, point: Tensor) -> Iterator[Tensor]:
        """J^T from top to bottom, a few rows at a time."""
        raw = self._raw(point) if self.view.scale_free else None
        for rows in self._raw_blocks(point):
            if raw is not None:
                unit = raw / raw.norm()
                rows = (rows - (rows @ unit)[:, None] * unit) / raw.norm()
            yield rows

    def _raw_blocks(self, point: Tensor) -> Iterator[Tensor]:
        if self.mean_of is None:
            yield from self._columns(point)
            return
        for row in range(len(point)):
            for rows in self._only(row)._columns(point[row : row + 1]):
                yield rows if self.mean_of == 1 else self.mean_of * rows

    def _columns(self, point: Tensor) -> Iterator[Tensor]:
        return forward_columns(
            lambda flat: self._raw(flat.view(point.shape)), point.reshape(-1), self._chunk()
        )

    def _only(self, row: int) -> System:
        """The system of one example by itself."""
        return replace(
            self,
            view=_single(self.view),
            fast=None if self.fast is None else _single(self.fast),
            labels=None if self.labels is None else self.labels[row : row + 1],
            mean_of=1.0,
        )

    def _raw(self, point: Tensor) -> Tensor:
        update = (self.fast or self.view).simulate(*self.split(point))
        parts = []
        for name, piece in self.pieces.items():
            if self.fast is not None and isinstance(piece, LowRank):
                prefix = name.removesuffix("weight")
                part = LowRank.join(update[f"{prefix}rows"], update[f"{prefix}columns"])
            else:
                part = piece(update[name])
            parts.append(self.weights[name] * part)
        return torch.cat(parts)

    def _chunk(self) -> int:
        """Columns at a time, so that tangents of parameters and equations fit in CHUNK_BYTES."""
        numbers = (self.fast or self.view).observed.numel() + 20 * self.width + len(self.target)
        return max(1, min(self.width, CHUNK_BYTES // (4 * numbers * self.target.element_size())))

    def _random_point(self, generator: torch.Generator) -> Tensor:
        shape = (self.view.round.num_examples, self.width)
        return torch.randn(shape, generator=generator, device=generator.device).to(self.target)

    def _agrees(self, fast: View, generator: torch.Generator) -> bool:
        """Whether `fast` gives the same equations; not when a weight is also used outside its layer."""
        point = self._random_point(generator)
        with torch.no_grad():
            slow, quick = self._raw(point), replace(self, fast=fast)._raw(point)
        return bool((slow - quick).norm() <= SAME * slow.norm())

    def _separation(self, generator: torch.Generator) -> float | None:
        """The factor c, found by trying on random candidates; None when examples interact."""
        count = self.view.round.num_examples
        if count == 1:
            return 1.0
        if self.view.round.local_steps > 1:
            return None
        point = self._random_point(generator)
        with torch.no_grad():
            together = self._raw(point)
            apart = torch.stack([self._only(i)._raw(point[i : i + 1]) for i in range(count)]).sum(0)
        factor = float(apart @ together / (apart @ apart))
        mismatch = float((together - factor * apart).norm() / together.norm())
        return factor if mismatch < SAME else None


def rms_weights(observed: Update) -> dict[str, float]:
    """1 / rms of each tensor, so that every number counts alike; a tensor that is all zero gets the
    largest weight of the others divided by 1000."""
    rms = {name: float(tensor.square().mean().sqrt()) for name, tensor in observed.items()}
    positive = [value for value in rms.values() if value > 0]
    if not positive:
        return dict.fromkeys(rms, 1.0)
    floor = max(positive) * 1e-3
    return {name: 1 / max(value, floor) for name, value in rms.items()}


def _has_low_rank(pieces: Mapping[str, Piece]) -> bool:
    return any(isinstance(piece, LowRank) for piece in pieces.values())


def _single(view: View) -> View:
    return replace(view, round=view.round.of(1))


def forward_columns(function: Callable[[Tensor], Tensor], point: Tensor, chunk: int) -> Iterator[Tensor]:
    """The Jacobian's columns of `function`: (n,) -> (m,), `chunk` at a time as the rows of (chunk, m), by
    batched forward-mode products."""
    for start in range(0, len(point), chunk):
        size = min(chunk, len(point) - start)
        tangents = point.new_zeros(size, len(point))
        tangents[torch.arange(size), start + torch.arange(size)] = 1
        with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with forward-mode derivatives
            rows = vmap(lambda tangent: jvp(function, (point,), (tangent,))[1])(tangents).detach()
        yield rows


def lower_gram(rows: Tensor) -> Tensor:
    """The lower triangle of rows @ rows.T, (n, n); blocks above the diagonal are left zero."""
    return add_lower_gram(rows.new_zeros(len(rows), len(rows)), rows)


def add_lower_gram(gram: Tensor, rows: Tensor, blocks: int = 12) -> Tensor:
    """Add `lower_gram(rows)` to `gram` in place, at little more than half the price of the whole."""
    start = 0
    for part in rows.chunk(blocks):
        stop = start + len(part)
        gram[start:stop, :stop].addmm_(part, rows[:stop].T)
        start = stop
    return gram


# ------------------------------------------------------------------ products without the matrix


class Products(Protocol):
    """A Jacobian J, (m, n), as what it does to vectors."""

    def forward(self, vector: Tensor) -> Tensor:
        """J v, (n,) -> (m,)."""
        ...

    def transposed(self, vector: Tensor) -> Tensor:
        """J^T w, (m,) -> (n,)."""
        ...


@dataclass(frozen=True)
class Graph:
    """Products of a recorded function by reverse mode.

    J^T w is linear in w, so that differentiating v^T (J^T w) in w gives J v ("double backward trick",
    Townsend 2017): an eighth of the time of `torch.func.jvp` on a LeNet.

    Attributes:
        point: u, of any shape with n numbers.
        value: the function there, (m,).
        weights: w, (m,), of no consequence.
        pulled: J^T w, of the shape of u, as a function of w.
    """

    point: Tensor
    value: Tensor
    weights: Tensor
    pulled: Tensor

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], point: Tensor) -> Graph:
        """Record `function`, of `point` to (m,).  `RuntimeError` where it cannot be differentiated twice."""
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            point = point.detach().clone().requires_grad_()
            value = function(point)
            weights = torch.zeros_like(value, requires_grad=True)
            (pulled,) = torch.autograd.grad(value, point, weights, create_graph=True)
        return cls(point, value, weights, pulled)

    def forward(self, vector: Tensor) -> Tensor:
        directions = vector.view(self.pulled.shape)
        (product,) = torch.autograd.grad(self.pulled, self.weights, directions, retain_graph=True)
        return product

    def transposed(self, vector: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(self.value, self.point, vector, retain_graph=True)
        return product.reshape(-1)


@dataclass(frozen=True)
class Columns:
    """Products with the matrix itself, (m, n)."""

    matrix: Tensor

    def forward(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector

    def transposed(self, vector: Tensor) -> Tensor:
        return self.matrix.T @ vector


# ------------------------------------------------------------------ what a Jacobian says


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a Jacobian, in short.

    Attributes:
        unknowns, equations: its shape.
        rank: singular values above max(shape) * eps * largest.
        largest, smallest: largest and smallest of the min(shape) singular values; `smallest` is 0 when
            there are fewer equations than unknowns.
        inverse_squares: sum of 1 / value^2, infinite below full rank; the squared length of the error
            that white noise of unit size causes, summed over the unknowns (Cramer-Rao).
        weakest: (n,) unit right singular vector of the smallest; None below full rank.
        values: the min(shape) singular values, largest first.
    """

    unknowns: int
    equations: int
    rank: int
    largest: float
    smallest: float
    inverse_squares: float
    weakest: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, columns: Tensor) -> Spectrum:
        """From a Jacobian (m, n), in its own precision.

        Eigenvalues of the Gram matrix where the condition allows (4 s for n = 3072 on one core), else
        singular values of the triangular factor (26 s).
        """
        equations, unknowns = columns.shape
        short = columns if equations < unknowns else columns.T
        gram = short @ short.T
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
        epsilon = torch.finfo(values.dtype).eps
        if values[-1] <= values[0] * (1e4 * epsilon) ** 0.5:
            values = torch.linalg.svdvals(torch.linalg.qr(short.T, mode="r").R)
        rank = int((values > values[0] * max(equations, unknowns) * epsilon).sum())
        full = rank == unknowns
        return cls(
            unknowns=unknowns,
            equations=equations,
            rank=rank,
            largest=float(values[0]),
            smallest=float(values[-1]) if equations >= unknowns else 0.0,
            inverse_squares=float((1 / values.square()).sum()) if full else math.inf,
            weakest=_weakest(gram, float(values[0])) if full else None,
            values=values,
        )

    def left_open(self, deviation: float) -> float:
        """Share, in [0, 1], of the unknowns' prior variance that is left under white noise of unit size, where
        they are independent with this standard deviation before: mean of 1 / (1 + (deviation * value)^2)."""
        seen = 1 / (1 + (deviation * self.values).square())
        return float(seen.sum() + self.unknowns - len(self.values)) / self.unknowns

    @property
    def full_rank(self) -> bool:
        return self.rank == self.unknowns

    @property
    def condition(self) -> float:
        return self.largest / self.smallest if self.smallest > 0 else math.inf


def _weakest(gram: Tensor, largest: float, iterations: int = 8) -> Tensor:
    """Unit eigenvector of the smallest eigenvalue, by inverse iteration."""
    shift = largest**2 * torch.finfo(gram.dtype).eps * 10
    factor = torch.linalg.cholesky(gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    vector = torch.ones(len(gram), 1, dtype=gram.dtype, device=gram.device)
    for _ in range(iterations):
        vector = torch.cholesky_solve(vector, factor)
        vector = vector / vector.norm()
    return vector[:, 0]
