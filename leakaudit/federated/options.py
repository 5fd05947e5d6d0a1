"""The options of every system, and where its code is.  Imports nothing heavy: the command line is made of them.

A preset is an instance of a frozen dataclass whose first paragraph says what the system is, with its source.
`help` of a field's metadata is one line for `--help`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

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
        intermittent: whether clients may be unavailable or drop out (federated learning); the workers of
            distributed training stay from beginning to end.
    """

    module: ClassVar[str]
    intermittent: ClassVar[bool] = False

    def check(self, clients: int) -> None:
        """`ValueError` where the options do not fit so many clients."""

    def run(self, simulation: Simulation) -> Generator[Any, Any, None]:
        """The system as a SimPy process; it ends when `simulation.done` says so."""
        process: Callable[[Any, Simulation], Generator[Any, Any, None]] = importlib.import_module(
            self.module
        ).run
        return process(self, simulation)


def at_least(options: object, least: float, *names: str) -> None:
    """`ValueError` unless these fields are at least `least` and finite (None is left alone)."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value < float("inf"):
            finite = " and finite" if isinstance(value, float) else ""
            raise ValueError(f"{name} must be at least {least}{finite}, got {value}")


def positive(options: object, *names: str) -> None:
    """`ValueError` unless these fields are positive and finite."""
    for name in names:
        value = getattr(options, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def one_of(options: object, name: str, choices: Any) -> None:
    """`ValueError` unless the field holds one of a `Literal`'s values."""
    accepted = get_args(choices)
    if getattr(options, name) not in accepted:
        raise ValueError(f"{name} must be {' or '.join(accepted)}, got {getattr(options, name)}")


def momentum_of(options: Any) -> None:
    """`ValueError` unless `momentum` is in [0, 1)."""
    if not 0 <= options.momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {options.momentum}")


def at_most(options: object, clients: int, *names: str) -> None:
    """`ValueError` where a field asks for more clients than there are."""
    for name in names:
        if getattr(options, name) > clients:
            raise ValueError(f"{name} must be at most the {clients} clients, got {getattr(options, name)}")


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
        momentum_of(self)
        one_of(self, "topology", Topology)


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
        momentum_of(self)
        one_of(self, "topology", Topology)


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
        momentum_of(self)
        one_of(self, "topology", Topology)

    def keep_at(self, step: int) -> float:
        """Share sent at a step, in (0, 1]: sparsity 75, 93.75, 98.4, 99.6 % during the warm-up, never beyond `keep`.

        Lin et al. 2018, section 3.3; there every level takes an epoch.
        """
        if step >= self.warmup:
            return self.keep
        return max(self.keep, 0.25 ** (1 + 4 * step // self.warmup))


DISTRIBUTED: dict[str, SystemOptions] = {
    "ssgd": SynchronousSGD(),
    "asgd": AsynchronousSGD(),
    "dssgd": DelayedSGD(),
    "dts": AcrossTheWorld(),
    "dgc": AcrossTheWorld(delay=0, period=1, keep=0.001),
}
# --- federated learning: clients that train for a while between download and upload ---

Weighting = Literal["examples", "equal"]
StalenessName = Literal["sqrt", "constant", "polynomial", "hinge"]


@dataclass(frozen=True)
class LocalTraining(SystemOptions):
    """Clients that take several steps of SGD on their own data, and a server that applies what they send."""

    intermittent: ClassVar[bool] = True
    local_steps: int = option(5, "Steps of SGD of a client a round.")
    local_epochs: int | None = option(None, "Passes over its data instead of so many steps.")
    batch_size: int | None = option(8, "Examples of a local step; none for all that a client has.")
    local_learning_rate: float = option(0.1, "Of a local step.")
    server_learning_rate: float = option(1.0, "Factor on the clients' mean change of the model.")
    momentum: float = option(0.0, "Of the server, in [0, 1).")
    weighting: Weighting = option("examples", "Of clients: by their examples, or equal.")  # noqa: RUF009
    retry: float = option(10.0, "Seconds until the server asks again, where too few clients were there.")
    patience: int = option(100, "Rounds in vain, one after the other, after which a run is given up.")

    def __post_init__(self) -> None:
        at_least(self, 1, "local_steps", "local_epochs", "batch_size", "patience")
        positive(self, "local_learning_rate", "server_learning_rate", "retry")
        momentum_of(self)
        one_of(self, "weighting", Weighting)


@dataclass(frozen=True)
class FederatedAveraging(LocalTraining):
    """Federated averaging: a cohort of clients trains for some steps, the mean of their changes is applied.

    McMahan et al. 2017, algorithm 1; server momentum as in Hsu, Qi and Brown 2019.
    """

    module: ClassVar[str] = "leakaudit.federated.federated_averaging"
    cohort: int = option(4, "Clients whose updates make one round.")
    over_selection: float = option(
        0.0, "Share of clients asked beyond the cohort; the last ones are cancelled."
    )
    cut_off: float | None = option(None, "Seconds after a round's start; later reports do not count.")
    minimum: int = option(1, "Reports below which a round is abandoned.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "cohort", "minimum")
        if not 0 <= self.over_selection < float("inf"):
            raise ValueError(f"over_selection must be at least 0 and finite, got {self.over_selection}")
        if self.cut_off is not None:
            positive(self, "cut_off")
        if self.minimum > self.cohort:
            raise ValueError(f"minimum must be at most the cohort of {self.cohort}, got {self.minimum}")

    def check(self, clients: int) -> None:
        at_most(self, clients, "cohort")


@dataclass(frozen=True)
class OverSelection(FederatedAveraging):
    """Synchronous federated learning: more clients are asked than needed, the first ones to report count.

    Bonawitz et al. 2019, "Towards federated learning at scale"; 30 percent more, as there.
    """

    over_selection: float = option(
        0.3, "Share of clients asked beyond the cohort; the last ones are cancelled."
    )


@dataclass(frozen=True)
class CutOff(FederatedAveraging):
    """Synchronous federated learning with a cut-off: who has not reported in time does not count.

    Bonawitz et al. 2019, "Towards federated learning at scale", the time-out of the reporting phase.
    """

    cut_off: float | None = option(3.0, "Seconds after a round's start; later reports do not count.")


@dataclass(frozen=True)
class FedBuff(LocalTraining):
    """FedBuff: clients come and go, the server moves whenever a buffer of their updates is full.

    Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation"; clients replaced at once as
    in Papaya (Huba et al. 2022).  With buffer=1 it is asynchronous federated learning.
    """

    module: ClassVar[str] = "leakaudit.federated.fedbuff"
    weighting: Weighting = option("equal", "Of clients: by their examples, or equal.")  # noqa: RUF009
    buffer: int = option(3, "Updates that make one step of the server, K.")
    concurrency: int = option(6, "Clients that train at the same time, at most.")
    staleness: StalenessName = option("sqrt", "Weight of a stale update: a name of STALENESS.")  # noqa: RUF009
    exponent: float = option(0.5, "Of polynomial: (1 + tau)^-exponent.")
    slope: float = option(10.0, "Of hinge: 1 / (1 + slope (tau - threshold)) beyond the threshold.")
    threshold: int = option(4, "Of hinge.")
    max_staleness: int | None = option(None, "Updates staler than this are dropped.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "buffer", "concurrency")
        at_least(self, 0, "exponent", "slope", "threshold", "max_staleness")
        one_of(self, "staleness", StalenessName)
        if self.buffer > self.concurrency:
            raise ValueError(
                f"buffer must be at most the concurrency of {self.concurrency}, got {self.buffer}"
            )

    def check(self, clients: int) -> None:
        at_most(self, clients, "buffer", "concurrency")


FEDERATED: dict[str, SystemOptions] = {
    "fedavg": FederatedAveraging(),
    "sync": OverSelection(),
    "timeout": CutOff(),
    "fedbuff": FedBuff(),
}

# --- secure aggregation: the server sees sums only ---

Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class SecureOptions(SystemOptions):
    """Local training, and the fixed point in which its updates are masked and summed."""

    intermittent: ClassVar[bool] = True
    local_steps: int = option(4, "SGD steps of a client a round.")
    batch_size: int = option(8, "Examples a step; all of a client that has fewer.")
    learning_rate: float = option(0.1, "Of the local SGD.")
    server_learning_rate: float = option(1.0, "Of the mean of the clients' differences.")
    bits: int = option(22, "Of a number in fixed point, 2 to 48.")
    limit: float = option(
        8.0, "Largest magnitude of a number of the pseudo-gradient; larger ones are clamped."
    )
    modulus_bits: int = option(32, "Sums are modulo 2 to this power, 8 to 63.")
    rounding: Rounding = option("nearest", "nearest, or stochastic.")  # noqa: RUF009

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "server_learning_rate")
        at_least(self, 1, "local_steps", "batch_size")
        one_of(self, "rounding", Rounding)

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
    weighting: Weighting = option("equal", "Of clients: by their examples, or equal.")  # noqa: RUF009
    wait: float = option(1.0, "Seconds from an aborted round to the next.")
    patience: int = option(20, "Aborted rounds in a row before giving up.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "cohort")
        at_least(self, 1, "threshold", "patience")
        at_least(self, 0, "wait")
        one_of(self, "weighting", Weighting)

    @property
    def quorum(self) -> int:
        """The threshold that holds."""
        return 2 * self.cohort // 3 + 1 if self.threshold is None else self.threshold

    def check(self, clients: int) -> None:
        from leakaudit.federated.secure.bonawitz import check_threshold

        at_most(self, clients, "cohort")
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
        at_most(self, clients, "buffer", "concurrency")
        self.check_sum(self.buffer)


SECURE: dict[str, SystemOptions] = {"secagg": SecureSync(), "async-secagg": SecureAsync()}

# --- all of them ---

SYSTEMS: dict[str, SystemOptions] = {**DISTRIBUTED, **FEDERATED, **SECURE}
