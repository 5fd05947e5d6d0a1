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


@dataclass(frozen=True)
class AsynchronousSGD(SystemOptions):
    """Asynchronous SGD: the parameter server applies every worker's gradient as it arrives (Dean et al. 2012)."""

    module: ClassVar[str] = "leakaudit.federated.asynchronous"
    learning_rate: float = option(0.05, "Of every gradient.")
    damping: float = option(0.0, "Power of the staleness that divides the rate; 0 none, 1 Zhang et al. 2016.")
    batch_size: int = option(16, "Examples of a worker a step.")

    def __post_init__(self) -> None:
        positive(self, "learning_rate")
        at_least(self, 1, "batch_size")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping must be at least 0 and finite, got {self.damping}")


@dataclass(frozen=True)
class DelayedSGD(SystemOptions):
    """Delayed synchronous SGD: workers go on by themselves and correct a step by its mean `delay` steps later.

    Zhu, Lin, Lu, Lin and Han 2019, "Distributed Training Across the World".
    """

    module: ClassVar[str] = "leakaudit.federated.delayed"
    delay: int = option(4, "Steps until the mean gradient is needed, d.")
    learning_rate: float = option(0.1, "Of every step.")
    momentum: float = option(0.0, "Of the corrected gradient, in [0, 1).")
    batch_size: int = option(16, "Examples of a worker a step.")
    topology: Topology = option("server", "server, or all-reduce among peers.")  # noqa: RUF009

    def __post_init__(self) -> None:
        positive(self, "learning_rate")
        at_least(self, 0, "delay")
        at_least(self, 1, "batch_size")
        distributed(self.momentum, self.topology)


@dataclass(frozen=True)
class AcrossTheWorld(SystemOptions):
    """Distributed training across the world: delayed, every `period` steps, with Deep Gradient Compression.

    Zhu, Lin, Lu, Lin and Han 2019; Lin, Han, Mao, Wang and Dally 2018.
    """

    module: ClassVar[str] = "leakaudit.federated.across_the_world"
    delay: int = option(4, "Steps until the mean is needed, d.")
    period: int = option(4, "Local steps between two exchanges, T.")
    keep: float = option(0.01, "Share of each tensor that is sent, in (0, 1]; 1 sends all.")
    momentum: float = option(0.9, "Of what a worker gathers, corrected and masked, in [0, 1).")
    clip: float | None = option(
        None, "Longest sum of local gradients, over the root of the number of workers."
    )
    warmup: int = option(0, "Steps in which the share sent falls: 25, 6.25, 1.6, 0.4 %, then `keep`.")
    learning_rate: float = option(0.02, "Of every step.")
    batch_size: int = option(16, "Examples of a worker a step.")
    topology: Topology = option("server", "server, or all-reduce among peers.")  # noqa: RUF009

    def __post_init__(self) -> None:
        positive(self, "learning_rate", *([] if self.clip is None else ["clip"]))
        at_least(self, 0, "delay", "warmup")
        at_least(self, 1, "period", "batch_size")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}")
        distributed(self.momentum, self.topology)

    def keep_at(self, step: int) -> float:
        """Share sent at a step, in (0, 1]: sparsity 75, 93.75, 98.4, 99.6 % during the warm-up, never beyond `keep`.

        Lin et al. 2018, section 3.3; there every level takes an epoch.
        """
        if step >= self.warmup:
            return self.keep
        return max(self.keep, 0.25 ** (1 + 4 * step // self.warmup))


def distributed(momentum: float, topology: str) -> None:
    """`ValueError` unless these are values of distributed training."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if topology not in ("server", "all-reduce"):
        raise ValueError(f"topology must be server or all-reduce, got {topology}")


SYSTEMS: dict[str, SystemOptions] = {
    "ssgd": SynchronousSGD(),
    "asgd": AsynchronousSGD(),
    "dssgd": DelayedSGD(),
    "dts": AcrossTheWorld(),
    "dgc": AcrossTheWorld(delay=0, period=1, keep=0.001),
}
