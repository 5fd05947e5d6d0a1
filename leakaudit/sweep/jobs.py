"""One run of a sweep as a job: capture, what the adversary sees, audit, summary."""

from __future__ import annotations

import shutil
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from leakaudit.atomic import write_atomically
from leakaudit.auditing import Settings, Subject, audit
from leakaudit.capture import Captured, as_shared, capture
from leakaudit.defenses.naming import Parts, parse_defense
from leakaudit.execution import OUT_OF_TIME, Plan
from leakaudit.inspection import Inspection
from leakaudit.judgement import NOUNS, nearness, was_cut
from leakaudit.media import medium_of
from leakaudit.models.victim import Victim
from leakaudit.numerics import faithful
from leakaudit.policy import Policy, parse_policy
from leakaudit.randomness import fork
from leakaudit.report.folder import write_run
from leakaudit.results import AuditResult, ExampleScores, Trial
from leakaudit.subject import inspected, pick_device
from leakaudit.sweep.protocols import round_of
from leakaudit.sweep.setup import Setup, load_examples, load_model, load_pool, shared_compiler
from leakaudit.sweep.work import one_line
from leakaudit.sweep_results import RUNS, Adversary, Example, Frame, Run
from leakaudit.threat import View, see

RUN_NAME = "run.json"
ERROR_NAME = "error.txt"


@dataclass(frozen=True)
class RunJob:
    """One capture and one audit; see `leakaudit.sweep_results.Run`.

    Attributes:
        first, count: the private examples, of those that `setup` loads.
        labels: whether the adversary is given them.
        policy, metrics: as text, and all that are measured.
    """

    key: str
    setup: Setup
    protocol: str
    defense: str
    attack: str
    adversary: Adversary
    group: int
    seed: int
    first: int
    count: int
    labels: bool
    budget: float | None
    policy: str
    metrics: tuple[str, ...]
    redact: bool

    def folder(self, root: Path) -> Path:
        return root / RUNS / self.key

    def stored(self, root: Path) -> Run | None:
        try:
            return Run.model_validate_json((self.folder(root) / RUN_NAME).read_bytes())
        except (OSError, ValidationError):
            return None

    def execute(self, root: Path) -> Run:
        folder = self.folder(root)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        try:
            with faithful(pick_device(self.setup.device)):
                run = self._audited(folder)
        except Exception as error:  # one failed run is not the end of the sweep
            text = traceback.format_exc()
            write_atomically(folder / ERROR_NAME, text.encode("utf-8", "replace"))
            run = self.failed(one_line(error))
        run = run.model_copy(update={"seconds": time.monotonic() - began})
        if run.status != "interrupted":
            shutil.rmtree(folder / "attempts", ignore_errors=True)
            write_atomically(folder / RUN_NAME, (run.model_dump_json(indent=1) + "\n").encode())
        return run

    def failed(self, error: str) -> Run:
        return Run(key=self.key, group=self.group, seed=self.seed, status="failed", error=error)

    def pending(self) -> Run:
        return Run(key=self.key, group=self.group, seed=self.seed, status="pending")

    def _audited(self, folder: Path) -> Run:
        victim, defenses = load_model(self.setup), parse_defense(self.defense)
        batch: Any = load_examples(self.setup).part(self.first, self.count)
        medium = medium_of(victim)
        source = (victim, batch, self.protocol, self.defense, self.first, self.seed)
        captured = shared_update(*source)
        undefended = shared_update(*source, defended=False).update if defenses else captured.update
        y = medium.tensors(victim, batch)[1]
        view, inspection = look(
            victim.with_mode("eval") if self.setup.language else victim,  # nobody knows the dropout masks
            captured,
            defenses,
            self.adversary,
            labels=y if self.labels and y.dim() == 1 else None,
            seed=self.seed,
        )
        policy = parse_policy(self.policy, medium.name)
        settings = Settings(
            plan=Plan(attacks=(self.attack,), seed=self.seed, budget=self.budget),
            policy=policy,
            metrics=self.metrics,
            compiler=shared_compiler(),
            controls=False,
            redact=self.redact,
            command="leakaudit defend",
            title=f"{self.protocol} | {self.defense} | {self.attack} | {self.adversary}",
        )
        subject = Subject(view, inspection, batch, load_pool(self.setup), checkpoint=self._checkpoint())
        result = write_run(audit(subject, settings, folder), folder)
        run = summarise(result, policy, self.metrics, f"{RUNS}/{self.key}")
        rms = {"noise_std": noise_std(view, captured), "update_rms": undefended.rms()}
        return self.pending().model_copy(update={**run, **rms})

    def _checkpoint(self) -> str | None:
        return None if self.setup.checkpoint is None else Path(self.setup.checkpoint).name


def shared_update(
    victim: Victim,
    batch: Any,
    protocol: str,
    defense: str,
    first: int,
    seed: int,
    *,
    defended: bool = True,
) -> Captured:
    """What the client shares of its `batch`, whose first example is the sweep's `first`: the same for every attack
    and adversary, with randomness of its own for every target, group and seed.

    Not `defended` it is the update of the same round before the defenses touch it.
    """
    parts = parse_defense(defense)
    name = f"sweep/{protocol}/{defense}/{first}"
    return capture(
        victim,
        batch,
        round_of(protocol, parts),
        defenses=parts if defended else (),
        seed=fork(seed, name).initial_seed(),
    )


def look(
    victim: Victim,
    captured: Captured,
    defenses: Parts,
    adversary: Adversary,
    *,
    labels: Tensor | None,
    seed: int,
) -> tuple[View, Inspection]:
    """What the adversary sees, and what the update gives away by itself.

    The oblivious one takes a defended update for an undefended one: nothing in what it is told speaks of the
    defenses, and noise that the inspection finds is not used.  The adaptive one knows them, with their
    options.  Both are told the round, and infer the labels unless these are given.
    """
    manifest = captured.manifest
    unaware = adversary == "oblivious" and bool(defenses)
    if unaware:
        manifest = manifest.model_copy(update={"defenses": None, "noise_std": None})
    shared = as_shared(replace(captured, manifest=manifest), victim)
    view = see(victim, shared, labels)
    return inspected(view, shared, () if unaware else defenses, seed, unaware=unaware)


def noise_std(view: View, captured: Captured) -> float:
    """Standard deviation, a number, of the noise that the defenses state; 0 without noise.

    Of noise that differs between tensors the root mean square.
    """
    if captured.manifest.noise_std is not None:
        return captured.manifest.noise_std
    sizes = {name: captured.update[name].numel() for name in captured.update}
    total = sum(sizes[name] * std**2 for name, std in view.spread.items() if name in sizes)
    return float((total / sum(sizes.values())) ** 0.5)


# ------------------------------------------------------------------ from an audit to a run


def summarise(result: AuditResult, policy: Policy, metrics: tuple[str, ...], place: str) -> dict[str, Any]:
    """The fields of a `Run` that an audit gives; `place` is its folder, relative to the sweep's.

    The doubts of an audit (whether file and checkpoint belong together, whether there was a defense) are settled
    here, where the sweep made the update itself: of a run that does not leak the only doubt is over attacks that
    apply and were not begun, for want of time.
    """
    leaks = result.verdict.status == "leaks"
    fields: dict[str, Any] = {
        "status": "interrupted" if result.interrupted else "done",
        "verdict": result.verdict.status,
        "headline": result.verdict.headline if leaks else _headline(result),
        "reasons": list(result.verdict.reasons) if leaks else _not_begun(result),
        "cut": [trial.attack for trial in result.trials if was_cut(trial)],
    }
    trials = [trial for trial in result.trials if trial.best is not None]
    if not trials:
        error = _nothing(result)
        return fields | ({} if result.interrupted else {"status": "failed", "error": error})
    higher = _directions(trials, policy)
    best = min(trials, key=lambda trial: nearness(trial, policy))
    examples = [
        _example(example, [trial.examples[row].scores for trial in trials], higher, place)
        for row, example in enumerate(best.examples)
    ]
    return fields | {
        "attack": best.attack,
        "residual": best.residual,
        "examples": examples,
        "unmeasured": policy.unmeasured(example.scores for example in examples),
        "strip": [
            Frame(iteration=frame.iteration, loss=frame.loss, image=_under(place, frame.image))
            for frame in best.strip
        ],
    }


def _headline(result: AuditResult) -> str:
    text = f"No attack that ran recovered {NOUNS[result.medium].possession}"
    best = result.best_trial
    late = best is not None and was_cut(best)
    return f"{text}; the time budget ended the best one early." if late else f"{text}."


def _not_begun(result: AuditResult) -> list[str]:
    names = [item.attack for item in result.skipped if item.reason == OUT_OF_TIME]
    return [f"The time budget left none for {', '.join(names)}."] if names else []


def _nothing(result: AuditResult) -> str:
    """Why there is no reconstruction."""
    reasons = [f"{trial.attack}: {trial.reason}" for trial in result.trials if trial.reason]
    reasons += [f"{item.attack} does not apply: {item.reason}" for item in result.skipped]
    return next(iter(reasons), "no attack ran")


def _directions(trials: list[Trial], policy: Policy) -> dict[str, bool]:
    """Metric -> whether more is worse for privacy: as the policy says, else as the metric does."""
    higher = {score.metric: score.higher_is_better for trial in trials for score in trial.scores}
    return higher | {threshold.metric: threshold.operator == ">" for threshold in policy.thresholds}


def _example(
    shown: ExampleScores, rows: list[dict[str, float | None]], higher: dict[str, bool], place: str
) -> Example:
    best: dict[str, float | None] = {}
    for name in shown.scores:
        found = [score for row in rows if (score := row.get(name)) is not None]
        pick = max if higher.get(name, False) else min
        best[name] = pick(found) if found else None
    return Example(
        index=shown.index,
        scores=best,
        true_label=shown.true_label,
        recovered_label=shown.recovered_label,
        original=_under(place, shown.original),
        reconstruction=_under(place, shown.reconstruction),
        original_tokens=shown.original_tokens,
        recovered_tokens=shown.recovered_tokens,
    )


def _under(place: str, name: str | None) -> str | None:
    return None if name is None else f"{place}/{name}"
