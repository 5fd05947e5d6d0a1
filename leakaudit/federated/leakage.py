"""What each party of simulated runs could learn: recorded views, attacked by the orchestrator of single audits."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from leakaudit.api import attack
from leakaudit.atomic import writable_folder, write_atomically
from leakaudit.auditing import environment
from leakaudit.errors import InputError
from leakaudit.execution import OnProgress, choose
from leakaudit.federated.network import NETWORK_NAME, Speeds, infer, read_network
from leakaudit.federated.theory import theory_of
from leakaudit.federated.views import ViewRecord, read_index
from leakaudit.leakage_results import AUDITS, LEAKAGE_NAME, LeakageResult, LeakageRow, Role, read_leakage
from leakaudit.policy import parse_policy
from leakaudit.report.folder import REPORT_NAME
from leakaudit.report.leakage_page import write_leakage_page
from leakaudit.report.leakage_summary import FIRST_SCORES
from leakaudit.results import AuditResult, ExampleScores, Trial
from leakaudit.simulation_results import SIMULATION_NAME
from leakaudit.subject import pick_device
from leakaudit.sweep_results import Example

ROLES: tuple[Role, ...] = ("server", "peer", "network", "enclave-host")
MASKED = "The party sees no client's update: there is nothing to invert."


@dataclass(frozen=True)
class AuditOptions:
    """How every view is attacked.

    Attributes:
        model: of the updates, where the manifest may not name it (hf:, own code); None to go by the manifest.
        attacks, seed, budget (seconds for the attacks on one view), device: see `leakaudit.api.attack`.
        policy: None for the medium's own.
        redact: leave the originals out of everything written.
        force: overwrite other results.
    """

    model: str | None = None
    attacks: tuple[str, ...] = ("auto",)
    seed: int = 0
    budget: float | None = 120.0
    policy: str | None = None
    device: str = "auto"
    redact: bool = False
    force: bool = False


def audit_runs(
    folders: Sequence[Path],
    *,
    attacks: Sequence[str] = ("auto",),
    budget: float | None = 120.0,
    per_role: int = 1,
    seed: int = 0,
    device: str = "auto",
    policy: str | None = None,
    model: str | None = None,
    out: Path | None = None,
    redact: bool = False,
    force: bool = False,
    command: str = "",
    on_progress: OnProgress | None = None,
) -> LeakageResult:
    """Attack the recorded views of every run and role, and put what theory says beside it.

    Args:
        folders: of simulated runs, as `leakaudit.federated.recording.ViewWriter` writes them.
        per_role: views of each run and role, >= 1, smallest cohorts first: a single client's is the worst case.
        out: folder for leakage.json, report.html and the audits; None for a new temporary one.
        others: see `AuditOptions`.

    A failed attack is never "safe": its verdict says "not-recovered" only where the positive control passed, else
    "inconclusive".  Ctrl-C ends the audit in progress; what was not attacked is "pending".
    Raises `InputError` for anything that cannot be used; a view that cannot be attacked is a row that says why.
    """
    if per_role < 1:
        raise InputError(f"per role {per_role}: accepted is 1 and above")
    if budget is not None and not budget > 0:
        raise InputError(f"budget {budget:g} is not positive")
    if policy is not None:
        parse_policy(policy)
    list(choose(tuple(attacks)))
    began = time.monotonic()
    options = AuditOptions(model, tuple(attacks), seed, budget, policy, device, redact, force)
    planned = plan(folders, per_role)
    folder = Path(tempfile.mkdtemp(prefix="leakaudit-")) if out is None else writable_folder(out)
    _refuse_another(folder, planned, force)
    rows, media = _run(planned, folder, options, on_progress)
    result = LeakageResult(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        medium="text" if "text" in media else "images",
        seed=seed,
        attacks=list(attacks),
        policy=next(iter(media.values()), policy or ""),
        budget=budget,
        rows=rows,
        environment=environment(pick_device(device)),
        seconds=time.monotonic() - began,
        interrupted=any(row.status in ("interrupted", "pending") for row in rows),
        redacted=redact,
    )
    write_atomically(folder / LEAKAGE_NAME, result.to_json().encode())
    write_leakage_page(result, folder, folder / REPORT_NAME)
    return result


# ------------------------------------------------------------------ what to attack


@dataclass(frozen=True)
class Planned:
    """A row to be; `record` is None for what crosses the network, `run` what the run is called."""

    folder: Path
    run: str
    system: str
    role: Role
    record: ViewRecord | None = None

    def row(self) -> LeakageRow:
        """As far as it is known before anything runs."""
        theory, record = theory_of(self.system, self.role), self.record
        row = LeakageRow(
            run=self.run,
            system=self.system,
            role=self.role,
            status="pending",
            theory=theory.text,
            source=theory.source,
        )
        if record is None:
            return row
        return row.model_copy(
            update={
                "view": record.name,
                "step": record.step,
                "time": record.time,
                "clients": record.clients,
                "examples": record.examples,
                "staleness": record.staleness,
                "exact": record.exact,
                "note": record.note,
            }
        )


def plan(folders: Sequence[Path], per_role: int) -> list[Planned]:
    """The rows of all runs, role by role; `InputError` for a folder that holds no run."""
    if not folders:
        raise InputError("no run folder given; accepted: folders written by leakaudit simulate")
    _refuse_twice(folders)
    names = Counter(Path(folder).resolve().name for folder in folders)
    rows: list[Planned] = []
    for folder in map(Path, folders):
        name = folder.resolve().name
        rows += _planned(folder, name if names[name] == 1 else str(folder), per_role)
    return rows


def _refuse_twice(folders: Sequence[Path]) -> None:
    places = [Path(folder).resolve() for folder in folders]
    for position, place in enumerate(places):
        if place in places[:position]:
            raise InputError(f"{folders[position]} was given twice; accepted: each run once")


def _planned(folder: Path, run: str, per_role: int) -> Iterator[Planned]:
    index = read_index(folder)
    system = index.system or _stated(folder).get("system")
    if not isinstance(system, str):
        raise InputError(
            f"{folder} does not say which training system it is of; accepted: a run with {SIMULATION_NAME}"
        )
    for role in ROLES:
        records = [record for record in index.views if record.role == role]
        for record in worst_first(records)[:per_role]:
            yield Planned(folder, run, system, role, record)
        if role == "network" and not records and (folder / NETWORK_NAME).is_file():
            yield Planned(folder, run, system, role)


def worst_first(records: Sequence[ViewRecord]) -> list[ViewRecord]:
    """Views by how much they should leak: those of few clients, of few examples, exact ones, early ones first;
    those that hold no client's update last."""
    return sorted(
        (record for record in records if record.update is not None or not record.members),
        key=lambda r: (not r.members, r.clients, r.examples, not r.exact, r.step),
    )


def _stated(folder: Path) -> dict[str, object]:
    """What the run says of itself; empty where it says nothing that can be read."""
    try:
        content = json.loads((folder / SIMULATION_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_another(folder: Path, planned: Sequence[Planned], force: bool) -> None:
    if force:
        return
    if not (folder / LEAKAGE_NAME).exists():
        if (folder / REPORT_NAME).exists():
            raise InputError(f"{folder} holds another report; accepted: --force, or another folder")
        return
    before = {(row.run, row.view) for row in read_leakage(folder).rows}
    if before != {(row.run, row.record and row.record.name) for row in planned}:
        raise InputError(f"{folder} holds the result of other views; accepted: --force, or another folder")


# ------------------------------------------------------------------ attacking


def _run(
    planned: Sequence[Planned], folder: Path, options: AuditOptions, on_progress: OnProgress | None
) -> tuple[list[LeakageRow], dict[str, str]]:
    """A row for each, and the policy of every medium met."""
    rows: list[LeakageRow] = []
    media: dict[str, str] = {}
    interrupted = False
    for position, item in enumerate(planned):
        if interrupted:
            rows.append(item.row())
            continue
        name = re.sub(
            r"[^A-Za-z0-9_-]+", "-", f"{position:02d}-{item.run}-{item.record and item.record.name}"
        )
        row, result = _row(item, folder, name, options, _labelled(on_progress, item))
        rows.append(row)
        if result is not None:
            media[result.medium] = result.verdict.policy
            interrupted = result.interrupted
    return rows, media


def _row(
    item: Planned, folder: Path, name: str, options: AuditOptions, on_progress: OnProgress | None
) -> tuple[LeakageRow, AuditResult | None]:
    if item.record is None:
        return _network_row(item), None
    if item.record.update is None or not item.record.members:
        return item.row().model_copy(update={"status": "no-update", "headline": MASKED}), None
    try:
        result = _attack(item, item.record, folder / AUDITS / name, options, on_progress)
    except InputError as error:
        return item.row().model_copy(update={"status": "failed", "error": str(error)}), None
    return _filled(item.row(), result, f"{AUDITS}/{name}"), result


def _attack(
    item: Planned, record: ViewRecord, out: Path, options: AuditOptions, on_progress: OnProgress | None
) -> AuditResult:
    update = item.folder / str(record.update)
    truth = None if record.truth is None else item.folder / record.truth
    return attack(
        update,
        options.model,
        checkpoint=None if record.model is None else item.folder / record.model,
        truth=truth,
        attacks=options.attacks,
        seed=options.seed,
        budget=options.budget,
        policy=options.policy,
        redact=options.redact,
        device=options.device,
        out=out,
        force=options.force,
        on_progress=on_progress,
        command=_command(update, truth, record, item, options),
        title=f"{item.system}, {item.role}: {record.name}",
    )


def _command(
    update: Path, truth: Path | None, record: ViewRecord, item: Planned, options: AuditOptions
) -> str:
    """What attacks this view alone."""
    words = ["leakaudit", "attack", str(update), "--seed", str(options.seed)]
    words += ["--model", options.model] if options.model else []
    words += ["--checkpoint", str(item.folder / record.model)] if record.model else []
    words += ["--truth", str(truth)] if truth else []
    words += [word for attack in options.attacks for word in ("--attack", attack)]
    words += ["--budget", f"{options.budget:g}"] if options.budget else []
    return shlex.join(words + (["--fail-on", options.policy] if options.policy else []))


def _labelled(on_progress: OnProgress | None, item: Planned) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda label, *rest: on_progress(f"{item.system} {item.role}: {label}", *rest)


def _network_row(item: Planned) -> LeakageRow:
    try:
        messages = read_network(item.folder)
    except InputError as error:
        return item.row().model_copy(update={"status": "no-update", "error": str(error)})
    run = _stated(item.folder)
    parameters = run.get("parameters")
    inferred = infer(messages or [], _speeds(run), parameters if isinstance(parameters, int) else None)
    return item.row().model_copy(
        update={"status": "no-update", "inferred": inferred, "note": "sizes and times of messages"}
    )


def _speeds(run: Mapping[str, object]) -> Speeds | None:
    scenario = run.get("scenario")
    seconds = scenario.get("step_seconds") if isinstance(scenario, dict) else None
    if not isinstance(scenario, dict) or not isinstance(seconds, (int, float)):
        return None
    return Speeds(float(seconds), alike=scenario.get("speed_spread") in (0, None))


# ------------------------------------------------------------------ an audit as a row


def _filled(row: LeakageRow, result: AuditResult, audit: str) -> LeakageRow:
    trial = _telling(result)
    control = next((control.passed for control in result.controls if control.name == "positive"), None)
    found: dict[str, object] = {
        "status": "interrupted" if result.interrupted else "done",
        "verdict": result.verdict.status,
        "headline": result.verdict.headline,
        "reasons": result.verdict.reasons,
        "control": control,
        "setting": result.setting,
        "audit": audit,
        "seconds": result.seconds,
    }
    if trial is not None:
        found |= {
            "attack": trial.spec,
            "residual": trial.residual,
            "scores": trial.scores,
            "example": _shown(trial, audit),
        }
    return row.model_copy(update=found)


def _telling(result: AuditResult) -> Trial | None:
    """The attack whose reconstruction the verdict rests on: of a leak that was measured the one that came nearest
    to an original, else the one with the smallest residual."""
    scored = [trial for trial in result.trials if trial.scores and trial.examples]
    if result.verdict.status != "leaks" or not scored:
        return result.best_trial
    return max(scored, key=lambda trial: _quality(trial, _best_example(trial)))


def _best_example(trial: Trial) -> ExampleScores:
    return max(trial.examples, key=lambda example: _quality(trial, example))


def _shown(trial: Trial, audit: str) -> Example | None:
    """The example that was reconstructed best, its pictures relative to the result's folder."""
    if not trial.examples:
        return None
    best = _best_example(trial)
    return Example(
        index=best.index,
        scores=best.scores,
        true_label=best.true_label,
        recovered_label=best.recovered_label,
        original=best.original and f"{audit}/{best.original}",
        reconstruction=best.reconstruction and f"{audit}/{best.reconstruction}",
        original_tokens=best.original_tokens,
        recovered_tokens=best.recovered_tokens,
    )


def _quality(trial: Trial, example: ExampleScores) -> float:
    """By the first of the usual scores that was measured, the larger the better."""
    known = {score.metric: score for score in trial.scores}
    for name in (*FIRST_SCORES, *known):
        value = example.scores.get(name)
        if value is not None and name in known:
            return value if known[name].higher_is_better else -value
    return float("-inf")
