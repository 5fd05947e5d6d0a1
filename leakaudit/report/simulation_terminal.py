"""Simulations -> the terminal, through rich."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leakaudit.report import words
from leakaudit.report.simulation_charts import yard_of
from leakaudit.report.simulation_summary import (
    comparison_headline,
    number_text,
    run_headline,
    size_text,
    time_text,
)
from leakaudit.report.terminal import plain as plain_text
from leakaudit.simulation_results import ALL, Comparison, SimulationResult


def plain(text: str, style: str = "") -> Text:
    """As everywhere on terminals, with spaces that all of them have."""
    return plain_text(text.replace(words.NARROW_SPACE, " "), style)


def print_simulation(result: SimulationResult, console: Console, folder: Path) -> None:
    """What the run came to, and where its files are."""
    last = result.last
    console.print(plain(run_headline(result), "bold"), soft_wrap=True)
    rows = [
        ("updates", f"{last.updates:,} of {words.plural(result.population.clients, 'client')}"),
        ("sent", f"{words.size(last.uploaded)} by clients, {words.size(last.downloaded)} to them"),
        *((_group(name), _quality(result, name)) for name in result.groups),
        *((name, f"{count:,}") for name, count in result.counters.items()),
        ("views", _views(result)),
        ("wall time", words.duration(result.seconds)),
    ]
    for name, value in rows:
        console.print(Text.assemble(plain(f"  {name:<24}", "dim"), plain(value)), soft_wrap=True)
    if result.interrupted:
        console.print(plain("Interrupted: this is what it had come to.", "yellow"))
    console.print(plain(f"Report: {folder / 'report.html'}"), soft_wrap=True)


def _group(name: str) -> str:
    return "held-out data" if name == ALL else f"of {name}"


def _quality(result: SimulationResult, group: str) -> str:
    quality = result.last.quality[group]
    return f"accuracy {words.percent(quality.accuracy)}, perplexity {words.number(quality.perplexity)}"


def _views(result: SimulationResult) -> str:
    roles = dict.fromkeys(view.role for view in result.views)
    counts = [f"{sum(view.role == role for view in result.views)} of the {role}" for role in roles]
    return ", ".join(counts) or "none"


def print_comparison(found: Comparison, console: Console, folder: Path) -> None:
    """The table of all systems, and where the page is."""
    seeds, yard = len(found.seeds), yard_of(found.first)
    groups = [group for group in found.first.groups if all(group in s.accuracy for s in found.systems)]
    counters = list(dict.fromkeys(name for system in found.systems for name in system.counters))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, heading in enumerate(_headings(found, groups, counters, f"{yard.name} {yard.unit}".strip())):
        table.add_column(plain(heading), justify="left" if index == 0 else "right", overflow="fold")
    for system in found.systems:
        estimates = system.perplexity if found.first.by_perplexity else system.accuracy
        scale = 1 if found.first.by_perplexity else 100
        cells = [
            system.spec,
            time_text(system, seeds),
            number_text(system.steps),
            number_text(system.updates),
            size_text(system.uploaded),
            *(number_text(estimates[group], scale) for group in groups),
            *(words.number(system.counters.get(name, 0)) for name in counters),
        ]
        table.add_row(*(plain(cell) for cell in cells))
    console.print(plain(comparison_headline(found), "bold"), soft_wrap=True)
    console.print(table)
    if seeds > 1:
        console.print(plain(f"± is half of the 95 % interval of the mean of {seeds} seeds.", "dim"))
    console.print(plain(f"Report: {folder / 'report.html'}"), soft_wrap=True)


def _headings(found: Comparison, groups: Sequence[str], counters: Sequence[str], quality: str) -> list[str]:
    time = "time to target" if found.limits.has_target else "time"
    named = [quality if len(groups) == 1 else f"{quality}, {group}" for group in groups]
    return ["system", time, "steps", "updates", "sent", *named, *counters]
