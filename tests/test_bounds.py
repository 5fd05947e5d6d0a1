"""Bounds against closed forms, explicit adversaries and whole Jacobians."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from small_transformers import labels_for, random_sentences, small_victim
from tiny_audits import private_batch, victim_of, view_of
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.levenberg_marquardt import LevenbergMarquardt
from leakaudit.bounds import Limits, greatest_success, mechanism, noise_of, target_bounds
from leakaudit.defenses import DPSGD, ClipExamples, Defense, GaussianNoise, adapt, apply
from leakaudit.defenses.accounting import epsilon_spent
from leakaudit.errors import InputError
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.sweep_results import Bound
from leakaudit.threat import View, known


def bounds_of(
    view: View, x: Tensor, y: Tensor, *defenses: Defense, limits: Limits | None = None, **training: Any
) -> dict[str, Bound]:
    specs = [(type(defense).__name__, defense) for defense in defenses]
    found = target_bounds(
        view, x, y, specs, protocol="p", defense="d", generator=fork(0, "bounds"), limits=limits, **training
    )
    assert len({bound.name for bound in found}) == len(found)
    return {bound.name: bound for bound in found}


# ------------------------------------------------------------------ reconstruction robustness


def closed(noise: float, steps: int, prior: float) -> float:
    return float(stats.norm.cdf(stats.norm.ppf(prior) + math.sqrt(steps) / noise))


def test_without_sampling_the_closed_form() -> None:
    found = greatest_success(0.8, 1.0, 4, 0.1, fork(0, "mc"))
    assert found.value == pytest.approx(closed(0.8, 4, 0.1))
    assert found.confidence == 1


@pytest.mark.parametrize(("noise", "steps", "prior"), [(1.0, 1, 0.1), (2.0, 9, 0.3), (0.7, 2, 0.01)])
def test_monte_carlo_near_full_sampling_agrees_with_the_closed_form(
    noise: float, steps: int, prior: float
) -> None:
    """At a rate this close to 1 the exact value is within 1e-6 of the closed form's."""
    found = greatest_success(noise, 1 - 1e-7, steps, prior, fork(0, "mc"), draws=40_000)
    exact = closed(noise, steps, prior)
    assert found.estimate == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000) + 0.01)
    assert exact - 1e-6 <= found.value


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_one_sampled_step_against_the_exact_value(rate: float) -> None:
    """In one dimension the best test is a threshold: (1 - q) prior + q Phi(Phi^-1(prior) + 1 / sigma)."""
    exact = (1 - rate) * 0.1 + rate * closed(1.0, 1, 0.1)
    found = greatest_success(1.0, rate, 1, 0.1, fork(0, "mc"))
    assert found.estimate == pytest.approx(exact, abs=0.01)
    assert exact <= found.value <= exact + 0.02


def test_the_limit_holds_as_often_as_it_says() -> None:
    exact = 0.5 * 0.1 + 0.5 * closed(1.0, 1, 0.1)
    limits = [
        greatest_success(1.0, 0.5, 1, 0.1, fork(i, "mc"), draws=500, confidence=0.8).value for i in range(200)
    ]
    assert sum(limit >= exact for limit in limits) >= 0.8 * 200


@settings(max_examples=10, deadline=None)
@given(
    st.floats(0.3, 5.0),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.integers(1, 30),
    st.sampled_from([1e-4, 0.1, 0.6]),
)
def test_never_below_the_prior_and_monotone(noise: float, rate: float, steps: int, prior: float) -> None:
    def value(noise: float, steps: int) -> float:
        return greatest_success(noise, rate, steps, prior, fork(0, "mc"), draws=4000).value

    base = value(noise, steps)
    assert prior <= base <= 1
    assert base <= closed(noise, steps, prior) + 1e-12
    assert value(2 * noise, steps) <= base + 0.05
    assert value(noise, 4 * steps) >= base - 0.05


@pytest.mark.parametrize("directions", [1, 10])
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_no_explicit_adversary_does_better(directions: int, noise: float, steps: int) -> None:
    """Ten equally likely gradients within the clipping bound; the maximum a posteriori guess from noisy sums."""
    candidates = torch.eye(10) if directions == 10 else torch.linspace(-1, 1, 10)[:, None]
    generator = fork(0, "game")
    secret = torch.randint(10, (4000,), generator=generator)
    shape = (4000, steps, candidates.shape[1])
    seen = candidates[secret][:, None] + noise * torch.randn(shape, generator=generator)
    distances = (seen[:, :, None] - candidates).square().sum((1, 3))
    success = float((distances.argmin(1) == secret).float().mean())
    bound = greatest_success(noise, 1.0, steps, 0.1, generator).value
    assert success <= bound + 3 * math.sqrt(0.25 / 4000)
    assert success > 0.1 - 0.02


def test_no_explicit_adversary_does_better_under_sampling() -> None:
    """Two candidates, -1 and 1, of which each of 20 steps may hold the secret."""
    generator, rate, noise = fork(0, "game"), 0.3, 1.0
    secret = torch.randint(2, (20_000,), generator=generator) * 2.0 - 1
    there = torch.rand(20_000, 20, generator=generator) < rate
    seen = secret[:, None] * there + noise * torch.randn(20_000, 20, generator=generator)

    def likelihood(value: float) -> Tensor:
        return torch.log((1 - rate) + rate * torch.exp((2 * value * seen - 1) / (2 * noise**2))).sum(1)

    guess = torch.where(likelihood(1.0) > likelihood(-1.0), 1.0, -1.0)
    success = float((guess == secret).float().mean())
    found = greatest_success(noise, rate, 20, 0.5, generator)
    assert 0.6 < success <= found.value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("noise_multiplier", (0.0, 1.0, 1, 0.1)),
        ("sample_rate", (1.0, 1.5, 1, 0.1)),
        ("steps", (1.0, 1.0, 0, 0.1)),
        ("prior", (1.0, 1.0, 1, 1.0)),
    ],
)
def test_values_that_cannot_be(name: str, values: tuple[float, float, int, float]) -> None:
    with pytest.raises(InputError, match=name):
        greatest_success(*values, fork(0, "mc"))


# ------------------------------------------------------------------ DP-SGD as a target


def test_several_uses_of_an_example_are_one_larger_step() -> None:
    private = DPSGD(noise_multiplier=2.0)
    assert mechanism(private, Round(4), 0.1, 7).noise_multiplier == 2.0
    passes = Round(4, local_steps=8, local_batch_size=2)  # four passes over two batches
    assert mechanism(private, passes, 0.1, 7).noise_multiplier == pytest.approx(1.0)
    poisson = mechanism(DPSGD(noise_multiplier=2.0, poisson=True, sample_rate=0.5), Round(4), 0.1, 7)
    assert (poisson.noise_multiplier, poisson.sample_rate, poisson.steps) == (2.0, pytest.approx(0.05), 7)


def test_dp_sgd_has_epsilon_and_robustness() -> None:
    defense, (x, y) = DPSGD(noise_multiplier=1.0), private_batch(1)
    view = adapt(view_of(victim_of("mlp"), Round(1)), [defense])
    found = bounds_of(view, x, y, defense, sample_rate=0.1, steps=20, delta=1e-5, prior=0.2)
    assert found["epsilon"].value == epsilon_spent(1.0, 0.1, 20, 1e-5)[0]
    assert found["reconstruction-robustness"].value == pytest.approx(closed(1.0, 1, 0.2))
    training = found["reconstruction-robustness-training"]
    assert training.value is not None
    assert 0.2 < training.value < closed(1.0, 20, 0.2)
    assert {found[name].kind for name in ("epsilon", "reconstruction-robustness")} == {"bound"}
    assert found["cramer-rao"].kind == found["rank"].kind == "indicator"
    assert all(bound.source and bound.assumptions for bound in found.values())
    alone = bounds_of(view, x, y, defense)
    assert "reconstruction-robustness-training" not in alone


def test_clipping_without_noise_is_no_bound() -> None:
    defense, (x, y) = ClipExamples(max_grad_norm=0.1), private_batch(1)
    view = adapt(view_of(victim_of("smooth"), Round(1)), [defense])
    assert set(bounds_of(view, x, y, defense)) == {"rank", "condition"}


# ------------------------------------------------------------------ Fisher information


def whole_jacobian(view: View, x: Tensor, y: Tensor) -> Tensor:
    """d update / d pixels in [0, 1], (numbers, pixels), by reverse mode, without any compression."""
    victim = view.victim.to(dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(
        lambda point: view.client(victim, victim.params, view.round, point, y).select(view.observed).flat(),
        x.double(),
    )
    return rows.flatten(1) / 0.25


def noisy_view(defense: Defense, count: int = 1, std: float | None = None) -> tuple[View, Tensor, Tensor]:
    victim, (x, y) = victim_of("smooth"), private_batch(count)
    view = view_of(victim, Round(count))
    observed = apply(client_update, [defense], fork(0, "noise"))(victim, victim.params, Round(count), x, y)
    view = adapt(replace(view, observed=observed), [defense])
    if std is not None:
        view = replace(
            view,
            spread=dict.fromkeys(observed, std),
            knowledge=replace(view.knowledge, noise_std=known(std, "test"), labels=known(y, "test")),
        )
    return view, x, y


@pytest.mark.parametrize(
    ("defense", "count"), [(GaussianNoise(std=1e-3), 1), (DPSGD(noise_multiplier=0.01, max_grad_norm=0.2), 2)]
)
def test_cramer_rao_is_that_of_the_whole_jacobian(defense: Defense, count: int) -> None:
    std = defense.std if isinstance(defense, GaussianNoise) else 0.01 * 0.2 / 2
    view, x, y = noisy_view(defense, count, std)
    fisher = whole_jacobian(view, x, y)
    fisher = fisher.T @ fisher / std**2
    expected = float(torch.linalg.inv(fisher).trace()) / (192 * count)
    found = bounds_of(view, x, y, defense)
    assert found["cramer-rao"].value == pytest.approx(expected, rel=1e-4)
    values = torch.linalg.eigvalsh(fisher)
    assert found["condition"].value == pytest.approx(float((values[-1] / values[0]).sqrt()), rel=1e-3)
    assert found["rank"].value == 0
    assert found["bayesian-cramer-rao"].value < expected
    assert found["bayesian-cramer-rao"].value <= 0.25


def test_behind_endless_noise_only_the_prior_is_left() -> None:
    """The mean of a channel has deviation 0.5, whatever the normalisation; neighbours differ by 0.1 on top."""
    view, x, y = noisy_view(GaussianNoise(std=1e9), std=1e9)
    left = bounds_of(view, x, y, GaussianNoise(std=1e9))["bayesian-cramer-rao"].value
    assert left is not None
    assert 0.25 < left < 0.27


def test_a_tensor_without_noise_counts_for_more() -> None:
    view, x, y = noisy_view(GaussianNoise(std=1e-3), std=1e-3)
    some = replace(view, spread=dict.fromkeys(list(view.observed)[1:], 0.001))
    assert min(noise_of(some).values()) == pytest.approx(1e-7)
    more, less = (bounds_of(v, x, y, GaussianNoise())["cramer-rao"].value for v in (view, some))
    assert less is not None
    assert more is not None
    assert less < more


def test_too_few_equations_leave_dimensions_open() -> None:
    x, y = private_batch(1)
    view = view_of(victim_of("smooth"), Round(1))
    view = replace(view, observed=view.observed.select(list(view.observed)[-2:]))  # the last layer only
    found = bounds_of(view, x, y)
    rank = int(torch.linalg.matrix_rank(whole_jacobian(view, x, y)))
    assert found["rank"].value == 192 - rank > 0
    assert found["condition"].value is None
    noisy = replace(view, spread=dict.fromkeys(view.observed, 1e-3))
    infinite = bounds_of(noisy, x, y)["cramer-rao"]
    assert infinite.value is None
    assert "dimensions open" in infinite.text
    assert bounds_of(noisy, x, y)["bayesian-cramer-rao"].value < 0.25


@pytest.mark.parametrize(
    "limits", [Limits(unknowns=100), Limits(memory_gb=1e-6), Limits(seconds=1e-9)], ids=str
)
def test_what_costs_too_much_says_so(limits: Limits) -> None:
    view, x, y = noisy_view(GaussianNoise(std=1e-3), std=1e-3)
    found = bounds_of(view, x, y, GaussianNoise(), limits=limits)
    assert found["cramer-rao"].value is None
    assert found["cramer-rao"].text.startswith("Not computed: ")
    assert found["bayesian-cramer-rao"].value is None


def mean_error(view: View, x: Tensor, std: float, attack: LevenbergMarquardt, draws: int) -> float:
    """Mean squared error per pixel of [0, 1] over draws of the noise."""
    client = apply(client_update, [GaussianNoise(std=std)], fork(1, "noise"))
    y = view.knowledge.labels.value
    errors = []
    for _ in range(draws):
        seen = replace(view, observed=client(view.victim, view.victim.params, view.round, x, y))
        found = attack.run(seen, fork(0, "start"), Monitor())
        errors.append(float(((found.x - x) * 0.25).square().mean()))
    return sum(errors) / draws


def test_the_attack_never_beats_the_figure_and_comes_close() -> None:
    """Maximum likelihood under little noise, without the box, which is a prior; four standard errors allowed.

    The error of a draw is a sum of squares of independent Gaussians with variances 1 / eigenvalue.
    """
    std, draws = 3e-6, 5
    view, x, y = noisy_view(GaussianNoise(std=std), std=std)
    jacobian = whole_jacobian(view, x, y)
    variances = 1 / torch.linalg.eigvalsh(jacobian.T @ jacobian / std**2)
    allowed = 4 * float((2 * variances.square().sum() / draws).sqrt() / variances.sum())
    likely = bounds_of(view, x, y, GaussianNoise(std=std))["cramer-rao"].value
    assert likely is not None
    attack = LevenbergMarquardt(smoothness=0.0, box=False, warm_start=0, restarts=1)
    assert mean_error(view, x, std, attack, draws) == pytest.approx(likely, rel=allowed)
    assert allowed < 0.4


def test_the_maximum_a_posteriori_attack_follows_the_bayesian_figure() -> None:
    """Noise at which the likelihood alone says little: the prior is what helps, and the figure knows."""
    std = 1e-3
    view, x, y = noisy_view(GaussianNoise(std=std), std=std)
    figures = bounds_of(view, x, y, GaussianNoise(std=std))
    likely, prior = figures["cramer-rao"].value, figures["bayesian-cramer-rao"].value
    assert likely is not None
    assert prior is not None
    mean = mean_error(view, x, std, LevenbergMarquardt(warm_start=0, restarts=1), 3)
    assert 0.6 * prior < mean < 1.6 * prior
    assert mean < 0.6 * likely


# ------------------------------------------------------------------ text


def test_free_dimensions_of_text() -> None:
    victim, x = small_victim("gpt2", "classification"), random_sentences(5, 7)
    y = labels_for("classification", x)
    observed = client_update(victim, victim.params, Round(2), x, y).detach()
    found = bounds_of(View(victim, Round(2), observed), x, y)
    assert set(found) == {"token-rank"}
    bound = found["token-rank"]
    assert bound.data["tokens"] == 12
    assert bound.value == bound.data["width"] - bound.data["rank"] > 0
    longer = random_sentences(20, 20, 20)
    full = bounds_of(View(victim, Round(3), observed), longer, labels_for("classification", longer))
    assert full["token-rank"].value == 0
