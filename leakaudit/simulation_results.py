"""`SimulationResult` and `Comparison`: what simulated trainings found, as plain values with a versioned JSON form.

No torch here.  Times are seconds of the virtual clock unless they say otherwise, sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from leakaudit.errors import InputError
from leakaudit.results import Value, read_versioned

SIMULATION_SCHEMA_VERSION = 1
SIMULATION_NAME = "run.json"
"""The result's file in the folder of a run."""
COMPARISON_NAME = "compare.json"
"""The result's file in the folder of a comparison."""
ALL = "all"
"""The group of all held-out examples."""


class QualityValue(Value):
    """Of the model on held-out data: accuracy in [0, 1], mean loss in nats, and its exponential."""

    accuracy: float
    loss: float
    perplexity: float


class CurvePoint(Value):
    """The state after one step of the server.

    Attributes:
        step: model versions so far; time: of the virtual clock.
        uploaded, downloaded: bytes so far, of all clients; updates: clients' updates that arrived.
        quality: of "all" and of each group.
    """

    step: int
    time: float
    uploaded: int
    downloaded: int
    updates: int
    quality: dict[str, QualityValue]


class Spread(Value):
    """Of a quantity over the clients."""

    least: float
    median: float
    most: float


class PopulationSummary(Value):
    """Who took part.

    Attributes:
        examples: of all clients together; held_out: for quality, nobody's.
        sizes: examples a client; step_seconds: of a local step; bandwidth: bytes a second.
        latency: seconds one way; dropout, availability: probabilities.
        groups: held-out examples of each group that quality is measured on.
    """

    clients: int
    examples: int
    held_out: int
    sizes: Spread
    step_seconds: Spread
    bandwidth: Spread
    latency: float
    dropout: float
    availability: float
    groups: dict[str, int] = Field(default_factory=dict)


class LimitValues(Value):
    """When the run was to end, and how often quality was measured."""

    steps: int
    seconds: float | None = None
    accuracy: float | None = None
    perplexity: float | None = None
    every: int = 10

    @property
    def has_target(self) -> bool:
        return self.accuracy is not None or self.perplexity is not None

    def reached_by(self, quality: QualityValue) -> bool:
        """Whether a target is there and met, of either kind."""
        return (self.accuracy is not None and quality.accuracy >= self.accuracy) or (
            self.perplexity is not None and quality.perplexity <= self.perplexity
        )


class RecordedView(Value):
    """One update that a party saw, as it was written.

    Attributes:
        name: of its files; role: who saw it; observer: which of them.
        step: of the server, from 0; time: of the virtual clock.
        clients: whose updates are in it; examples: of all of them; staleness: the largest, in server steps.
        exact: False where it holds more than these clients' rounds.
        defenses: specs of what was done to it.
        note: how the party comes by it.
        command: that attacks it.
    """

    name: str
    role: str
    observer: int | None = None
    step: int
    time: float
    clients: list[int]
    examples: int
    staleness: int = 0
    exact: bool = True
    defenses: list[str] = Field(default_factory=list)
    note: str = ""
    command: str = ""


class SimulationResult(Value):
    """One run of one system.

    Attributes:
        system: its name; spec: with the options that differ from its defaults; summary: what it is.
        options: all of the system's; scenario: all others, see `leakaudit.scenario.Scenario`.
        medium: "images" or "text"; parameters: numbers that are trained.
        curve: first at step 0, last at the end.
        counters: events by name, such as clients that dropped out.
        messages: on the network, as logged; messages_cut: whether the log was full.
        views: what was written of what each party saw, views_left_out: what was not, for `record_clients`.
        seconds: of the wall clock.
        notes: deviations, and what was assumed.
        files: SHA-256 of what was read.
        command: that repeats the run.
    """

    schema_version: Literal[1] = 1
    created: str = ""
    system: str
    spec: str
    summary: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    scenario: dict[str, Any] = Field(default_factory=dict)
    model: str
    medium: Literal["images", "text"] = "images"
    parameters: int = 0
    population: PopulationSummary
    limits: LimitValues
    seed: int
    curve: list[CurvePoint]
    counters: dict[str, int] = Field(default_factory=dict)
    messages: int = 0
    messages_cut: bool = False
    views: list[RecordedView] = Field(default_factory=list)
    views_left_out: int = 0
    seconds: float = 0.0
    environment: dict[str, str] = Field(default_factory=dict)
    device: str = "cpu"
    files: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    interrupted: bool = False
    command: str = ""

    @property
    def last(self) -> CurvePoint:
        return self.curve[-1]

    @property
    def groups(self) -> list[str]:
        """ "all", and the others."""
        return list(self.last.quality)

    @property
    def by_perplexity(self) -> bool:
        """Whether quality is first of all perplexity: of models that predict words."""
        return self.medium == "text" and self.scenario.get("task") != "classification"

    @property
    def reached(self) -> CurvePoint | None:
        """The first point at which a target is met; None where there is none, or it is not met."""
        return next((point for point in self.curve if self.limits.reached_by(point.quality[ALL])), None)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


class Estimate(Value):
    """Mean of the seeds, with its 95 % interval by Student's t; no interval for one seed."""

    mean: float
    low: float | None = None
    high: float | None = None
    count: int = 1


class ComparedRun(Value):
    """One seed of one system; `folder` is relative to the comparison's."""

    seed: int
    folder: str
    result: SimulationResult


class ComparedSystem(Value):
    """One system of a comparison, over its seeds.

    Attributes:
        time: to the target where one is set and all seeds reached it, else at the end.
        reached: seeds that reached the target; None without one.
        accuracy, perplexity: at the end, by group.
        counters: means over the seeds.
    """

    spec: str
    runs: list[ComparedRun]
    time: Estimate
    reached: int | None = None
    steps: Estimate
    updates: Estimate
    uploaded: Estimate
    accuracy: dict[str, Estimate]
    perplexity: dict[str, Estimate]
    counters: dict[str, float] = Field(default_factory=dict)


class Comparison(Value):
    """Several systems on the same model, data, population and seeds.

    Attributes:
        limits: of every run; seconds: of the wall clock, of all runs together.
    """

    schema_version: Literal[1] = 1
    created: str = ""
    systems: list[ComparedSystem]
    scenario: dict[str, Any] = Field(default_factory=dict)
    limits: LimitValues
    seeds: list[int]
    seconds: float = 0.0
    notes: list[str] = Field(default_factory=list)
    command: str = ""

    @property
    def first(self) -> SimulationResult:
        return self.systems[0].runs[0].result

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def read_simulation(folder: Path) -> SimulationResult:
    """The result of a run in its folder; `InputError` where there is none, or it cannot be read."""
    path = folder / SIMULATION_NAME
    result = read_versioned(
        path,
        SimulationResult,
        SIMULATION_SCHEMA_VERSION,
        noun="a simulation's result",
        lacking=f"{folder} is not the folder of a simulation",
    )
    if not result.curve or not all(ALL in point.quality for point in result.curve):
        raise InputError(f"{path}: the curve has no quality of all held-out examples")
    return result


def read_comparison(folder: Path) -> Comparison:
    """The comparison in its folder; `InputError` where there is none, or it cannot be read."""
    path = folder / COMPARISON_NAME
    found = read_versioned(
        path,
        Comparison,
        SIMULATION_SCHEMA_VERSION,
        noun="a comparison",
        lacking=f"{folder} is not the folder of a comparison",
    )
    if not found.systems or not all(system.runs for system in found.systems):
        raise InputError(f"{path} compares nothing")
    return found


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; the median is the mean of the middle two where there are two."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Spread(least=ordered[0], median=median, most=ordered[-1])
