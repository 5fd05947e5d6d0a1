"""Several systems on the same model, data, clients and seeds: a folder for every run, one page for all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from scipy.stats import t as student

from leakaudit import __version__
from leakaudit.atomic import write_atomically
from leakaudit.errors import InputError
from leakaudit.progress import OnStep
from leakaudit.report.folder import REPORT_NAME
from leakaudit.report.simulation_page import write_comparison_page
from leakaudit.scenario import Scenario
from leakaudit.simulating import System, World, check_options, load_world, run_in
from leakaudit.simulation_folder import forget, open_folder, same_plan
from leakaudit.simulation_results import (
    COMPARISON_NAME,
    SIMULATION_NAME,
    ComparedRun,
    ComparedSystem,
    Comparison,
    Estimate,
    SimulationResult,
    read_simulation,
)

CONFIDENCE = 0.95


def compare(
    specs: Sequence[str],
    scenario: Scenario,
    folder: Path,
    *,
    seeds: int = 1,
    force: bool = False,
    on_run: Callable[[str], OnStep] | None = None,
    command: str = "",
) -> Comparison:
    """Run every system with every seed; see `leakaudit.api.compare`.

    Raises `InputError` for anything that cannot be used: before the first run begins, as far as that can be told.
    """
    began = time.monotonic()
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    systems = _systems(specs)
    first = load_world(scenario)
    for system in systems:
        check_options(system, first)
    open_folder(folder, "comparison", _identity(systems, first, seeds), force=force)
    runs: dict[str, list[ComparedRun]] = {system.spec: [] for system in systems}
    for world in _worlds(first, seeds):
        for system, run_folder in zip(systems, _folders(systems, world.scenario.seed, seeds), strict=True):
            label = f"{system.spec}, seed {world.scenario.seed}" if seeds > 1 else system.spec
            on_step = None if on_run is None else on_run(label)
            try:
                result = _run(world, system, folder / run_folder, force, on_step, command)
            except InputError:
                if not any(runs.values()):
                    forget(folder)  # so that another try needs no --force
                raise
            runs[system.spec].append(ComparedRun(seed=world.scenario.seed, folder=run_folder, result=result))
    found = Comparison(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        systems=[summarised(spec, done) for spec, done in runs.items()],
        scenario=dataclasses.asdict(scenario),
        limits=runs[systems[0].spec][0].result.limits,
        seeds=[scenario.seed + number for number in range(seeds)],
        seconds=time.monotonic() - began,
        notes=list(
            dict.fromkeys(note for done in runs.values() for run in done for note in run.result.notes)
        ),
        command=command,
    )
    write_atomically(folder / COMPARISON_NAME, found.to_json().encode())
    write_comparison_page(found, folder / REPORT_NAME)
    return found


def _systems(specs: Sequence[str]) -> list[System]:
    systems = [System.parse(spec) for spec in specs]
    if not systems:
        raise InputError("no systems given; accepted: --systems sync,fedbuff or --system fedbuff:buffer=10")
    for position, system in enumerate(systems):
        if system.spec in [other.spec for other in systems[:position]]:
            raise InputError(
                f"system {system.spec!r} was given twice; accepted: each once, with --seeds for several runs"
            )
    return systems


def _worlds(first: World, seeds: int) -> Iterator[World]:
    yield first
    for number in range(1, seeds):
        yield load_world(replace(first.scenario, seed=first.scenario.seed + number))


def _folders(systems: Sequence[System], seed: int, seeds: int) -> Iterator[str]:
    """Of every run, readable and different: fedbuff-buffer-10, with -seed-3 where there are several."""
    names = [re.sub(r"[^a-z0-9.]+", "-", system.spec.lower()).strip("-.") for system in systems]
    for position, name in enumerate(names):
        number = names[:position].count(name)
        yield name + (f"-{number + 1}" if number else "") + (f"-seed-{seed}" if seeds > 1 else "")


def _identity(systems: Sequence[System], world: World, seeds: int) -> str:
    told = [__version__, seeds, *(world.identity(system) for system in systems)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _run(
    world: World, system: System, folder: Path, force: bool, on_step: OnStep | None, command: str
) -> SimulationResult:
    """The run, or the finished one that an earlier comparison of the same left."""
    if same_plan(folder, "simulation", world.identity(system)) and (folder / SIMULATION_NAME).is_file():
        before = read_simulation(folder)
        if not before.interrupted:
            return before
    result = run_in(world, system, folder, force=force, on_step=on_step, command=command)
    if result.interrupted:
        raise KeyboardInterrupt
    return result


# ------------------------------------------------------------------ over the seeds


def summarised(spec: str, runs: Sequence[ComparedRun]) -> ComparedSystem:
    """Means and intervals over the runs of one system."""
    results = [run.result for run in runs]
    ends = [result.last for result in results]
    target = results[0].limits.has_target
    reached = [point for result in results if (point := result.reached) is not None]
    times = [point.time for point in (reached if target and len(reached) == len(results) else ends)]
    groups = [group for group in results[0].groups if all(group in result.groups for result in results)]
    names = dict.fromkeys(name for result in results for name in result.counters)
    return ComparedSystem(
        spec=spec,
        runs=list(runs),
        time=estimate(times),
        reached=len(reached) if target else None,
        steps=estimate([end.step for end in ends]),
        updates=estimate([end.updates for end in ends]),
        uploaded=estimate([end.uploaded for end in ends]),
        accuracy={group: estimate([end.quality[group].accuracy for end in ends]) for group in groups},
        perplexity={group: estimate([end.quality[group].perplexity for end in ends]) for group in groups},
        counters={
            name: statistics.fmean(result.counters.get(name, 0) for result in results) for name in names
        },
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and the 95 % interval of it by Student's t, of at least one value; no interval of one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean=mean)
    half = (
        float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        * statistics.stdev(values)
        / math.sqrt(len(values))
    )
    return Estimate(mean=mean, low=mean - half, high=mean + half, count=len(values))
