"""What the file does not say is found by trying: train or eval mode, and the number of local steps."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch
from tiny_audits import UNSAID, victim_of, view_of

from leakaudit.attacks.base import Monitor, Reconstruction
from leakaudit.attacks.gradient_matching import InvertingGradients
from leakaudit.auditing import _hypothesis_findings
from leakaudit.formats.phrases import counted
from leakaudit.hypotheses import STEPS, Hypothesis, Sweep, _plausible_steps, settle
from leakaudit.models.victim import Mode
from leakaudit.rounds import Round
from leakaudit.threat import View, known


def unsure(view: View, mode: Mode, **facts: object) -> View:
    """The view of somebody who assumes `mode`."""
    knowledge = dataclasses.replace(view.knowledge, mode=UNSAID, **facts)  # type: ignore[arg-type]
    return dataclasses.replace(view, victim=view.victim.with_mode(mode), knowledge=knowledge)


@pytest.mark.parametrize("true", ["train", "eval"])
@pytest.mark.parametrize("assumed", ["train", "eval"])
def test_the_mode_of_batch_norm_is_inferred(true: Mode, assumed: Mode) -> None:
    view = unsure(view_of(victim_of("norm", true), Round(2)), assumed)
    settled, sweep = settle(view, seed=0)
    assert settled.victim.mode == true
    assert settled.knowledge.mode.value == true
    assert settled.knowledge.mode.status == "inferred"
    assert [hypothesis.mode for hypothesis in sweep.tried] == ["eval", "train"]
    right, wrong = sorted(sweep.tried, key=lambda hypothesis: hypothesis.mode != true)
    assert right.residual < wrong.residual / 2


def unsaid_steps(steps: int, rate: float, count: int = 1, size: int | None = None) -> View:
    """A delta of `steps` steps whose number the adversary does not know."""
    round = Round(count, steps, size, learning_rate=rate)
    view = view_of(victim_of("smooth"), round, local_steps=UNSAID)
    return dataclasses.replace(view, round=dataclasses.replace(round, local_steps=1))


@pytest.mark.parametrize(("steps", "rate"), [(5, 0.1), (1, 0.1), (3, 0.01)])
def test_the_number_of_local_steps_is_inferred(steps: int, rate: float) -> None:
    settled, sweep = settle(unsaid_steps(steps, rate), seed=0)
    assert settled.round.local_steps == steps
    assert settled.knowledge.local_steps.value == steps
    assert settled.knowledge.local_steps.status == "inferred"
    tried = [hypothesis.local_steps for hypothesis in sweep.tried]
    assert tried == list(STEPS)[-len(tried) :]
    (finding,) = _hypothesis_findings(sweep)
    assert f"eval mode with {counted(steps, 'local step')} fits best" in finding.text
    assert len(finding.data) == len(tried)
    assert finding.severity == "info"


@pytest.mark.parametrize("rate", [0.03, 0.3])
@pytest.mark.parametrize(("steps", "count", "size"), [(1, 1, 1), (2, 1, 1), (3, 1, 1), (8, 1, 1), (2, 2, 1)])
def test_too_few_steps_for_the_rank_are_not_tried(steps: int, count: int, size: int, rate: float) -> None:
    """Every step of an example adds one to the rank; the truth is never ruled out."""
    possible = _plausible_steps(unsaid_steps(steps, rate, count, size))
    assert steps in possible
    assert (1 in possible) == (steps == 1)


def test_the_examples_of_all_clients_count_for_the_rank() -> None:
    view = unsaid_steps(1, 0.1, 3)
    cohort = dataclasses.replace(view, round=Round(3, clients=3))
    assert _plausible_steps(cohort)[0] == _plausible_steps(view)[0] == 1


def test_a_close_call_is_a_doubt_about_the_audit() -> None:
    close = (Hypothesis("eval", 1, 0.13), Hypothesis("eval", 3, 0.15), Hypothesis("eval", 2, math.inf))
    (finding,) = _hypothesis_findings(Sweep(close, 3))
    assert finding.severity == "warning"
    assert "Another fits almost as well" in finding.text
    assert _hypothesis_findings(Sweep()) == []


def test_nothing_runs_when_nothing_is_unknown() -> None:
    view = view_of(victim_of("norm"))

    def never(iteration: int, total: int, loss: float) -> None:
        pytest.fail("an attack ran")

    assert settle(view, 0, never) == (view, Sweep())
    unscaled = unsaid_steps(3, 0.1)
    knowledge = dataclasses.replace(unscaled.knowledge, learning_rate=UNSAID, scale=known(False, "t"))
    unscaled = dataclasses.replace(unscaled, knowledge=knowledge)
    assert settle(unscaled, 0, never) == (unscaled, Sweep())


def test_a_hypothesis_that_fails_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    run = InvertingGradients.run

    def fragile(
        self: InvertingGradients, view: View, generator: torch.Generator, monitor: Monitor
    ) -> Reconstruction:
        if view.victim.mode == "eval":
            raise RuntimeError("the matching loss was never finite")
        return run(self, view, generator, monitor)

    monkeypatch.setattr(InvertingGradients, "run", fragile)
    settled, sweep = settle(unsure(view_of(victim_of("norm"), Round(2)), "eval"), seed=0)
    assert settled.victim.mode == "train"
    assert [hypothesis.residual == float("inf") for hypothesis in sweep.tried] == [True, False]


def test_labels_that_cannot_be_inferred_leave_things_as_they_are() -> None:
    view = unsure(view_of(victim_of("norm", "train"), Round(2)), "eval")
    headless = dataclasses.replace(view, observed=view.observed.select(["0.weight"]))
    settled, sweep = settle(headless, seed=0)
    assert settled is headless
    assert sweep.best is None
    assert _hypothesis_findings(sweep) == []


class Clock:
    """`time.monotonic` that goes on by a second with every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize(("budget", "tried"), [(20, 0), (60, 1), (150, 3), (280, 6)])
def test_a_sweep_ends_with_its_budget(budget: float, tried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coarse attack takes 41 looks at the clock."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    view = unsaid_steps(1, 0.01)
    settled, sweep = settle(view, 0, budget=budget)
    assert clock.now <= budget + 3
    assert not sweep.complete
    assert not sweep.decided
    assert [hypothesis.local_steps for hypothesis in sweep.tried] == list(STEPS[:tried])
    (finding,) = _hypothesis_findings(sweep)
    assert finding.severity == "warning"
    assert f"The budget did not allow to compare all {len(STEPS)} at length" in finding.text
    if tried < 2:
        assert settled is view
        assert "no two hypotheses on it were compared" in finding.text
    else:
        assert f"Of {tried} hypotheses" in finding.text
        assert settled.knowledge.local_steps.source == f"best of {tried} hypotheses by residual"


def test_finalists_take_part_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finalist with three times the steps would beat the others for that reason alone."""
    monkeypatch.setattr("leakaudit.hypotheses.OBVIOUS", 0.0)
    monkeypatch.setattr("leakaudit.hypotheses.STEPS", (1, 2, 3, 4))
    view = unsaid_steps(1, 0.01)
    monkeypatch.setattr(time, "monotonic", Clock())
    _, brief = settle(view, 0, budget=170)
    _, cut = settle(view, 0, budget=170 + 150)
    assert cut == brief
    _, full = settle(view, 0, budget=170 + 500)
    assert full.complete
    assert min(h.residual for h in full.tried) < min(h.residual for h in brief.tried)
