"""AUC, true-positive rates and their intervals against scipy, counting by hand, and brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, mannwhitneyu
from torch import Tensor

from leakaudit.inference import measures
from leakaudit.inference.measures import Trialled, auc, curve, rates, roc
from leakaudit.inference_results import RATES, Rate

scores = st.lists(
    st.sampled_from([-1e9, -3.0, -1e-9, 0.0, 1e-9, 2.5, 2.5000001, 7e8]), min_size=1, max_size=40
)


def fork(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rate(found: list[Rate], name: str) -> Rate:
    return next(item for item in found if item.name == name)


@given(scores, scores)
def test_auc_is_the_statistic_of_mann_and_whitney(positive: list[float], negative: list[float]) -> None:
    expected = mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
    assert auc(tensor(positive), tensor(negative)) == pytest.approx(expected, abs=1e-6)


def test_scores_far_from_zero_keep_their_order() -> None:
    """A logistic squashing, as torchmetrics applies to logits, would make these all equal."""
    assert auc(tensor([1e6 + 1, 1e6 + 3]), tensor([1e6, 1e6 + 2])) == pytest.approx(0.75)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.001]))
def test_true_positive_rates_by_counting(seed: int, level: float) -> None:
    generator = fork(seed)
    positive = torch.randn(30, generator=generator, dtype=torch.float64) * 2 + 2
    negative = torch.randn(1500, generator=generator, dtype=torch.float64)
    name = {0.01: "tpr01", 0.001: "tpr001"}[level]
    allowed = int(level * len(negative))
    threshold = negative.sort(descending=True).values[allowed]  # so many negatives may lie above
    expected = float((positive > threshold).double().mean())
    assert rate(rates([Trialled(positive, negative)], fork()), name).value == pytest.approx(expected)


def test_one_false_positive_in_a_hundred_is_allowed_and_two_are_not() -> None:
    negative = tensor([*range(100)])
    found = rates([Trialled(tensor([98.5, 97.5, 50.0, 200.0]), negative)], fork())
    assert rate(found, "tpr01").value == 0.5  # 200 and 98.5 lie above all but one
    low, high = beta.ppf(0.025, 2, 3), beta.ppf(0.975, 3, 2)  # Clopper and Pearson, 2 of 4
    assert rate(found, "tpr01").low == pytest.approx(low)
    assert rate(found, "tpr01").high == pytest.approx(high)


@pytest.mark.parametrize(("count", "missing"), [(99, {"tpr01", "tpr001"}), (999, {"tpr001"}), (1000, set())])
def test_rates_that_cannot_be_resolved_are_not_measured(count: int, missing: set[str]) -> None:
    found = rates([Trialled(torch.ones(5), torch.zeros(count))], fork())
    assert {item.name for item in found if item.value is None} == missing
    for item in found:
        assert item.value == 1.0 or f"got {count}" in item.reason


def test_without_negatives_nothing_is_measured() -> None:
    found = rates([Trialled(torch.ones(5), torch.zeros(0))], fork())
    assert [(item.value, item.chance) for item in found] == [(None, chance) for chance in RATES.values()]
    assert all("got 5 and 0" in item.reason for item in found)


def test_the_bootstrap_resamples_trials() -> None:
    """Against drawing trials, pooling their scores, and measuring again."""
    generator = fork(5)
    trials = [
        Trialled(
            torch.randn(4, generator=generator, dtype=torch.float64) + shift,
            torch.randn(9, generator=generator, dtype=torch.float64),
        )
        for shift in torch.linspace(-1, 3, 8).tolist()
    ]
    brute = []
    for _ in range(400):
        rows = torch.randint(len(trials), (len(trials),), generator=generator).tolist()
        pooled = [
            torch.cat([getattr(trials[row], kind) for row in rows]) for kind in ("positive", "negative")
        ]
        brute.append(auc(*pooled))
    low, high = tensor(brute).quantile(tensor([0.025, 0.975])).tolist()
    found = rate(rates(trials, fork()), "auc")
    whole = [torch.cat([getattr(trial, kind) for trial in trials]) for kind in ("positive", "negative")]
    assert found.value == pytest.approx(auc(*whole))
    shift = auc(*whole) - float(tensor(brute).mean())
    assert found.low == pytest.approx(low + shift, abs=0.03)
    assert found.high == pytest.approx(high + shift, abs=0.03)


def test_a_perfect_score_still_has_an_interval() -> None:
    found = rate(rates([Trialled(torch.ones(10), torch.zeros(50))] * 3, fork()), "auc")
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 30))  # thirty successes of thirty


def test_intervals_of_chance_hold_what_they_promise() -> None:
    """Scores that mean nothing: some 95 of 100 intervals hold one half."""
    generator, held = fork(2), 0
    for _ in range(40):
        trials = [
            Trialled(torch.randn(8, generator=generator), torch.randn(60, generator=generator))
            for _ in range(12)
        ]
        found = rate(rates(trials, generator), "auc")
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.5 <= found.high
    assert held >= 33


def test_a_thinned_curve_keeps_its_ends_and_lies_on_the_whole_one() -> None:
    generator = fork(1)
    positive = torch.randn(500, generator=generator) + 1
    negative = torch.randn(3000, generator=generator)
    points = curve(positive, negative)
    assert len(points) <= measures.CURVE_POINTS
    assert points[-1] == (1.0, 1.0)
    assert points[0][0] == 0.0
    whole = {
        (round(x, 6), round(y, 6))
        for x, y in zip(*(t.tolist() for t in roc(positive, negative)), strict=True)
    }
    assert set(points) <= whole
    assert points == sorted(points)
