"""The one orchestrator of a single audit (not `audit`, which is the public function)."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakaudit import __version__
from leakaudit.attacks.compiling import Compiler
from leakaudit.attacks.disturbance import errors_of
from leakaudit.attacks.registry import MAXIMUM_A_POSTERIORI
from leakaudit.errors import InputError
from leakaudit.execution import OUT_OF_TIME, OnProgress, Plan, progress, run_attacks
from leakaudit.formats.phrases import counted
from leakaudit.formats.writing import save_tensors
from leakaudit.hypotheses import Sweep
from leakaudit.illustration import Yardstick, decoded, illustrate
from leakaudit.inspection import Inspection
from leakaudit.judgement import DISCRETE, floor_control, judge
from leakaudit.media import Medium, medium_of
from leakaudit.metrics import DEFAULT_METRICS
from leakaudit.numerics import faithful
from leakaudit.outcomes import Outcome
from leakaudit.policy import DEFAULT_POLICY, Policy, parse_policy
from leakaudit.results import (
    NO_CONTROL,
    AuditResult,
    Control,
    Finding,
    KnowledgeRow,
    ModelSummary,
    RoundSummary,
    Skipped,
    Trial,
    Verdict,
)
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Fact, View, known

OVERFIT = 1.05
"""How much better than the private text another one may explain its update, by fitting noise."""
SWEEP_SHARE = 1 / 3
"""Of the budget, for finding out what the manifest does not say."""


@dataclass(frozen=True)
class Subject:
    """What is audited.

    Attributes:
        view: all that the adversary sees.
        inspection: what the update gives away by itself.
        truth: the private batch, as `Medium.read_truth` reads it, or None when it is not at hand.
        pool: unrelated examples, for chance levels and identification; see `Medium.read_pool`.
        files: name -> sha256 of what was read.
        findings: what reading the files showed.
    """

    view: View
    inspection: Inspection
    truth: Any = None
    pool: Any = None
    files: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    checkpoint: str | None = None

    @property
    def medium(self) -> Medium[Any, Any]:
        return medium_of(self.view.victim)


@dataclass(frozen=True)
class Settings:
    """How to audit: what to run, what counts as leakage, and what to print on the report.

    `controls`: run the positive control when nothing was recovered; `compiler`: of the attacks' steps.
    """

    plan: Plan = field(default_factory=Plan)
    policy: Policy = field(default_factory=lambda: parse_policy(DEFAULT_POLICY))
    metrics: tuple[str, ...] = DEFAULT_METRICS
    compiler: Compiler = field(default_factory=Compiler.of)
    controls: bool = True
    redact: bool = False
    command: str = ""
    title: str = "Gradient-inversion audit"


def audit(
    subject: Subject, settings: Settings, folder: Path, on_progress: OnProgress | None = None
) -> AuditResult:
    """Attack, score, judge; pictures and the best reconstruction go to `folder`.

    Ctrl-C ends the attack in progress and keeps its best candidate; the result says so.  Finished
    attempts lie in `folder`/attempts and are read back by the next run of the same audit.
    """
    with faithful(subject.view.victim.device):
        return _audit(subject, settings, folder, on_progress)


def _audit(subject: Subject, settings: Settings, folder: Path, on_progress: OnProgress | None) -> AuditResult:
    began, compiled_before = time.monotonic(), settings.compiler.seconds
    plan, medium = settings.plan, subject.medium
    share = None if plan.budget is None else SWEEP_SHARE * plan.budget
    view, sweep = medium.settle(subject.view, plan.seed, progress(on_progress, "unknown facts"), share)
    left = None if plan.budget is None else max(0.0, plan.budget - (time.monotonic() - began))
    outcomes, skipped = run_attacks(
        view, replace(plan, budget=left), folder / "attempts", on_progress, settings.compiler
    )
    best = _best(outcomes, disturbed=bool(errors_of(view)))
    yardstick: Yardstick[Any, Any] = Yardstick(
        subject.truth, subject.pool, settings.metrics, settings.policy, plan.seed, settings.redact
    )
    trials = [
        illustrate(medium, outcome, view, yardstick, folder, best=index == best)
        for index, outcome in enumerate(outcomes)
    ]
    if best is not None:
        _save_reconstruction(folder, view, outcomes[best])
    findings = [*subject.findings, *subject.inspection.findings, *_hypothesis_findings(sweep)]
    findings += _other_count(subject, view) + _foreign_truth(subject, view, trials, best)
    controls = _controls(subject, view, settings, outcomes, trials, best, findings, folder, on_progress)
    return AuditResult(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        medium=medium.name,
        command=settings.command,
        title=settings.title,
        seed=plan.seed,
        model=_model_summary(subject, view),
        round=_round_summary(view),
        setting=view.knowledge.setting,
        knowledge=[
            knowledge_row(name, fact) for name, fact in view.knowledge if name not in medium.facts_left_out
        ],
        findings=findings,
        trials=trials,
        skipped=skipped,
        controls=controls,
        best=best,
        verdict=_judge(subject, settings, trials, best, controls, findings, skipped),
        truth_known=subject.truth is not None,
        seconds=time.monotonic() - began,
        compiling=settings.compiler.seconds - compiled_before,
        environment=environment(view.victim.device),
        files=subject.files,
        interrupted=any(trial.status == "interrupted" for trial in trials),
        redacted=settings.redact,
    )


def _best(outcomes: Sequence[Outcome], disturbed: bool = False) -> int | None:
    """The smallest residual, but what is proven comes first: unknown dropout or clipping disturbs residuals.

    Where errors of known size disturb the update (`disturbed`), residuals below their floor are all alike,
    and of those the candidate weighed against a prior comes first.
    """

    def rank(outcome: Outcome, residual: float) -> tuple[bool, float, bool]:
        floor = 0.0 if outcome.verification is None or not disturbed else outcome.verification.floor
        likely = disturbed and outcome.chosen.name in MAXIMUM_A_POSTERIORI
        return not outcome.proven, max(residual, floor), not likely

    ranks = {
        i: rank(outcome, outcome.best.residual)
        for i, outcome in enumerate(outcomes)
        if outcome.best is not None
    }
    return min(ranks, key=lambda i: ranks[i], default=None)


def _other_count(subject: Subject, view: View) -> list[Finding]:
    """A warning where the truth has another number of examples than the attacks took the update for."""
    if subject.truth is None or len(subject.truth) == view.round.num_examples:
        return []
    text = (
        f"The truth holds {counted(len(subject.truth), 'example')}, the attacks took the update for one of"
        f" {view.round.num_examples}, which the file does not state: state --batch-size."
    )
    return [Finding(name="batch size", severity="warning", text=text)]


def _foreign_truth(subject: Subject, view: View, trials: Sequence[Trial], best: int | None) -> list[Finding]:
    """A warning where the truth explains the update worse than what was found: then it is not the truth."""
    reached = None if best is None else trials[best].residual
    if subject.truth is None or reached is None or subject.medium.name not in DISCRETE:
        return []
    x, y = subject.medium.tensors(view.victim, subject.truth)
    if len(x) != view.round.num_examples:  # its number was not stated, else the file had been refused
        view = replace(view, round=view.round.of(len(x)))
    own = view.residual(x, y)
    if own <= OVERFIT * reached + view.rounding:
        return []
    text = (
        f"The update of the originals is off by {own:.2g} of the observed one, that of a reconstruction by"
        f" {reached:.2g} only: the truth file does not belong to this update, or the client did something that is"
        " not stated (local steps, dropout, another model)."
    )
    return [Finding(name="truth", severity="warning", text=text, data={"own": own, "reached": reached})]


def _judge(
    subject: Subject,
    settings: Settings,
    trials: Sequence[Trial],
    best: int | None,
    controls: Sequence[Control],
    findings: Sequence[Finding],
    skipped: Sequence[Skipped] = (),
) -> Verdict:
    return judge(
        trials,
        best,
        controls,
        settings.policy,
        truth_known=subject.truth is not None,
        findings=findings,
        medium=subject.medium.name,
        not_begun=[item.attack for item in skipped if item.reason == OUT_OF_TIME],
    )


def _save_reconstruction(folder: Path, view: View, outcome: Outcome) -> None:
    assert outcome.best is not None
    tensors, metadata = medium_of(view.victim).contents(decoded(outcome.best.found, view), view)
    metadata = {**metadata, "attack": outcome.chosen.spec}
    save_tensors(folder / "reconstruction.safetensors", tensors, metadata)


# ------------------------------------------------------------------ controls


def _controls(
    subject: Subject,
    view: View,
    settings: Settings,
    outcomes: Sequence[Outcome],
    trials: Sequence[Trial],
    best: int | None,
    findings: Sequence[Finding],
    folder: Path,
    on_progress: OnProgress | None,
) -> list[Control]:
    """The floor where there is a truth; the positive control where the verdict hangs on it."""
    if best is None:
        return []
    floor = floor_control(trials[best].scores, subject.medium.name)
    controls = [floor] if subject.truth is not None else []
    if _judge(subject, settings, trials, best, (), findings).status == "leaks":
        text = "Not needed: the audited update itself was recovered."
        return [*controls, Control(name="positive", passed=None, text=text)]
    if not settings.controls or trials[best].status == "interrupted":
        return controls
    return [*controls, _positive_control(view, outcomes[best], settings, folder, on_progress)]


def _positive_control(
    view: View, outcome: Outcome, settings: Settings, folder: Path, on_progress: OnProgress | None
) -> Control:
    """The same attack, with a budget of its own, on the undefended one-step gradient of one photo or
    sentence, through the same model."""
    label, medium = outcome.chosen.name, medium_of(view.victim)
    try:
        example = medium.control(view)
    except InputError as error:
        return _no_control(f"there is no {medium.specimen} for it: {error}")
    x, y = medium.tensors(view.victim, example)
    round = Round(num_examples=1)
    knowledge = replace(
        view.knowledge,
        labels=known(y, "control") if y.dim() == 1 else Fact(),  # else they are the text itself
        batch_size=known(1, "control"),
        local_steps=known(1, "control"),
        defense=known((), "control"),
        noise_std=Fact(),
        statistics=Fact(),
        scale=known(True, "control"),
    )
    observed = client_update(view.victim, view.victim.params, round, x, y).detach()
    control = View(view.victim, round, observed.select(view.observed), knowledge)
    plan = replace(settings.plan, attacks=(outcome.chosen.spec,), restarts=None)
    refused = outcome.chosen.attack.applies(control)
    if refused is not None:
        return _no_control(f"{label} does not apply to it: {refused}")
    outcomes, _ = run_attacks(control, plan, folder / "attempts", on_progress, settings.compiler)
    if outcomes[0].status == "interrupted":
        return _no_control("it was interrupted")
    yardstick: Yardstick[Any, Any] = Yardstick(example, None, settings.metrics, settings.policy, plan.seed)
    trial = illustrate(medium, outcomes[0], control, yardstick, folder / "control", best=False)
    broken = settings.policy.broken_by(example.scores for example in trial.examples)
    verdict = "succeeded" if broken else "failed too, so its failure above says nothing"
    return Control(
        name="positive",
        passed=bool(broken),
        text=f"Positive control: {label} on the undefended gradient of one {medium.specimen} {verdict}.",
        scores=trial.scores,
    )


def _no_control(reason: str) -> Control:
    return Control(name="positive", passed=None, text=f"{NO_CONTROL}: {reason}.")


# ------------------------------------------------------------------ plain values for the report


def knowledge_row(name: str, fact: Fact) -> KnowledgeRow:
    return KnowledgeRow(
        name=name,
        status=fact.status,
        text=_fact_text(fact),
        source=fact.source,
        upper_bound=fact.upper_bound,
    )


def _fact_text(fact: Fact) -> str:
    value = fact.value
    if value is None:
        return "unknown"
    if isinstance(value, Tensor):
        return ", ".join(str(int(item)) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return f"mean and variance of {counted(len(value), 'layer')}"
    if isinstance(value, tuple):
        return "; ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for the report."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "leakaudit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type} ({name})",
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "system": platform.system(),
    }


def _model_summary(subject: Subject, view: View) -> ModelSummary:
    victim = view.victim
    return ModelSummary(
        name=victim.name,
        parameters=sum(p.numel() for p in (*victim.params.values(), *victim.frozen.values())),
        num_classes=victim.num_classes,
        input_shape=list(victim.space.shape),
        mode=victim.mode,
        checkpoint=subject.checkpoint,
        task=subject.medium.task(victim),
    )


def _round_summary(view: View) -> RoundSummary:
    return RoundSummary(
        num_examples=view.round.num_examples,
        local_steps=view.round.local_steps,
        local_batch_size=view.round.batch_size,
        learning_rate=view.knowledge.learning_rate.value,
    )


def _hypothesis_findings(sweep: Sweep) -> list[Finding]:
    if sweep.best is None and sweep.complete:
        return []
    tried = {f"{h.mode}, {counted(h.local_steps, 'step')}": h.residual for h in sweep.tried}
    text = "The file does not say all about the round, and no two hypotheses on it were compared."
    if sweep.best is not None:
        text = (
            f"Of {len(sweep.tried)} hypotheses on what the file does not say, {sweep.best.mode} mode with "
            f"{counted(sweep.best.local_steps, 'local step')} fits best (relative residual {sweep.best.residual:.2g})."
        )
    if sweep.decided:
        return [Finding(name="hypotheses", severity="info", text=text, data=tried)]
    text += (
        " Another fits almost as well;"
        if sweep.complete
        else f" The budget did not allow to compare all {sweep.planned} at length; raise it, or"
    )
    text += " state the mode and the local steps if you know them."
    return [Finding(name="hypotheses", severity="warning", text=text, data=tried)]
