"""`SweepResult` -> the terminal, through rich; reads well at 80 columns.

Strings from files are shown as plain text: no rich markup, no control characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from leakaudit.report import words
from leakaudit.report.folder import REPORT_NAME
from leakaudit.report.gate_terminal import STATE_MARKS, STATE_STYLES, gate_panel
from leakaudit.report.sweep_summary import (
    EXIT_MEANINGS,
    Pair,
    Row,
    Yardstick,
    chief_bound,
    epsilon_of,
    headline,
    only_oblivious,
    rows_of,
    state_of,
    utility_of,
    worst_score,
    yardstick,
)
from leakaudit.report.terminal import plain
from leakaudit.sweep_results import NO_DEFENSE, Bound, SweepResult, Utility

MAX_NAMES = 20


def print_sweep(result: SweepResult, console: Console, folder: Path | None = None) -> None:
    """Print what the sweep means, every target with both adversaries, and the cells to look at.

    Args:
        result: the sweep.
        console: where to; any width from 60 columns.
        folder: the sweep's folder, to say where the page lies.
    """
    yard = yardstick(result)
    console.print(_panel(result))
    for (protocol, attack), rows in _groups(result).items():
        console.print(Text.assemble("\n", plain(protocol, "bold"), (" under ", "dim"), plain(attack, "bold")))
        console.print(_table(result, rows, yard))
    if result.cells:
        console.print(_legend(yard))
    _print_names(result, console)
    if folder is not None:
        page = Text.assemble(("\nReport      ", "bold"), plain(str(folder / REPORT_NAME)))
        console.print(page, soft_wrap=True)
        console.print(Text.assemble(("Sweep folder", "bold"), " ", plain(str(folder))), soft_wrap=True)


def _panel(result: SweepResult) -> Panel:
    code = result.exit_code if result.cells else 3
    lines: list[RenderableType] = [plain(headline(result), "bold")]
    blind = only_oblivious(result)
    if blind:
        many = words.plural(len(blind), "defense only stops", "defenses only stop")
        lines.append(
            plain(f"{many} an adversary who does not know of {'it' if len(blind) == 1 else 'them'}:")
        )
        lines += [plain(f"• {name}") for name in blind[:5]]
        lines += [plain(f"and {len(blind) - 5} more", "dim")] if len(blind) > 5 else []
    if result.interrupted:
        lines.append(Text("Interrupted: cells that did not finish prove nothing.", style="yellow"))
    lines.append(plain(f"Policy: {result.gate.policy}{_quantile(result)}", "dim"))
    lines.append(plain(f"Exit code {result.exit_code}: {EXIT_MEANINGS[result.exit_code]}", "dim"))
    unrecovered = any(cell.verdict == "not-recovered" for cell in result.cells)
    return gate_panel(lines, code, unrecovered=unrecovered)


def _quantile(result: SweepResult) -> str:
    quantile = result.gate.quantile
    return "" if quantile >= 1 else f", on the quantile {words.plain_number(quantile)} of the examples"


def _groups(result: SweepResult) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows_of(result.cells):
        groups.setdefault((row.protocol, row.attack), []).append(row)
    return groups


def _table(result: SweepResult, rows: Sequence[Row], yard: Yardstick) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0), expand=False)
    table.add_column("Defense", overflow="fold", ratio=1)
    for name in ("Oblivious", "Adaptive"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Verdict", no_wrap=True)
    for name in ("Accuracy", "ε", "Theory"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        for pair in row.pairs:
            table.add_row(*_cells(result, pair, yard))
    return table


def _cells(result: SweepResult, pair: Pair, yard: Yardstick) -> list[Text]:
    cell = result.cells[pair.chief(result.cells)]
    state, utility = state_of(cell), utility_of(result, cell)
    name = "no defense" if cell.defense == NO_DEFENSE else cell.defense
    return [
        plain(name, "bold" if cell.defense == NO_DEFENSE else ""),
        _score(result, pair.oblivious, yard),
        _score(result, pair.adaptive, yard),
        Text(state.replace("-", " "), style=STATE_STYLES[state]),
        plain(_accuracy(utility)),
        plain(words.plain_number(epsilon_of(result, cell))),
        plain(_theory(chief_bound(result, cell))),
    ]


def _score(result: SweepResult, index: int | None, yard: Yardstick) -> Text:
    """The worst score behind the mark of its own verdict; empty for an adversary who was not tried."""
    if index is None:
        return Text("")
    cell = result.cells[index]
    state = state_of(cell)
    score = words.plain_number(worst_score(cell, yard))
    return Text.assemble((STATE_MARKS[state], f"bold {STATE_STYLES[state]}"), f" {score}")


def _accuracy(utility: Utility | None) -> str:
    """In percent, with half the width of its interval."""
    if utility is None or utility.accuracy is None:
        return words.MISSING
    if utility.low is None or utility.high is None:
        return f"{100 * utility.accuracy:.1f}"
    return f"{100 * utility.accuracy:.1f}±{50 * (utility.high - utility.low):.1f}"


def _theory(bound: Bound | None) -> str:
    """What holds for every adversary, or ~ for an indicator: success at most, or MSE at least."""
    if bound is None or bound.value is None:
        return words.MISSING
    doubt = "" if bound.kind == "bound" else "~"
    if bound.quantity == "probability":
        return f"{doubt}≤{100 * bound.value:.3g}%"
    if bound.quantity == "mse":
        return f"{doubt}≥{bound.value:.1e}"
    return words.MISSING


def _legend(yard: Yardstick) -> Text:
    name = f"{yard.name}{' in ' + yard.unit if yard.unit else ''}"
    marks = ", ".join(f"{mark} {state.replace('-', ' ')}" for state, mark in STATE_MARKS.items())
    text = f"\nScores: worst {name}; {marks}. Verdict: of the worse of both adversaries."
    return plain(
        text + " Accuracy in %. Theory: success ≤ or MSE ≥ for any adversary, ~ an indicator only.", "dim"
    )


def _print_names(result: SweepResult, console: Console) -> None:
    gate = result.gate
    reasons = {cell.name: cell.reasons[0] for cell in result.cells if cell.reasons}
    expired = set(gate.expired)
    broken = [(name, "its acceptance ran out" if name in expired else "") for name in gate.broken]
    accepted = [(item.cell, f"{item.owner}, until {item.expires}") for item in gate.accepted]
    unclear = [(name, reasons.get(name, "")) for name in gate.inconclusive]
    _print_list(console, "Break the policy", "bold red", broken)
    _print_list(console, "Prove nothing", "bold yellow", unclear)
    _print_list(console, "Leak and are accepted", "bold", accepted)


def _print_list(console: Console, title: str, style: str, items: Sequence[tuple[str, str]]) -> None:
    if not items:
        return
    console.print(Text.assemble("\n", (f"{title} ({len(items)})", style)))
    for name, note in items[:MAX_NAMES]:
        console.print(Text.assemble("  ", plain(name), plain(f": {note}" if note else "", "dim")))
    if len(items) > MAX_NAMES:
        console.print(Text(f"  and {len(items) - MAX_NAMES} more, in the report", style="dim"))
