"""What a sweep will do, worked out and checked before anything is computed.

targets = protocols x defenses; cells = targets x attacks x adversaries; runs = cells x groups x seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from leakaudit import __version__
from leakaudit.attacks.registry import medium_of_attack
from leakaudit.defenses.naming import expand, parse_defense
from leakaudit.errors import InputError
from leakaudit.execution import choose
from leakaudit.media import Medium, medium_of
from leakaudit.media.base import metrics_of, policy_of
from leakaudit.policy import Medium as MediumName
from leakaudit.policy import Policy, parse_policy
from leakaudit.rounds import Round
from leakaudit.sweep.config import SweepConfig
from leakaudit.sweep.curves import read_curves
from leakaudit.sweep.jobs import RunJob
from leakaudit.sweep.protocols import CONTROL, canonical, round_of
from leakaudit.sweep.setup import (
    Setup,
    batch_hash,
    example_hashes,
    load_all,
    load_model,
    model_identity,
    setup_of,
)
from leakaudit.sweep.target_jobs import BoundJob, UtilityJob
from leakaudit.sweep.utility import Training
from leakaudit.sweep.work import Job
from leakaudit.sweep_results import NO_DEFENSE, Adversary, Utility


@dataclass(frozen=True)
class Target:
    """A protocol with a defense, and the round that the client makes of both."""

    protocol: str
    defense: str
    round: Round


@dataclass(frozen=True)
class CellPlan:
    """One cell: its runs, and those of its control, on the same examples.

    Attributes:
        counts: whether the gate looks at it; the control row counts only where it was asked for.
    """

    target: Target
    attack: str
    adversary: Adversary
    jobs: tuple[RunJob, ...]
    control: tuple[RunJob, ...]
    counts: bool


@dataclass(frozen=True)
class SweepPlan:
    """All that follows from a configuration and the files it names.

    Attributes:
        parameters: of the model, how many.
        more: jobs besides the runs, for whole targets.
        supplied: utilities that the user had already.
    """

    config: SweepConfig
    setup: Setup
    medium: MediumName
    policy: Policy
    metrics: tuple[str, ...]
    parameters: int
    cells: tuple[CellPlan, ...]
    more: tuple[Job, ...] = ()
    supplied: tuple[Utility, ...] = ()

    @property
    def runs(self) -> list[RunJob]:
        """Every run once, controls and undefended ones first."""
        controls = {job.key: job for cell in self.cells for job in cell.control}
        rest = {job.key: job for cell in self.cells for job in cell.jobs}
        return list((controls | rest).values())

    @property
    def jobs(self) -> list[Job]:
        return [*self.runs, *self.more]

    @property
    def targets(self) -> list[Target]:
        return list(dict.fromkeys(cell.target for cell in self.cells))

    @property
    def identity(self) -> str:
        """Of all runs: another sweep has another one."""
        return digest(sorted(job.key for job in self.runs))


def digest(specification: Any) -> str:
    """SHA-256 of the canonical JSON of plain values, 32 hexadecimal digits of it."""
    text = json.dumps(specification, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def plan_sweep(config: SweepConfig) -> SweepPlan:
    """Read the model and the private examples, check everything, and name all runs.

    Raises `InputError` for unknown names, values out of range, files that do not fit together, and fewer
    private examples than asked for.
    """
    if config.fail_on is not None:
        parse_policy(config.fail_on)
    targets = _targets(config)
    attacks = _attacks(config.attacks)
    needed = max(config.images, *(target.round.num_examples for target in targets))
    setup = setup_of(config, needed)
    victim = load_model(setup)
    medium = medium_of(victim)
    _refuse_other_medium(attacks, medium)
    policy = policy_of(config.fail_on, medium)
    metrics = metrics_of(config.metrics, policy, medium)
    namer = _Namer(
        config, setup, str(policy), metrics, tuple(model_identity(setup)), tuple(example_hashes(setup))
    )
    supplied = _supplied(config, targets)
    trainings = [] if supplied else list(_trainings(config, setup, targets))
    return SweepPlan(
        config=config,
        setup=setup,
        medium=medium.name,
        policy=policy,
        metrics=metrics,
        parameters=sum(p.numel() for p in (*victim.params.values(), *victim.frozen.values())),
        cells=tuple(_cells(config, targets, attacks, namer)),
        more=(*_bounds(config, setup, targets, namer.examples), *trainings),
        supplied=supplied,
    )


def _targets(config: SweepConfig) -> list[Target]:
    """The control row first, then the defenses in their order, each under every protocol."""
    protocols = dict.fromkeys(canonical(text) for text in config.protocols)
    if not protocols:
        raise InputError("the sweep has no protocol; accepted: fedsgd, fedavg:steps=5,learning_rate=0.01")
    listed = [spec for text in config.defenses for spec in expand(text)]
    defenses = dict.fromkeys([NO_DEFENSE, *listed])
    return [
        Target(protocol, defense, round_of(protocol, parse_defense(defense)))
        for protocol in protocols
        for defense in defenses
    ]


def _attacks(texts: Sequence[str]) -> list[str]:
    specs = [text if text == "auto" else next(iter(choose((text,)))).spec for text in texts]
    if not specs:
        raise InputError("the sweep has no attack; accepted: auto, or a name that `list attacks` gives")
    return list(dict.fromkeys(specs))


def _refuse_other_medium(attacks: Sequence[str], medium: Medium[Any, Any]) -> None:
    for spec in attacks:
        own = medium.name if spec == "auto" else medium_of_attack(spec.partition(":")[0])
        if own != medium.name:
            raise InputError(f"attack {spec} reconstructs {own}, the model takes {medium.name}")


def _cells(
    config: SweepConfig, targets: Sequence[Target], attacks: Sequence[str], namer: _Namer
) -> list[CellPlan]:
    if not config.adversaries:
        raise InputError("the sweep has no adversary; accepted: oblivious, adaptive")
    asked = NO_DEFENSE in config.defenses or not config.defenses
    cells = []
    for target in targets:
        adversaries = _adversaries(config, target)
        for attack in attacks:
            for adversary in adversaries:
                jobs = namer.runs(target, attack, adversary)
                used = max(job.first + job.count for job in jobs)
                control = namer.control(attack, used)
                counts = asked or target.defense != NO_DEFENSE
                cells.append(CellPlan(target, attack, adversary, jobs, control, counts))
    return cells


def _adversaries(config: SweepConfig, target: Target) -> list[Adversary]:
    """Without a defense there is nothing to know."""
    return ["oblivious"] if target.defense == NO_DEFENSE else list(dict.fromkeys(config.adversaries))


# ------------------------------------------------------------------ utility and bounds


def _supplied(config: SweepConfig, targets: Sequence[Target]) -> tuple[Utility, ...]:
    """The curves of the user's file under the names of the targets; `InputError` for one that is no target."""
    options = config.utility
    if not options.on or options.curves is None:
        return ()
    names = {(target.protocol, target.defense) for target in targets}
    found = []
    for utility in read_curves(options.curves):
        name = canonical(utility.protocol), *expand(utility.defense)
        if name not in names:
            raise InputError(f"{options.curves} has curves of {' | '.join(name)}, which is not in this sweep")
        found.append(utility.model_copy(update={"protocol": name[0], "defense": name[1]}))
    return tuple(found)


def _trainings(config: SweepConfig, setup: Setup, targets: Sequence[Target]) -> Iterator[UtilityJob]:
    options = config.utility
    if not options.on:
        return
    victim = load_model(setup)
    training = Training(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        momentum=options.momentum,
        holdout=options.holdout,
        seeds=options.seeds,
        delta=config.bounds.delta,
    )
    common = {
        "version": __version__,
        "model": model_identity(setup),
        "data": batch_hash(victim, load_all(setup, options.examples)),
        "training": asdict(training),
        "seed": config.seed,
    }
    for target in targets:
        names = {"protocol": target.protocol, "defense": target.defense}
        key = digest(common | names)
        yield UtilityJob(key, setup, target.protocol, target.defense, training, options.examples, config.seed)


def _bounds(
    config: SweepConfig, setup: Setup, targets: Sequence[Target], examples: Sequence[str]
) -> Iterator[BoundJob]:
    options = config.bounds
    if not options.on:
        return
    common = {
        "version": __version__,
        "model": model_identity(setup),
        "options": options.model_dump(),
        "seed": config.seed,
    }
    for target in targets:
        count = target.round.num_examples
        names = {"protocol": target.protocol, "defense": target.defense, "examples": examples[:count]}
        yield BoundJob(
            digest({"bounds": common} | names),
            setup,
            target.protocol,
            target.defense,
            count,
            config.seed,
            options,
        )


# ------------------------------------------------------------------ keys


@dataclass(frozen=True)
class _Namer:
    """Makes runs with their keys; `examples` are hashes."""

    config: SweepConfig
    setup: Setup
    policy: str
    metrics: tuple[str, ...]
    model: tuple[str | None, ...]
    examples: tuple[str, ...]

    def runs(self, target: Target, attack: str, adversary: Adversary) -> tuple[RunJob, ...]:
        count = target.round.num_examples
        groups = max(1, self.config.images // count)
        return tuple(
            self._run(target.protocol, target.defense, attack, adversary, group, seed, count)
            for group in range(groups)
            for seed in self.config.seed_numbers
        )

    def control(self, attack: str, used: int) -> tuple[RunJob, ...]:
        """The attack on each of the first `used` examples by itself: with every seed where the sweep has these
        runs anyway, else with the first."""
        seeds = self.config.seed_numbers
        there = CONTROL in map(canonical, self.config.protocols) and used <= self.config.images
        return tuple(
            self._run(CONTROL, NO_DEFENSE, attack, "oblivious", group, seed, 1)
            for group in range(used)
            for seed in (seeds if there else seeds[:1])
        )

    def _run(
        self,
        protocol: str,
        defense: str,
        attack: str,
        adversary: Adversary,
        group: int,
        seed: int,
        count: int,
    ) -> RunJob:
        config, setup, first = self.config, self.setup, group * count
        specification = {
            "version": __version__,
            "model": self.model,
            "examples": self.examples[first : first + count],
            "protocol": protocol,
            "defense": defense,
            "attack": attack,
            "adversary": adversary,
            "labels": config.labels,
            "group": group,
            "seed": seed,
            "budget": config.budget,
            "policy": self.policy,
            "metrics": self.metrics,
            "redact": config.redact,
        }
        return RunJob(
            key=digest(specification),
            setup=setup,
            protocol=protocol,
            defense=defense,
            attack=attack,
            adversary=adversary,
            group=group,
            seed=seed,
            first=first,
            count=count,
            labels=config.labels,
            budget=config.budget,
            policy=self.policy,
            metrics=self.metrics,
            redact=config.redact,
        )
