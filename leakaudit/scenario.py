"""`Scenario`: everything of a simulated training but the system itself.  Imports nothing heavy: the command line
is made of it, as it is of the systems' own options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from leakaudit.errors import InputError

Quantity = Literal["seconds", "bandwidth", "shape"]
"""How the command line writes a number: see `leakaudit.units`."""

T = TypeVar("T")


def given(default: T, help: str, *, flags: tuple[str, ...] = (), quantity: Quantity | None = None) -> T:
    """A field with its line of help, its options on the command line where they are not its name, and its unit."""
    metadata = {"help": help, "flags": flags, "quantity": quantity}
    return dataclasses.field(default=default, metadata=metadata)


def _required(help: str) -> Any:
    return dataclasses.field(metadata={"help": help, "flags": (), "quantity": None})


@dataclass(frozen=True)
class Scenario:
    """The model, the data, the clients, when the training ends, and what is recorded of it.

    Attributes:
        model, checkpoint, data, text, task, lora, max_length, normalisation, input_shape, num_classes: as for
            `leakaudit.api.capture_update`.
        examples: how many of the data are used, the first ones; None for all.
        holdout: share of them held out for quality, in (0, 1).
        clients to availability: see `leakaudit.federated.population.PopulationOptions`; seconds, bytes a second.
        steps to every: see `leakaudit.federated.simulation.Limits`.
        defense: specs of `leakaudit.defenses.naming`, applied by every client in order.
        record: steps whose views are written, see `recorded_steps`.
        record_clients: most views of single clients of a step and role, >= 1: without any an audit would miss the
            worst that a party sees; those of many clients are all written.
        together: most clients trained at once with torch.func.vmap; 1 for one after the other.
        seed: of the population, the hold-out, batches, fresh parameters and defenses.
        device: cpu, cuda or auto.
    """

    model: str = _required("Name, torchvision:NAME, file.py:factory, or hf:NAME_OR_FOLDER for text.")
    data: str | None = given(None, "Images of all clients: a folder, .npz, or torchvision:NAME.")
    text: str | None = given(None, "Sentences instead: .txt, .tsv, .csv or .jsonl, for a language model.")
    task: str | None = given(None, "Of a language model (hf:): classification, mlm or causal-lm.")
    lora: str | None = given(None, "Adapters of a language model: rank=8,alpha=16,targets=query+value.")
    max_length: int | None = given(None, "Cut sentences off after so many tokens.")
    checkpoint: str | None = given(None, "The model to begin with; fresh from the seed unless given.")
    normalisation: str = given("none", "none, cifar10, cifar100, imagenet, mnist, or MEAN/STD.")
    input_shape: tuple[int, int, int] | None = given(None, "C,H,W.", quantity="shape")
    num_classes: int | None = given(None, "Number of classes.")
    examples: int | None = given(None, "Use so many of the data; all unless given.")
    holdout: float = given(0.2, "Share of the data that quality is measured on.")
    clients: int = given(8, "How many take part.", flags=("--clients", "--workers"))
    size_spread: float = given(0.0, "Sigma of the log-normal share of the data of a client; 0: equal shares.")
    label_skew: float | None = given(
        None, "Concentration of the Dirichlet distribution of a client's classes."
    )
    step_seconds: float = given(
        0.3, "Computing time of a local step.", flags=("--step-time",), quantity="seconds"
    )
    speed_spread: float = given(0.0, "Sigma of the log-normal computing time of a client.")
    slow_with_data: float = given(0.0, "Correlation of a client's data and its computing time, -1 to 1.")
    latency: float = given(0.05, "Of a message, one way: 240ms is a round trip of 480ms.", quantity="seconds")
    bandwidth: float = given(12.5e6, "Of a client's link: 100Mbps, 12.5MB/s.", quantity="bandwidth")
    bandwidth_spread: float = given(0.0, "Sigma of the log-normal bandwidth of a client.")
    dropout: float = given(0.0, "Probability that a client leaves in the middle of a round.")
    availability: float = given(1.0, "Probability that a client is there when asked.")
    steps: int = given(100, "End after so many steps of the server.")
    seconds: float | None = given(None, "End after so much virtual time, such as 2h.", quantity="seconds")
    target_accuracy: float | None = given(None, "End at this held-out accuracy, 0 to 1.")
    target_perplexity: float | None = given(None, "End at this held-out perplexity.")
    every: int = given(10, "Measure quality every so many steps.")
    defense: tuple[str, ...] = given(
        (), "NAME:key=value of every client, applied in order; see list defenses."
    )
    record: str = given(
        "first,middle,last", "Steps whose views are written: first,12,every:50,last; none; all."
    )
    record_clients: int = given(4, "Single clients' updates to write of such a step.")
    together: int = given(16, "Clients trained at once; 1: one after the other.")
    seed: int = given(0, "The one seed of the run.")
    device: str = given("auto", "cpu, cuda or auto.")

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}")
        for name in ("record_clients", "examples", "together", "clients", "steps", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{_written(name)} must be at least 1, got {value}")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"seconds must be positive, got {self.seconds:g}")
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout must be between 0 and 1, got {self.holdout}")
        if self.target_accuracy is not None and not 0 <= self.target_accuracy <= 1:
            raise InputError(f"target accuracy must be between 0 and 1, got {self.target_accuracy}")
        if self.target_perplexity is not None and not self.target_perplexity >= 1:
            raise InputError(f"target perplexity must be at least 1, got {self.target_perplexity}")
        recorded_steps(self.record, self.steps)


def _written(name: str) -> str:
    return name.replace("_", " ")


def recorded_steps(text: str, steps: int) -> Callable[[int], bool]:
    """Whether the views of a step, counted from 0, are written.

    Args:
        text: of first, middle, last (of `steps`), a step's number, every:K (0, K, 2 K, ...), all or none, with
            commas between.

    Raises `InputError` for anything else.
    """
    single: set[int] = set()
    periods: list[int] = []
    named = {"first": 0, "middle": steps // 2, "last": steps - 1}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = item.partition(":")
        if item in named:
            single.add(named[item])
        elif item == "all":
            periods.append(1)
        elif name == "every" and number.isdecimal() and int(number) > 0:
            periods.append(int(number))
        elif item.isdecimal() and int(item) >= steps:
            raise InputError(f"record {item!r} is beyond the last step; accepted: 0 to {steps - 1}")
        elif item.isdecimal():
            single.add(int(item))
        elif item != "none":
            raise InputError(
                f"record {item!r} is no step; accepted: first, middle, last, a number from 0, every:10, all, none"
            )
    return lambda step: step in single or any(step % period == 0 for period in periods)
