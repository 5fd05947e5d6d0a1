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
class SecureOptions(SystemOptions):
    """Local training, and the fixed point in which its updates are masked and summed."""

    local_steps: int = option(4, "SGD steps of a client a round.")
    batch_size: int = option(8, "Examples a step; all of a client that has fewer.")
    learning_rate: float = option(0.1, "Of the local SGD.")
    server_learning_rate: float = option(1.0, "Of the mean of the clients' differences.")
    bits: int = option(22, "Of a number in fixed point, 2 to 48.")
    limit: float = option(
        8.0, "Largest magnitude of a number of the pseudo-gradient; larger ones are clamped."
    )
    modulus_bits: int = option(32, "Sums are modulo 2 to this power, 8 to 63.")
    rounding: Literal["nearest", "stochastic"] = option("nearest", "nearest, or stochastic.")

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "server_learning_rate")
        at_least(self, 1, "local_steps", "batch_size")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be nearest or stochastic, got {self.rounding}")

    def check_sum(self, clients: int) -> None:
        """`ValueError` where the sum of so many clients could wrap around, or the fixed point is none."""
        from leakaudit.federated.secure.fixed_point import FixedPoint

        FixedPoint(clients, self.bits, self.limit, self.modulus_bits)


@dataclass(frozen=True)
class SecureSync(SecureOptions):
    """Federated averaging with the secure aggregation of Bonawitz et al. 2017: the server sees a cohort's sum."""

    module: ClassVar[str] = "leakaudit.federated.secure_sync"
    cohort: int = option(5, "Clients a round, at least 2.")
    threshold: int | None = option(None, "Who must be left in every round of the protocol; else 2/3 + 1.")
    weighting: Literal["equal", "examples"] = option("equal", "Of clients: equal, or by examples.")
    wait: float = option(1.0, "Seconds from an aborted round to the next.")
    patience: int = option(20, "Aborted rounds in a row before giving up.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "cohort")
        at_least(self, 1, "threshold", "patience")
        at_least(self, 0, "wait")
        if self.weighting not in ("equal", "examples"):
            raise ValueError(f"weighting must be equal or examples, got {self.weighting}")

    @property
    def quorum(self) -> int:
        """The threshold that holds."""
        return 2 * self.cohort // 3 + 1 if self.threshold is None else self.threshold

    def check(self, clients: int) -> None:
        from leakaudit.federated.secure.bonawitz import check_threshold

        if self.cohort > clients:
            raise ValueError(f"cohort must be at most the {clients} clients there are, got {self.cohort}")
        check_threshold(self.quorum, self.cohort)
        self.check_sum(self.cohort)


@dataclass(frozen=True)
class SecureAsync(SecureOptions):
    """FedBuff whose server sees the sum of a buffer only, by a SIMULATED enclave as in Papaya (Huba et al. 2022)."""

    module: ClassVar[str] = "leakaudit.federated.secure_async"
    buffer: int = option(4, "Contributions a step of the server, at least 2.")
    concurrency: int = option(5, "Clients that train at any time.")
    staleness_exponent: float = option(
        0.5, "Weight 1 / (1 + staleness)^exponent, put on by the client; 0 for none."
    )
    isolated: bool = option(False, "Run the simulated enclave in a process of its own.")
    patience: int = option(200, "Contributions lost in a row before giving up.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "buffer")
        at_least(self, 1, "concurrency", "patience")
        if not 0 <= self.staleness_exponent < float("inf"):
            raise ValueError(
                f"staleness_exponent must be at least 0 and finite, got {self.staleness_exponent}"
            )

    def check(self, clients: int) -> None:
        for name in ("buffer", "concurrency"):
            if getattr(self, name) > clients:
                raise ValueError(
                    f"{name} must be at most the {clients} clients there are, got {getattr(self, name)}"
                )
        self.check_sum(self.buffer)


SYSTEMS: dict[str, SystemOptions] = {
    "ssgd": SynchronousSGD(),
    "secagg": SecureSync(),
    "async-secagg": SecureAsync(),
}
