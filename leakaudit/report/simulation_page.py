"""The pages of a simulation and of a comparison: one HTML document each, without remote requests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakaudit.atomic import write_atomically
from leakaudit.report import simulation_summary, words
from leakaudit.report.pages import asset, environment, policy_hash
from leakaudit.report.simulation_charts import comparison_plots, run_plots, target_text, yard_of
from leakaudit.simulation_results import (
    ALL,
    ComparedSystem,
    Comparison,
    PopulationSummary,
    RecordedView,
    SimulationResult,
    Spread,
)

MAX_VIEWS = 60
"""Views of one role that are listed."""
MAX_NAMED = 8
"""Clients of a view that are named."""

ROLES = {
    "server": "The server sees what clients send it, and what it applies.",
    "peer": "A peer sees what it takes part in: the sum, from which it takes its own part away.",
    "network": "An observer of the network sees who sends how much to whom, and when; network.csv has all of it.",
    "enclave-host": "The host of the enclave sees what passes through its memory outside of the enclave.",
}


@dataclass(frozen=True)
class RoleViews:
    """What one party sees."""

    role: str
    text: str
    views: list[RecordedView]
    unlisted: int


def write_simulation_page(result: SimulationResult, path: Path) -> None:
    """Write the page of a run; `InputError` when it cannot be written."""
    write_atomically(path, render_simulation(result).encode("utf-8", "replace"), make_folder=True)


def write_comparison_page(found: Comparison, path: Path) -> None:
    """Write the page of a comparison; `InputError` when it cannot be written."""
    write_atomically(path, render_comparison(found).encode("utf-8", "replace"), make_folder=True)


def render_simulation(result: SimulationResult) -> str:
    """The page of one run."""
    return _render(
        "simulation.html.j2",
        result=result,
        headline=simulation_summary.run_headline(result),
        target=target_text(result.limits),
        plots=run_plots(result),
        population=_population(result.population),
        roles=_roles(result),
        options={name: _value(value) for name, value in result.options.items()},
        scenario=_scenario(result.scenario),
        named=_named,
    )


def render_comparison(found: Comparison) -> str:
    """The page of a comparison."""
    return _render(
        "comparison.html.j2",
        found=found,
        headline=simulation_summary.comparison_headline(found),
        target=target_text(found.limits),
        plots=comparison_plots(found),
        population=_population(found.first.population),
        scenario=_scenario(found.scenario),
        groups=[group for group in found.first.groups if all(group in s.accuracy for s in found.systems)],
        quality=_quality_of(found),
        yard=yard_of(found.first),
        texts=simulation_summary,
    )


def _render(template: str, **values: Any) -> str:
    css, script = asset("audit.css", "sweep.css", "simulation.css"), asset("copy.js")
    hashes = {"css_hash": policy_hash(css), "script_hash": policy_hash(script)}
    page = environment().get_template(template)
    return page.render(css=css, script=script, words=words, ALL=ALL, **hashes, **values)


def _quality_of(found: Comparison) -> Any:
    """What a group's entry in the table says of a system."""

    def text(system: ComparedSystem, group: str) -> str:
        if found.first.by_perplexity:
            return simulation_summary.number_text(system.perplexity[group])
        return simulation_summary.number_text(system.accuracy[group], 100)

    return text


def _population(population: PopulationSummary) -> dict[str, str]:
    groups = {
        f"held-out data of {name}": words.plural(count, "example")
        for name, count in population.groups.items()
    }
    return {
        "clients": f"{population.clients:,}",
        "examples to train on": f"{population.examples:,}",
        "examples held out": f"{population.held_out:,}",
        **groups,
        "examples a client": _range(population.sizes, lambda n: f"{n:,.0f}"),
        "seconds a local step": _range(population.step_seconds, words.number),
        "latency": f"{words.number(1000 * population.latency)} ms one way",
        "bandwidth": _range(population.bandwidth, _rate),
        "drops out of a round": words.percent(population.dropout),
        "there when asked": words.percent(population.availability),
    }


def _range(values: Spread, write: Any) -> str:
    if values.least == values.most:
        return str(write(values.median))
    return f"{write(values.least)} to {write(values.most)}, median {write(values.median)}"


def _rate(rate: float) -> str:
    return "unlimited" if rate == float("inf") else f"{words.size(rate)}/s"


def _roles(result: SimulationResult) -> list[RoleViews]:
    names = [*ROLES, *(view.role for view in result.views)]
    found = []
    for role in dict.fromkeys(names):
        views = [view for view in result.views if view.role == role]
        if views or role == "network":
            found.append(
                RoleViews(role, ROLES.get(role, ""), views[:MAX_VIEWS], max(0, len(views) - MAX_VIEWS))
            )
    return found


def _named(view: RecordedView) -> str:
    if not view.clients:
        return words.MISSING
    if len(view.clients) == 1:
        return f"client {view.clients[0]}"
    shown = ", ".join(map(str, view.clients[:MAX_NAMED]))
    more = len(view.clients) - MAX_NAMED
    return f"{words.plural(len(view.clients), 'client')}: {shown}" + (f" and {more} more" if more > 0 else "")


def _scenario(scenario: Mapping[str, Any]) -> dict[str, str]:
    return {
        name.replace("_", " "): _value(value)
        for name, value in scenario.items()
        if value not in (None, [], ())
    }


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value, default=str)
