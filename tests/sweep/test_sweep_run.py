"""Whole sweeps in this process: verdicts, controls, what the adversaries are told, resuming, and folders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sweeps import config, timeless, values

import leakaudit
from leakaudit.atomic import sha256_of
from leakaudit.bundled import labelled_sentences, tiny_model
from leakaudit.capture import capture
from leakaudit.data import load_batch, photo_folder
from leakaudit.defenses import DEFENSES, GaussianNoise
from leakaudit.errors import InputError
from leakaudit.execution import OUT_OF_TIME
from leakaudit.gate import judge_cell, read_sweep
from leakaudit.policy import parse_policy
from leakaudit.report.folder import read_run
from leakaudit.results import Skipped, Value
from leakaudit.rounds import Round
from leakaudit.sweep import jobs
from leakaudit.sweep.config import build_config
from leakaudit.sweep.engine import Finished, InProcess
from leakaudit.sweep.folder import alone
from leakaudit.sweep.jobs import RunJob, look, shared_update
from leakaudit.sweep.plan import plan_sweep
from leakaudit.sweep.run import do_jobs
from leakaudit.sweep.setup import load_examples, load_model
from leakaudit.sweep.work import Job
from leakaudit.sweep_results import Cell, Run, SweepResult, Utility


def swept(folder: Path, **changes: Any) -> SweepResult:
    return leakaudit.defend(config(folder, **changes))


def cells(result: SweepResult) -> dict[tuple[str, str], Cell]:
    return {(cell.defense, cell.adversary): cell for cell in result.cells}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def result(folder: Path) -> SweepResult:
    """none, and noise of 1e-4 and 10, against the closed form; both adversaries."""
    return swept(folder)


# ------------------------------------------------------------------ what comes out


def test_verdicts_controls_and_scores(result: SweepResult) -> None:
    found = cells(result)
    assert {name: cell.verdict for name, cell in found.items()} == {
        ("none", "oblivious"): "leaks",
        ("gaussian-noise:std=0.0001", "oblivious"): "leaks",
        ("gaussian-noise:std=0.0001", "adaptive"): "leaks",
        ("gaussian-noise:std=10.0", "oblivious"): "not-recovered",
        ("gaussian-noise:std=10.0", "adaptive"): "not-recovered",
    }
    assert all(cell.control for cell in result.cells)
    assert min(found["none", "oblivious"].scores("psnr")) > 60
    assert max(found["gaussian-noise:std=10.0", "adaptive"].scores("psnr")) < 20
    assert [cell.strength for cell in result.cells] == [None, *[("std", 1e-4)] * 2, *[("std", 10.0)] * 2]
    assert {cell.family for cell in result.cells} == {"none", "gaussian-noise"}
    assert "in 2 of 2 runs" in result.notes[0]


def test_what_the_time_budget_left_out_is_told(folder: Path, result: SweepResult) -> None:
    (first, *_) = cells(result)["gaussian-noise:std=10.0", "adaptive"].runs
    audit = read_run(folder / "out" / "runs" / first.key)
    (trial,) = audit.trials
    attempts = [attempt.model_copy(update={"stopped": "budget"}) for attempt in trial.attempts]
    late = audit.model_copy(
        update={
            "trials": [trial.model_copy(update={"attempts": attempts})],
            "skipped": [Skipped(attack="idlg", reason=OUT_OF_TIME), Skipped(attack="dlg", reason="no")],
        }
    )
    policy = parse_policy(result.gate.policy)
    before, after = (jobs.summarise(each, policy, ("psnr",), "runs/KEY") for each in (audit, late))
    assert (before["cut"], before["reasons"]) == ([], [])
    assert (after["cut"], after["reasons"]) == (["linear"], ["The time budget left none for idlg."])
    assert judge_cell([first.model_copy(update=after)], policy, 1.0, True)[0] == "inconclusive"


def test_an_adversary_who_does_not_know_the_defense_proves_nothing_by_failing(tmp_path: Path) -> None:
    result = swept(tmp_path, defenses=["gaussian-noise:std=10.0"], adversaries=["oblivious"])
    assert [cell.verdict for cell in result.cells] == ["leaks", "inconclusive"]
    assert "does not know the defense" in result.cells[1].reasons[-1]
    assert result.exit_code == 3


def test_the_control_row_fails_no_build(result: SweepResult) -> None:
    assert result.exit_code == 1
    assert result.gate.broken == [
        "fedsgd | gaussian-noise:std=0.0001 | linear | oblivious",
        "fedsgd | gaussian-noise:std=0.0001 | linear | adaptive",
    ]
    assert result.gate.inconclusive == []


def test_the_folder_holds_what_the_result_names(result: SweepResult, folder: Path) -> None:
    out = folder / "out"
    assert read_sweep(out) == result
    for cell in result.cells:
        for run in cell.runs:
            assert read_run(out / "runs" / run.key).verdict.status == run.verdict
            names = [frame.image for frame in run.strip]
            names += [name for each in run.examples for name in (each.original, each.reconstruction)]
            assert names
            assert all(name and (out / name).is_file() for name in names)
            assert not (out / "runs" / run.key / "attempts").exists()
    assert (out / "report.html").stat().st_size > 10_000


def test_noise_is_given_absolute_and_the_update_beside_it(result: SweepResult, folder: Path) -> None:
    found = cells(result)
    assert {run.noise_std for run in found["gaussian-noise:std=10.0", "oblivious"].runs} == {10.0}
    assert {run.noise_std for run in found["none", "oblivious"].runs} == {0.0}
    setup = plan_sweep(config(folder)).setup
    victim, batch = load_model(setup), load_examples(setup)
    update = capture(victim, batch.part(1, 1), Round(1)).update
    rms = torch.cat([tensor.flatten() for tensor in update.values()]).square().mean().sqrt()
    second = [cell.runs[1].update_rms for cell in result.cells]
    assert second == pytest.approx([float(rms)] * 5, rel=1e-5)


def test_both_adversaries_attack_the_same_update(folder: Path, result: SweepResult) -> None:
    """Noise is drawn anew for every target, group and seed, but not for every adversary or attack."""
    plan = plan_sweep(config(folder, attacks=["linear", "auto"], seeds=2))
    victim = load_model(plan.setup)
    seen: dict[tuple[str, int, int], list[torch.Tensor]] = {}
    for job in plan.runs:
        if job.defense != "none":
            batch: Any = load_examples(plan.setup).part(job.first, job.count)
            source = (victim, batch, job.protocol, job.defense, job.first, job.seed)
            update = shared_update(*source).update
            undefended = shared_update(*source, defended=False).update
            noise = torch.cat([t.flatten() for t in (update - undefended).values()])
            seen.setdefault((job.defense, job.first, job.seed), []).append(noise / noise.std())
    assert [len(noises) for noises in seen.values()] == [4] * 8
    first = [noises[0] for noises in seen.values()]
    assert all(torch.equal(noise, noises[0]) for noises in seen.values() for noise in noises)
    assert torch.corrcoef(torch.stack(first)).triu(1).abs().max() < 0.1


# ------------------------------------------------------------------ what the adversaries are told


def test_the_oblivious_are_told_nothing_of_the_defense(folder: Path) -> None:
    setup = plan_sweep(config(folder)).setup
    victim, batch = load_model(setup), load_examples(setup).part(0, 1)
    defenses = (("gaussian-noise:std=0.05", GaussianNoise(0.05)),)
    captured = capture(victim, batch, Round(1), defenses=defenses, seed=3)
    assert captured.manifest.noise_std == 0.05
    unaware, _ = look(victim, captured, defenses, "oblivious", labels=None, seed=0)
    aware, _ = look(victim, captured, defenses, "adaptive", labels=None, seed=0)
    assert unaware.knowledge.defense.status == unaware.knowledge.noise_std.status == "unknown"
    assert not unaware.spread
    assert aware.knowledge.defense.value == ("gaussian-noise:std=0.05",)
    assert aware.knowledge.noise_std.value == pytest.approx(0.05)
    assert set(aware.spread.values()) == {0.05}
    for view in (unaware, aware):
        assert view.knowledge.batch_size.value == view.knowledge.local_steps.value == 1
        assert all(torch.equal(view.observed[name], captured.update[name]) for name in captured.update)
    undefended, _ = look(victim, capture(victim, batch, Round(1)), (), "oblivious", labels=None, seed=0)
    assert undefended.knowledge.defense.value == ()


def test_labels_are_given_when_asked_for(folder: Path) -> None:
    setup = plan_sweep(config(folder)).setup
    victim, batch = load_model(setup), load_examples(setup).part(1, 1)
    captured = capture(victim, batch, Round(1))
    given, _ = look(victim, captured, (), "oblivious", labels=batch.labels, seed=0)
    assert (given.knowledge.labels.status, given.knowledge.setting) == ("known", "upper bound")
    inferred, _ = look(victim, captured, (), "oblivious", labels=None, seed=0)
    assert inferred.knowledge.labels.status == "inferred"


# ------------------------------------------------------------------ what goes wrong


@dataclass(frozen=True)
class Broken(GaussianNoise):
    """A defense that cannot be applied to this model."""

    def wrap(self, client: Any, generator: torch.Generator) -> Any:
        raise RuntimeError("no per-sample gradients of BatchNorm\nand a second line")


def test_a_failed_cell_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFENSES, "broken", Broken())
    result = swept(tmp_path, defenses=["broken", "gaussian-noise:std=10"])
    found = cells(result)
    for adversary in ("oblivious", "adaptive"):
        cell = found["broken:std=0.001", adversary]
        assert [run.status for run in cell.runs] == ["failed"] * 2
        assert {run.error for run in cell.runs} == {"no per-sample gradients of BatchNorm"}
        assert cell.verdict == "inconclusive"
        trace = tmp_path / "out" / "runs" / cell.runs[0].key / "error.txt"
        assert "in wrap" in trace.read_text()
    assert found["gaussian-noise:std=10.0", "adaptive"].verdict == "not-recovered"
    assert result.exit_code == 3
    monkeypatch.setattr(RunJob, "execute", None)
    again = swept(tmp_path, defenses=["broken", "gaussian-noise:std=10"])
    assert timeless(again.model_dump()) == timeless(result.model_dump()), "what failed is not tried again"


def test_our_own_errors_are_told_whole(tmp_path: Path) -> None:
    """DP-SGD cannot clip examples that BatchNorm mixes; the message is longer than what strangers' errors get."""
    result = swept(tmp_path, model=f"{tmp_path}/models.py:norm", defenses=["dp-sgd"], images=1)
    (error,) = {run.error for cell in result.cells if cell.defense != "none" for run in cell.runs}
    assert "BatchNorm" in error
    assert not error.endswith("...")


def test_an_attack_that_cannot_run_is_a_failure_that_says_why(tmp_path: Path) -> None:
    result = swept(tmp_path, attacks=["patch-embedding"], images=1, defenses=["clip"])
    (run,) = result.cells[0].runs
    assert run.status == "failed"
    assert run.error.startswith("patch-embedding does not apply: ")
    assert {cell.verdict for cell in result.cells} == {"inconclusive"}
    assert {cell.control for cell in result.cells} == {False}


def test_a_metric_that_cannot_be_measured_is_never_green(tmp_path: Path) -> None:
    """LPIPS takes 1 or 3 channels; without its weights it is not measured either."""
    changes = {"fail_on": "lpips-alex<1e-9", "metrics": ["mse"], "defenses": ["gaussian-noise:std=10"]}
    result = swept(tmp_path, images=1, **changes)
    run = result.cells[-1].runs[0]
    measured = run.examples[0].scores["lpips-alex"] is not None
    assert measured or run.unmeasured == ["lpips-alex"]
    assert result.cells[-1].verdict == "inconclusive"


def test_no_verdict_without_a_control_that_works(tmp_path: Path) -> None:
    """A policy that nothing breaks, not even the undefended update."""
    result = swept(tmp_path, fail_on="mse<-1", images=1)
    assert {cell.control for cell in result.cells} == {False}
    assert {cell.verdict for cell in result.cells} == {"inconclusive"}
    assert all("positive control failed" in " ".join(cell.reasons) for cell in result.cells)
    assert result.exit_code == 3


# ------------------------------------------------------------------ budgets, Ctrl-C, resuming


@dataclass(frozen=True)
class StopsAfter:
    """In process, until so many jobs are done; then Ctrl-C."""

    count: int

    def run(self, jobs: Sequence[Job], root: Path, go_on: Any) -> Finished:
        for index, pair in enumerate(InProcess().run(jobs, root, go_on)):
            yield pair
            if index + 1 == self.count:
                raise KeyboardInterrupt


def test_ctrl_c_keeps_what_is_finished(
    tmp_path: Path, folder: Path, result: SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("leakaudit.sweep.run.local_engine", lambda *_: StopsAfter(3))
        stopped = swept(tmp_path)
    assert stopped.interrupted
    assert stopped.exit_code != 0
    statuses = [run.status for cell in stopped.cells for run in cell.runs]
    assert (statuses.count("done"), statuses.count("pending")) == (3, 7)
    assert cells(stopped)["gaussian-noise:std=10.0", "adaptive"].verdict == "inconclusive"
    assert "7 jobs of 10 did not finish" in stopped.notes[-1]
    with pytest.raises(InputError, match="holds this sweep, unfinished; accepted: --resume"):
        swept(tmp_path)
    resumed = leakaudit.defend(config(tmp_path), resume=True)
    assert timeless(resumed.model_dump()) == timeless(result.model_dump())


def test_an_interrupted_audit_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_sweep(config(tmp_path))
    first = plan.runs[0]
    monkeypatch.setattr(
        RunJob, "execute", lambda job, _: job.pending().model_copy(update={"status": "interrupted"})
    )
    results, interrupted = do_jobs(plan.runs, InProcess(), tmp_path, None, None)
    assert interrupted
    assert list(results) == [first.key]


def test_when_the_time_is_out_the_rest_is_pending(tmp_path: Path, result: SweepResult) -> None:
    late = swept(tmp_path, total_budget=1e-6)
    assert {run.status for cell in late.cells for run in cell.runs} == {"pending"}
    assert {cell.verdict for cell in late.cells} == {"inconclusive"}
    assert (late.exit_code, late.interrupted) == (3, False)
    resumed = leakaudit.defend(config(tmp_path), resume=True)
    assert timeless(resumed.model_dump()) == timeless(result.model_dump())


def test_progress_is_told_from_what_is_there(folder: Path, result: SweepResult) -> None:
    told: list[tuple[int, int, int]] = []
    plan = plan_sweep(config(folder))
    do_jobs(plan.jobs, InProcess(), folder / "out", None, lambda *numbers: told.append(numbers))
    assert told == [(10, 0, 10)]


def test_a_finished_sweep_is_judged_anew_without_running(
    folder: Path, result: SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunJob, "execute", None)
    again = swept(folder)
    assert timeless(again.model_dump()) == timeless(result.model_dump())


def test_a_run_that_cannot_be_read_is_done_again(tmp_path: Path) -> None:
    result = swept(tmp_path, images=1)
    marker = tmp_path / "out" / "runs" / result.cells[0].runs[0].key / "run.json"
    marker.write_text(marker.read_text()[:50])
    with pytest.raises(InputError, match="unfinished"):
        swept(tmp_path, images=1)
    again = leakaudit.defend(config(tmp_path, images=1), resume=True)
    assert timeless(again.model_dump()) == timeless(result.model_dump())


def test_the_folder_of_another_sweep_is_left_alone(tmp_path: Path) -> None:
    swept(tmp_path, images=1, defenses=[])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "runs" / "mine").mkdir()
    before = {path: sha256_of(path) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for resume in (False, True):
        with pytest.raises(InputError, match="holds another sweep; accepted: --force"):
            leakaudit.defend(config(tmp_path, images=1, defenses=["clip"]), resume=resume)
    assert {path: sha256_of(path) for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    anew = leakaudit.defend(config(tmp_path, images=1, defenses=["clip"]), force=True)
    kept = {path.name for path in (tmp_path / "out" / "runs").iterdir()}
    assert kept == {"mine"} | {run.key for cell in anew.cells for run in cell.runs}
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_two_sweeps_never_share_a_folder(tmp_path: Path) -> None:
    with alone(tmp_path / "out"):
        for force in (False, True):
            with pytest.raises(InputError, match="another sweep is at work in"):
                leakaudit.defend(config(tmp_path, images=1, defenses=[]), force=force)
    assert swept(tmp_path, images=1, defenses=[]).cells


def test_a_target_that_fails_counts_as_failed(tmp_path: Path) -> None:
    lost = Utility(protocol="fedsgd", defense="none", accuracy=None, failed=True, reason="out of memory")
    counts = []

    class Lost:
        key = "lost"

        def stored(self, root: Path) -> Utility:
            return lost

    do_jobs([Lost()], InProcess(), tmp_path, None, lambda *numbers: counts.append(numbers))  # type: ignore[list-item]
    assert counts == [(1, 1, 1)]


def test_the_folder_of_an_audit_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{}")
    with pytest.raises(InputError, match=re.escape("holds another run (result.json)")):
        swept(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_nothing_is_computed_before_the_outputs_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot write to the folder"):
        swept(tmp_path, junit=str(tmp_path / "file" / "out.xml"))
    with pytest.raises(InputError, match="baseline"):
        swept(tmp_path, baseline=str(tmp_path / "nowhere.json"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ the best of several attacks


def test_examples_have_the_best_scores_any_attack_reached(tmp_path: Path) -> None:
    """Two photos behind one smooth network: what each attack scores by itself, and what the run says of both."""
    plan = plan_sweep(
        config(tmp_path, images=1, defenses=["gaussian-noise:std=0.01"], metrics=["psnr", "mse"])
    )
    job = replace(next(job for job in plan.runs if job.defense != "none"), key="0" * 32)
    medium_auto = jobs.Plan(attacks=("linear", "inverting-gradients:iterations=20,restarts=1"), seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "Plan", lambda **_: medium_auto)
        run = job.execute(tmp_path)
    trials = read_run(tmp_path / "runs" / job.key).trials
    assert len(trials) == 2
    (example,) = run.examples
    for metric, best in (("psnr", max), ("mse", min)):
        scores = [trial.examples[0].scores[metric] for trial in trials]
        assert example.scores[metric] == best(score for score in scores if score is not None)
    winner = max(trials, key=lambda trial: trial.examples[0].scores["psnr"] or 0)
    assert (run.attack, run.residual) == (winner.attack, winner.residual)
    assert example.reconstruction == f"runs/{job.key}/{winner.examples[0].reconstruction}"


# ------------------------------------------------------------------ redaction, text, utility


def test_redaction_leaves_no_original(tmp_path: Path) -> None:
    result = swept(tmp_path, redact=True, images=1)
    assert result.redacted
    for cell in result.cells:
        for example in cell.runs[0].examples:
            assert (example.original, example.true_label) == (None, None)
            assert example.reconstruction is not None
    assert not list((tmp_path / "out").rglob("*original*"))
    assert not list((tmp_path / "out").rglob("*difference*"))
    photo = load_batch(photo_folder(), (3, 8, 8), 1).names[0]
    assert all(photo not in path.read_text() for path in (tmp_path / "out").rglob("*.json"))


def test_text(tmp_path: Path) -> None:
    sweep = {
        "model": f"hf:{tiny_model('bert')}",
        "task": "classification",
        "text": str(labelled_sentences()),
        "images": 1,
        "attacks": ["bag-of-tokens", "position-rows"],
        "defenses": ["gaussian-noise:std=10"],
        "redact": True,
        "workers": 0,
        "utility": False,
        "bounds": False,
        "device": "cpu",
        "out": str(tmp_path / "out"),
    }
    result = leakaudit.defend(build_config(sweep))
    assert (result.medium, result.metrics[0]) == ("text", "token-accuracy")
    found = {(cell.defense, cell.attack, cell.adversary): cell for cell in result.cells}
    exact = found["none", "position-rows", "oblivious"]
    assert exact.verdict == "leaks"
    assert exact.scores("exact-match") == [1.0]
    assert exact.runs[0].examples[0].recovered_tokens
    assert exact.runs[0].examples[0].original_tokens is None
    noisy = found["gaussian-noise:std=10.0", "position-rows", "adaptive"]
    assert noisy.verdict != "leaks"
    sentence = labelled_sentences().read_text().splitlines()[1].split("\t")[0]
    assert all(sentence not in path.read_text() for path in (tmp_path / "out").rglob("run.json"))


def test_utility_is_measured_for_every_target_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "images": 1,
        "adversaries": ["oblivious"],
        "utility": {"steps": 3, "batch_size": 2, "seeds": 2, "holdout": 0.5},
    }
    result = swept(tmp_path, **changes)
    assert [utility.defense for utility in result.utilities] == [cell.defense for cell in result.cells]
    assert all(len(utility.curves) == 2 for utility in result.utilities)
    assert all(utility.accuracy is not None for utility in result.utilities)
    monkeypatch.setattr("leakaudit.sweep.target_jobs.measure_utility", None)
    again = swept(tmp_path, **changes)
    assert again.utilities == result.utilities


def test_curves_are_supplied_by_target(tmp_path: Path) -> None:
    rows = ["protocol,defense,seed,step,accuracy", "fedsgd,none,0,10,0.9", "fedsgd,clip,0,10,0.7"]
    curves = tmp_path / "curves.csv"
    curves.write_text("\n".join(rows))
    changes = {"images": 1, "defenses": ["clip:max_grad_norm=1"], "utility": {"curves": str(curves)}}
    result = swept(tmp_path, **changes)
    assert {utility.defense: utility.accuracy for utility in result.utilities} == {
        "none": 0.9,
        "clip:max_grad_norm=1.0": 0.7,
    }
    assert all(utility.supplied for utility in result.utilities)
    curves.write_text("\n".join([*rows, "fedsgd,top-k,0,10,0.7"]))
    with pytest.raises(InputError, match=r"has curves of fedsgd \| top-k"):
        swept(tmp_path, **changes)


def test_bounds_stand_beside_the_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"images": 1, "bounds": {"prior": 0.2}, "defenses": ["gaussian-noise:std=10"]}
    result = swept(tmp_path, **changes)
    by_target: dict[str, dict[str, float | None]] = {}
    for bound in result.bounds:
        by_target.setdefault(bound.defense, {})[bound.name] = bound.value
    assert by_target.keys() == {"none", "gaussian-noise:std=10.0"}
    assert "rank" in by_target["none"]
    least = by_target["gaussian-noise:std=10.0"]["bayesian-cramer-rao"]
    reached = cells(result)["gaussian-noise:std=10.0", "adaptive"].scores("psnr")
    assert least is not None
    assert 0 < least < 10 ** (-max(reached) / 10)
    monkeypatch.setattr("leakaudit.sweep.target_jobs.target_bounds", None)
    assert swept(tmp_path, **changes).bounds == result.bounds


# ------------------------------------------------------------------ outputs


def test_files_for_other_tools(tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"out.{name}") for name in ("html", "junit", "sarif", "summary")}
    swept(tmp_path, images=1, **files)
    assert (tmp_path / "out.html").read_text().lstrip().startswith("<!DOCTYPE html>")
    assert '<testsuites name="leakaudit"' in (tmp_path / "out.junit").read_text()
    assert json.loads((tmp_path / "out.sarif").read_text())["version"] == "2.1.0"
    assert "gaussian-noise" in (tmp_path / "out.summary").read_text()


def test_a_toml_file_is_enough(tmp_path: Path) -> None:
    own = values(tmp_path, images=1, out="out", model="models.py:mlp", defenses=["clip"])
    lines = [f"{key} = {json.dumps(value)}" for key, value in own.items()]
    (tmp_path / "audit.toml").write_text("\n".join(lines))
    result = leakaudit.defend(tmp_path / "audit.toml")
    assert isinstance(result, Value)
    assert [cell.defense for cell in result.cells] == ["none", *["clip:max_grad_norm=1.0"] * 2]
    assert isinstance(result.cells[0].runs[0], Run)
    assert (tmp_path / "out" / "sweep.json").is_file()
