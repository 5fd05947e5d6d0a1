"""`SweepResult` -> JUnit XML, as Jenkins and GitLab read it: one suite a protocol, one case a cell.

Both show the text of an element or its `message`, so findings carry both.  Jenkins splits class names at
dots, which the options of a protocol may hold, so those are written as underscores.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from leakaudit.gate import acceptance, deciding_scores, policy_of, standing
from leakaudit.report.words import plain_number
from leakaudit.results import NEVER
from leakaudit.sweep_results import Cell, SweepResult

ELEMENTS = {"failure": "failures", "error": "errors", "skipped": "skipped"}


def junit_xml(result: SweepResult) -> str:
    """The document as text, UTF-8 declared; valid under the schema of Jenkins' xUnit plugin (junit-10).

    A cell that breaks the policy is a failure; one that proves nothing, with failed runs or without a
    control that passed, an error; accepted leakage, and what the gate does not count, is skipped, so that it
    never looks like a pass.
    """
    root = ET.Element("testsuites", name="leakaudit", time=_seconds(result.cells))
    for protocol in dict.fromkeys(cell.protocol for cell in result.cells):
        root.append(_suite(result, protocol, [cell for cell in result.cells if cell.protocol == protocol]))
    for attribute in ("tests", "failures", "errors"):
        root.set(attribute, str(sum(int(suite.get(attribute, 0)) for suite in root)))
    ET.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(result: SweepResult, protocol: str, cells: Sequence[Cell]) -> ET.Element:
    suite = ET.Element("testsuite", name=clean(protocol), tests=str(len(cells)))
    properties = ET.SubElement(suite, "properties")
    for name, value in _facts(result).items():
        ET.SubElement(properties, "property", name=name, value=clean(value))
    cases = [_case(result, cell) for cell in cells]
    suite.extend(cases)
    for element, attribute in ELEMENTS.items():
        suite.set(attribute, str(sum(case.find(element) is not None for case in cases)))
    suite.set("time", _seconds(cells))
    suite.set("timestamp", clean(result.created))
    return suite


def _facts(result: SweepResult) -> dict[str, str]:
    return {
        "model": result.model,
        "policy": result.gate.policy,
        "quantile": f"{result.gate.quantile:g}",
        "seed": str(result.seed),
        "command": result.command,
    }


def _case(result: SweepResult, cell: Cell) -> ET.Element:
    classname = clean(f"leakaudit.{cell.protocol.replace('.', '_')}")
    case = ET.Element("testcase", classname=classname, name=clean(cell.name), time=_seconds([cell]))
    found = _finding(result, cell)
    if found is not None:
        element, kind, message = found
        text = clean("\n".join([message, *cell.reasons]))
        ET.SubElement(case, element, type=kind, message=clean(message)).text = text
    ET.SubElement(case, "system-out").text = clean("\n".join(_output(result, cell)))
    return case


def _finding(result: SweepResult, cell: Cell) -> tuple[str, str, str] | None:
    """Element, type and message; None for a cell within the policy."""
    first = cell.reasons[0] if cell.reasons else f"verdict: {cell.verdict}"
    outcome = standing(cell, result.gate)
    if outcome == "broken":
        notes = [text for text in result.gate.notes if text.startswith(f"{cell.name}: ")]
        return "failure", "leaks", "\n".join([f"Leaks: {first}", *notes])
    if outcome == "inconclusive":
        return "error", "inconclusive", f"Inconclusive: {first}"
    if outcome == "reported":
        why = f"the policy is {NEVER}" if result.gate.policy == NEVER else "the gate does not count this cell"
        return "skipped", "reported", f"{cell.verdict.capitalize()}, but {why}: {first}"
    entry = acceptance(cell, result.gate)
    if entry is not None:
        why = f": {entry.reason}" if entry.reason else ""
        return "skipped", "accepted", f"Leaks; accepted by {entry.owner} until {entry.expires}{why}"
    return None


def _output(result: SweepResult, cell: Cell) -> list[str]:
    scores = deciding_scores(cell, policy_of(result), result.gate.quantile)
    label = "worst" if result.gate.quantile == 1 else f"quantile {result.gate.quantile:g}"
    lines = [f"{threshold} {label}: {plain_number(score)}" for threshold, score in scores.items()]
    done = sum(run.status == "done" for run in cell.runs)
    return [f"verdict: {cell.verdict}", *lines, f"runs done: {done} of {len(cell.runs)}", *cell.reasons]


def _seconds(cells: Sequence[Cell]) -> str:
    return f"{sum(run.seconds for cell in cells for run in cell.runs):.3f}"


def clean(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold, not even escaped (section 2.2); they become `?`."""
    return "".join(c if c in "\t\n\r" or _in_xml(ord(c)) else "?" for c in text)


def _in_xml(code: int) -> bool:
    return 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or code >= 0x10000
