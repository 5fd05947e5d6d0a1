"""`SweepResult` -> GitHub-flavoured Markdown, for the summary of a CI job.

GitHub refuses a step's summary of more than 1 MiB, so what does not fit is cut off line by line, with a
note; the verdict and how to repeat it come first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from leakaudit.errors import InputError
from leakaudit.gate import Standing, deciding_scores, policy_of, standing
from leakaudit.policy import Policy
from leakaudit.report.sweep_summary import bounds_of, epsilon_of, utility_of
from leakaudit.report.words import MISSING, plain_number, plural
from leakaudit.sweep_results import Adversary, Bound, Cell, SweepResult, Utility

LIMIT = 1024 * 1024
"""Bytes of one step's summary that GitHub takes."""
NOTE = "\n*Cut off here: the rest would not fit. The HTML page has all of it.*\n"
LISTED = 50
"""Cells named in a list of reasons."""
LONGEST = 400
"""Characters of one reason."""
COLUMNS = ("Protocol", "Defense", "Attack", "Oblivious", "Adaptive", "Accuracy", "Epsilon", "Theory")
WORDS: dict[Standing, str] = {
    "broken": "**LEAKS**",
    "accepted": "leaks (accepted)",
    "reported": "not counted",
    "inconclusive": "inconclusive",
    "passed": "not recovered",
}


def markdown(result: SweepResult) -> str:
    """The verdict, how to repeat it, the cells that matter and why, and the table of all cells.

    A row is a target under one attack: what the policy decides on (the worst score, or that at the quantile)
    for both adversaries, held-out accuracy, epsilon, and what theory says.  At most `LIMIT` bytes.
    """
    lines = [
        *_verdict(result),
        *_repeat(result),
        *_reasons(result, "broken", "Leakage above the policy"),
        *_reasons(result, "inconclusive", "Inconclusive"),
        *_accepted(result),
        *_bullets("Baseline", [text_of(note) for note in result.gate.notes]),
        *_table(result),
    ]
    return shorten("\n".join(lines) + "\n", LIMIT)


def append_summary(path: str | Path, text: str) -> None:
    """Append to the file of `$GITHUB_STEP_SUMMARY`, cut so that the whole file keeps within `LIMIT`.

    Raises `InputError` when it cannot be written.
    """
    path = Path(path)
    try:
        there = path.stat().st_size if path.exists() else 0
        data = shorten(text if there == 0 else f"\n{text}", LIMIT - there).encode()
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        raise InputError(f"cannot write the summary {path}: {error.strerror or error}") from error


def shorten(text: str, limit: int) -> str:
    """The whole lines of `text` that fit into `limit` bytes together with a note that some do not."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    room = limit - len(NOTE.encode())
    end = data.rfind(b"\n", 0, max(room, 0)) + 1
    return data[:end].decode() + NOTE if room > 0 else ""


# ------------------------------------------------------------------ sections


def _verdict(result: SweepResult) -> list[str]:
    outcomes = [standing(cell, result.gate) for cell in result.cells]
    counts = {name: outcomes.count(name) for name in WORDS}
    if counts["broken"]:
        headline = f"{plural(counts['broken'], 'cell')} above the policy"
    elif counts["inconclusive"]:
        headline = f"{plural(counts['inconclusive'], 'cell')} inconclusive: nothing is proven"
    else:
        headline = "Within the policy"
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    quantile = "the worst case" if result.gate.quantile == 1 else f"the quantile {result.gate.quantile:g}"
    lines = [
        f"## {text_of(result.title)}: {headline}",
        "",
        f"{code(result.model)}, {plural(len(result.cells), 'cell')} ({parts}),"
        f" {plural(result.examples, 'private example')}, {plural(result.seeds, 'seed')}."
        f" Policy {code(result.gate.policy)} over {quantile}. Exit code {result.exit_code}.",
    ]
    if result.interrupted:
        lines += ["", "**Interrupted: this is what was found until then.**"]
    return lines


def _repeat(result: SweepResult) -> list[str]:
    if not result.command:
        return []
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", result.command)), 0)
    return ["", "To repeat it:", "", fence, _one_line(result.command), fence]


def _reasons(result: SweepResult, outcome: Standing, heading: str) -> list[str]:
    cells = [cell for cell in result.cells if standing(cell, result.gate) == outcome]
    return _bullets(
        heading, [f"{code(cell.name)}: {text_of(' '.join(cell.reasons) or cell.verdict)}" for cell in cells]
    )


def _accepted(result: SweepResult) -> list[str]:
    return _bullets(
        "Accepted",
        [
            f"{code(entry.cell)}: by {text_of(entry.owner)} until {text_of(entry.expires)}"
            + (f", {text_of(entry.reason)}" if entry.reason else "")
            for entry in result.gate.accepted
        ],
    )


def _bullets(heading: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    rest = [f"- and {len(items) - LISTED:,} more"] if len(items) > LISTED else []
    return ["", f"### {heading}", "", *(f"- {item}" for item in items[:LISTED]), *rest]


# ------------------------------------------------------------------ the table


def _table(result: SweepResult) -> Iterator[str]:
    policy = policy_of(result)
    rows: dict[tuple[str, str, str], dict[Adversary, Cell]] = {}
    for cell in result.cells:
        rows.setdefault((cell.protocol, cell.defense, cell.attack), {})[cell.adversary] = cell
    yield from ("", "### Cells", "", _row(COLUMNS), _row(["---"] * len(COLUMNS)))
    for (protocol, defense, attack), pair in rows.items():
        cell = next(iter(pair.values()))
        yield _row(
            [
                *map(code, (protocol, defense, attack)),
                _outcome(result, policy, pair.get("oblivious")),
                _outcome(result, policy, pair.get("adaptive")),
                _accuracy(utility_of(result, cell)),
                plain_number(epsilon_of(result, cell)),
                _theory(bounds_of(result, cell)),
            ]
        )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _outcome(result: SweepResult, policy: Policy, cell: Cell | None) -> str:
    if cell is None:
        return MISSING
    scores = deciding_scores(cell, policy, result.gate.quantile)
    by_metric = {t.metric: scores[str(t)] for t in policy.thresholds if str(t) in scores}
    parts = ", ".join(f"{metric} {plain_number(score)}" for metric, score in by_metric.items())
    outcome = standing(cell, result.gate)
    word = WORDS[outcome] if outcome != "reported" else f"{cell.verdict} (not counted)"
    return f"{word}, {parts}" if parts else word


def _accuracy(utility: Utility | None) -> str:
    if utility is None or utility.accuracy is None:
        return MISSING
    text = f"{utility.accuracy:.3f}"
    if utility.low is None or utility.high is None:
        return text
    return f"{text} ({utility.low:.3f} to {utility.high:.3f})"


def _theory(bounds: Sequence[Bound]) -> str:
    """Everything but epsilon, each labelled bound or indicator."""
    shown = [
        f"{text_of(bound.name)} {plain_number(bound.value)} ({bound.kind})"
        for bound in bounds
        if bound.quantity != "epsilon" and bound.value is not None
    ]
    return "; ".join(shown) or MISSING


# ------------------------------------------------------------------ escapes


def code(text: str) -> str:
    """A code span that may stand in a table: GFM takes `\\|` there even inside code (section 4.10)."""
    return f"`{_one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def text_of(text: str) -> str:
    """Words without markup: what Markdown or HTML would read as such is escaped; long ones are cut."""
    line = _one_line(text)
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]<>#|~&!@])", r"\\\1", line)


def _one_line(text: str) -> str:
    """Without line breaks and control characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
