from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_audits import timeless, victim_of, view_of

from leakaudit.attacks.base import Monitor, Reconstruction
from leakaudit.attacks.registry import ATTACKS
from leakaudit.attempts import AttemptStore
from leakaudit.auditing import Settings, Subject, audit
from leakaudit.execution import Outcome, Plan, run_attacks
from leakaudit.inspection import inspect_update
from leakaudit.randomness import fork
from leakaudit.results import AuditResult
from leakaudit.rounds import Round
from leakaudit.spec import parse
from leakaudit.threat import View, inferred, known


def found() -> Reconstruction:
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    return Reconstruction(
        x=x,
        y=torch.tensor([3]),
        loss=0.125,
        iterations=7,
        stopped="plateau",
        history=[(0, 1.0), (5, 0.125)],
        strip=[(0, 1.0, x.float() * 0), (7, 0.125, x.float())],
        details={"rank": 3, "condition": math.inf, "warm_start": False},
    )


def test_an_attempt_comes_back_as_it_was(tmp_path: Path) -> None:
    store = AttemptStore(tmp_path, view_of(victim_of("mlp")), "dlg", 0)
    assert store.get(0) is None
    kept = found()
    store.put(0, kept, 2.5)
    again, seconds = store.get(0) or pytest.fail("nothing kept")
    assert seconds == 2.5
    assert again.x.dtype == torch.float64
    assert torch.equal(again.x, kept.x)
    assert torch.equal(again.y, kept.y)
    assert (again.loss, again.iterations, again.stopped) == (0.125, 7, "plateau")
    assert (again.history, again.details) == (kept.history, kept.details)
    assert [(i, loss) for i, loss, _ in again.strip] == [(0, 1.0), (7, 0.125)]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(again.strip, kept.strip, strict=True))
    assert store.get(1) is None


def other_views(view: View) -> dict[str, View]:
    """The same view but for one thing each."""
    observed = view.observed.map(lambda t: t * (1 + 1e-6))
    facts = view.knowledge
    statistics = {"1": (torch.full((2000,), 0.5), torch.ones(2000))}
    nearby = {"1": (torch.full((2000,), 0.5 + 1e-6), torch.ones(2000))}
    with_statistics = dataclasses.replace(facts, statistics=known(statistics, "t"))
    return {
        "update": dataclasses.replace(view, observed=observed),
        "checkpoint": dataclasses.replace(
            view,
            victim=dataclasses.replace(
                view.victim, params={n: p + 1e-6 for n, p in view.victim.params.items()}
            ),
        ),
        "mode": dataclasses.replace(view, victim=view.victim.with_mode("train")),
        "model of the same shapes": dataclasses.replace(
            view, victim=dataclasses.replace(view.victim, module=torch.nn.Identity())
        ),
        "round": dataclasses.replace(view, round=Round(1, learning_rate=0.5)),
        "labels": dataclasses.replace(
            view, knowledge=dataclasses.replace(facts, labels=known(torch.tensor([1]), "t"))
        ),
        "how labels are known": dataclasses.replace(
            view, knowledge=dataclasses.replace(facts, labels=inferred(torch.tensor([1]), "t"))
        ),
        "statistics": dataclasses.replace(view, knowledge=with_statistics),
        "statistics in the seventh digit": dataclasses.replace(
            view, knowledge=dataclasses.replace(facts, statistics=known(nearby, "t"))
        ),
        "precision": view.to(dtype=torch.float64),
    }


def test_whatever_determines_an_attempt_is_in_its_key(tmp_path: Path) -> None:
    view = view_of(victim_of("mlp"))
    stores = {
        "itself": AttemptStore(tmp_path, view, "dlg", 0),
        "spec": AttemptStore(tmp_path, view, "dlg:iterations=5", 0),
        "seed": AttemptStore(tmp_path, view, "dlg", 1),
        **{name: AttemptStore(tmp_path, other, "dlg", 0) for name, other in other_views(view).items()},
    }
    stores["itself"].put(0, found(), 1.0)
    hits = [name for name, store in stores.items() if store.get(0) is not None]
    assert hits == ["itself"]
    for store in stores.values():
        store.put(0, found(), 1.0)
    assert len(list(tmp_path.iterdir())) == len(stores)
    assert AttemptStore(tmp_path, view_of(victim_of("mlp")), "dlg", 0).get(0) is not None


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_attempt_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    store = AttemptStore(tmp_path, view_of(victim_of("mlp")), "dlg", 0)
    store.put(0, found(), 1.0)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-50] if damage is None else damage)
    assert store.get(0) is None


# ------------------------------------------------------------------ resuming


SPECS = (
    "idlg:iterations=5,restarts=1",
    "inverting-gradients:iterations=10,restarts=3",
    "dlg:iterations=3,restarts=1",
)
PLAN = Plan(attacks=SPECS, seed=2)


class Interrupt:
    """Ctrl-C at one step of one label; counts the steps of every label."""

    def __init__(self, label: str = "", at: int = -1) -> None:
        self.label, self.at = label, at
        self.steps: dict[str, int] = {}

    def __call__(self, label: str, iteration: int, total: int, loss: float) -> None:
        self.steps[label] = self.steps.get(label, 0) + 1
        if label == self.label and iteration == self.at:
            raise KeyboardInterrupt


def audited(folder: Path, on_progress: Interrupt) -> AuditResult:
    view = view_of(victim_of("smooth"))
    inspection = inspect_update(
        view, buffers_after=None, raw=view.observed, dtypes={}, generator=fork(0, "inspection")
    )
    folder.mkdir(exist_ok=True)
    settings = Settings(plan=PLAN, metrics=("mse",), controls=False)
    return audit(Subject(view, inspection), settings, folder, on_progress)


def test_an_interrupted_audit_resumes_and_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = audited(tmp_path / "whole", Interrupt())
    second = "inverting-gradients, start 2"
    stopped = audited(tmp_path / "resumed", Interrupt(second, at=4))
    assert stopped.interrupted
    assert [trial.status for trial in stopped.trials] == ["done", "interrupted"]
    last = stopped.trials[1]
    assert last.reason == "interrupted; the best candidate so far is kept"
    assert [attempt.stopped for attempt in last.attempts] == ["finished", "interrupted"]
    assert last.residual is not None
    assert [(skip.attack, skip.reason) for skip in stopped.skipped] == [
        ("dlg", "interrupted before it began")
    ]
    assert stopped.verdict.status == "inconclusive"

    counter = Interrupt()
    resumed = audited(tmp_path / "resumed", counter)
    assert not resumed.interrupted
    finished = {"idlg, start 1", "inverting-gradients, start 1"}
    assert not finished & counter.steps.keys(), "finished attempts are read back, not run again"
    assert {second, "inverting-gradients, start 3", "dlg, start 1"} <= counter.steps.keys()
    assert timeless(resumed) == timeless(whole)

    counter = Interrupt()
    assert timeless(audited(tmp_path / "resumed", counter)) == timeless(whole)
    assert not counter.steps, "nothing is left to run"


def test_ctrl_c_before_the_first_step_keeps_earlier_restarts(tmp_path: Path) -> None:
    outcome = interrupted(tmp_path, "inverting-gradients, start 2", at=0)
    assert outcome.status == "interrupted"
    assert len(outcome.attempts) >= 1
    nothing = interrupted(tmp_path / "other", "inverting-gradients, start 1", at=0)
    assert nothing.status == "interrupted"


def interrupted(folder: Path, label: str, at: int) -> Outcome:
    plan = dataclasses.replace(PLAN, attacks=SPECS[1:2])
    outcomes, _ = run_attacks(view_of(victim_of("smooth")), plan, folder, Interrupt(label, at))
    return outcomes[-1]


def test_ctrl_c_while_verifying_keeps_the_reconstruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("leakaudit.media.images.verify", stop)
    outcomes, skipped = run_attacks(view_of(victim_of("smooth")), PLAN, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["interrupted"]
    assert outcomes[0].best is not None
    assert len(skipped) == 2


# ------------------------------------------------------------------ plans


def test_attempts_cut_short_by_the_budget_are_not_kept(tmp_path: Path) -> None:
    plan = Plan(attacks=("idlg:restarts=2",), budget=1e-9)
    outcomes, _ = run_attacks(view_of(victim_of("smooth")), plan, tmp_path)
    assert [attempt.found.stopped for attempt in outcomes[0].attempts] == ["budget"]
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_auto_stops_when_the_update_is_explained(tmp_path: Path) -> None:
    outcomes, skipped = run_attacks(view_of(victim_of("mlp")), Plan(), tmp_path)
    assert [outcome.chosen.name for outcome in outcomes] == ["linear"]
    assert outcomes[0].verification is not None
    assert outcomes[0].verification.status == "verified"
    reasons = {skip.attack: skip.reason for skip in skipped}
    assert "no patch projection" in reasons["patch-embedding"]
    assert reasons["idlg"].startswith("linear already explains the update")


def test_restarts_end_at_the_first_match_unless_their_number_is_given(tmp_path: Path) -> None:
    view = view_of(victim_of("smooth"))
    for restarts, expected in ((None, 1), (2, 2)):
        plan = Plan(attacks=("idlg:restarts=3",), restarts=restarts)
        outcomes, _ = run_attacks(view, plan, tmp_path)
        assert len(outcomes[0].attempts) == expected


def test_an_attack_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        restarts = 1

        def applies(self, view: View) -> str | None:
            return None

        def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
            raise RuntimeError("the matrix is singular\nand more")

    attack = parse("dlg", ATTACKS)
    monkeypatch.setattr(type(attack), "run", Broken.run)
    outcomes, _ = run_attacks(view_of(victim_of("smooth")), Plan(attacks=("dlg",)), tmp_path)
    assert (outcomes[0].status, outcomes[0].reason) == ("failed", "the matrix is singular")
    assert outcomes[0].best is None


def test_labels_that_cannot_be_inferred_fail_the_attack_not_the_audit(tmp_path: Path) -> None:
    view = view_of(victim_of("smooth"))
    headless = dataclasses.replace(view, observed=view.observed.select(["0.weight", "0.bias"]))
    plan = Plan(attacks=("idlg:iterations=2,restarts=1", "dlg:iterations=2,restarts=1"))
    outcomes, _ = run_attacks(headless, plan, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["failed", "done"]
    assert outcomes[0].reason.startswith("labels cannot be inferred")
