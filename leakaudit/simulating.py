"""One simulated training, from its scenario to its folder.

plan.json       which run the folder holds, written first
run.json        the result
curve.csv       quality over steps, time and bytes
network.csv     what an observer of the network sees: who sent how much to whom, and when
models/         the model at the end, and those that the views need
views/          what each party saw
report.html     the page
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakaudit import __version__
from leakaudit.atomic import sha256_of, write_atomically
from leakaudit.auditing import environment
from leakaudit.defenses.naming import Parts, parse_all
from leakaudit.errors import InputError
from leakaudit.federated.network import COLUMNS, NETWORK_NAME, Message
from leakaudit.federated.options import SYSTEMS, SystemOptions
from leakaudit.federated.population import Client, PopulationOptions, draw_population
from leakaudit.federated.recording import ViewWriter
from leakaudit.federated.seen import Observation, Seen
from leakaudit.federated.simulation import Limits, Point, Simulation
from leakaudit.federated.task import Task
from leakaudit.federated.trainer import Trainer
from leakaudit.federated.training import Examples, split
from leakaudit.federated.views import ViewRecord
from leakaudit.formats.checkpoint import parameters_sha256, save_checkpoint
from leakaudit.formats.phrases import counted
from leakaudit.formats.run_models import MODELS
from leakaudit.media import medium_of
from leakaudit.models.victim import Victim
from leakaudit.models.zoo import LANGUAGE, load_victim, parse_normalisation
from leakaudit.numerics import faithful
from leakaudit.progress import OnStep
from leakaudit.randomness import fork
from leakaudit.report.folder import REPORT_NAME
from leakaudit.report.simulation_page import write_simulation_page
from leakaudit.rounds import ClientUpdate, Round, client_update
from leakaudit.scenario import Scenario, recorded_steps
from leakaudit.simulation_folder import CURVE_NAME, forget, open_folder
from leakaudit.simulation_results import (
    ALL,
    SIMULATION_NAME,
    CurvePoint,
    LimitValues,
    PopulationSummary,
    QualityValue,
    RecordedView,
    SimulationResult,
    spread,
)
from leakaudit.spec import described, format_spec, parse
from leakaudit.subject import pick_device, private_source

LOGGED = 1_000_000
"""Messages on the network that are kept."""
FINAL_MODEL = "final.safetensors"
TOP_SHARES = {"top 25 %": 0.25, "top 1 %": 0.01}
"""Groups of clients by how many examples they hold."""


@dataclass(frozen=True)
class System:
    """A system by its name in `SYSTEMS`, with its options."""

    name: str
    options: SystemOptions

    @classmethod
    def parse(cls, spec: str) -> System:
        """`fedbuff:buffer=10`; `InputError` (did you mean) for an unknown name, option or value."""
        return cls(spec.partition(":")[0].strip(), parse(spec, SYSTEMS, "system"))

    @property
    def spec(self) -> str:
        """With the options that differ from the defaults."""
        return format_spec(self.name, self.options, SYSTEMS[self.name])


@dataclass(frozen=True)
class World:
    """What a scenario comes to, once it is loaded.  Systems may share it.

    Attributes:
        task: model, clients, data.
        parts: the clients' defenses.
        notes: what was assumed; files: SHA-256 of what was read.
    """

    scenario: Scenario
    task: Task
    parts: Parts = ()
    notes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    def trainer(self) -> Trainer:
        """A new one, whose clients remember nothing yet."""
        if self.parts:
            return Trainer(self.task, [self._defended(client) for client in self.task.clients])
        pixels = self.task.train.x.is_floating_point()  # sentences are of different lengths
        return Trainer(self.task, together=self.scenario.together if pixels else 1)

    def _defended(self, client: Client) -> ClientUpdate:
        """The code of one client: what it keeps from round to round (a residual) is its own."""
        code: ClientUpdate = client_update
        generator = fork(self.scenario.seed, f"simulation/defenses/{client.index}")
        for _, defense in self.parts:
            code = defense.training(code, generator)
        return code

    def identity(self, system: System) -> str:
        """Of the run: the same for the same system, options, model, files and version."""
        scenario = dataclasses.asdict(replace(self.scenario, device=""))
        model = parameters_sha256(self.task.victim.params)
        told = [__version__, system.name, dataclasses.asdict(system.options), scenario, model, self.files]  # type: ignore[call-overload]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def simulate(
    system: System,
    scenario: Scenario,
    folder: Path,
    *,
    force: bool = False,
    on_step: OnStep | None = None,
    command: str = "",
) -> SimulationResult:
    """Train with the system, and write the run's folder; see the head of this file.

    Args:
        force: start anew in a folder that holds another run.

    Ctrl-C ends it with what it has come to; the result says so.
    Raises `InputError` for anything that cannot be used, before anything is written.
    """
    return run_in(load_world(scenario), system, folder, force=force, on_step=on_step, command=command)


def run_in(
    world: World,
    system: System,
    folder: Path,
    *,
    force: bool = False,
    on_step: OnStep | None = None,
    command: str = "",
) -> SimulationResult:
    """As `simulate`, in a world that is loaded."""
    began = time.monotonic()
    check_options(system, world)
    limits = _limits(world.scenario)
    open_folder(folder, "simulation", world.identity(system), force=force)
    recorder = Recorder(lambda: _writer(folder, world, system), folder, world)
    simulation = Simulation(
        world.task,
        world.trainer(),
        Seen(recorder.wants, recorder),
        limits,
        world.scenario.seed,
        log=LOGGED,
        on_step=on_step,
    )
    try:
        with faithful(world.task.victim.device):
            interrupted = _run(simulation, system)
    except InputError:
        forget(folder)  # so that another try needs no --force
        raise
    result = _result(world, system, simulation, recorder, time.monotonic() - began, interrupted, command)
    _write(result, simulation, folder)
    return result


def check_options(system: System, world: World) -> None:
    """`InputError` where the system cannot train these clients as the scenario wants it to."""
    scenario = world.scenario
    for name, always in (("dropout", 0.0), ("availability", 1.0)):
        value = getattr(scenario, name)
        if value != always and not system.options.intermittent:
            able = ", ".join(name for name, options in SYSTEMS.items() if options.intermittent)
            raise InputError(
                f"system {system.name!r}: its workers stay from beginning to end, got {name} {value};"
                f" accepted by: {able}"
            )
    try:
        system.options.check(len(world.task.clients))
    except ValueError as error:
        raise InputError(f"system {system.name!r}: {error}") from error


def _run(simulation: Simulation, system: System) -> bool:
    """Whether Ctrl-C ended it, after it began."""
    try:
        simulation.run(system.options)
    except KeyboardInterrupt:
        if not simulation.curve:
            raise
        return True
    return False


# ------------------------------------------------------------------ from a scenario to a world


def load_world(scenario: Scenario) -> World:
    """The model, the data shared out to clients, and the data held out.

    Images are trained in train mode, where BatchNorm takes the statistics of the batch; language models in eval
    mode, without dropout.  Raises `InputError` for anything that does not fit.
    """
    parts = parse_all(scenario.defense)
    _refuse_other_rounds(parts)
    source = private_source(scenario.model, scenario.data, _path(scenario.text), scenario.max_length)
    victim = _victim(scenario)
    data = medium_of(victim).load(
        source, victim, scenario.examples, max_length=scenario.max_length, seed=scenario.seed
    )
    for _, defense in parts:
        victim = defense.victim(victim)
    x, y = medium_of(victim).tensors(victim, data)
    dealt = _deal(scenario, y.cpu())
    examples = Examples(x, y)
    task = Task(
        victim,
        examples.rows(dealt.inside),
        dealt.clients,
        examples.rows(dealt.outside),
        data.rows(dealt.inside.tolist()),
        dealt.groups,
    )
    return World(scenario, task, parts, (*data.notes, *_deviations(victim)), _files(scenario, source))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _victim(scenario: Scenario) -> Victim:
    victim = load_victim(
        scenario.model,
        checkpoint=scenario.checkpoint,
        num_classes=scenario.num_classes,
        input_shape=scenario.input_shape,
        normalisation=parse_normalisation(scenario.normalisation),
        mode="eval" if scenario.model.startswith(LANGUAGE) else "train",
        seed=scenario.seed,
        task=scenario.task,
        lora=scenario.lora,
    )
    return victim.to(pick_device(scenario.device))


def _refuse_other_rounds(parts: Parts) -> None:
    """The system says how clients train; `InputError` for a defense that would have them do otherwise."""
    probe = Round(num_examples=4, local_steps=2, local_batch_size=2, learning_rate=0.1)
    for spec, defense in parts:
        try:
            changed = defense.round(probe) != probe
        except ValueError:
            changed = True
        if changed:
            raise InputError(
                f"defense {spec!r} changes what a client trains on, which is the system's to say;"
                " accepted: the options of a system"
            )


@dataclass(frozen=True)
class _Dealt:
    """Who has what: rows (int64) of the data to train on, those held out, clients' rows of the former, and groups
    as rows of the latter."""

    inside: Tensor
    outside: Tensor
    clients: tuple[Client, ...]
    groups: dict[str, Tensor]


def _deal(scenario: Scenario, labels: Tensor) -> _Dealt:
    """Where clients differ in their classes each holds out a share of its own data, so that quality can be told
    of those with most data; else a share of all data is held out, which does not depend on the clients."""
    if scenario.label_skew is not None and labels.dim() > 1:
        raise InputError(
            f"label skew {scenario.label_skew} needs classes; the labels of this model are words"
        )
    dealt = (
        _deal_skewed(scenario, labels) if scenario.label_skew is not None else _deal_alike(scenario, labels)
    )
    if not len(dealt.outside):
        raise InputError(
            f"holdout {scenario.holdout} of {counted(len(labels), 'example')} leaves none to measure"
        )
    return dealt


def _deal_alike(scenario: Scenario, labels: Tensor) -> _Dealt:
    inside, outside = split(labels, scenario.holdout, fork(scenario.seed, "simulation/holdout"))
    return _Dealt(inside, outside, _drawn(scenario, labels[inside]), {})


def _deal_skewed(scenario: Scenario, labels: Tensor) -> _Dealt:
    clients, kept, held = _drawn(scenario, labels), [], []
    for client in clients:
        draw = fork(scenario.seed, f"simulation/holdout/{client.index}")
        inside, outside = split(labels[client.rows], scenario.holdout, draw)
        if not len(inside):
            inside, outside = outside[:1], outside[1:]
        kept.append(client.rows[inside])
        held.append(client.rows[outside])
    inner = torch.cat(kept).sort().values
    own = tuple(
        replace(client, rows=torch.searchsorted(inner, rows))
        for client, rows in zip(clients, kept, strict=True)
    )
    return _Dealt(inner, torch.cat(held), own, _groups(own, [len(rows) for rows in held]))


def _drawn(scenario: Scenario, labels: Tensor) -> tuple[Client, ...]:
    named = {f.name: getattr(scenario, f.name) for f in dataclasses.fields(PopulationOptions)}
    try:
        return draw_population(PopulationOptions(**named), labels, scenario.seed)
    except ValueError as error:
        raise InputError(str(error)) from error


def _groups(clients: Sequence[Client], held: Sequence[int]) -> dict[str, Tensor]:
    """Held-out rows of the clients with most data, client after client; of one client at least."""
    if len({client.examples for client in clients}) == 1:
        return {}
    ends = torch.tensor(held).cumsum(0).tolist()
    by_size = sorted(clients, key=lambda client: -client.examples)
    groups = {}
    for name, share in TOP_SHARES.items():
        top = by_size[: max(1, round(share * len(clients)))]
        rows = [torch.arange(ends[c.index] - held[c.index], ends[c.index]) for c in top]
        groups[name] = torch.cat(rows)
    return {name: rows for name, rows in groups.items() if len(rows)}


def _deviations(victim: Victim) -> Iterable[str]:
    if victim.batch_norms():
        yield (
            "BatchNorm: clients use the statistics of their batches and share no running ones; before every measurement"
            " these are estimated anew from up to 512 training examples."
        )
    if medium_of(victim).name == "text":
        yield "The language model trains without dropout."
    yield "Links neither share their bandwidth nor lose messages, and the server computes in no time."


def _files(scenario: Scenario, source: str | Path) -> dict[str, str]:
    paths = [Path(source), *([Path(scenario.checkpoint)] if scenario.checkpoint else [])]
    return {path.name: sha256_of(path) for path in paths if path.is_file()}


def _limits(scenario: Scenario) -> Limits:
    try:
        return Limits(
            scenario.steps,
            scenario.seconds,
            scenario.target_accuracy,
            scenario.target_perplexity,
            scenario.every,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


# ------------------------------------------------------------------ what is seen


class Recorder:
    """Writes what is seen at the wanted steps, of single clients a few a step and role, and lists it.

    Args:
        make: gives what makes the files; called when something is seen.
        folder: of the run, for the commands that attack the views.
        world: says which steps and how many, and has the clients' defenses, which the system knows nothing of.
    """

    def __init__(self, make: Callable[[], ViewWriter], folder: Path, world: World) -> None:
        scenario = world.scenario
        self.wants = recorded_steps(scenario.record, scenario.steps)
        self._make, self._folder, self._model = make, folder, scenario.model
        self._singles = scenario.record_clients
        self._defenses = tuple(spec for spec, _ in world.parts)
        self._remembers = any(defense.remembers for _, defense in world.parts)
        self._writer: ViewWriter | None = None
        self._written: Counter[tuple[int, str]] = Counter()
        self.views: list[RecordedView] = []
        self.left_out = 0

    def __call__(self, observation: Observation) -> None:
        place = (observation.step, observation.role)
        if observation.observer is not None:
            if self._written[place] >= self._singles:
                self.left_out += 1
                return
            self._written[place] += 1
        told = replace(
            observation,
            defenses=(*self._defenses, *observation.defenses),
            exact=observation.exact and not (self._remembers and observation.step),
        )
        self._writer = self._writer or self._make()
        self._writer.write(told)
        self.views.append(self._view(told, self._writer.records()[-1]))

    def _view(self, observation: Observation, record: ViewRecord) -> RecordedView:
        return RecordedView(
            name=record.name,
            role=observation.role,
            observer=observation.observer,
            step=observation.step,
            time=observation.time,
            clients=[member.client for member in observation.members],
            examples=sum(len(member.rows) for member in observation.members),
            staleness=max((member.staleness for member in observation.members), default=0),
            exact=record.exact,
            defenses=list(observation.defenses),
            note=record.note,
            command="" if record.update is None else self._command(record),
        )

    def _command(self, record: ViewRecord) -> str:
        words = ["leakaudit", "attack", str(self._folder / str(record.update)), "--model", self._model]
        words += ["--checkpoint", str(self._folder / str(record.model))]
        if record.truth is not None:
            words += ["--truth", str(self._folder / record.truth)]
        return shlex.join([*words, "--out", str(self._folder / "attacks" / record.name)])


def _writer(folder: Path, world: World, system: System) -> ViewWriter:
    return ViewWriter(folder, world.task, world.scenario.model, system.name)


# ------------------------------------------------------------------ what comes out


def _result(
    world: World,
    system: System,
    simulation: Simulation,
    recorder: Recorder,
    seconds: float,
    interrupted: bool,
    command: str,
) -> SimulationResult:
    task, scenario = world.task, world.scenario
    return SimulationResult(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        system=system.name,
        spec=system.spec,
        summary=described(system.options),
        options=dataclasses.asdict(system.options),  # type: ignore[call-overload]
        scenario=dataclasses.asdict(scenario),
        model=scenario.model,
        medium=medium_of(task.victim).name,
        parameters=sum(p.numel() for p in task.victim.params.values()),
        population=_population(task),
        limits=LimitValues(**dataclasses.asdict(simulation.limits)),
        seed=scenario.seed,
        curve=[_point(point) for point in simulation.curve],
        counters=dict(simulation.counters),
        messages=len(simulation.messages),
        messages_cut=len(simulation.messages) >= LOGGED,
        views=recorder.views,
        views_left_out=recorder.left_out,
        seconds=seconds,
        environment=environment(task.victim.device),
        device=str(task.victim.device),
        files=world.files,
        notes=[*world.notes, *_remarks(simulation, interrupted)],
        interrupted=interrupted,
        command=command,
    )


def _remarks(simulation: Simulation, interrupted: bool) -> Iterable[str]:
    if interrupted:
        yield f"The run was interrupted after step {simulation.step}."
    if len(simulation.messages) >= LOGGED:
        yield f"{NETWORK_NAME} holds the first {LOGGED:,} messages; bytes are counted to the end."


def _population(task: Task) -> PopulationSummary:
    clients = task.clients
    return PopulationSummary(
        clients=len(clients),
        examples=len(task.train),
        held_out=len(task.test),
        sizes=spread([client.examples for client in clients]),
        step_seconds=spread([client.device.step_seconds for client in clients]),
        bandwidth=spread([client.device.bandwidth for client in clients]),
        latency=clients[0].device.latency,
        dropout=clients[0].dropout,
        availability=clients[0].availability,
        groups={name: len(rows) for name, rows in task.groups.items()},
    )


def _point(point: Point) -> CurvePoint:
    quality = {
        name: QualityValue(accuracy=q.accuracy, loss=q.loss, perplexity=q.perplexity)
        for name, q in point.quality.items()
    }
    counts: dict[str, Any] = {
        name: getattr(point, name) for name in ("step", "time", "uploaded", "downloaded", "updates")
    }
    return CurvePoint(**counts, quality=quality)


def _write(result: SimulationResult, simulation: Simulation, folder: Path) -> None:
    """The result last but for the page, so that where it is the rest is too."""
    final = simulation.task.evaluated(simulation.params)
    (folder / MODELS).mkdir(exist_ok=True)
    save_checkpoint({**final.frozen, **final.params, **final.buffers}, folder / MODELS / FINAL_MODEL)
    write_atomically(folder / CURVE_NAME, _curve_table(result))
    write_atomically(folder / NETWORK_NAME, _network_table(simulation.messages))
    write_atomically(folder / SIMULATION_NAME, result.to_json().encode())
    write_simulation_page(result, folder / REPORT_NAME)


def _curve_table(result: SimulationResult) -> bytes:
    measures = ("accuracy", "loss", "perplexity")
    heading = ["step", "time", "uploaded", "downloaded", "updates"]
    columns = [(group, measure) for group in result.groups for measure in measures]
    names = [measure if group == ALL else f"{measure} of {group}" for group, measure in columns]
    rows = [
        [point.step, point.time, point.uploaded, point.downloaded, point.updates]
        + [getattr(point.quality[group], measure) for group, measure in columns]
        for point in result.curve
    ]
    return _table([*heading, *names], rows)


def _network_table(messages: Sequence[Message]) -> bytes:
    rows = ([m.sent, m.received, m.sender, m.receiver, m.kind, m.size] for m in messages)
    return _table(COLUMNS, rows)


def _table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows(rows)
    return text.getvalue().encode()
