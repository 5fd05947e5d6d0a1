"""From finished jobs to cells with verdicts, and to the `SweepResult`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from leakaudit.atomic import sha256_of
from leakaudit.auditing import environment
from leakaudit.defenses.naming import family, strength
from leakaudit.formats.phrases import counted
from leakaudit.gate import Baseline, gate, judge_cell
from leakaudit.policy import Policy
from leakaudit.results import Value
from leakaudit.subject import pick_device
from leakaudit.sweep.jobs import RunJob
from leakaudit.sweep.plan import CellPlan, SweepPlan, Target
from leakaudit.sweep.target_jobs import Bounds
from leakaudit.sweep_results import NO_DEFENSE, Cell, Run, SweepResult, Utility

MAJORITY = 0.5
"""The control passes when the undefended attack breaks the policy on more than this share of its examples."""

UNAWARE = "Only an adversary who does not know the defense was tried, and a real one may know it."

Results = Mapping[str, Value]
"""By the key of the job."""


def assemble(
    plan: SweepPlan,
    results: Results,
    baseline: Baseline | None,
    *,
    command: str,
    seconds: float,
    interrupted: bool,
) -> SweepResult:
    """The result of whatever is finished; what is not is pending, and its cells inconclusive."""
    cells = [_cell(plan, cell, results) for cell in plan.cells]
    config = plan.config
    counted_cells = [cell for cell, planned in zip(cells, plan.cells, strict=True) if planned.counts]
    now = datetime.datetime.now(datetime.timezone.utc)
    more = [results[job.key] for job in plan.more if job.key in results]
    return SweepResult(
        created=now.isoformat(timespec="seconds"),
        command=command,
        medium=plan.medium,
        config=config.model_dump(mode="json", exclude_none=True),
        model=config.model,
        parameters=plan.parameters,
        examples=config.images,
        seeds=config.seeds,
        seed=config.seed,
        metrics=list(plan.metrics),
        cells=cells,
        utilities=[*plan.supplied, *(value for value in more if isinstance(value, Utility))],
        bounds=[bound for value in more if isinstance(value, Bounds) for bound in value.bounds],
        gate=gate(counted_cells, plan.policy, config.quantile, baseline, now.date()),
        notes=[*_control_notes(plan, results), *_pending_notes(plan, results)],
        seconds=seconds,
        environment=environment(pick_device(config.device)),
        files=_files(config.checkpoint),
        interrupted=interrupted,
        redacted=config.redact,
    )


def _files(*paths: Path | None) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in paths if path is not None}


def _cell(plan: SweepPlan, planned: CellPlan, results: Results) -> Cell:
    runs = _runs(planned.jobs, results)
    control = _passed(_runs(planned.control, results), plan.policy)
    verdict, reasons = judge_cell(runs, plan.policy, plan.config.quantile, control)
    target = planned.target
    if verdict == "not-recovered" and not _known_to_some(plan, target):
        verdict, reasons = "inconclusive", [*reasons, UNAWARE]
    return Cell(
        protocol=target.protocol,
        defense=target.defense,
        attack=planned.attack,
        adversary=planned.adversary,
        family=family(target.defense),
        strength=strength(target.defense, [other.defense for other in plan.targets]),
        runs=runs,
        verdict=verdict,
        reasons=reasons,
        control=control,
    )


def _known_to_some(plan: SweepPlan, target: Target) -> bool:
    """Whether an adversary who knows the target's defense attacks it, or there is no defense to know."""
    return target.defense == NO_DEFENSE or any(
        cell.target == target and cell.adversary == "adaptive" for cell in plan.cells
    )


def _runs(jobs: Sequence[RunJob], results: Results) -> list[Run]:
    found = (results.get(job.key) for job in jobs)
    return [run if isinstance(run, Run) else job.pending() for job, run in zip(jobs, found, strict=True)]


def _passed(control: Sequence[Run], policy: Policy) -> bool | None:
    """Whether most of the runs broke the policy; None while those that are not finished decide."""
    if _broken(control, policy) > MAJORITY * len(control):
        return True
    return False if all(run.status in ("done", "failed") for run in control) else None


def _broken(runs: Sequence[Run], policy: Policy) -> int:
    return sum(bool(policy.broken_by([example.scores for example in run.examples])) for run in runs)


def _control_notes(plan: SweepPlan, results: Results) -> list[str]:
    notes = []
    for attack in dict.fromkeys(cell.attack for cell in plan.cells):
        jobs = {job.key: job for cell in plan.cells if cell.attack == attack for job in cell.control}
        finished = [run for run in _runs(list(jobs.values()), results) if run.status in ("done", "failed")]
        if finished:
            notes.append(
                f"Positive control: {attack}, undefended, on one example an update broke the policy in"
                f" {_broken(finished, plan.policy)} of {counted(len(finished), 'run')}; more than half must."
            )
    return notes


def _pending_notes(plan: SweepPlan, results: Results) -> list[str]:
    left = sum(job.key not in results for job in plan.jobs)
    return [f"{counted(left, 'job')} of {len(plan.jobs)} did not finish; --resume does them."] if left else []
