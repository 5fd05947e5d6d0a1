"""Delayed synchronous SGD: workers go on by themselves and correct every step when its mean arrives.

    w_{i+1,j} = w_{i,j} - eta v_{i+1,j},   v_{i+1,j} = m v_{i,j} + g_{i,j} - g_{i-d,j} + mean_j g_{i-d,j}

(Zhu, Lin, Lu, Lin and Han 2019; m = 0 there).  The first d steps use the local gradient only, and d = 0 is
synchronous SGD, bit by bit (of gradients computed client by client; `torch.func.vmap` rounds differently where
clients share a model).  On average the workers follow synchronous SGD with local gradients,

    mean_j w_{i+1,j} = mean_j w_{i,j} - eta mean_j v_{i+1,j},   mean_j v_{i+1,j} = m mean_j v_{i,j} + mean_j g_{i,j},

and the model of the simulation, of which quality is measured, is that mean.

A worker waits at step i only where the mean of step i - d has not arrived, so a run is as fast as its computing
as long as an exchange takes at most d steps and its bytes fit the links (`leakaudit.federated.scaling`).
Workers are there from beginning to end: `Client.dropout` and `availability` are not used.

With a period T the workers exchange the sums of T steps' gradients, d steps after the last of them: local SGD,
that is FedAvg (McMahan et al. 2017), for d = 0.  `across_the_world` adds the compression.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import simpy
import torch

from leakaudit.defenses.pruning import DeepGradientCompression, Memory
from leakaudit.federated.exchange import EXCHANGES, Part
from leakaudit.federated.options import DelayedSGD, Topology
from leakaudit.federated.population import Client
from leakaudit.federated.replay import MeanModel, seer
from leakaudit.federated.simulation import Simulation, accelerate, descend
from leakaudit.models.victim import Params
from leakaudit.rounds import Round
from leakaudit.update import Update


@dataclass(frozen=True)
class Plan:
    """What the workers do.

    Attributes:
        delay: d >= 0, steps between the end of a block and the use of its mean.
        period: T >= 1, steps of a block.
        batch_size, learning_rate, momentum: of every step of a worker.
        compression: of what is sent after a step, by its number; None to send the sum as it is.
        sparse: whether messages hold only the numbers that are not zero.
    """

    delay: int
    batch_size: int
    learning_rate: float
    topology: Topology
    period: int = 1
    momentum: float = 0.0
    compression: Callable[[int], DeepGradientCompression] | None = None
    sparse: bool = False

    @property
    def round(self) -> Round:
        """What a worker does in one block."""
        if self.period == 1:
            return Round(self.batch_size)
        examples = self.period * self.batch_size
        return Round(examples, self.period, self.batch_size, self.learning_rate)

    def due(self, step: int) -> int | None:
        """The block whose mean is used at the end of this step; None for none."""
        steps = step - self.delay + 1
        return steps // self.period - 1 if steps > 0 and steps % self.period == 0 else None

    def corrections(self, block: int) -> list[int]:
        """The blocks whose means are used in the steps of this one."""
        steps = range(block * self.period, (block + 1) * self.period)
        return [due for due in map(self.due, steps) if due is not None]

    def send(self, memory: Memory | None, total: Update, step: int) -> tuple[Update, Memory | None]:
        """What is sent of the sum of a block's gradients, and the memory afterwards."""
        if self.compression is None:
            return total, None
        compression = self.compression(step)
        return compression.send(compression.gather(memory, total))


def run(options: DelayedSGD, simulation: Simulation) -> Generator[Any, Any, None]:
    plan = Plan(
        options.delay,
        options.batch_size,
        options.learning_rate,
        options.topology,
        momentum=options.momentum,
    )
    yield from train(plan, simulation)


def train(plan: Plan, simulation: Simulation) -> Generator[Any, Any, None]:
    """The workers, each a process, and the mean of their models as the model of the simulation."""
    workers = Workers(plan, simulation)
    for client in simulation.clients:
        simulation.env.process(workers.work(client))
    for step in itertools.count():
        if simulation.done:
            return
        mean = yield from workers.mean_model(step)
        used = 0 if plan.due(step) is None else len(simulation.clients)
        simulation.apply(mean, used)


class Workers:
    """All workers of a run."""

    def __init__(self, plan: Plan, simulation: Simulation) -> None:
        self._plan, self._simulation = plan, simulation
        self._exchange = EXCHANGES[plan.topology](simulation, plan.sparse, seer(plan, simulation))
        self._tallies: dict[int, _Tally] = {}

    def work(self, client: Client) -> Generator[Any, Any, None]:
        """A worker: compute, send, correct, descend."""
        plan, simulation = self._plan, self._simulation
        model = simulation.params
        velocity: Update | None = None
        memory: Memory | None = None
        sums: dict[int, Update] = {}
        block_rows: list[torch.Tensor] = []
        for step in range(simulation.limits.steps):
            if simulation.done:
                return
            block = step // plan.period
            block_rows.append(simulation.batch(client, plan.batch_size))
            pending = simulation.trainer.submit(model, Round(plan.batch_size), block_rows[-1])
            yield simulation.env.timeout(client.device.compute(1))
            gradient = pending.result()
            sums[block] = sums[block] + gradient if block in sums else gradient
            if (step + 1) % plan.period == 0:
                sent, memory = plan.send(memory, sums[block], step)
                self._exchange.share(client, Part(client.index, block, step, sent, torch.cat(block_rows)))
                block_rows = []
            direction, due = gradient, plan.due(step)
            if due is not None:
                mean = yield from self._exchange.mean(client, due)
                direction = gradient - sums.pop(due) + mean
            velocity = accelerate(velocity, direction, plan.momentum)
            model = descend(model, velocity, plan.learning_rate)
            self._tally(step).add(model)

    def mean_model(self, step: int) -> Generator[Any, Any, Params]:
        """Wait until all workers are through this step; the mean of their models, once a step."""
        tally = self._tally(step)
        yield tally.complete
        del self._tallies[step]
        return tally.models.value()

    def _tally(self, step: int) -> _Tally:
        env, workers = self._simulation.env, len(self._simulation.clients)
        return self._tallies.setdefault(step, _Tally(workers, env.event()))


@dataclass
class _Tally:
    """The workers' models after one step, as they come."""

    workers: int
    complete: simpy.Event
    models: MeanModel = field(default_factory=MeanModel)

    def add(self, model: Params) -> None:
        self.models.add(model)
        if self.models.count == self.workers:
            self.complete.succeed()
