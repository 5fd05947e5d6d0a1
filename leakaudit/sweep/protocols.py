"""Protocols by name: what a client does in one round, before any defense.

fedsgd:batch_size=8
fedavg:steps=5,learning_rate=0.01,examples=4
cohort:clients=3,examples=7,sizes=2+2+3,steps=5
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from leakaudit.capture import refuse_idle_examples, steps_of_epochs
from leakaudit.defenses.naming import Parts
from leakaudit.errors import InputError
from leakaudit.formats.reading import read_file
from leakaudit.rounds import Round
from leakaudit.spec import format_spec, parse
from leakaudit.threat import stated_round

FILES = (".safetensors", ".npz", ".pt", ".pth")
"""Suffixes of shared updates, in place of a spec."""


class Protocol(ABC):
    """A frozen dataclass of options that names one round."""

    @abstractmethod
    def round(self) -> Round:
        """`ValueError` for options that do not make one."""


@dataclass(frozen=True)
class FedSGD(Protocol):
    """One gradient of one batch (McMahan et al. 2017)."""

    batch_size: int = 1

    def round(self) -> Round:
        return Round(num_examples=self.batch_size)


@dataclass(frozen=True)
class FedAvg(Protocol):
    """Several local SGD steps between download and upload (McMahan et al. 2017).

    Attributes:
        steps: local steps; epochs: passes over the examples, instead of steps.
        examples: of the client; batch_size: of them a step, None for all.
        learning_rate: of the local SGD.
    """

    steps: int = 5
    epochs: int | None = None
    examples: int = 1
    batch_size: int | None = None
    learning_rate: float = 0.01

    def round(self) -> Round:
        whole = self.batch_size is None or self.batch_size == self.examples
        size = None if whole else self.batch_size
        steps = self.steps if self.epochs is None else steps_of_epochs(self.epochs, self.examples, size)
        return Round(self.examples, steps, size, self.learning_rate)


@dataclass(frozen=True)
class Cohort(Protocol):
    """The mean, or weighted sum, of several clients' updates, as `leakaudit simulate` records them.

    A view's file in place of a spec, `--protocol runs/x/views/round-0012.safetensors`, states its own.

    Attributes:
        examples: of all clients together; the others as in `leakaudit.rounds.Round`, one number a client
            joined by +.
    """

    examples: int = 2
    clients: int = 2
    steps: int = 1
    batch_size: int | None = None
    learning_rate: float = 0.01
    sizes: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    client_steps: tuple[int, ...] | None = None

    def round(self) -> Round:
        return Round(
            self.examples,
            self.steps,
            self.batch_size,
            self.learning_rate,
            self.clients,
            self.sizes,
            self.weights,
            self.client_steps,
        )


PROTOCOLS: dict[str, Protocol] = {"fedsgd": FedSGD(), "fedavg": FedAvg(), "cohort": Cohort()}
CONTROL = "fedsgd"
"""The protocol of the positive control: one gradient of one example."""


def canonical(text: str) -> str:
    """The shortest spec of the same protocol; `InputError` for an unknown one, or one that makes no round.

    Of the file of a shared update, the round that its manifest states.
    """
    if Path(text).suffix in FILES:
        text = _stated(Path(text))
    name = text.partition(":")[0].strip()
    protocol = parse(text, PROTOCOLS, "protocol")
    spec = format_spec(name, protocol, PROTOCOLS[name])
    round_of(spec)
    return spec


def _stated(path: Path) -> str:
    """The protocol that a view's manifest states; its defenses, and that members started from different models, are
    no part of it."""
    manifest = read_file(path).manifest
    if manifest.num_examples is None:
        raise InputError(
            f"{path} does not state its round: num_examples is missing; accepted: fedsgd, fedavg, cohort"
        )
    round = stated_round(manifest, manifest.num_examples)
    stated = Cohort(
        round.num_examples,
        round.clients,
        round.local_steps,
        round.local_batch_size,
        round.learning_rate,
        round.sizes,
        round.weights,
        round.client_steps,
    )
    return format_spec("cohort", stated, PROTOCOLS["cohort"])


def round_of(spec: str, defenses: Parts = ()) -> Round:
    """What the client does in the end: the protocol's round as the defenses, applied in order, change it.

    Raises `InputError` when that is no round, or leaves examples unused.
    """
    try:
        round = parse(spec, PROTOCOLS, "protocol").round()
        for _, defense in defenses:
            round = defense.round(round)
    except ValueError as error:
        chain = "".join(f" with {text}" for text, _ in defenses)
        raise InputError(f"protocol {spec}{chain} is not a round: {error}") from error
    refuse_idle_examples(round)
    return round
