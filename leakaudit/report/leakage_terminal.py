"""`LeakageResult` -> the terminal, through rich; reads well at 80 columns.

Strings from files are shown as plain text: no rich markup, no control characters.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from leakaudit.leakage_results import LeakageResult, LeakageRow
from leakaudit.report import words
from leakaudit.report.folder import REPORT_NAME
from leakaudit.report.gate_terminal import STATE_MARKS, STATE_STYLES, gate_panel
from leakaudit.report.leakage_summary import (
    EXIT_MEANINGS,
    headline,
    scores_of,
    seen,
    state_of,
    what_happened,
)
from leakaudit.report.terminal import plain


def print_leakage(result: LeakageResult, console: Console, folder: Path | None = None) -> None:
    """Print system x role x best attack, then for every row what was found and what theory says.

    Args:
        console: where to; any width from 60 columns.
        folder: the result's folder, to say where the page lies.
    """
    console.print(_panel(result))
    console.print(_table(result))
    for row in result.rows:
        console.print(_remarks(row))
    if folder is not None:
        page = Text.assemble(("\nReport", "bold"), " ", plain(str(folder / REPORT_NAME)))
        console.print(page, soft_wrap=True)


def _panel(result: LeakageResult) -> Panel:
    code = result.exit_code
    lines: list[RenderableType] = [plain(headline(result), "bold")]
    if result.interrupted:
        lines.append(Text("Interrupted: views that were not attacked prove nothing.", style="yellow"))
    if result.unattacked:
        runs = ", ".join(result.unattacked)
        lines.append(plain(f"No update of {runs} was attacked: that shows nothing.", "yellow"))
    if result.policy:
        lines.append(plain(f"Policy: {result.policy}", "dim"))
    lines.append(plain(f"Exit code {code}: {EXIT_MEANINGS[code]}", "dim"))
    unrecovered = any(row.verdict == "not-recovered" for row in result.rows)
    return gate_panel(lines, code, unrecovered=unrecovered)


def _table(result: LeakageResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0), expand=False)
    for name in ("System", "Role", "Seen", "Best attack", "Score"):
        table.add_column(name, overflow="fold")
    table.add_column("Verdict", no_wrap=True)
    for row in result.rows:
        state = state_of(row)
        verdict = Text(f"{STATE_MARKS[state]} {state.replace('-', ' ')}".strip(), style=STATE_STYLES[state])
        table.add_row(
            plain(row.system, "bold"),
            plain(row.role),
            plain(seen(row)),
            plain(_attack(row)),
            _scores(row),
            verdict,
        )
    return table


def _attack(row: LeakageRow) -> str:
    return words.MISSING if row.attack is None else row.attack.partition(":")[0]


def _scores(row: LeakageRow) -> Text:
    found = [
        f"{words.metric_name(s.metric)} {words.plain_number(s.value)} {s.unit}".rstrip()
        for s in scores_of(row)
    ]
    return plain("\n".join(found) or words.MISSING)


def _remarks(row: LeakageRow) -> Group:
    """What was found, and the theory beside it."""
    where = f"{row.system}, {row.role}" + (f", {row.view}" if row.view else "")
    lines = [Text.assemble("• ", plain(sentence)) for sentence in what_happened(row)]
    source = f" ({row.source})" if row.source else ""
    lines.append(Text.assemble(("Theory: ", "bold"), plain(row.theory), plain(source, "dim")))
    head = Text.assemble("\n", plain(where, "bold"), plain(f"  {row.note}" if row.note else "", "dim"))
    return Group(head, *(Padding(line, (0, 0, 0, 2)) for line in lines))
