"""What an adversary who knows the defense does with it: properties of the comparison, and small attacks end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_audits import SPACE, private_batch, victim_of, view_of
from torch import Tensor

from leakaudit.attacks.base import Attack, Monitor
from leakaudit.attacks.disturbance import Comparison, errors_of, likely_length
from leakaudit.attacks.gradient_matching import DLG, IDLG, TV_PATH, TotalVariationPath, assumed_labels
from leakaudit.attacks.jacobian import System
from leakaudit.attacks.labels import likely_labels
from leakaudit.attacks.levenberg_marquardt import LevenbergMarquardt
from leakaudit.attacks.linear import Linear
from leakaudit.attacks.matching import fitted, outside, squared
from leakaudit.attacks.optimise import Matching
from leakaudit.defenses.base import after
from leakaudit.randomness import fork
from leakaudit.rounds import client_update
from leakaudit.threat import Fact, View, known
from leakaudit.update import Update

NUMBERS = st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6)
HALVES = st.lists(st.floats(0, 2, width=32), min_size=6, max_size=6)


def update(numbers: list[float]) -> Update:
    values = torch.tensor(numbers, dtype=torch.float64)
    return Update({"w": values[:4].view(2, 2), "b": values[4:]})


def smooth() -> tuple[View, Tensor, Tensor]:
    x, y = private_batch()
    return view_of(victim_of("smooth"), labels=known(y, "test")), x, y


def disturbed(view: View, std: float, seed: int = 0) -> View:
    noise = fork(seed, "noise")
    return replace(
        view, observed=view.observed.map(lambda g: g + std * torch.randn(g.shape, generator=noise))
    )


def error(found: Tensor, truth: Tensor) -> float:
    """Mean squared error in pixels of [0, 1]."""
    return float((SPACE.decode(SPACE.project(found)) - SPACE.decode(truth)).square().mean())


# ------------------------------------------------------------------ the comparison


@settings(max_examples=60, deadline=None)
@given(NUMBERS, NUMBERS, HALVES)
def test_an_interval_counts_only_what_lies_outside(
    left: list[float], right: list[float], half: list[float]
) -> None:
    simulated, observed, slack = update(left), update(right), update(half)
    beyond = ((simulated - observed).flat().abs() - slack.flat()).clamp(min=0)
    found = squared(outside(simulated, observed, slack), observed)
    assert float(found) == pytest.approx(float(beyond.square().sum()))
    nothing = update([0.0] * 6)
    torch.testing.assert_close(outside(simulated, observed, nothing).flat(), simulated.flat())
    torch.testing.assert_close(outside(simulated, observed, slack, pull=1.0).flat(), simulated.flat())


def test_within_the_interval_only_the_pull_is_left() -> None:
    observed, slack = update([0.0] * 6), update([0.5] * 6)
    inside = update([0.4, -0.4, 0.1, 0.0, 0.5, -0.5])
    assert float(squared(outside(inside, observed, slack), observed)) == 0
    pulled = squared(outside(inside, observed, slack, pull=0.1), observed)
    assert float(pulled) == pytest.approx(0.01 * float(squared(inside, observed)))


@settings(max_examples=30, deadline=None)
@given(NUMBERS, st.floats(0.01, 100), st.floats(0.1, 10))
def test_fitted_has_the_length_asked_for_whatever_it_had(
    numbers: list[float], factor: float, length: float
) -> None:
    here = update(numbers)
    if float(here.norm()) > 1e-3:
        assert float(fitted(here, length).norm()) == pytest.approx(length)
        torch.testing.assert_close(fitted(here * factor, length).flat(), fitted(here, length).flat())


@pytest.mark.parametrize("distance", ["squared", "relative", "cosine"])
def test_without_a_scale_no_factor_of_the_update_matters(distance: str) -> None:
    view, x, y = smooth()
    view, x = view.to(dtype=torch.float64), x.double()
    free = replace(view, knowledge=replace(view.knowledge, scale=known(False, "test")))
    objective = Matching(free, distance)  # type: ignore[arg-type]
    longer = Matching(replace(free, observed=free.observed * 7.5), distance)  # type: ignore[arg-type]
    per_length = 7.5**2 if distance == "squared" else 1.0
    assert float(longer(x + 0.2, y)) == pytest.approx(per_length * float(objective(x + 0.2, y)), rel=1e-4)
    assert float(objective(x, y)) < 1e-6 * float(objective(x + 0.2, y))


def test_equal_noise_everywhere_leaves_the_squared_distance_as_it_is() -> None:
    view, x, y = smooth()
    with_spread = replace(view, spread=dict.fromkeys(view.observed, 0.01))
    by_knowledge = replace(view, knowledge=replace(view.knowledge, noise_std=known(0.01, "test")))
    plain = float(Matching(view, "squared")(x + 0.1, y))
    for other in (with_spread, by_knowledge):
        assert float(Matching(other, "squared")(x + 0.1, y)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("distance", ["squared", "relative"])
def test_noise_weighs_tensors_by_maximum_likelihood(distance: str) -> None:
    view, x, y = smooth()
    spread = {name: 0.01 * (1 + index) for index, name in enumerate(view.observed)}
    objective = Matching(replace(view, spread=spread), distance)  # type: ignore[arg-type]

    def chi_square(x: Tensor) -> float:
        departure = view.simulate(x, y) - view.observed
        return sum(float((g / spread[name]).square().sum()) for name, g in departure.items())

    other = x.flip(-1)
    ratio = float(objective(x + 0.1, y)) / float(objective(other, y))
    assert ratio == pytest.approx(chi_square(x + 0.1) / chi_square(other), rel=1e-4)


def test_errors_are_those_of_noise_and_of_rounding_together() -> None:
    view, _, _ = smooth()
    names = list(view.observed)
    slack = view.observed.map(lambda g: torch.full_like(g, 0.03))
    both = replace(view, spread={names[0]: 0.04}, slack=slack)
    assert errors_of(view) == {}
    assert errors_of(both)[names[0]] == 0.04, "a spread already holds the rounding"
    assert errors_of(both)[names[1]] == pytest.approx(0.03 / 3**0.5)
    assert errors_of(replace(view, spread={names[0]: 1.0}))[names[1]] == pytest.approx(1e-3)
    assert Comparison.of(both).slack is None
    assert Comparison.of(replace(view, slack=slack)).slack is slack


def test_the_likely_length_is_that_without_the_noise() -> None:
    view, _, _ = smooth()
    std = 3 * float(view.observed.norm()) / view.observed.numel() ** 0.5
    noisy = replace(disturbed(view, std), spread=dict.fromkeys(view.observed, std))
    assert float(noisy.observed.norm()) > 2 * float(view.observed.norm())
    assert likely_length(noisy) == pytest.approx(float(view.observed.norm()), rel=0.5)


@pytest.mark.parametrize("distance", ["squared", "relative"])
@pytest.mark.parametrize("kind", ["scale-free", "slack", "spread", "scale-free with spread"])
def test_the_gradient_is_that_of_finite_differences(distance: str, kind: str) -> None:
    view, x, y = smooth()
    view = view.to(dtype=torch.float64)
    if "scale-free" in kind:
        view = replace(view, knowledge=replace(view.knowledge, scale=known(False, "test")))
    if "spread" in kind:
        view = replace(view, spread={name: 0.01 * (1 + i) for i, name in enumerate(view.observed)})
    if kind == "slack":
        view = replace(view, slack=view.observed.map(lambda g: 0.01 * torch.ones_like(g)))
    objective = Matching(view, distance)  # type: ignore[arg-type]
    here = (x.double() + 0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(here, y), here)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=fork(0, "direction"))
    step = 1e-6
    with torch.no_grad():
        rise = float(objective(here + step * direction, y) - objective(here - step * direction, y))
    assert float((gradient * direction).sum()) == pytest.approx(rise / (2 * step), rel=1e-4)


# ------------------------------------------------------------------ adaptive against oblivious


def test_knowing_the_noise_beats_not_knowing_it() -> None:
    view, x, _ = smooth()
    std = 0.1 * float(view.observed.norm()) / view.observed.numel() ** 0.5
    oblivious = disturbed(view, std)
    adaptive = replace(oblivious, spread=dict.fromkeys(view.observed, std))
    attack = replace(TV_PATH, iterations=3, stages=3)
    aware, blind = (attack.run(v, fork(0, "a"), Monitor()).x for v in (adaptive, oblivious))
    assert error(aware, x) < 0.5 * error(blind, x)


def test_noise_that_drowns_the_update_leaves_a_smooth_picture() -> None:
    view, _, _ = smooth()
    std = 100 * float(view.observed.norm()) / view.observed.numel() ** 0.5
    drowned = replace(disturbed(view, std), spread=dict.fromkeys(view.observed, std))
    found = replace(TV_PATH, iterations=3, stages=3).run(drowned, fork(0, "a"), Monitor())
    pixels = SPACE.decode(found.x)
    assert float(pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()) < 0.02


def shortened(attack: Attack) -> Attack:
    """Enough for a comparison, in a second."""
    if isinstance(attack, TotalVariationPath):
        return replace(attack, iterations=3, stages=3, first=1e-2)
    return replace(attack, iterations=10)  # type: ignore[type-var]


def largest(view: View) -> Callable[[Update], Update]:
    """Keeps the numbers of the observed update that are not zero."""
    kept = view.observed.map(lambda g: (g.abs() >= g.abs().flatten().quantile(0.7)).to(g))
    return lambda update: update.combine(kept, torch.mul)


@pytest.mark.parametrize("attack", [IDLG, TV_PATH], ids=["idlg", "tv-path"])
def test_simulating_the_mask_beats_matching_its_zeros(attack: Attack) -> None:
    view, x, _ = smooth()
    mask = largest(view)
    oblivious = replace(view, observed=mask(view.observed))
    adaptive = replace(oblivious, client=after(client_update, mask))
    short = shortened(attack)
    aware, blind = (short.run(v, fork(0, "a"), Monitor()).x for v in (adaptive, oblivious))
    assert error(aware, x) < 0.1 * error(blind, x)


@pytest.mark.parametrize("attack", [DLG, TV_PATH], ids=["dlg", "tv-path"])
def test_knowing_that_the_length_was_clipped_beats_believing_it(attack: Attack) -> None:
    view, x, _ = smooth()
    oblivious = replace(view, observed=view.observed * 0.05)
    adaptive = replace(oblivious, knowledge=replace(view.knowledge, scale=known(False, "clipped")))
    short = shortened(attack)
    assert short.applies(adaptive) is None
    aware, blind = (short.run(v, fork(0, "a"), Monitor()).x for v in (adaptive, oblivious))
    assert error(aware, x) < 0.1 * error(blind, x)


def test_knowing_the_interval_of_rounding_beats_taking_numbers_for_exact() -> None:
    view, x, _ = smooth()
    step = view.observed.map(lambda g: g.abs().max() / 20)
    oblivious = replace(view, observed=view.observed.combine(step, lambda g, s: (g / s).round() * s))
    adaptive = replace(oblivious, slack=view.observed.combine(step, lambda g, s: s / 2 + 0 * g))
    attack = replace(TV_PATH, iterations=4, stages=3)
    aware, blind = (attack.run(v, fork(0, "a"), Monitor()).x for v in (adaptive, oblivious))
    assert error(aware, x) < error(blind, x)


def test_a_label_in_doubt_is_settled_by_the_match() -> None:
    view, _, y = smooth()
    bias = view.victim.classifier().bias  # type: ignore[union-attr]
    wrong = (int(y) + 1) % view.victim.num_classes
    swapped = view.observed[bias].clone()  # type: ignore[index]
    swapped[wrong] = swapped[int(y)] - 0.01
    observed = Update({name: swapped if name == bias else g for name, g in view.observed.items()})
    unknown = replace(view.knowledge, labels=Fact())
    doubtful = replace(view, observed=observed, knowledge=unknown, spread=dict.fromkeys(observed, 1e-3))
    doubtful = replace(doubtful, spread={**doubtful.spread, bias: 0.05})  # type: ignore[dict-item]
    assert likely_labels(doubtful, 5)[:2] == [wrong, int(y)]
    assert int(assumed_labels(doubtful, fork(0, "a"))) == int(y)
    assert likely_labels(replace(doubtful, spread=dict.fromkeys(observed, 1e-4)), 5) == [wrong]


def test_masked_numbers_are_no_equations() -> None:
    view, x, y = smooth()
    mask = largest(view)
    masked = replace(view, observed=mask(view.observed), client=after(client_update, mask))
    kept = sum(int((g != 0).sum()) for g in masked.observed.values())
    system = System.of(masked.to(dtype=torch.float64), y, fork(0, "s"), 10**6)
    assert len(system.target) == kept
    assert float(system.residual(system.point(x.double())).norm()) < 1e-5 * float(system.target.norm())
    found = LevenbergMarquardt(warm_start=0).run(masked, fork(0, "a"), Monitor())
    assert error(found.x, x) < 1e-6


def test_levenberg_marquardt_weighs_by_the_spread_without_a_scale_too() -> None:
    """The same noise and prior, with and without a scale, give the same picture."""
    view, x, _ = smooth()
    std = 0.01 * float(view.observed.norm()) / view.observed.numel() ** 0.5
    noisy = replace(disturbed(view, std), spread=dict.fromkeys(view.observed, std))
    free = replace(
        noisy,
        observed=noisy.observed * 7.0,
        spread={name: 7.0 * value for name, value in noisy.spread.items()},
        knowledge=replace(view.knowledge, scale=known(False, "test")),
    )
    attack = LevenbergMarquardt(warm_start=0, iterations=8)
    scaled, unscaled = (error(attack.run(v, fork(0, "a"), Monitor()).x, x) for v in (noisy, free))
    assert max(scaled, unscaled) < 5e-3
    assert unscaled == pytest.approx(scaled, rel=0.5)


def test_the_closed_form_stays_in_the_box_under_known_noise() -> None:
    """The truth lies in the box, so the nearest point in it is never further away."""
    clean = view_of(victim_of("mlp"))
    x, _ = private_batch()
    std = float(clean.observed["1.bias"].norm())  # of the weight alone: an error of 1 in model inputs
    gains = []
    for seed in range(5):
        noisy = {**clean.observed, "1.weight": disturbed(clean, std, seed).observed["1.weight"]}
        oblivious = replace(clean, observed=Update(noisy))
        adaptive = replace(oblivious, spread={"1.weight": std})
        aware, blind = (Linear().run(v, fork(0, "a"), Monitor()).x for v in (adaptive, oblivious))
        assert torch.equal(aware, SPACE.project(aware))
        gains.append(float((blind - x).square().mean() - (aware - x).square().mean()))
    assert min(gains) >= 0
    assert max(gains) > 0
