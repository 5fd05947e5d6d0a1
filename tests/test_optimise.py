from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
import torch
from tiny_audits import Asked, private_batch, victim_of, view_of
from torch import Tensor

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.gradient_matching import WithVariation
from leakaudit.attacks.graphs import record
from leakaudit.attacks.matching import cosine, squared, statistics_distance, total_variation
from leakaudit.attacks.optimise import (
    Candidate,
    Matching,
    Objective,
    adam,
    continuation,
    geometric,
    lbfgs,
    value_and_gradient,
)
from leakaudit.threat import known

LABELS = torch.tensor([1])


def bowl(x: Tensor, y: Tensor) -> Tensor:
    return (x - 2).square().sum()


def candidate(start: float = 0.0) -> Candidate:
    return Candidate(torch.full((1, 1, 2, 2), start), labels=LABELS)


# ------------------------------------------------------------------ the objective


def test_the_objective_is_distance_plus_priors() -> None:
    victim = victim_of("norm", "train")
    x, y = private_batch(2)
    target = victim.batch_statistics(victim.params, x)
    view = view_of(victim, labels=known(y, "t"), statistics=known(target, "t"))
    trial = x[:1] + 0.3
    simulated = view.simulate(trial, y[:1])
    expected = (
        cosine(simulated, view.observed)
        + 0.5 * total_variation(trial)
        + 0.25 * statistics_distance(victim.batch_statistics(victim.params, trial), target)
    )
    found = Matching(view, "cosine", tv=0.5, statistics=0.25)(trial, y[:1])
    torch.testing.assert_close(found, expected)
    plain = Matching(view, "squared", scale=4.0)(trial, y[:1])
    torch.testing.assert_close(plain, squared(simulated, view.observed) / 4)


def test_statistics_count_only_when_they_are_known() -> None:
    view = view_of(victim_of("norm", "train"))
    x, y = private_batch()
    with_weight, without = (Matching(view, "squared", statistics=w)(x + 0.1, y) for w in (1.0, 0.0))
    assert torch.equal(with_weight, without)


def test_the_objective_is_zero_at_the_truth_and_its_gradient_is_right() -> None:
    view = view_of(victim_of("smooth")).to(dtype=torch.float64)
    x, y = (t.double() if t.is_floating_point() else t for t in private_batch())
    objective = Matching(view, "squared")
    assert float(objective(x, y)) < 1e-12
    here = (x + 0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(here, y), here)
    direction = torch.randn_like(x)
    step = 1e-5
    with torch.no_grad():
        rise = float(objective(here + step * direction, y) - objective(here - step * direction, y))
    assert float((gradient * direction).sum()) == pytest.approx(rise / (2 * step), rel=1e-5)


def test_a_candidate_has_labels_or_logits() -> None:
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="either labels or logits"):
        Candidate(x)
    with pytest.raises(ValueError, match="either labels or logits"):
        Candidate(x, labels=LABELS, logits=torch.zeros(2, 3))
    soft = Candidate(x, logits=torch.zeros(2, 3))
    assert torch.equal(soft.y, torch.full((2, 3), 1 / 3))
    assert soft.variables[1] is soft.logits
    assert Candidate(x, labels=LABELS).x is not x


# ------------------------------------------------------------------ the optimisers


def test_lbfgs_finds_the_minimum_of_a_bowl() -> None:
    monitor = Monitor()
    lbfgs(candidate(), bowl, monitor, iterations=5, target=1e-10)
    found = monitor.result()
    assert found.stopped == "converged"
    assert found.loss <= 1e-10
    torch.testing.assert_close(found.x, torch.full((1, 1, 2, 2), 2.0))


def test_lbfgs_with_soft_labels_moves_both() -> None:
    start = Candidate(torch.zeros(1, 1, 2, 2), logits=torch.zeros(1, 3))

    def objective(x: Tensor, y: Tensor) -> Tensor:
        return bowl(x, y) + (y[0, 2] - 0.8).square()

    monitor = Monitor()
    lbfgs(start, objective, monitor, iterations=30)
    found = monitor.result()
    assert found.loss < 1e-6
    assert float(found.y[0, 2]) == pytest.approx(0.8, abs=1e-2)


def test_a_step_that_changes_nothing_is_a_plateau() -> None:
    monitor = Monitor()
    lbfgs(candidate(2.0), bowl, monitor, iterations=50)
    assert monitor.result().iterations <= 2


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("cosine_decay", [True, False])
def test_adam_descends(signed: bool, cosine_decay: bool) -> None:
    monitor = Monitor()
    adam(
        candidate(),
        bowl,
        monitor,
        iterations=200,
        learning_rate=0.1,
        signed=signed,
        cosine_decay=cosine_decay,
    )
    found = monitor.result()
    assert found.loss < 1e-3
    assert (found.iterations, found.stopped) == (201, "finished") or found.loss == 0


def test_adam_decays_by_steps_at_three_eighths_five_eighths_and_seven_eighths() -> None:
    """On a constant slope the signed step is the learning rate itself."""
    positions: list[float] = []

    def slope(x: Tensor, y: Tensor) -> Tensor:
        positions.append(float(x.detach()[0, 0, 0, 0]))
        return 100 + x.sum()

    adam(candidate(), slope, Monitor(), iterations=16, learning_rate=0.1, signed=True)
    steps = [round(a - b, 6) for a, b in pairwise(positions)]
    assert steps == pytest.approx([0.1] * 6 + [0.01] * 4 + [0.001] * 4 + [0.0001] * 2, rel=0.02)


def test_adam_projects_after_every_step() -> None:
    monitor = Monitor(frames=40)
    adam(candidate(), bowl, monitor, iterations=30, learning_rate=0.5, project=lambda x: x.clamp(-1, 1))
    assert all(float(x.abs().max()) <= 1 for _, _, x in monitor.strip)
    torch.testing.assert_close(monitor.result().x, torch.ones(1, 1, 2, 2))


# ------------------------------------------------------------------ the monitor


def feed(monitor: Monitor, losses: list[float]) -> int:
    """How many losses the monitor took before it said stop."""
    for count, loss in enumerate(losses, 1):
        if monitor.step(loss, torch.full((1, 1, 1, 1), loss), LABELS):
            return count
    return len(losses)


def test_the_best_is_kept_not_the_last() -> None:
    monitor = Monitor()
    monitor.start(10)
    feed(monitor, [5.0, 1.0, 3.0, 4.0])
    found = monitor.result()
    assert found.loss == 1.0
    assert float(found.x) == 1.0
    assert found.strip[-1][1] == 1.0


def test_the_candidate_is_copied() -> None:
    monitor = Monitor()
    monitor.start(10)
    x = torch.ones(1, 1, 1, 1)
    monitor.step(1.0, x, LABELS)
    x.fill_(float("nan"))
    assert float(monitor.result().x) == 1.0
    assert float(monitor.strip[0][2]) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence_stops_and_keeps_the_best(bad: float) -> None:
    monitor = Monitor()
    monitor.start(10)
    assert feed(monitor, [2.0, bad, 1.0]) == 2
    assert (monitor.result().stopped, monitor.result().loss) == ("diverged", 2.0)
    never = Monitor()
    never.start(10)
    never.step(bad, torch.zeros(1), LABELS)
    with pytest.raises(RuntimeError, match="never finite"):
        never.result()


def test_plateau_target_and_deadline() -> None:
    plateau = Monitor()
    plateau.start(100, patience=3, min_gain=0.1)
    assert feed(plateau, [1.0] * 50) == 4
    assert plateau.stopped == "plateau"
    falling = Monitor()
    falling.start(100, patience=3, min_gain=0.1)
    assert feed(falling, [0.8**i for i in range(50)]) == 50
    target = Monitor()
    target.start(100, target=0.5)
    assert feed(target, [1.0, 0.5, 0.1]) == 2
    assert target.stopped == "converged"
    late = Monitor(deadline=time.monotonic() - 1)
    late.start(100)
    assert feed(late, [1.0] * 5) == 1
    assert late.stopped == "budget"


def test_strip_and_history_are_thinned() -> None:
    monitor = Monitor(frames=12, history=50)
    monitor.start(1000)
    feed(monitor, [1000.0 - i for i in range(1001)])
    found = monitor.result()
    assert 10 <= len(found.strip) <= 13
    assert (found.strip[0][0], found.strip[-1][0]) == (0, 1000)
    assert len(found.history) <= 52
    gaps = [b[0] - a[0] for a, b in pairwise(found.strip)]
    assert gaps == sorted(gaps), "frames are spaced by a constant ratio"


def test_a_second_phase_goes_on_counting() -> None:
    monitor = Monitor()
    monitor.start(2)
    feed(monitor, [3.0, 2.0])
    monitor.start(2)
    feed(monitor, [2.5, 1.0])
    found = monitor.result()
    assert found.iterations == 4
    assert [i for i, _ in found.history] == [0, 1, 2, 3]
    assert found.loss == 1.0


def test_stages_share_one_progress_bar_and_one_film_strip() -> None:
    seen: list[tuple[int, int]] = []
    monitor = Monitor(lambda iteration, total, _: seen.append((iteration, total)))
    monitor.expect(100)
    x, y = torch.zeros(1), torch.zeros(1)
    for _ in range(4):
        monitor.forget_best()
        monitor.start(25)
        for step in range(25):
            monitor.step(1.0 / (step + 1), x, y)
    assert seen == [(index, 100) for index in range(100)]
    assert len(monitor.strip) <= 12
    assert len(monitor.result().strip) <= 13


# ------------------------------------------------------------------ several objectives


def bowl_at(centre: float, starts: list[float]) -> Objective:
    """A bowl around `centre`; notes the first x it is asked about."""

    def objective(x: Tensor, _: Tensor) -> Tensor:
        if len(starts) == 0 or starts[-1] != centre:
            starts.extend([x[0, 0, 0, 0].item(), centre])
        return (x - centre).square().sum() + 10 * centre

    return objective


def test_a_continuation_starts_each_objective_where_the_last_one_ended() -> None:
    """The losses rise from one objective to the next, and are not compared."""
    starts: list[float] = []
    monitor = Monitor()
    objectives = [bowl_at(centre, starts) for centre in (1.0, 2.0, 3.0)]
    x = torch.zeros(1, 1, 2, 2)
    end, _ = continuation(x, LABELS, objectives, monitor, iterations=5, patience=3)
    assert starts == pytest.approx([0, 1, 1, 2, 2, 3])
    torch.testing.assert_close(end, torch.full_like(x, 3.0))
    torch.testing.assert_close(monitor.result().x, end)
    assert not x.any()


def test_a_continuation_ends_with_the_time() -> None:
    starts: list[float] = []
    monitor = Monitor(deadline=time.monotonic() - 1)
    objectives = [bowl_at(centre, starts) for centre in (1.0, 2.0)]
    continuation(torch.zeros(1, 1, 2, 2), LABELS, objectives, monitor, iterations=5, patience=3)
    assert starts == [0, 1]
    assert monitor.stopped == "budget"


def test_geometric_steps() -> None:
    assert geometric(1e-2, 1e-8, 4) == pytest.approx([1e-2, 1e-4, 1e-6, 1e-8], rel=1e-5)
    assert geometric(5.0, 500.0, 1) == pytest.approx([5.0])


def test_the_stages_of_a_continuation_share_one_compiled_graph() -> None:
    """Recorded, not compiled: equal keys are what makes them share."""
    distance = Matching(view_of(victim_of("smooth")), "relative")
    x, labels = private_batch()
    stages = [WithVariation(distance, weight) for weight in (1e-1, 1e-4)]
    keys = {record(value_and_gradient(stage), (x, labels)).key for stage in stages}
    assert len(keys) == 1
    values = [float(stage(x, labels)) for stage in stages]
    assert values[0] > values[1], "and still weigh differently"


def test_a_continuation_plans_for_all_of_its_stages() -> None:
    compiler = Asked()
    monitor = Monitor(compiler=compiler)
    objectives = [bowl_at(centre, []) for centre in (1.0, 2.0)]
    continuation(torch.zeros(1, 1, 2, 2), LABELS, objectives, monitor, iterations=5, patience=3)
    assert compiler.evaluations == [2 * 5 * 20, 2 * 5 * 20]
