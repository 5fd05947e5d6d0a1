"""A run of a system: the virtual clock, the network, and the curve of quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import simpy
import torch
from torch import Tensor

from leakaudit.errors import InputError
from leakaudit.federated.network import SERVER, Message
from leakaudit.federated.options import SystemOptions
from leakaudit.federated.population import Client
from leakaudit.federated.seen import Seen
from leakaudit.federated.task import Quality, Task
from leakaudit.federated.trainer import Trainer
from leakaudit.federated.training import shuffled
from leakaudit.models.victim import Params
from leakaudit.randomness import fork
from leakaudit.update import Update


@dataclass(frozen=True)
class Point:
    """The curve at one step of the server.

    Attributes:
        step: model versions so far; time: seconds of the virtual clock.
        uploaded, downloaded: bytes so far, of all clients; updates: clients' updates that arrived.
        quality: "all" and each group.
    """

    step: int
    time: float
    uploaded: int
    downloaded: int
    updates: int
    quality: dict[str, Quality]


@dataclass(frozen=True)
class Limits:
    """When a run ends: after `steps` of the server, `seconds` of the virtual clock, or at a held-out accuracy of
    `accuracy` or perplexity of `perplexity`, whichever comes first; `every` steps quality is measured."""

    steps: int = 100
    seconds: float | None = None
    accuracy: float | None = None
    perplexity: float | None = None
    every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or self.every < 1:
            raise ValueError(f"steps and every must be at least 1, got {self.steps} and {self.every}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")


@dataclass
class Simulation:
    """What a system runs in.

    Attributes:
        task, trainer, seen, limits, seed: given.
        env: SimPy's environment; `env.now` is in seconds.
        messages: all that crossed the network; kept only as far as `log` says.
        curve: quality, first at step 0.
        params: the server's model after the last step.
        on_step: called with (steps done, steps at most, held-out loss) after each step.
    """

    task: Task
    trainer: Trainer
    seen: Seen
    limits: Limits = Limits()
    seed: int = 0
    log: int = 100_000
    on_step: Callable[[int, int, float], None] | None = None
    env: simpy.Environment = field(default_factory=simpy.Environment)
    messages: list[Message] = field(default_factory=list)
    curve: list[Point] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    params: Params = field(init=False)
    step: int = 0
    uploaded: int = 0
    downloaded: int = 0
    updates: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.params = self.task.victim.params
        self._draws: dict[int, Any] = {}

    @property
    def clients(self) -> tuple[Client, ...]:
        return self.task.clients

    def generator(self, name: str) -> torch.Generator:
        """Randomness for the purpose called `name`, the same for the same seed."""
        return fork(self.seed, f"simulation/{name}")

    def run(self, options: SystemOptions) -> None:
        """Run the system until a limit is reached.  `InputError` where its options do not fit the population."""
        try:
            options.check(len(self.clients))
        except ValueError as error:
            raise InputError(str(error)) from error
        self._measure()
        system = options.run(self)
        process = self.env.process(system)
        stop = process if self.limits.seconds is None else process | self.env.timeout(self.limits.seconds)
        try:
            self.env.run(until=stop)
        finally:
            system.close()  # it is told of an end that is not its own, by GeneratorExit
        if self.curve[-1].step != self.step:
            self._measure()

    def batch(self, client: Client, count: int) -> Tensor:
        """The next `count` rows (int64) of the client's shuffled data, epoch after epoch; no more than it has."""
        if count > client.examples:
            raise InputError(
                f"client {client.index} holds {client.examples} examples, fewer than a batch of {count};"
                " accepted: a smaller batch, more data or fewer clients"
            )
        if client.index not in self._draws:
            draw = self.generator(f"batches/{client.index}")
            self._draws[client.index] = shuffled(client.examples, count, draw)
        return client.rows[next(self._draws[client.index])]

    def send(
        self, sender: str, receiver: str, kind: str, size: int, seconds: float
    ) -> Generator[Any, Any, None]:
        """A message on the network: use as `yield from simulation.send(...)`."""
        began = self.env.now
        yield self.env.timeout(seconds)
        self.note(Message(began, self.env.now, sender, receiver, kind, size))

    def upload(self, client: Client, size: int) -> Generator[Any, Any, None]:
        """The client's update on its way to the server."""
        yield from self.send(name_of(client), SERVER, "update", size, client.device.transfer(size))

    def download(self, client: Client, size: int) -> Generator[Any, Any, None]:
        """The model on its way to the client."""
        yield from self.send(SERVER, name_of(client), "model", size, client.device.transfer(size))

    def note(self, message: Message) -> None:
        """Count a message; `send` does."""
        if message.sender == SERVER:
            self.downloaded += message.size
        else:
            self.uploaded += message.size
        if len(self.messages) < self.log:
            self.messages.append(message)

    def count(self, what: str, by: int = 1) -> None:
        """Count an event by name, such as "dropped out", for the report."""
        self.counters[what] = self.counters.get(what, 0) + by

    def apply(self, params: Params, updates: int) -> None:
        """The server's next model, made of so many clients' updates; measures the curve and ends the run in time."""
        if not Update(params).is_finite():
            raise InputError(
                f"the model is not finite after step {self.step + 1} at {self.env.now:.3g} s; lower the learning rate"
            )
        self.params = params
        self.step += 1
        self.updates += updates
        if self.step % self.limits.every == 0 or self.step >= self.limits.steps:
            self._measure()
        if self.on_step is not None:
            self.on_step(self.step, self.limits.steps, self.curve[-1].quality["all"].loss)
        self.done = self.done or self.step >= self.limits.steps

    def _measure(self) -> None:
        quality = self.task.quality(self.params)
        if not math.isfinite(quality["all"].loss):
            raise InputError(
                f"the held-out loss is {quality['all'].loss} after step {self.step} at {self.env.now:.3g} s;"
                " lower the learning rate"
            )
        self.curve.append(
            Point(self.step, self.env.now, self.uploaded, self.downloaded, self.updates, quality)
        )
        reached, limits = quality["all"], self.limits
        self.done = (
            self.done
            or (limits.accuracy is not None and reached.accuracy >= limits.accuracy)
            or (limits.perplexity is not None and reached.perplexity <= limits.perplexity)
        )


def name_of(client: Client) -> str:
    """On the network."""
    return f"client-{client.index:03d}"


def descend(params: Params, update: Update, learning_rate: float) -> dict[str, Tensor]:
    """params - learning_rate * update, for the parameters that the update holds."""
    return {**params, **{name: params[name] - learning_rate * step for name, step in update.items()}}


def accelerate(velocity: Update | None, direction: Update, momentum: float) -> Update:
    """momentum * velocity + direction; the direction itself to begin with, or without momentum."""
    return direction if velocity is None or not momentum else momentum * velocity + direction
