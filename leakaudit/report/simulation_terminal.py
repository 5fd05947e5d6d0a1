"""Simulations -> the terminal, through rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from leakaudit.simulation_results import ALL, ComparedSystem, Comparison, SimulationResult


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
        *([("counters", _counters(result.counters))] if result.counters else []),
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


def _counters(counters: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {words.number(count)}" for name, count in counters.items())


def _views(result: SimulationResult) -> str:
    roles = dict.fromkeys(view.role for view in result.views)
    counts = [f"{sum(view.role == role for view in result.views)} of the {role}" for role in roles]
    return ", ".join(counts) or "none"


def print_comparison(found: Comparison, console: Console, folder: Path) -> None:
    """What all systems cost and came to, then groups and counters, and where the page is."""
    seeds, yard = len(found.seeds), yard_of(found.first)
    groups = [group for group in found.first.groups if all(group in s.accuracy for s in found.systems)]
    quality = f"{yard.name} {yard.unit}".strip()
    console.print(plain(comparison_headline(found), "bold"), soft_wrap=True)
    time = "time to target" if found.limits.has_target else "time"
    headings = ["system", time, "steps", "updates", "sent", quality]
    console.print(_table(headings, [_costs(found, system) for system in found.systems]))
    if len(groups) > 1:
        headings = ["system", *(f"{quality}, {group}" for group in groups[1:])]
        rows = [[s.spec, *(_estimate(found, s, group) for group in groups[1:])] for s in found.systems]
        console.print()
        console.print(_table(headings, rows))
    for system in found.systems:
        if system.counters:
            console.print(plain(f"{system.spec}: {_counters(system.counters)}", "dim"), soft_wrap=True)
    if seeds > 1:
        console.print(plain(f"± is half of the 95 % interval of the mean of {seeds} seeds.", "dim"))
    console.print(plain(f"Report: {folder / 'report.html'}"), soft_wrap=True)


def _costs(found: Comparison, system: ComparedSystem) -> list[str]:
    return [
        system.spec,
        time_text(system, len(found.seeds)),
        number_text(system.steps),
        number_text(system.updates),
        size_text(system.uploaded),
        _estimate(found, system, ALL),
    ]


def _estimate(found: Comparison, system: ComparedSystem, group: str) -> str:
    if found.first.by_perplexity:
        return number_text(system.perplexity[group])
    return number_text(system.accuracy[group], 100)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(
            plain(heading), justify="right" if index else "left", min_width=None if index else 12
        )
    for row in rows:
        table.add_row(*(plain(cell) for cell in row))
    return table
