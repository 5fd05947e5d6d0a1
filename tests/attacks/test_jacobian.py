"""The Jacobian against reverse mode and finite differences; the compression against what it must keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import jacrev

from leakaudit.attacks.jacobian import (
    Buckets,
    Graph,
    LowRank,
    Spectrum,
    System,
    add_lower_gram,
    compression,
    forward_columns,
    lower_gram,
    plan,
)
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known
from leakaudit.update import Update

SHAPE = (2, 6, 6)


def small_net(seed: int = 0, norm: bool = False, classes: int = 7) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(144, 40),
            nn.Tanh(),
            nn.Linear(40, classes),
        )


def view_of(
    round: Round, seed: int = 0, norm: bool = False, mode: str = "eval", reduction: str = "mean"
) -> tuple[View, Tensor, Tensor]:
    space = Pixels(SHAPE, (0.4, 0.5), (0.2, 0.3))
    victim = Victim.of(small_net(seed, norm), space, 7, mode=mode, reduction=reduction).to(
        dtype=torch.float64
    )
    generator = fork(seed, "data")
    x = space.encode(torch.rand((round.num_examples, *SHAPE), generator=generator, dtype=torch.float64))
    y = torch.randint(7, (round.num_examples,), generator=generator)
    observed = client_update(victim, victim.params, round, x, y).detach()
    return View(victim, round, observed, Knowledge(labels=known(y, "test"))), x, y


def reverse_mode(system: System, point: Tensor) -> Tensor:
    """The same Jacobian by reverse mode through the full, uncompressed simulation."""

    def predict(flat: Tensor) -> Tensor:
        update = system.view.simulate(*system.split(flat.view(point.shape)))
        raw = torch.cat([system.weights[name] * piece(update[name]) for name, piece in system.pieces.items()])
        return raw / raw.norm() if system.view.scale_free else raw

    return jacrev(predict)(point.reshape(-1))


ROUNDS = {
    "one example": Round(1),
    "batch": Round(3),
    "local steps": Round(2, local_steps=3, learning_rate=0.1),
    "local batches": Round(4, local_steps=2, local_batch_size=2, learning_rate=0.1),
}


@pytest.mark.parametrize("round", ROUNDS.values(), ids=list(ROUNDS))
@pytest.mark.parametrize("scale_free", [False, True])
def test_equals_reverse_mode_through_the_whole_update(round: Round, scale_free: bool) -> None:
    view, x, y = view_of(round)
    if scale_free:
        view = replace(view, knowledge=Knowledge(scale=known(False, "test")))
    system = System.of(view, y, fork(0, "system"))
    point = system.point(x)
    assert torch.allclose(system.jacobian(point), reverse_mode(system, point), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batch_norm_and_reduction(mode: str, reduction: str) -> None:
    view, x, y = view_of(Round(3), norm=True, mode=mode, reduction=reduction)
    system = System.of(view, y, fork(0, "system"))
    factors = {("eval", "mean"): 1 / 3, ("eval", "sum"): 1.0}
    assert system.mean_of == pytest.approx(factors.get((mode, reduction)))  # None: examples interact
    point = system.point(x)
    assert torch.allclose(system.jacobian(point), reverse_mode(system, point), rtol=1e-9, atol=1e-11)


def test_soft_labels_are_unknowns_and_agree_with_finite_differences() -> None:
    view, x, _ = view_of(Round(2))
    system = System.of(view, None, fork(0, "system"))
    assert system.unknowns == 2 * (72 + 7)
    point = system.point(x, torch.randn(2, 7, generator=fork(0, "logits"), dtype=torch.float64))
    direction = torch.randn(point.shape, generator=fork(0, "direction"), dtype=torch.float64)
    step = 1e-5
    difference = (system.predict(point + step * direction) - system.predict(point - step * direction)) / (
        2 * step
    )
    product = system.jacobian(point) @ direction.reshape(-1)
    assert float((product - difference).norm() / difference.norm()) < 1e-8


def test_residual_vanishes_at_the_truth_and_nowhere_else() -> None:
    view, x, y = view_of(Round(2))
    system = System.of(view, y, fork(0, "system"))
    assert float(system.residual(system.point(x)).norm()) < 1e-12 * system.length
    assert float(system.residual(system.point(x + 0.1)).norm()) > 1e-3 * system.length


def test_float32_system_is_the_same_system() -> None:
    view, x, y = view_of(Round(2))
    system = System.of(view, y, fork(0, "system"))
    single = system.to(torch.float32)
    assert single.jacobian(single.point(x.float())).dtype == torch.float32
    wide = system.jacobian(system.point(x))
    narrow = single.jacobian(single.point(x.float())).double()
    assert float((wide - narrow).norm() / wide.norm()) < 1e-5


def test_chunks_do_not_matter() -> None:
    matrix = torch.randn(5, 11, generator=fork(0, "matrix"), dtype=torch.float64)
    point = torch.randn(11, generator=fork(0, "point"), dtype=torch.float64)

    def function(u: Tensor) -> Tensor:
        return (matrix @ u).tanh()

    (whole,) = forward_columns(function, point, 11)
    assert torch.allclose(whole.T, jacrev(function)(point))
    for chunk in (1, 4, 10, 100):
        parts = list(forward_columns(function, point, chunk))
        assert torch.equal(torch.cat(parts), whole)
        assert {len(part) for part in parts[:-1]} <= {chunk}


@pytest.mark.parametrize("round", [*ROUNDS.values()], ids=list(ROUNDS))
@pytest.mark.parametrize("scale_free", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_products_and_gram_matrices_equal_those_of_the_jacobian(
    round: Round, scale_free: bool, told: bool
) -> None:
    """By double backward as by forward mode; J J^T in blocks as from the whole."""
    view, x, y = view_of(round)
    if scale_free:
        view = replace(view, knowledge=Knowledge(scale=known(False, "test")))
    generator = fork(0, "vectors")
    system = System.of(view, y if told else None, fork(0, "system"))
    logits = None if told else torch.randn(len(x), 7, generator=generator, dtype=torch.float64)
    point = system.point(x, logits)
    jacobian = system.jacobian(point)
    products = system.linearise(point)
    assert system.has_graph(fork(0, "graph"))
    ahead = torch.randn(jacobian.shape[1], generator=generator, dtype=torch.float64)
    back = torch.randn(jacobian.shape[0], generator=generator, dtype=torch.float64)
    assert torch.allclose(products.forward(ahead), jacobian @ ahead, rtol=1e-9, atol=1e-11)
    assert torch.allclose(products.transposed(back), jacobian.T @ back, rtol=1e-9, atol=1e-11)
    assert torch.allclose(system.gram(point).tril(), (jacobian.T @ jacobian).tril(), rtol=1e-9, atol=1e-11)
    outer = system.outer_gram(point)
    assert torch.allclose(outer.tril(), (jacobian @ jacobian.T).tril(), rtol=1e-9, atol=1e-11)


def test_graph_of_a_function_with_its_jacobian_in_closed_form() -> None:
    matrix = torch.randn(5, 6, generator=fork(0, "matrix"), dtype=torch.float64)
    point = torch.randn(2, 3, generator=fork(0, "point"), dtype=torch.float64)
    graph = Graph.of(lambda u: (matrix @ u.reshape(-1)).sin(), point)
    expected = (matrix @ point.reshape(-1)).cos()[:, None] * matrix
    for index in range(6):
        assert torch.allclose(graph.forward(torch.eye(6, dtype=torch.float64)[index]), expected[:, index])
    for index in range(5):
        assert torch.allclose(graph.transposed(torch.eye(5, dtype=torch.float64)[index]), expected[index])


def test_update_that_has_only_one_derivative_has_no_graph() -> None:
    """As behind a client with its own backward pass; the attack then forms the Jacobian."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    view, _, y = view_of(Round(1))
    system = System.of(view, y, fork(0, "system"))
    assert system.has_graph(fork(0, "graph"))
    broken = replace(view, client=lambda *a: client_update(*a).map(Once.apply))
    assert not System.has_graph(replace(system, view=broken, fast=None), fork(0, "graph"))


def test_lower_gram_is_added_up_from_blocks() -> None:
    rows = torch.randn(17, 40, generator=fork(0, "rows"), dtype=torch.float64)
    expected = (rows @ rows.T).tril()
    assert torch.allclose(lower_gram(rows).tril(), expected, rtol=1e-12)
    total = torch.zeros(17, 17, dtype=torch.float64)
    for part in rows.split(9, dim=1):
        add_lower_gram(total, part)
    assert torch.allclose(total.tril(), expected, rtol=1e-12)


def test_low_rank_loses_nothing_of_the_tangent_space() -> None:
    """|piece(d)| = |d| for every d = U A + B V^T, and |piece(d)| <= |d| for any d."""
    generator = fork(0, "matrices")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    observed = draw(20, 2) @ draw(2, 30)
    piece = LowRank.of(observed, 2)
    for _ in range(5):
        tangent = piece.left @ draw(2, 30) + draw(20, 2) @ piece.right.T
        assert float(piece(tangent).norm()) == pytest.approx(float(tangent.norm()), rel=1e-12)
        other = draw(20, 30)
        assert float(piece(other).norm()) <= float(other.norm())


@pytest.mark.parametrize("count", [1, 7, 50, 99, 100])
def test_buckets_are_orthonormal_rows(count: int) -> None:
    like = torch.zeros(10, 10, dtype=torch.float64)
    piece = Buckets.of(like, count, fork(count, "buckets"))
    rows = jacrev(piece)(like).flatten(1)
    assert len(rows) <= count
    product = rows @ rows.T
    assert torch.equal(product * (1 - torch.eye(len(rows))), torch.zeros_like(product))
    assert float(product.diagonal().max()) <= 1 + 1e-12


def test_compressed_singular_values_are_lower_bounds() -> None:
    view, x, y = view_of(Round(1))
    weights = dict.fromkeys(view.observed, 1.0)
    system = System.of(view, y, fork(0, "system"), limit=100, weights=weights)
    assert any(isinstance(piece, Buckets) for piece in system.pieces.values())
    point = system.point(x)
    full = jacrev(lambda flat: view.simulate(*system.split(flat.view(point.shape))).flat())(point.reshape(-1))
    compressed = torch.linalg.svdvals(system.jacobian(point))
    whole = torch.linalg.svdvals(full)
    assert bool((compressed <= whole * (1 + 1e-9)).all())
    assert float(compressed[-1]) > 0.05 * float(whole[-1])


def test_lossless_compression_keeps_all_singular_values() -> None:
    """With one example and no buckets the fully connected layers are compressed without loss."""
    view, x, y = view_of(Round(1))
    weights = dict.fromkeys(view.observed, 1.0)
    system = System.of(view, y, fork(0, "system"), limit=10_000, weights=weights)
    assert sum(isinstance(piece, LowRank) for piece in system.pieces.values()) == 2
    point = system.point(x)
    full = jacrev(lambda flat: view.simulate(*system.split(flat.view(point.shape))).flat())(point.reshape(-1))
    assert len(system.target) < full.shape[0] / 5
    assert torch.allclose(torch.linalg.svdvals(system.jacobian(point)), torch.linalg.svdvals(full), rtol=1e-8)


def test_plan_counts_the_equations() -> None:
    view, _, y = view_of(Round(1))
    for limit in (100, 300, 10_000):
        system = System.of(view, y, fork(0, "system"), limit=limit)
        assert plan(view, limit).equations >= len(system.target)
        assert plan(view, limit).equations <= 1.3 * len(system.target)


def test_weight_used_twice_is_not_taken_for_a_plain_layer() -> None:
    """A tied weight gets gradient outside its layer, which `ProjectedLinear` would miss."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code = nn.Linear(72, 60)
            self.head = nn.Linear(72, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.code(x.flatten(1)).tanh() @ self.code.weight)

    space = Pixels(SHAPE, (0.4, 0.5), (0.2, 0.3))
    victim = Victim.of(Tied(), space, 7).to(dtype=torch.float64)
    x, y = torch.rand(1, *SHAPE, dtype=torch.float64), torch.tensor([1])
    view = View(victim, Round(1), client_update(victim, victim.params, Round(1), x, y).detach())
    system = System.of(view, y, fork(0, "system"))
    assert isinstance(system.pieces["code.weight"], LowRank)
    assert system.fast is None
    point = system.point(x)
    assert torch.allclose(system.jacobian(point), reverse_mode(system, point), rtol=1e-9, atol=1e-11)


def test_shared_linear_layers_and_limits() -> None:
    """A layer called at 5 positions has rank 5 a batch; the number of equations stays near the limit."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(12, 64)
            self.head = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(x.reshape(len(x), 6, 12)).tanh().mean(1))

    victim = Victim.of(Tokens(), Pixels(SHAPE), 3)
    x, y = torch.rand(1, *SHAPE), torch.tensor([1])
    view = View(victim, Round(1), client_update(victim, victim.params, Round(1), x, y).detach())
    pieces = compression(view, 200, fork(0, "pieces"))
    assert isinstance(pieces["head.weight"], LowRank)
    assert pieces["head.weight"].left.shape == (3, 1)
    assert isinstance(pieces["mix.weight"], Buckets)  # rank 6 of 12 saves nothing
    assert list(pieces) == list(view.observed)


@pytest.mark.parametrize("shape", [(30, 10), (10, 10), (10, 30)])
def test_spectrum_of_matrices_with_known_singular_values(shape: tuple[int, int]) -> None:
    generator = fork(0, "matrices")
    left = torch.linalg.qr(torch.randn(shape[0], 10, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 10, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(3, -3, 10, dtype=torch.float64)
    spectrum = Spectrum.of(left @ torch.diag(values) @ right.T)
    assert (spectrum.rank, spectrum.largest) == (10, pytest.approx(1e3))
    assert spectrum.full_rank == (shape[1] == 10)
    if spectrum.full_rank:
        assert spectrum.smallest == pytest.approx(1e-3, rel=1e-6)
        assert spectrum.condition == pytest.approx(1e6, rel=1e-6)
        assert spectrum.inverse_squares == pytest.approx(float((1 / values.square()).sum()), rel=1e-5)
        assert spectrum.weakest is not None
        assert abs(float(spectrum.weakest @ right[:, -1])) == pytest.approx(1, abs=1e-4)
    else:
        assert (spectrum.smallest, spectrum.weakest) == (0.0, None)


@pytest.mark.parametrize("lost", [1, 4])
def test_spectrum_counts_lost_directions(lost: int) -> None:
    matrix = torch.randn(30, 10, generator=fork(0, "matrix"), dtype=torch.float64)
    matrix[:, :lost] = matrix[:, lost : 2 * lost]
    spectrum = Spectrum.of(matrix)
    assert (spectrum.rank, spectrum.weakest) == (10 - lost, None)


def test_update_is_rebuilt_by_the_projected_victim() -> None:
    """The compressed victim computes the same logits and, uncompressed, the same bias gradients."""
    view, x, y = view_of(Round(1))
    system = System.of(view, y, fork(0, "system"))
    assert system.fast is not None
    logits = system.fast.victim.logits(system.fast.victim.params, x)
    assert torch.allclose(logits, view.victim.logits(view.victim.params, x), rtol=1e-12)
    assert torch.allclose(system.fast.simulate(x, y)["4.bias"], view.observed["4.bias"])
    assert isinstance(system.fast.observed, Update)
