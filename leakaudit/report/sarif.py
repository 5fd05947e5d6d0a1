"""`SweepResult` -> SARIF 2.1.0, for code scanning: one result for every threshold that a cell crosses.

Sections cited are those of the OASIS standard, Static Analysis Results Interchange Format (SARIF) 2.1.0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from leakaudit import __version__
from leakaudit.gate import Standing, acceptance, crossed, deciding_scores, policy_of, standing
from leakaudit.policy import Policy, Threshold
from leakaudit.report.words import metric_name, plain_number
from leakaudit.results import NEVER
from leakaudit.sweep_results import Acceptance, Cell, SweepResult

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS: dict[Standing, str] = {
    "broken": "error",
    "accepted": "error",
    "reported": "note",
    "inconclusive": "warning",
}
"""Cells that pass, or that the gate does not count, have no result.  An inconclusive audit is a problem of kind
"fail": the kinds "open" and "review" may not have a level (3.27.10), and code scanning shows nothing without."""
PROVEN, INCONCLUSIVE = "leakage-proven", "inconclusive"
TEXT_FILES = frozenset({".toml", ".json", ".yaml", ".yml", ".py"})


def sarif(result: SweepResult, artifact: str | None = None) -> dict[str, Any]:
    """The log file as JSON values.

    Args:
        artifact: the file that alerts are shown at, a path relative to the repository's root, such as the
            sweep's configuration; by default the first of `result.files`, else the model's name.

    Returns:
        One run.  Leaking cells have a result for each threshold they cross (one for a leak that is proven
        without), level error; those the baseline accepts are suppressed with owner, date and
        reason; inconclusive cells have level warning.  Results keep their fingerprints from sweep
        to sweep: they depend on the rule and the name of the cell only.
    """
    policy = policy_of(result)
    rules = [*_threshold_rules(policy), _proven_rule(), _inconclusive_rule()]
    indices = {rule["id"]: index for index, rule in enumerate(rules)}
    place = _place(artifact or next(iter(result.files), result.model))
    found = [
        {**item, "ruleIndex": indices[item["ruleId"]], "locations": [{**place, **_logical(cell)}]}
        for cell in result.cells
        for item in _results(result, cell, policy)
    ]
    invocation: dict[str, Any] = {"executionSuccessful": not result.interrupted, "exitCode": result.exit_code}
    if result.command:
        invocation["commandLine"] = result.command
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "leakaudit", "version": __version__, "rules": rules}},
                "invocations": [invocation],
                "columnKind": "unicodeCodePoints",
                "results": found,
                "properties": {"policy": result.gate.policy, "quantile": result.gate.quantile},
            }
        ],
    }


def _results(result: SweepResult, cell: Cell, policy: Policy) -> Iterator[dict[str, Any]]:
    outcome = standing(cell, result.gate)
    if outcome == "passed" or (outcome == "reported" and not _noted(result, cell)):
        return
    if outcome == "inconclusive":
        text = f"Inconclusive: {cell.name}. {' '.join(cell.reasons)}"
        yield _result(INCONCLUSIVE, LEVELS[outcome], text, cell)
        return
    entry = acceptance(cell, result.gate)
    scores = deciding_scores(cell, policy, result.gate.quantile)
    over = crossed(cell, policy, result.gate.quantile)
    for rule, threshold in _by_rule(over).items():
        score = scores[str(threshold)]
        text = f"Leaks: {cell.name}. {threshold.metric} {plain_number(score)} crosses {threshold}."
        yield _result(rule, LEVELS[outcome], text, cell, entry)
    if not over:
        text = f"Leaks: {cell.name}. {' '.join(cell.reasons)}"
        yield _result(PROVEN, LEVELS[outcome], text, cell, entry)


def _noted(result: SweepResult, cell: Cell) -> bool:
    """Leakage under `never` is worth a note; the undefended rows of a gate that counts are not."""
    return result.gate.policy == NEVER and cell.verdict == "leaks"


def _result(rule: str, level: str, text: str, cell: Cell, entry: Acceptance | None = None) -> dict[str, Any]:
    digest = hashlib.sha256(f"{rule}\n{cell.name}".encode("utf-8", "replace")).hexdigest()[:32]
    item: dict[str, Any] = {
        "ruleId": rule,
        "level": level,
        "message": {"text": text.strip()},
        "partialFingerprints": {"leakauditCell/v1": digest, "primaryLocationLineHash": f"{digest}:1"},
        "properties": {"reasons": cell.reasons},
    }
    if entry is not None:
        item["suppressions"] = [_suppression(entry)]
    return item


def _suppression(entry: Acceptance) -> dict[str, Any]:
    why = f" {entry.reason}" if entry.reason else ""
    return {
        "kind": "external",
        "status": "accepted",
        "justification": f"Accepted by {entry.owner} until {entry.expires}.{why}",
        "properties": {"owner": entry.owner, "expires": entry.expires},
    }


# ------------------------------------------------------------------ rules


def _threshold_rules(policy: Policy) -> list[dict[str, Any]]:
    return [
        _rule(
            name,
            f"Reconstruction with {metric_name(threshold.metric)} {threshold.operator} {threshold.value:g}",
            "A shared update gave the private data away: an attack reconstructed an example so well that its"
            f" {metric_name(threshold.metric)} crossed {threshold}.",
            "error",
        )
        for name, threshold in _by_rule(policy.thresholds).items()
    ]


def _proven_rule() -> dict[str, Any]:
    return _rule(
        PROVEN,
        "Reconstruction proven without the originals",
        "A shared update gave the private data away: the reconstruction was proven from the update alone.",
        "error",
    )


def _inconclusive_rule() -> dict[str, Any]:
    return _rule(
        INCONCLUSIVE,
        "The audit proves nothing",
        "Runs failed, scores are missing, or the attack does not succeed without the defense either. That nothing"
        " was recovered is then no evidence of safety.",
        "warning",
    )


def _rule(name: str, short: str, full: str, level: str) -> dict[str, Any]:
    return {
        "id": name,
        "shortDescription": {"text": short},
        "fullDescription": {"text": full},
        "help": {"text": "The sweep's HTML page shows the reconstructions of every cell."},
        "defaultConfiguration": {"level": level},
        "properties": {"tags": ["security", "privacy"]},
    }


def _by_rule(thresholds: Iterable[Threshold]) -> dict[str, Threshold]:
    """One a metric and side, so that a rule outlives a change of its number; the first where there are two."""
    found: dict[str, Threshold] = {}
    for threshold in thresholds:
        side = "above" if threshold.operator == ">" else "below"
        found.setdefault(f"leakage-{threshold.metric}-{side}", threshold)
    return found


# ------------------------------------------------------------------ where


def _place(path: str) -> dict[str, Any]:
    """The file as a URI; its first line, where it has lines."""
    pure = PurePath(path)
    uri = pure.as_uri() if pure.is_absolute() else quote(pure.as_posix(), errors="replace")
    place: dict[str, Any] = {"artifactLocation": {"uri": uri}}
    if pure.suffix.lower() in TEXT_FILES:
        place["region"] = {"startLine": 1}
    return {"physicalLocation": place}


def _logical(cell: Cell) -> dict[str, Any]:
    return {"logicalLocations": [{"fullyQualifiedName": cell.name, "kind": "object"}]}
