"""`SweepResult` -> the terminal, through rich: a row for each protocol, defense and attack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leakaudit.policy import Threshold, parse_policy
from leakaudit.report import words
from leakaudit.report.terminal import VERDICT_STYLES, plain
from leakaudit.results import VerdictStatus
from leakaudit.sweep_results import Cell, SweepResult

WORST_FIRST: tuple[VerdictStatus, ...] = ("leaks", "inconclusive", "not-recovered")
MOST = 12
"""Lines of reasons, notes and names."""
HEADLINES = {
    0: ("WITHIN POLICY", "green"),
    1: ("! LEAKAGE ABOVE POLICY", "red"),
    3: ("? INCONCLUSIVE", "yellow"),
}


def print_sweep(result: SweepResult, console: Console, folder: Path | None = None) -> None:
    """Print the tables, what the gate says, and where everything lies."""
    _print_tables(result, console)
    _print_gate(result, console)
    _print_failures(result, console)
    for note in result.notes:
        console.print(plain(note, "dim"))
    if folder is not None:
        console.print(Text.assemble(("Sweep", "bold"), " ", plain(str(folder))), soft_wrap=True)


def _print_tables(result: SweepResult, console: Console) -> None:
    """One for each protocol and attack."""
    threshold = parse_policy(result.gate.policy, result.medium).thresholds[0]
    noun = "image" if result.medium == "images" else "sentence"
    tables: dict[tuple[str, str], dict[str, dict[str, Cell]]] = {}
    for cell in result.cells:
        rows = tables.setdefault((cell.protocol, cell.attack), {})
        rows.setdefault(cell.defense, {})[cell.adversary] = cell
    for (protocol, attack), rows in tables.items():
        console.print(Text.assemble("\n", plain(protocol, "bold"), ", attack ", plain(attack, "bold")))
        console.print(_table(result, protocol, rows, threshold))
    examples = words.plural(result.examples, f"private {noun}")
    console.print(Text(f"Scores are the worst {words.metric_name(threshold.metric)} of {examples}.", "dim"))


def _table(
    result: SweepResult, protocol: str, rows: dict[str, dict[str, Cell]], threshold: Threshold
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("Defense", overflow="fold")
    table.add_column("Oblivious", justify="right", no_wrap=True)
    table.add_column("Adaptive", justify="right", no_wrap=True)
    table.add_column("Verdict", no_wrap=True)
    table.add_column("Accuracy", justify="right", no_wrap=True)
    table.add_column("Epsilon", justify="right", no_wrap=True)
    for defense, cells in rows.items():
        table.add_row(
            plain(defense),
            _worst(cells.get("oblivious"), threshold),
            _worst(cells.get("adaptive"), threshold),
            _verdict(list(cells.values())),
            _accuracy(result, protocol, defense),
            _epsilon(result, protocol, defense),
        )
    return table


def _worst(cell: Cell | None, threshold: Threshold) -> Text:
    scores = [] if cell is None else cell.scores(threshold.metric)
    if cell is None or not scores:
        return Text(words.MISSING, style="dim")
    worst = max(scores) if threshold.operator == ">" else min(scores)
    return plain(words.plain_number(worst), VERDICT_STYLES[cell.verdict])


def _verdict(cells: Sequence[Cell]) -> Text:
    """The worst of the row's cells."""
    verdict = min((cell.verdict for cell in cells), key=WORST_FIRST.index)
    return Text(verdict.replace("-", " "), style=VERDICT_STYLES[verdict])


def _accuracy(result: SweepResult, protocol: str, defense: str) -> str:
    found = [item for item in result.utilities if (item.protocol, item.defense) == (protocol, defense)]
    if not found or found[0].accuracy is None:
        return words.MISSING
    return f"{100 * found[0].accuracy:.1f}%"


def _epsilon(result: SweepResult, protocol: str, defense: str) -> str:
    """Of the training where there was one, else of the accountant's bound."""
    for item in result.utilities:
        if (item.protocol, item.defense) == (protocol, defense) and item.epsilon is not None:
            return words.plain_number(item.epsilon)
    for bound in result.bounds:
        target = (bound.protocol, bound.defense, bound.quantity)
        if target == (protocol, defense, "epsilon") and bound.value is not None:
            return words.plain_number(bound.value)
    return words.MISSING


def _print_gate(result: SweepResult, console: Console) -> None:
    gate = result.gate
    headline, style = HEADLINES[result.exit_code]
    console.print()
    console.print(Text(headline, style=f"bold {style}"), plain(f"Policy: {gate.policy}", "dim"))
    if result.interrupted:
        console.print(Text("Interrupted: this is what was finished until then.", style="yellow"))
    _print_names("breaks the policy", "red", gate.broken, console)
    _print_names("accepted", "cyan", [item.cell for item in gate.accepted], console)
    _print_names("inconclusive", "yellow", gate.inconclusive, console)
    for note in gate.notes:
        console.print(plain(note))


def _print_names(what: str, style: str, names: Sequence[str], console: Console) -> None:
    for name in names[:MOST]:
        console.print(Text.assemble((what, style), " ", plain(name)))
    if len(names) > MOST:
        console.print(Text(f"and {words.plural(len(names) - MOST, 'more cell')} {what}", style=style))


def _print_failures(result: SweepResult, console: Console) -> None:
    """Each error once, with how many runs ended in it."""
    errors: dict[str, int] = {}
    for cell in result.cells:
        for run in cell.runs:
            if run.status == "failed":
                errors[run.error] = errors.get(run.error, 0) + 1
    for error, count in list(errors.items())[:MOST]:
        console.print(Text.assemble((words.plural(count, "failed run"), "red"), ": ", plain(error)))
