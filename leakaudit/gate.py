"""Verdicts over many runs, and what they mean for a build: the policy, its quantile, and the baseline.

No torch here.  `judge_cell` joins the runs of one cell, `gate` holds all cells against the policy and
against the leakage that somebody accepted (`Baseline`), and `standing` says how one cell came out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Literal, TypeAlias

from leakaudit.atomic import write_atomically
from leakaudit.errors import InputError
from leakaudit.policy import Policy, Threshold, parse_policy
from leakaudit.results import NO_CONTROL, Read, Value, VerdictStatus, parse_versioned
from leakaudit.sweep_results import (
    SWEEP_NAME,
    SWEEP_SCHEMA_VERSION,
    Acceptance,
    Cell,
    Gate,
    Run,
    SweepResult,
)

BASELINE_SCHEMA_VERSION = 1
TOLERANCE = 0.1
TOLERANCES = {"psnr": 2.0, "mse": 2.0}
"""How much worse an accepted score may get: dB for PSNR, and for MSE as 10 log10 of it; else `TOLERANCE`."""
EXACT = 40.0
"""PSNR in dB (MSE 1e-4) from which on a picture is recovered and better scores are not worse leakage."""

Standing: TypeAlias = Literal["broken", "accepted", "inconclusive", "reported", "passed"]
"""How a cell came out: "reported" ones fail nothing though they leak, or prove nothing, because the policy is
`never` or the gate does not count them (the undefended rows that serve as the control)."""


class Baseline(Value):
    """Known leakage that somebody accepted, as `leakaudit baseline` writes it.

    Attributes:
        created: date and time, ISO 8601.
        policy, quantile: what the scores of the entries were judged by.
        entries: one a cell; `Acceptance.scores` are those that decided, by threshold.
    """

    schema_version: Literal[1] = 1
    created: str
    policy: str
    quantile: float = 1.0
    entries: list[Acceptance]


# ------------------------------------------------------------------ one cell


def judge_cell(
    runs: Sequence[Run], policy: Policy, quantile: float, control: bool | None
) -> tuple[VerdictStatus, list[str]]:
    """The verdict over all runs of a cell, with the reasons in sentences.

    "leaks" when the score that decides (`deciding_score` over the private examples of all runs) crosses a
    threshold, or when a run proves a leak: its own audit says "leaks" though none of its scores crosses
    one, as text that is verified without matching the originals does.  A quantile below 1 forgives
    a share of scores, never a proof.

    "not-recovered" only when every run is done, each policy metric was measured on every example,
    the control passed, the attack that came nearest had all the time it took, and no run's audit is in
    doubt (`Run.reasons` of an inconclusive one, less that its own control did not run: the sweep's control
    stands for it).  "inconclusive" otherwise.

    Args:
        quantile: above 0, up to 1.
        control: whether the same attack broke the policy without the defense; None when it did not run.

    Raises:
        InputError: the quantile is out of range.
    """
    check_quantile(quantile)
    leaks = [*_crossings(runs, policy, quantile), *_proofs(runs, policy)]
    if leaks:
        return "leaks", [*leaks, *_unfinished(runs)]
    doubts = [
        *_unfinished(runs),
        *_ended_early(runs),
        *_unmeasured(runs, policy),
        *_control(control),
        *_own_doubts(runs),
    ]
    if doubts:
        return "inconclusive", doubts
    return "not-recovered", [
        *_forgiven(runs, policy),
        *_cut(runs),
        "The same attack breaks the policy without the defense.",
    ]


def check_quantile(quantile: float) -> float:
    if not 0 < quantile <= 1:
        raise InputError(f"quantile {quantile:g}; accepted: above 0, up to 1 for the worst case")
    return quantile


def deciding_score(scores: Iterable[float | None], threshold: Threshold, quantile: float) -> float | None:
    """The worst score after the worst share `1 - quantile` (rounded down) of the measured ones is set aside.

    1 gives the worst case; 0.9 of ten scores gives the second worst.  None when nothing was measured.
    """
    measured = sorted(_measured(scores), reverse=threshold.operator == ">")
    if not measured:
        return None
    aside = math.floor((1 - quantile) * len(measured) + 1e-9)
    return measured[min(aside, len(measured) - 1)]


def deciding_scores(cell: Cell, policy: Policy, quantile: float) -> dict[str, float]:
    """`deciding_score` of the cell by threshold, in the order of the policy; measured ones only."""
    found = {str(t): deciding_score(cell.scores(t.metric), t, quantile) for t in policy.thresholds}
    return {name: score for name, score in found.items() if score is not None}


def crossed(cell: Cell, policy: Policy, quantile: float) -> list[Threshold]:
    """The thresholds that the cell's deciding scores cross; none where it leaks by proof alone."""
    scores = deciding_scores(cell, policy, quantile)
    return [threshold for threshold in policy.thresholds if threshold.crossed(scores.get(str(threshold)))]


def _measured(scores: Iterable[float | None]) -> list[float]:
    return [score for score in scores if score is not None and not math.isnan(score)]


def _rows(runs: Iterable[Run]) -> list[dict[str, float | None]]:
    return [example.scores for run in runs for example in run.examples]


def _crossings(runs: Sequence[Run], policy: Policy, quantile: float) -> Iterator[str]:
    rows = _rows(runs)
    for threshold in policy.thresholds:
        scores = (row.get(threshold.metric) for row in rows)
        if threshold.crossed(deciding_score(scores, threshold, quantile)):
            aside = "" if quantile == 1 else f", more than the {100 - 100 * quantile:.3g} % that may"
            yield from (f"{text}{aside}." for text in _alone(threshold).broken_by(rows))


def _proofs(runs: Sequence[Run], policy: Policy) -> list[str]:
    return [
        f"{_named(run)}: {run.headline or 'its audit proves a leak.'}"
        for run in runs
        if run.verdict == "leaks" and not policy.broken_by(_rows([run]))
    ]


def _unfinished(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return ["No run was made."]
    return [
        f"{_named(run)} {run.status}{f': {run.error}' if run.error else '.'}"
        for run in runs
        if run.status != "done"
    ]


def _unmeasured(runs: Sequence[Run], policy: Policy) -> Iterator[str]:
    for run in runs:
        if run.status != "done":
            continue
        if not run.examples:
            yield f"{_named(run)} scored no example."
        for metric in policy.metrics:
            there = len(_measured(row.get(metric) for row in _rows([run])))
            missing = len(run.examples) - there
            if missing or metric in run.unmeasured:
                yield f"{_named(run)}: {metric} was not measured on {missing or 'some'} of its examples."


def _control(control: bool | None) -> list[str]:
    if control:
        return []
    if control is None:
        return [f"{NO_CONTROL}: nothing shows that this attack works here."]
    return ["The positive control failed: this attack does not break the policy without the defense either."]


def _own_doubts(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if run.status == "done" and run.verdict is None:
            yield f"{_named(run)} came to no verdict."
        if run.verdict == "inconclusive":
            yield from (f"{_named(run)}: {text}" for text in run.reasons if not text.startswith(NO_CONTROL))


def _forgiven(runs: Sequence[Run], policy: Policy) -> list[str]:
    return [
        f"{text}, within the share that the quantile sets aside." for text in policy.broken_by(_rows(runs))
    ]


def _ended_early(runs: Sequence[Run]) -> list[str]:
    """A doubt where the attack that came nearest was still at it when its time was up."""
    return [
        f"{_named(run)}: the time budget ended {run.attack} early, which came nearest; raise it."
        for run in runs
        if run.attack in run.cut
    ]


def _cut(runs: Sequence[Run]) -> list[str]:
    """What more time might show; no doubt, as another attack came nearer and had the time it took."""
    early = [run for run in runs if run.cut]
    names = ", ".join(dict.fromkeys(name for run in early for name in run.cut))
    if not early:
        return []
    return [
        f"The time budget ended {names} early in {len(early)} of {len(runs)} runs: more may recover more."
    ]


def _alone(threshold: Threshold) -> Policy:
    return Policy((threshold,))


def _named(run: Run) -> str:
    return f"Group {run.group}, seed {run.seed}"


# ------------------------------------------------------------------ all cells


def gate(
    result_cells: Sequence[Cell],
    policy: Policy,
    quantile: float,
    baseline: Baseline | None,
    today: date,
) -> Gate:
    """Hold judged cells against the policy and the baseline.

    A leaking cell breaks the build unless the baseline accepts it on `today` (the day `expires` included)
    and it leaks no more than it did then, within `TOLERANCES`.  Inconclusive cells are never accepted.
    `Gate.notes` say which entries have expired, got worse, or are not needed any more.

    Raises:
        InputError: no cells, or the baseline was written for another policy or quantile.
    """
    if not result_cells:
        raise InputError("the sweep has no cells: there is nothing to judge")
    if baseline is not None:
        check_baseline(baseline, policy, quantile)
    known = {entry.cell: entry for entry in baseline.entries} if baseline is not None else {}
    broken, expired, worse, accepted, notes = [], [], [], [], []
    for cell in result_cells:
        if cell.verdict != "leaks" or not policy.enforced:
            continue
        entry = known.get(cell.name)
        if entry is None:
            broken.append(cell.name)
        elif _day(entry.expires) < today:
            broken.append(cell.name)
            expired.append(cell.name)
            notes.append(f"{cell.name}: accepted by {entry.owner} until {entry.expires}, which is over.")
        elif more := _advances(cell, entry, policy, quantile):
            broken.append(cell.name)
            worse.append(cell.name)
            notes += [f"{cell.name}: {text}" for text in more]
        else:
            accepted.append(entry)
    return Gate(
        policy=str(policy),
        quantile=quantile,
        broken=broken,
        accepted=accepted,
        expired=expired,
        worse=worse,
        inconclusive=[cell.name for cell in result_cells if cell.verdict == "inconclusive"],
        notes=[*notes, *_stale(known.values(), result_cells)],
    )


def standing(cell: Cell, verdict: Gate) -> Standing:
    """How a cell of the sweep that `verdict` is about came out."""
    if cell.name in verdict.broken:
        return "broken"
    if acceptance(cell, verdict) is not None:
        return "accepted"
    if cell.name in verdict.inconclusive:
        return "inconclusive"
    return "passed" if cell.verdict == "not-recovered" else "reported"


def acceptance(cell: Cell, verdict: Gate) -> Acceptance | None:
    """The entry of the baseline that covers the cell."""
    return next((entry for entry in verdict.accepted if entry.cell == cell.name), None)


def policy_of(result: SweepResult) -> Policy:
    """The thresholds the sweep was judged by; those of its medium, not enforced, for `never`."""
    return parse_policy(result.gate.policy, result.medium)


def _advances(cell: Cell, entry: Acceptance, policy: Policy, quantile: float) -> list[str]:
    """One sentence for every threshold that the cell crosses clearly further than when it was accepted."""
    scores = deciding_scores(cell, policy, quantile)
    found = []
    for threshold in crossed(cell, policy, quantile):
        now, before = scores[str(threshold)], entry.scores.get(str(threshold))
        tolerance = TOLERANCES.get(threshold.metric, TOLERANCE)
        if before is None:
            found.append(
                f"{threshold} was not crossed when it was accepted, now {threshold.metric} is {now:.4g}."
            )
        elif _advance(threshold, before, now) > tolerance + 1e-9:
            unit = " dB" if threshold.metric in TOLERANCES else ""
            found.append(
                f"{threshold.metric} {now:.4g} where {before:.4g} was accepted: worse by more than {tolerance:g}{unit}."
            )
    return found


def _advance(threshold: Threshold, before: float, now: float) -> float:
    """How much further `now` is on the leaking side than `before`, on the metric's scale of `TOLERANCES`."""
    if threshold.metric == "mse":
        flipped = -1 if threshold.operator == ">" else 1
        return flipped * (_decibels(now) - _decibels(before))
    if threshold.metric == "psnr":
        before, now = min(before, EXACT), min(now, EXACT)
    return now - before if threshold.operator == ">" else before - now


def _decibels(mse: float) -> float:
    return EXACT if mse <= 10 ** (-EXACT / 10) else -10 * math.log10(mse)


def _stale(entries: Iterable[Acceptance], cells: Sequence[Cell]) -> Iterator[str]:
    verdicts = {cell.name: cell.verdict for cell in cells}
    for entry in entries:
        verdict = verdicts.get(entry.cell)
        if verdict is None:
            yield f"{entry.cell}: in the baseline, but not in this sweep."
        elif verdict == "not-recovered":
            yield f"{entry.cell}: in the baseline, but leaks no more; its entry can go."


# ------------------------------------------------------------------ the baseline's file


def read_baseline(path: str | Path) -> Baseline:
    """The baseline in a JSON file.

    Raises:
        InputError: no such file, not JSON, another schema, a date that is none, a policy that does not
            parse, an entry without owner, or two of one cell.
    """
    baseline = _read(Path(path), Baseline, "baseline", BASELINE_SCHEMA_VERSION)
    try:
        parse_policy(baseline.policy)
        check_quantile(baseline.quantile)
        for entry in baseline.entries:
            _check_entry(entry)
    except InputError as error:
        raise InputError(f"baseline {path}: {error}") from error
    seen: set[str] = set()
    for entry in baseline.entries:
        if entry.cell in seen:
            raise InputError(f"baseline {path} names the cell {entry.cell!r} twice")
        seen.add(entry.cell)
    return baseline


def check_baseline(baseline: Baseline, policy: Policy, quantile: float) -> None:
    """Raises `InputError` when the baseline was written for another policy; worth asking before a sweep runs."""
    theirs = _terms(parse_policy(baseline.policy), baseline.quantile)
    if theirs != _terms(policy, quantile):
        raise InputError(
            f"the baseline accepts leakage under {baseline.policy} (quantile {baseline.quantile:g}), but this sweep is"
            f" judged by {policy} (quantile {quantile:g}): write the baseline anew, or use its policy"
        )


def write_baseline(
    result: SweepResult,
    path: str | Path,
    owner: str,
    expires: str,
    *,
    reason: str = "",
    force: bool = False,
    today: date | None = None,
) -> Baseline:
    """Accept every leaking cell that the gate counts, and write that as the baseline file, in one step.

    Cells that an earlier baseline still covers keep their owner, date and scores; the others, those that
    got worse or expired among them, become `owner`'s.  Inconclusive cells cannot be accepted.

    Args:
        expires: last day of the acceptance, YYYY-MM-DD, not before today.
        reason: why, for whoever reads the file.
        today: taken from the clock unless given.

    Raises:
        InputError: the file exists (without `force`), no owner, a date that is none or is over, or the
            sweep was judged by `never`.
    """
    today = today or date.today()
    path = Path(path)
    policy = policy_of(result)
    if not policy.enforced:
        raise InputError(
            "the sweep was judged by never, so nothing is to be accepted: use --fail-on ssim>0.5"
        )
    if path.exists() and not force:
        raise InputError(f"{path} exists; pass --force to overwrite it, or choose another name")
    template = Acceptance(cell="", owner=owner.strip(), expires=expires, reason=reason)
    _check_entry(template)
    if _day(expires) < today:
        raise InputError(f"expires {expires}: that day is over; accepted: {today.isoformat()} or later")
    baseline = Baseline(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        policy=str(policy),
        quantile=result.gate.quantile,
        entries=[
            _entry(cell, result.gate, policy, template, today)
            for cell in result.cells
            if standing(cell, result.gate) in ("broken", "accepted")
        ],
    )
    write_atomically(path, (baseline.model_dump_json(indent=1) + "\n").encode(), make_folder=True)
    return baseline


def read_sweep(path: str | Path) -> SweepResult:
    """The result of a sweep, from its folder or its JSON file.  `InputError` when there is none."""
    path = Path(path)
    return _read(path / SWEEP_NAME if path.is_dir() else path, SweepResult, "sweep", SWEEP_SCHEMA_VERSION)


def _entry(cell: Cell, verdict: Gate, policy: Policy, template: Acceptance, today: date) -> Acceptance:
    kept = acceptance(cell, verdict)
    if kept is not None and _day(kept.expires) >= today:
        return kept
    scores = deciding_scores(cell, policy, verdict.quantile)
    crossing = [str(threshold) for threshold in crossed(cell, policy, verdict.quantile)]
    return template.model_copy(
        update={"cell": cell.name, "scores": {name: scores[name] for name in crossing}}
    )


def _check_entry(entry: Acceptance) -> None:
    if not entry.owner.strip():
        raise InputError(f"the acceptance of {entry.cell!r} has no owner; accepted: who answers for it")
    _day(entry.expires)


def _day(text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        day = None
    if day is None or day.isoformat() != text:
        raise InputError(f"expires {text!r} is not a date; accepted: YYYY-MM-DD")
    return day


def _terms(policy: Policy, quantile: float) -> tuple[bool, frozenset[str], float]:
    return policy.enforced, frozenset(map(str, policy.thresholds)), quantile


def _read(path: Path, kind: type[Read], what: str, schema: int) -> Read:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}") from error
    return parse_versioned(text, kind, schema, path, called=f"{what} {path}", noun=f"a {what}")
