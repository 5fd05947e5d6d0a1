"""Closed forms: inputs read off the gradients of a layer that is linear in them.  No optimisation.

Sources:
    Phong et al. 2017, section 3, and Geiping et al. 2020, proposition 3.1: one example, x = dW_i / db_i.
    Boenisch et al. 2021 and Fowl et al. 2022: in a batch, a neuron that only one example
        activates still gives that example.
    Dimitrov et al. 2024 (SPEAR): a batch behind a ReLU, from the zeros in the gradient of the
        layer's outputs.
    Lu et al. 2022 (APRIL), section 3: vision transformers, from the position embedding's gradient.
Deviations are noted where they occur.  Every result is verified by simulating its update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leakaudit.attacks.base import Monitor, Reconstruction
from leakaudit.attacks.disturbance import errors_of
from leakaudit.attacks.head import effective_rank, exact, storage_precision
from leakaudit.attacks.labels import match_labels
from leakaudit.models.victim import Victim
from leakaudit.numerics import least_squares
from leakaudit.threat import View

SLACK = 0.01
VERIFIED = 1e-3
INDEPENDENT = 1e-7
"""Least singular value of the position rows, over the largest, that counts."""
CHUNK = 10_000


@dataclass(frozen=True)
class InputLayer:
    """A fully connected layer that reads the model input itself.

    Attributes:
        weight, bias: names of its parameters, (H, D) and (H,); bias is None without one.
        pixels: (D,) int64, the index in the flattened model input that each of its inputs copies.
    """

    weight: str
    bias: str | None
    pixels: Tensor


@dataclass(frozen=True)
class PatchEmbedding:
    """A convolution that cuts the model input into patches, and the position embedding added to them.

    Attributes:
        weight: name of the projection, (D, C, k, l), with stride (k, l).
        position: name of the embedding; `rows` are the (P,) rows of it, reshaped to (T, D), that
            are added to the patches in the convolution's order.
        grid: patches (down, across), P = down * across.
    """

    weight: str
    position: str
    rows: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Linear:
    """`linear`: inputs from the first fully connected layer, x = dW_i / db_i.

    One example is exact for any activation and any number of local steps, because every step's
    gradient of this layer is an outer product with the same x.  A batch is exact as far as
    neurons are activated by one example only (at least two must agree), and behind a ReLU in
    full, by the zeros in the gradient of the layer's outputs (SPEAR).

    Attributes:
        samples: random row subsets tried for a batch behind a ReLU; about N log N / z^(N-1) are
            needed when each example leaves the share z of the neurons inactive.
    """

    samples: int = 400_000

    @property
    def restarts(self) -> int:
        return 1

    def applies(self, view: View) -> str | None:
        layer = input_layer(view.victim)
        if layer is None:
            return "no fully connected layer reads the model input directly"
        if layer.bias is None:
            return "the first fully connected layer has no bias"
        if layer.weight not in view.observed or layer.bias not in view.observed:
            return "the update lacks the first fully connected layer's weight or bias"
        if not bool(view.observed[layer.bias].any()):
            return "the gradient of the first fully connected layer's bias is zero"
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        layer = input_layer(view.victim)
        assert layer is not None
        assert layer.bias is not None
        generator = _cpu(generator)
        rows, divisors = exact(view.observed[layer.weight]), exact(view.observed[layer.bias])
        if view.round.num_examples == 1:
            found = _ratio(rows, divisors)[None]
        else:
            found = _agreeing(view, layer, rows, divisors, generator)
        monitor.start(1)
        done = _record(view, layer, found, generator, monitor)
        details: dict[str, Any] = {"closed_form": "rows over biases", "recovered": len(found)}
        details["examples"] = view.round.num_examples
        if len(found) < view.round.num_examples and not done:
            self._by_zeros(view, layer, rows, divisors, generator, monitor)
            if monitor.best_loss <= VERIFIED:
                details |= {"closed_form": "zeros behind the ReLU", "recovered": view.round.num_examples}
        details["pixels_seen"] = len(set(layer.pixels.tolist())) / view.victim.space.unknowns
        return monitor.result(details=details)

    def _by_zeros(
        self,
        view: View,
        layer: InputLayer,
        rows: Tensor,
        divisors: Tensor,
        generator: torch.Generator,
        monitor: Monitor,
    ) -> None:
        """Search for the whole batch behind a ReLU until its simulated update fits."""
        share = _inactive_share(view.victim, layer)
        factors = _factor(rows, view.round.num_examples, storage_precision(view.observed[layer.weight]))
        if share < 0.05 or factors is None:
            return
        left, right, error = factors
        search = _ZeroSearch(left, error)
        rounds = -(-self.samples // CHUNK)
        monitor.start(max(1, rounds), target=VERIFIED)
        for _ in range(rounds):
            if search.sample(CHUNK, generator):
                found = _unmix(search.mixing, left, right, divisors)
                done = _record(view, layer, found, generator, monitor)
            else:
                assert monitor.best_x is not None
                assert monitor.best_y is not None
                done = monitor.step(monitor.best_loss, monitor.best_x, monitor.best_y)
            if done:
                break


@dataclass(frozen=True)
class PatchEmbeddingInverse:
    """`patch-embedding`: a whole image from a vision transformer's position embedding gradient.

    The gradient of a learnt position embedding is that of its token, delta_p (one example); the
    gradient of the patch projection is sum_p delta_p (x) patch_p.  With P <= D independent
    delta_p the patches follow by least squares.  Exact, for any number of local steps (the sums
    over steps keep the form) and any common factor.

    Deviation from APRIL: it uses the embedding and the first attention layer's weights and
    needs that layer without a skip connection in its closed form; here the patch projection and
    the embedding suffice for any transformer.
    """

    @property
    def restarts(self) -> int:
        return 1

    def applies(self, view: View) -> str | None:
        if view.round.num_examples > 1:
            return "in a batch the position embedding's gradient adds up the examples' tokens"
        patches = patch_embedding(view.victim)
        if patches is None:
            return "no patch projection with a learnt position embedding added to it"
        if patches.weight not in view.observed or patches.position not in view.observed:
            return "the update lacks the patch projection or the position embedding"
        if not bool(view.observed[patches.position].any()):
            return "the gradient of the position embedding is zero (torchvision starts the head at zero)"
        return None

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        patches = patch_embedding(view.victim)
        assert patches is not None
        weight = exact(view.observed[patches.weight])
        tokens = _token_rows(exact(view.observed[patches.position]), weight.shape[0])[patches.rows]
        solution = least_squares(tokens.T, weight.flatten(1), "gelsd", rcond=INDEPENDENT)
        x = _assemble(solution, weight.shape[1:], patches.grid, view.victim.space.shape)
        x = x.to(view.victim.device, view.victim.dtype)
        y, source = match_labels(view, x, generator)
        monitor.start(1)
        monitor.step(view.residual(x, y), x, y)
        values = torch.linalg.svdvals(tokens)
        return monitor.result(
            details={
                "closed_form": "patches from the position embedding",
                "patches": len(tokens),
                "rank": int((values > INDEPENDENT * values[0]).sum()),
                "condition": float(values[0] / values[-1].clamp(min=1e-300)),
                "labels": source,
            }
        )


def input_layer(victim: Victim) -> InputLayer | None:
    """The first `Linear` all of whose inputs are copies of model inputs, found by comparing values."""
    probe = victim.probe()
    flat = probe.flatten(1)
    values, order = flat.sort(1)
    for name, module, seen, _ in victim.modules_in_order():
        if not isinstance(module, nn.Linear) or seen.dim() != 2:
            continue
        slots = torch.searchsorted(values, seen.contiguous()).clamp(max=flat.shape[1] - 1)
        pixels = order.gather(1, slots)
        if torch.equal(pixels[0], pixels[1]) and torch.equal(flat[:, pixels[0]], seen):
            prefix = f"{name}." if name else ""
            bias = f"{prefix}bias" if module.bias is not None else None
            return InputLayer(f"{prefix}weight", bias, pixels[0].cpu())
    return None


def patch_embedding(victim: Victim) -> PatchEmbedding | None:
    """The patch projection and its position embedding, found by comparing gradients, not names.

    A parameter is the position embedding when its gradient holds, for every patch, the gradient
    of the projection's output there: only an addition gives both the same.
    """
    name = _patch_projection(victim)
    if name is None:
        return None
    prefix = f"{name}." if name else ""
    outputs: list[Tensor] = []
    handle = victim.module.get_submodule(name).register_forward_hook(lambda *call: outputs.append(call[2]))
    leaves = {key: p.detach().requires_grad_() for key, p in victim.params.items()}
    probe = victim.probe()[:1]
    try:
        with torch.enable_grad():
            logits = victim.logits(leaves, probe)
    finally:
        handle.remove()
    width, grid = outputs[0].shape[1], (int(outputs[0].shape[2]), int(outputs[0].shape[3]))
    likely = [key for key, p in leaves.items() if _may_be_positions(p, width, grid[0] * grid[1])]
    scalar = logits.square().sum() + logits.sum()
    gradients = torch.autograd.grad(
        scalar, [outputs[0], *(leaves[key] for key in likely)], allow_unused=True, materialize_grads=True
    )
    wanted = gradients[0][0].flatten(1).T
    for key, gradient in zip(likely, gradients[1:], strict=True):
        rows = _matching_rows(wanted, _token_rows(gradient, width))
        if rows is not None:
            return PatchEmbedding(f"{prefix}weight", key, rows.cpu(), grid)
    return None


def _patch_projection(victim: Victim) -> str | None:
    """Name of a convolution without overlap that reads the model input."""
    probe = victim.probe()
    for name, module, seen, _ in victim.modules_in_order():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == module.stride
            and module.padding in ((0, 0), "valid")
            and module.dilation == (1, 1)
            and module.groups == 1
            and torch.equal(seen, probe)
        ):
            return name
    return None


def _may_be_positions(parameter: Tensor, width: int, patches: int) -> bool:
    """Shapes (T, D), (1, T, D) or (1, D, h, w) with T >= P."""
    shape = tuple(parameter.shape)
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    flat = len(shape) == 2 and shape[1] == width and shape[0] >= patches
    return flat or (len(shape) == 3 and shape[0] == width and shape[1] * shape[2] == patches)


def _token_rows(embedding: Tensor, width: int) -> Tensor:
    """(T, D) rows of a position embedding in any of the accepted shapes."""
    return embedding.reshape(-1, width) if embedding.shape[-1] == width else embedding.reshape(width, -1).T


def _matching_rows(wanted: Tensor, rows: Tensor) -> Tensor | None:
    """For each of the (P, D) `wanted`, the index of the equal one in `rows` (T, D); None unless all are."""
    size = wanted.norm(dim=1)
    if not bool((size > 0).all()):
        return None
    distance, index = torch.cdist(wanted.double(), rows.double()).min(1)
    equal = bool((distance <= 1e-3 * size).all()) and int(index.bincount().max()) == 1
    return index if equal else None


def _assemble(
    patches: Tensor, kernel: torch.Size, grid: tuple[int, int], shape: tuple[int, int, int]
) -> Tensor:
    """(P, C k l) patches -> (1, C, H, W); pixels beyond the last patch stay at zero."""
    channels, down, across = kernel
    image = torch.zeros(1, *shape, dtype=patches.dtype)
    tiles = patches.reshape(*grid, channels, down, across).permute(2, 0, 3, 1, 4)
    image[0, :, : grid[0] * down, : grid[1] * across] = tiles.reshape(channels, grid[0] * down, -1)
    return image


def _ratio(rows: Tensor, divisors: Tensor) -> Tensor:
    """x (D,) with rows (H, D) = outer(divisors, x) in least squares over the entries that are not zero.

    Leaving out zeros costs nothing (a pixel that is zero makes all its entries zero) and keeps
    the answer exact when small entries were pruned.
    """
    weights = divisors[:, None].square() * (rows != 0)
    return (divisors[:, None] * rows).sum(0) / weights.sum(0).clamp(min=1e-300)


def _agreeing(
    view: View, layer: InputLayer, rows: Tensor, divisors: Tensor, generator: torch.Generator
) -> Tensor:
    """(found, D) examples on which at least two neurons agree, inside the box, most neurons first."""
    alive = divisors.abs() > 1e-6 * divisors.abs().max()
    rows, divisors = rows[alive], divisors[alive]
    candidates = rows / divisors[:, None]
    tolerance = 64 * storage_precision(view.observed[layer.weight])
    sketch = torch.randn(rows.shape[1], 32, generator=generator, dtype=torch.float64)
    shadows = candidates @ sketch / sketch.shape[1] ** 0.5
    close = torch.cdist(shadows, shadows) <= tolerance * shadows.norm(dim=1)[:, None]
    found: list[Tensor] = []
    free = torch.ones(len(rows), dtype=torch.bool)
    for index in close.sum(1).argsort(descending=True).tolist():
        group = close[index] & free
        if not free[index] or int(group.sum()) < 2:
            continue
        free &= ~group
        example = _ratio(rows[group], divisors[group])
        if _in_box(view.victim, layer, example):
            found.append(example)
    kept = found[: view.round.num_examples]
    return torch.stack(kept) if kept else rows.new_zeros(0, rows.shape[1])


def _in_box(victim: Victim, layer: InputLayer, example: Tensor) -> bool:
    """Whether the pixels of `example` (D,) are in [0, 1], give or take `SLACK`."""
    pixels = victim.space.decode(_to_images(victim, layer, example[None]).double())
    if victim.space.mean is None:
        return bool(example.isfinite().all())
    return bool(((pixels >= -SLACK) & (pixels <= 1 + SLACK)).all())


def _to_images(victim: Victim, layer: InputLayer, found: Tensor) -> Tensor:
    """(n, D) layer inputs -> (n, C, H, W) model inputs; pixels the layer does not see are at zero."""
    flat = torch.zeros(len(found), victim.space.unknowns, dtype=found.dtype)
    flat[:, layer.pixels] = found
    return flat.reshape(-1, *victim.space.shape).to(victim.device, victim.dtype)


def _record(
    view: View, layer: InputLayer, found: Tensor, generator: torch.Generator, monitor: Monitor
) -> bool:
    """Simulate the update of the examples found, the rest filled with the mean image; True to stop."""
    images = _to_images(view.victim, layer, found[: view.round.num_examples])
    if errors_of(view):  # noise leads out of the box, where no picture is
        images = view.victim.space.project(images)
    missing = view.round.num_examples - len(images)
    x = torch.cat([images, images.new_zeros(missing, *view.victim.space.shape)])
    y, _ = match_labels(view, x, generator)
    return monitor.step(view.residual(x, y), x, y)


def _inactive_share(victim: Victim, layer: InputLayer) -> float:
    """Share of the layer's outputs with a gradient of exactly zero, over random examples: a ReLU's mark."""
    assert layer.bias is not None
    shares = []
    for example in victim.probe(4):
        bias = victim.params[layer.bias].detach().requires_grad_()
        with torch.enable_grad():
            logits = victim.logits({**victim.params, layer.bias: bias}, example[None])
            (gradient,) = torch.autograd.grad(logits.square().sum(), bias)
        shares.append(float((gradient == 0).float().mean()))
    return sum(shares) / len(shares)


def _factor(rows: Tensor, count: int, precision: float) -> tuple[Tensor, Tensor, float] | None:
    """rows (H, D) = left (H, N) right (N, D); and left's error per number, from the next singular value.

    None when the rank is below N: then examples are hidden, equal, or activate nothing.
    """
    if count < 2 or effective_rank(rows, precision) < count:
        return None
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    rest = float(values[count]) if len(values) > count else float(values[0]) * precision
    error = rest / (rows.shape[0] ** 0.5 + rows.shape[1] ** 0.5) / float(values[count - 1])
    return left[:, :count], values[:count, None] * right[:count], error


class _ZeroSearch:
    """Directions q for which left @ q has many zeros: columns of the gradient of a ReLU layer's outputs.

    Dimitrov et al. 2024, section 4: N - 1 rows on which one example is inactive determine its
    direction; such rows are found by drawing.  A mixture of examples is zero only where all of
    them are inactive, so the true directions are the independent ones with the most zeros, and
    choosing greedily by the number of zeros finds them once they are drawn.
    Deviation: that greedy choice, and a refinement on all zeros, replace the paper's two-stage filter.
    """

    def __init__(self, left: Tensor, error: float) -> None:
        self._tolerance = 8 * max(error, 1e-12)
        self._rows = left[left.norm(dim=1) > 16 * self._tolerance]
        self._count = left.shape[1]
        self._chosen = left.new_zeros(0, self._count)

    def sample(self, draws: int, generator: torch.Generator) -> bool:
        """Draw `draws` subsets of N - 1 rows; True when N directions are known and have changed."""
        if len(self._rows) <= 2 * self._count:
            return False
        picks = torch.randint(len(self._rows), (draws, self._count - 1), generator=generator)
        directions = torch.linalg.qr(self._rows[picks].mT, mode="complete")[0][..., -1]
        pool = torch.cat([self._chosen, directions[self._zeros(directions) >= 2 * self._count]])
        chosen = self._independent(pool)
        changed = chosen.shape != self._chosen.shape or not torch.allclose(chosen.abs(), self._chosen.abs())
        self._chosen = chosen
        return changed and len(chosen) == self._count

    @property
    def mixing(self) -> Tensor:
        """(N, N), a direction a column."""
        return self._chosen.T

    def _zeros(self, directions: Tensor) -> Tensor:
        return ((directions @ self._rows.T).abs() < self._tolerance).sum(1)

    def _independent(self, pool: Tensor) -> Tensor:
        """Greedily the directions with the most zeros, each refined and outside the span of those before."""
        chosen: list[Tensor] = []
        rest = pool[self._zeros(pool).argsort(descending=True, stable=True)]
        while len(rest) and len(chosen) < self._count:
            chosen.append(self._refined(rest[0]))
            basis = torch.linalg.qr(torch.stack(chosen, 1))[0]
            outside = rest - rest @ basis @ basis.T
            rest = rest[outside.norm(dim=1) > 1e-2]
        return torch.stack(chosen) if chosen else pool

    def _refined(self, direction: Tensor) -> Tensor:
        zero = (self._rows @ direction).abs() < self._tolerance
        refined: Tensor = torch.linalg.svd(self._rows[zero])[2][-1]
        return refined


def _unmix(mixing: Tensor, left: Tensor, right: Tensor, divisors: Tensor) -> Tensor:
    """Examples (N, D) from rows = (left Q)(Q^-1 right), scaled so that the columns of left Q add up to db."""
    columns = left @ mixing
    scales = least_squares(columns, divisors[:, None])
    examples: Tensor = torch.linalg.solve(mixing, right) / torch.where(scales == 0, 1.0, scales)
    return examples


def _cpu(generator: torch.Generator) -> torch.Generator:
    """A generator on the CPU that continues from `generator`."""
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return torch.Generator().manual_seed(seed)
