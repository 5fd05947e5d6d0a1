"""Verification: the bound must hold, and nothing more may be claimed than is proven."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from leakaudit.attacks.jacobian import Spectrum
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known
from leakaudit.verification import Budget, expected_error, quantisation_step, verify

SHAPE = (1, 6, 6)
STD = 0.25


def victim_of(*layers: nn.Module, seed: int = 0) -> Victim:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(*layers)
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return Victim.of(module, Pixels(SHAPE, (0.5,), (STD,)), 5)


def full_rank(seed: int = 0) -> Victim:
    return victim_of(
        nn.Conv2d(1, 6, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(6 * 36, 5), seed=seed
    )


def few_features() -> Victim:
    """36 pixels enter only through 4 numbers, and no layer sees them directly but a frozen one."""
    victim = victim_of(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 5))
    victim.module[1].requires_grad_(False)
    return Victim.of(victim.module, victim.space, 5)


def strided() -> Victim:
    """A stride of 2 with a kernel of 1 looks at every fourth pixel: 9 of 36."""
    return victim_of(nn.Conv2d(1, 6, 1, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(54, 5))


def capture(victim: Victim, count: int = 1, seed: int = 0) -> tuple[View, Tensor, Tensor]:
    generator = fork(seed, "data")
    x = victim.space.encode(torch.rand((count, *SHAPE), generator=generator))
    y = torch.randperm(5, generator=generator)[:count]
    round = Round(count)
    observed = client_update(victim, victim.params, round, x, y).detach()
    return View(victim, round, observed), x, y


def noise_like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=fork(seed, "noise"), dtype=torch.float64)


def rms_in_pixels(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt()) * STD


@pytest.mark.parametrize("count", [1, 2])
def test_truth_is_verified(count: int) -> None:
    view, x, y = capture(full_rank(), count)
    found = verify(view, x, y)
    assert (found.status, found.rank, found.unknowns) == ("verified", 36 * count, 36 * count)
    assert found.distance is not None
    assert found.distance < 1e-2
    assert found.residual <= found.floor
    assert "nearby" in found.text
    assert "order of the batch" in found.text


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_verified_lies_within_the_bound(seed: int) -> None:
    """Perturb the truth until the residual just meets the floor: the bound must still cover it."""
    view, x, y = capture(full_rank(seed), 1, seed)
    direction = noise_like(x, seed)
    held = 0
    for exponent in torch.linspace(-7, -1, 25):
        candidate = x.double() + float(10**exponent) * direction
        found = verify(view, candidate, y)
        if found.status == "verified":
            held += 1
            assert found.distance is not None
            assert rms_in_pixels(candidate - x) <= found.distance
    assert held > 0


@pytest.mark.parametrize("scale", [True, False])
def test_cramer_rao_is_that_of_the_whole_jacobian(scale: bool) -> None:
    """Against the Fisher information of all numbers; compression loses a little."""
    view, x, y = capture(full_rank())
    exact = view.to(dtype=torch.float64)
    rows = torch.func.jacrev(lambda u: exact.simulate(u, y).flat())(x.double()).reshape(-1, 36) / STD
    errors = expected_error(view, x, y).rms
    each = torch.cat([torch.full((g.numel(),), errors[name]) for name, g in view.observed.items()])
    fisher = (rows / each[:, None]).T @ (rows / each[:, None])
    least = float((torch.linalg.inv(fisher).trace() / 36).sqrt())
    knowledge = Knowledge(scale=known(scale, "test"))
    found = verify(replace(view, observed=view.observed * (1 if scale else 7.0), knowledge=knowledge), x, y)
    assert found.cramer_rao is not None
    assert found.distance is not None
    assert found.cramer_rao < found.distance
    assert least <= found.cramer_rao * 1.0001
    assert found.cramer_rao < 3 * least


@pytest.mark.parametrize("seed", range(3))
def test_bound_covers_the_weakest_direction(seed: int) -> None:
    """The truth shifted along the worst direction, half as far as the floor lets it."""
    view, x, y = capture(full_rank(seed), 1, seed)
    found = verify(view, x, y)
    exact = view.to(dtype=torch.float64)
    rows = torch.func.jacrev(lambda u: exact.simulate(u, y).flat())(x.double()).reshape(-1, 36)
    weakest = torch.linalg.svd(rows).Vh[-1].view(x.shape)
    gap = found.floor * float(exact.observed.norm()) / float(torch.linalg.svdvals(rows)[-1])
    candidate = x.double() + 0.5 * gap * weakest
    shifted = verify(view, candidate, y)
    assert shifted.residual == pytest.approx(0.5 * found.floor, rel=0.5)
    assert shifted.status == "verified"
    assert shifted.distance is not None
    assert rms_in_pixels(candidate - x) <= shifted.distance


@pytest.mark.parametrize(("victim", "rank"), [(few_features(), 4), (strided(), 9)])
def test_rank_deficiency_is_consistent_and_says_the_rank(victim: Victim, rank: int) -> None:
    view, x, y = capture(victim)
    found = verify(view, x, y)
    assert (found.status, found.rank, found.distance) == ("consistent", rank, None)
    assert f"rank {rank} of 36" in found.reason


def test_another_input_with_the_same_update_is_never_verified() -> None:
    view, x, y = capture(strided())
    other = x.clone()
    other[..., 1::2, :] = 0
    assert verify(view, other, y).status == "consistent"


def test_wrong_checkpoint_and_wrong_label_are_not_matched() -> None:
    view, x, y = capture(full_rank())
    foreign = replace(view, victim=full_rank(seed=1))
    assert verify(foreign, x, y).status == "not-matched"
    wrong = verify(view, x, (y + 1) % 5)
    assert wrong.status == "not-matched"
    assert wrong.distance is None
    assert wrong.residual > 1e3 * wrong.floor


def test_near_miss_is_not_matched() -> None:
    view, x, y = capture(full_rank())
    assert verify(view, x + 1e-3 * noise_like(x, 0).float(), y).status == "not-matched"


def test_known_noise_sets_the_floor() -> None:
    clean, x, y = capture(full_rank())
    std = 1e-4
    noisy = clean.observed.map(lambda g: g + std * torch.randn(g.shape, generator=fork(0, "dp")))
    without = replace(clean, observed=noisy)
    assert verify(without, x, y).status == "not-matched"
    view = replace(without, knowledge=Knowledge(noise_std=known(std, "told")))
    found = verify(view, x, y)
    expected = std * noisy.numel() ** 0.5 / float(noisy.norm())
    assert found.status != "not-matched"
    assert expected < found.floor < 1.1 * expected
    much_less = replace(without, knowledge=Knowledge(noise_std=known(std / 3, "told")))
    assert verify(much_less, x, y).status == "not-matched"


def test_noise_too_large_to_prove_anything_is_consistent() -> None:
    clean, x, y = capture(full_rank())
    noisy = clean.observed.map(lambda g: g + 0.1 * torch.randn(g.shape, generator=fork(0, "dp")))
    found = verify(replace(clean, observed=noisy, knowledge=Knowledge(noise_std=known(0.1, "told"))), x, y)
    assert found.status == "consistent"
    assert "known noise allows a distance" in found.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_storage_precision_sets_the_floor(dtype: torch.dtype) -> None:
    view, x, y = capture(full_rank())
    stored = view.to(dtype=torch.float64).simulate(x.double(), y).to(dtype).to(torch.float64)
    found = verify(replace(view, victim=view.victim.to(dtype=torch.float64), observed=stored), x, y)
    assert found.residual <= found.floor
    assert found.floor < {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float64: 1e-10}[dtype]


def test_difference_of_checkpoints_sets_the_floor() -> None:
    """(before - after) / learning rate in float32 loses digits, which the reader of the file reports."""
    view, x, y = capture(full_rank())
    rate = 1e-3
    before = view.victim.params
    delta = {name: (p - (p - rate * view.observed[name])) / rate for name, p in before.items()}
    observed = type(view.observed)(delta)
    rounding = float((observed - view.observed).norm() / view.observed.norm())
    assert rounding > 1e-5
    assert verify(replace(view, observed=observed), x, y).status == "not-matched"
    assert verify(replace(view, observed=observed, rounding=rounding), x, y).status != "not-matched"


def test_quantisation_sets_the_floor() -> None:
    view, x, y = capture(full_rank())
    step = float(view.observed["3.weight"].abs().max()) / 127
    quantised = dict(view.observed) | {"3.weight": (view.observed["3.weight"] / step).round() * step}
    quantised_view = replace(view, observed=type(view.observed)(quantised))
    assert quantisation_step(quantised["3.weight"]) == pytest.approx(step, rel=1e-3)
    assert expected_error(quantised_view, x, y).source == "quantisation"
    assert verify(quantised_view, x, y).status != "not-matched"


@pytest.mark.parametrize(
    ("values", "step"),
    [
        (torch.randn(1000, generator=fork(0, "values")), 0.0),
        (torch.zeros(100), 0.0),
        (torch.tensor([-1.0, 1.0]).repeat(50), 0.0),
        (torch.arange(10.0).repeat(10), 1.0),
        (0.25 * torch.arange(10.0).repeat(10) - 3, 0.25),
    ],
)
def test_quantisation_step(values: Tensor, step: float) -> None:
    assert quantisation_step(values) == step


def test_scale_free_update() -> None:
    view, x, y = capture(full_rank())
    scaled = replace(view, observed=view.observed * 37.0, knowledge=Knowledge(scale=known(False, "test")))
    assert verify(scaled, x, y).status == "verified"
    assert verify(replace(scaled, knowledge=Knowledge()), x, y).status == "not-matched"


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        (Budget(unknowns=35), "36 unknowns"),
        (Budget(gigabytes=1e-6), "GB"),
        (Budget(seconds=0.0), "about"),
    ],
)
def test_budget_leaves_the_jacobian_out_and_says_so(budget: Budget, word: str) -> None:
    view, x, y = capture(full_rank())
    found = verify(view, x, y, budget)
    assert (found.status, found.rank, found.distance) == ("consistent", None, None)
    assert word in found.reason


def test_nonlinear_neighbourhood_is_not_verified() -> None:
    """A bound that reaches across the kinks of a ReLU network is dropped or covers the truth."""
    victim = victim_of(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
    view, x, y = capture(victim)
    noisy = view.observed.map(lambda g: g + 2e-3 * torch.randn(g.shape, generator=fork(0, "dp")))
    found = verify(replace(view, observed=noisy, knowledge=Knowledge(noise_std=known(2e-3, "told"))), x, y)
    assert found.status == "consistent"


def test_soft_labels_are_taken_as_given() -> None:
    view, x, y = capture(full_rank())
    soft = nn.functional.one_hot(y, 5).double()
    assert verify(view, x, soft).status == "verified"


def test_a_match_that_a_grey_picture_reaches_too_is_no_leak() -> None:
    """Under huge noise anything matches: it must not count, with or without a Jacobian."""
    clean, x, y = capture(full_rank())
    std = 10 * float(clean.observed.norm()) / clean.observed.numel() ** 0.5
    noisy = clean.observed.map(lambda g: g + std * torch.randn(g.shape, generator=fork(0, "dp")))
    view = replace(clean, observed=noisy, spread=dict.fromkeys(noisy, std))
    nonsense = noise_like(x, 1)
    for budget in (Budget(), Budget(unknowns=1)):
        found = verify(view, nonsense, y, budget)
        assert (found.status, found.left_open) == ("consistent", 1.0)
        assert "grey" in found.reason


def test_what_is_left_open_grows_with_the_noise_and_decides_the_verdict() -> None:
    clean, x, y = capture(full_rank())
    shares = []
    for std in (1e-4, 1e-1, 2.0):
        noisy = clean.observed.map(lambda g, std=std: g + std * torch.randn(g.shape, generator=fork(0, "dp")))  # type: ignore[misc]
        found = verify(replace(clean, observed=noisy, spread=dict.fromkeys(noisy, std)), x, y)
        assert found.left_open is not None
        shares.append(found.left_open)
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert shares[-1] > 0.5


def test_left_open_is_the_posterior_variance_of_a_linear_gaussian_problem() -> None:
    matrix = torch.randn(30, 6, dtype=torch.float64, generator=fork(0, "m"))
    prior = torch.eye(6, dtype=torch.float64) / 0.25**2
    expected = torch.linalg.inv(matrix.T @ matrix + prior).trace() / (6 * 0.25**2)
    assert Spectrum.of(matrix).left_open(0.25) == pytest.approx(float(expected))
    wide = matrix[:4]
    expected = torch.linalg.inv(wide.T @ wide + prior).trace() / (6 * 0.25**2)
    assert Spectrum.of(wide).left_open(0.25) == pytest.approx(float(expected))
