"""What pages and terminals say of a sweep: worst cases, rows, rates, the frontier, axes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sweep_page_samples import empty_sweep, photo_sweep, small_sweep, text_sweep

from leakaudit.gate import policy_of
from leakaudit.policy import parse_policy
from leakaudit.report.sweep_charts import gap_plots, pareto, utility_plots
from leakaudit.report.sweep_plots import Axis, linear_axis, log_axis
from leakaudit.report.sweep_summary import (
    base_of,
    bound_text,
    chief_bound,
    epsilon_of,
    headline,
    only_oblivious,
    rate,
    rows_of,
    state_of,
    success_rate,
    worst_of,
    worst_score,
    yardstick,
)
from leakaudit.report.sweep_theory_charts import error_plots, privacy_plots, run_errors
from leakaudit.results import VerdictStatus
from leakaudit.sweep_results import (
    Acceptance,
    Adversary,
    Bound,
    Cell,
    Example,
    Gate,
    Run,
    RunStatus,
    SweepResult,
    Utility,
)

SWEEP = small_sweep(None)
GRID = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@given(st.lists(st.tuples(GRID, GRID), max_size=12))
def test_the_frontier_is_what_no_other_point_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        as_good = [p for p in points if p[0] >= point[0] and p[1] <= point[1]]
        return any(p != point for p in as_good)

    found = pareto(points)
    assert sorted(found) == [index for index, point in enumerate(points) if not beaten(point)]
    assert [points[index][0] for index in found] == sorted(points[index][0] for index in found)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_wilson_s(counts: tuple[int, int]) -> None:
    successes, trials = counts
    found = rate(successes, trials)
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


FINITE = st.floats(allow_nan=False, allow_infinity=True, width=64)


@given(st.lists(FINITE, max_size=8), st.lists(FINITE, max_size=8), st.booleans())
def test_axes_keep_order_and_stay_inside(values: list[float], others: list[float], log: bool) -> None:
    axis = (log_axis if log else linear_axis)(values, 50.0, 400.0)
    places = [axis.at(value) for value in sorted(values + others)]
    assert all(50.0 <= place <= 400.0 for place in places)
    assert places == sorted(places)
    ticks = axis.ticks()
    assert len(ticks) <= 9
    assert all(50.0 <= tick.place <= 400.0 for tick in ticks)


def test_a_logarithmic_axis_has_a_place_for_zero() -> None:
    axis = log_axis([0.0, 0.01, 1.0], 0.0, 300.0)
    assert axis.at(0.0) == 0.0
    assert [tick.text for tick in axis.ticks()] == ["0", "10⁻²", "10⁻¹", "10⁰"]
    assert axis.at(0.1) == pytest.approx((axis.at(0.01) + axis.at(1.0)) / 2, abs=0.1)
    assert Axis(0.0, 10.0, 0.0, 100.0).at(5.0) == 50.0


@pytest.mark.parametrize("axis", [linear_axis, log_axis])
@pytest.mark.parametrize("values", [[2.30259, 2.30301], [7.5, 9.5], [11.0, 13.0], [2.0, 5.0], [0.3, 40.0]])
def test_neighbouring_ticks_are_told_apart(axis: Callable[..., Axis], values: list[float]) -> None:
    texts = [tick.text for tick in axis(values, 0.0, 300.0).ticks()]
    assert len(set(texts)) == len(texts) >= 2


def cell(
    defense: str = "none",
    adversary: Adversary = "oblivious",
    strength: tuple[str, float] | None = None,
    scores: list[dict[str, float | None]] | None = None,
    status: RunStatus = "done",
    verdict: str = "inconclusive",
) -> Cell:
    examples = [Example(index=index, scores=row) for index, row in enumerate(scores or [])]
    run = Run(key="a", group=0, seed=0, status=status, examples=examples)
    return Cell.model_validate(
        {"protocol": "fedsgd", "defense": defense, "attack": "auto", "adversary": adversary,
         "family": defense.split(":")[0], "strength": strength, "runs": [run], "verdict": verdict}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "verdict", "state"),
    [
        ("done", "leaks", "leaks"),
        ("failed", "leaks", "leaks"),
        ("failed", "inconclusive", "failed"),
        ("pending", "inconclusive", "pending"),
        ("interrupted", "inconclusive", "inconclusive"),
        ("done", "not-recovered", "not-recovered"),
    ],
)
def test_states(status: RunStatus, verdict: str, state: str) -> None:
    assert state_of(cell(status=status, verdict=verdict)) == state


def test_a_cell_without_runs_is_pending() -> None:
    assert state_of(cell().model_copy(update={"runs": []})) == "pending"


@pytest.mark.parametrize(
    ("policy", "scores", "metric", "worst"),
    [
        ("psnr>20", [10.0, 30.0, 20.0], "psnr", 30.0),
        ("lpips<0.3", [0.5, 0.1, 0.9], "lpips", 0.1),
        ("mse<0.01", [math.nan, 0.5, 0.2], "mse", 0.2),
        ("psnr>20", [math.inf, 5.0], "psnr", math.inf),
    ],
)
def test_the_worst_case_is_worst_by_the_policy(
    policy: str, scores: list[float], metric: str, worst: float
) -> None:
    found = cell(scores=[{metric: score} for score in scores])
    result = SWEEP.model_copy(update={"cells": [found], "gate": Gate(policy=policy)})
    yard = yardstick(result)
    assert yard.metric == metric
    assert worst_score(found, yard) == worst
    chosen = worst_of(found, yard)
    assert chosen is not None
    assert chosen.example.index == scores.index(worst)


def test_the_yardstick_falls_back() -> None:
    unmeasured = SWEEP.model_copy(update={"gate": Gate(policy="lpips<0.3,ssim>0.5")})
    assert yardstick(unmeasured).metric == "ssim"
    nothing = SWEEP.model_copy(update={"gate": Gate(policy="lpips<0.3")})
    assert yardstick(nothing).metric == "lpips"
    reported = SWEEP.model_copy(update={"gate": Gate(policy="never")})
    assert str(yardstick(reported).threshold) == "psnr>20"
    assert yardstick(text_sweep()).metric == "token-accuracy"


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_colours_grow_with_leakage(first: float, second: float) -> None:
    for policy in ("psnr>20", "lpips<0.3", "mse<0.1", "ssim>0.5"):
        yard = yardstick(SWEEP.model_copy(update={"gate": Gate(policy=policy), "cells": []}))
        assert 0 <= yard.share(first) <= 1
        if yard.leakage(first) >= yard.leakage(second):
            assert yard.share(first) >= yard.share(second)


def test_rows_run_from_weak_to_strong() -> None:
    cells = [
        cell("top-k:keep=0.01", strength=("keep", 0.01)),
        cell("top-k:keep=0.3", strength=("keep", 0.3)),
        cell("top-k:keep=0.3", "adaptive", strength=("keep", 0.3)),
        cell("noise:std=0.1,per=row", strength=("std", 0.1)),
        cell("noise:std=0.01,per=row", strength=("std", 0.01)),
        cell("noise:std=0.1", strength=("std", 0.1)),
        cell("int8"),
    ]
    rows = rows_of(cells)
    assert [row.defense for row in rows] == ["top-k", "noise:per=row", "noise", "int8"]
    assert [[pair.label for pair in row.pairs] for row in rows] == [
        ["keep 0.3", "keep 0.01"],
        ["std 0.01", "std 0.1"],
        ["std 0.1"],
        ["int8"],
    ]
    assert [(pair.oblivious, pair.adaptive) for pair in rows[0].pairs] == [(1, 2), (0, None)]


@pytest.mark.parametrize(
    ("defense", "strength", "base"),
    [
        ("gaussian-noise:std=0.1", ("std", 0.1), "gaussian-noise"),
        ("dp-sgd:noise_multiplier=0.1,max_grad_norm=1", ("noise_multiplier", 0.1), "dp-sgd:max_grad_norm=1"),
        ("dp-sgd:max_grad_norm=1,noise_multiplier=0.1", ("noise_multiplier", 0.1), "dp-sgd:max_grad_norm=1"),
        ("clip:norm=1+top-k:keep=0.1", ("keep", 0.1), "clip:norm=1+top-k"),
        ("top-k:keep=0.1+clip:norm=1", ("keep", 0.1), "top-k+clip:norm=1"),
        ("int8:per=row", None, "int8:per=row"),
        ("noise:std=nan", ("std", math.nan), "noise:std=nan"),
    ],
)
def test_the_spec_without_its_strength(defense: str, strength: tuple[str, float] | None, base: str) -> None:
    assert base_of(cell(defense, strength=strength)) == base


def test_success_counts_examples_that_cross_any_threshold() -> None:
    found = cell(
        scores=[{"psnr": 30.0, "ssim": 0.1}, {"psnr": 5.0, "ssim": 0.9}, {"psnr": 5.0}, {"lpips": 0.0}]
    )
    counted = success_rate(found, parse_policy("psnr>20,ssim>0.5"))
    assert counted is not None
    assert (counted.successes, counted.trials) == (2, 3)
    assert success_rate(cell(), parse_policy("psnr>20")) is None


def named(result: SweepResult, defense: str) -> Cell:
    return next(item for item in result.cells if item.defense == defense)


def test_theory_beside_a_cell() -> None:
    private = named(SWEEP, "dp-sgd:noise_multiplier=0.5,max_grad_norm=1")
    assert epsilon_of(SWEEP, private) == 12.0
    assert bound_text(chief_bound(SWEEP, private)) == "success ≤ 17\u202f%"
    assert bound_text(chief_bound(SWEEP, named(SWEEP, "gaussian-noise:std=0.01"))).startswith("MSE ≥ 0.0025")
    assert bound_text(chief_bound(SWEEP, named(SWEEP, "int8:per=row"))) == "–"


def test_sentences() -> None:
    assert only_oblivious(SWEEP) == [
        "gaussian-noise:std=0.01 under fedsgd",
        "dp-sgd:noise_multiplier=0.1,max_grad_norm=1 under fedsgd",
        "soteria:percentile=1 under fedsgd",
    ]
    assert headline(SWEEP) == "12 of 27 cells leak beyond the policy."
    clean = [item for item in SWEEP.cells if item.verdict == "not-recovered"]

    def with_gate(gate: Gate, cells: list[Cell]) -> str:
        return headline(SWEEP.model_copy(update={"gate": gate, "cells": cells}))

    assert with_gate(Gate(policy="never"), SWEEP.cells).endswith(
        "which the policy reports and does not fail."
    )
    assert (
        with_gate(Gate(policy="psnr>20", inconclusive=["a"]), clean)
        == f"1 of {len(clean)} cells proves nothing."
    )
    assert with_gate(Gate(policy="psnr>20"), clean).startswith("No attack that ran recovered private data")
    assert headline(empty_sweep()) == "The sweep has no cells."

    control = next(item for item in SWEEP.cells if item.defense == "none" and item.verdict == "leaks")
    known = next(item for item in SWEEP.cells if item.defense != "none" and item.verdict == "leaks")
    accepted = [Acceptance(cell=known.name, owner="me", expires="2099-12-31")]
    assert with_gate(Gate(policy="psnr>20", accepted=accepted), [control, known, *clean]) == (
        f"1 of {len(clean) + 2} cells leaks, which somebody accepted."
    )
    defended = [item for item in clean if item.defense != "none"]
    assert with_gate(Gate(policy="psnr>20"), [control, *defended]) == (
        f"No attack that ran recovered private data in any of {len(defended)} defended cells."
    )


def test_an_adversary_who_knows_the_defense_may_ignore_it() -> None:
    def pair(oblivious: VerdictStatus, adaptive: VerdictStatus) -> str:
        cells = [
            cell("clip", adversary="oblivious", verdict=oblivious),
            cell("clip", adversary="adaptive", verdict=adaptive),
        ]
        (row,) = rows_of(cells)
        return cells[row.pairs[0].chief(cells)].adversary

    assert pair("leaks", "not-recovered") == "oblivious"
    assert pair("leaks", "leaks") == "adaptive"
    assert pair("not-recovered", "inconclusive") == "adaptive"


def test_the_point_of_a_defense_is_the_worst_of_both_adversaries() -> None:
    cells = [
        cell("clip", adversary="oblivious", scores=[{"psnr": 30.0}]),
        cell("clip", adversary="adaptive", scores=[{"psnr": 15.0}]),
    ]
    utility = Utility(protocol=cells[0].protocol, defense="clip", accuracy=0.5)
    result = SWEEP.model_copy(update={"cells": cells, "utilities": [utility]})
    (plot,) = utility_plots(result, yardstick(result))
    assert [point.score for point in plot.listed] == [yardstick(result).write(30.0)]


def test_of_two_indicators_the_smaller_error_is_shown() -> None:
    private = cell("gaussian-noise")
    bounds = [
        Bound(
            protocol=private.protocol,
            defense=private.defense,
            name=name,
            kind="indicator",
            quantity="mse",
            value=value,
            text="",
            source="",
        )
        for name, value in (("cramer-rao", 6.5), ("bayesian-cramer-rao", 0.0058))
    ]
    found = chief_bound(SWEEP.model_copy(update={"bounds": bounds}), private)
    assert found is not None
    assert found.name == "bayesian-cramer-rao"


def test_errors_of_runs_come_from_the_mse_or_the_psnr() -> None:
    assert run_errors(cell(scores=[{"mse": 0.02}, {"mse": 0.04}])) == [pytest.approx(0.03)]
    assert run_errors(cell(scores=[{"psnr": 20.0}, {"psnr": math.inf}])) == [pytest.approx(0.005)]
    assert run_errors(cell(scores=[{"psnr": None}, {"psnr": -math.inf}, {"mse": math.nan}])) == []


def test_charts_of_a_sweep() -> None:
    result = photo_sweep(None, seeds=2, count=2, frames=0)
    yard = yardstick(result)
    utility = utility_plots(result, yard)
    assert [plot.title for plot in utility] == ["fedsgd", "fedavg:steps=5"]
    assert len(utility[0].listed) == len(utility[0].marks) == 14
    assert len({mark.link for mark in utility[0].marks}) == 14
    scores = {point.defense: point for point in utility[0].listed}
    assert scores["gaussian-noise:std=0.001"].frontier
    assert not scores["none"].frontier  # as accurate as the least noise, and leaks more
    (gaps,), _ = gap_plots(result, yard)
    assert gaps.notes[0].text == "int8:per=row"  # 28 dB against 51 dB
    widths = [b.x - a.x for a, b in zip(gaps.marks[::2], gaps.marks[1::2], strict=True)]
    assert widths == sorted(widths, reverse=True)
    errors = error_plots(result)
    assert [plot.title for plot in errors] == ["gaussian-noise · fedsgd", "gaussian-noise · fedavg:steps=5"]
    assert {key.look for key in errors[0].keys} == {"ring", "full", "indicator", "indicator second"}
    private = privacy_plots(result, policy_of(result))
    assert [plot.title for plot in private] == [
        "dp-sgd:max_grad_norm=1 · fedsgd",
        "dp-sgd:max_grad_norm=1 · fedavg:steps=5",
    ]
    assert [note.text for note in private[0].notes] == ["–", "60", "12", "6", "ε"]
    assert {"bound", "bound second", "accuracy"} <= {stroke.look for stroke in private[0].strokes}
    bounds = [mark for mark in private[0].marks if mark.look == "bound"]
    assert [mark.y for mark in bounds] == sorted(mark.y for mark in bounds)  # more noise, less success


def test_no_chart_without_what_it_draws() -> None:
    result = empty_sweep()
    yard = yardstick(result)
    charts = [
        utility_plots(result, yard),
        gap_plots(result, yard),
        error_plots(result),
        privacy_plots(result, None),
    ]
    assert charts == [[], [], [], []]
