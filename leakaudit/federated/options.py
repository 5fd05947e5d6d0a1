"""The options of every system, and where its code is.  Imports nothing heavy: the command line is made of them.

A preset is an instance of a frozen dataclass whose first paragraph says what the system is, with its source.
`help` of a field's metadata is one line for `--help`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    from leakaudit.federated.simulation import Simulation

Topology = Literal["server", "all-reduce"]
T = TypeVar("T")


def option(default: T, help: str) -> T:
    """A field with its line of help."""
    return dataclasses.field(default=default, metadata={"help": help})


class SystemOptions:
    """Base of all options.

    Class attributes:
        module: where `run(options, simulation)` is.
        one_batch: True where a client takes one batch a step from its own data (distributed training), False
            where it trains on all of them for some epochs or steps (federated learning).
    """

    module: ClassVar[str]

    def check(self, clients: int) -> None:
        """`ValueError` where the options do not fit so many clients."""

    def run(self, simulation: Simulation) -> Generator[Any, Any, None]:
        """The system as a SimPy process; it ends when `simulation.done` says so."""
        process: Callable[[Any, Simulation], Generator[Any, Any, None]] = importlib.import_module(
            self.module
        ).run
        return process(self, simulation)


def at_least(options: object, least: float, *names: str) -> None:
    """`ValueError` unless these fields are at least `least` (None is left alone)."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def positive(options: object, *names: str) -> None:
    """`ValueError` unless these fields are positive and finite."""
    for name in names:
        value = getattr(options, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")


@dataclass(frozen=True)
class SynchronousSGD(SystemOptions):
    """Synchronous SGD: every worker's gradient of one batch, averaged at every step."""

    module: ClassVar[str] = "leakaudit.federated.synchronous"
    learning_rate: float = option(0.1, "Of every step.")
    momentum: float = option(0.0, "Of the server, in [0, 1).")
    batch_size: int = option(16, "Examples of a worker a step.")
    topology: Topology = option("server", "server, or all-reduce among peers.")  # noqa: RUF009

    def __post_init__(self) -> None:
        positive(self, "learning_rate")
        at_least(self, 1, "batch_size")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.topology not in ("server", "all-reduce"):
            raise ValueError(f"topology must be server or all-reduce, got {self.topology}")


SYSTEMS: dict[str, SystemOptions] = {"ssgd": SynchronousSGD()}
