"""A small classification task shared by clients, for the tests of systems."""

from __future__ import annotations

import torch
from torch import nn

from leakaudit.federated.options import SystemOptions
from leakaudit.federated.population import PopulationOptions, draw_population
from leakaudit.federated.seen import Seen
from leakaudit.federated.simulation import Limits, Simulation
from leakaudit.federated.task import Task
from leakaudit.federated.trainer import Trainer
from leakaudit.federated.training import Examples
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork

CLASSES, SHAPE = 3, (1, 4, 4)


def examples(count: int, seed: int = 0) -> Examples:
    """Three overlapping blobs in (1, 4, 4)."""
    draw = fork(seed, "blobs")
    y = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, *SHAPE, generator=fork(0, "centres"))
    return Examples(centres[y] + torch.randn(count, *SHAPE, generator=draw), y)


def task(clients: int = 4, each: int = 12, **population: float) -> Task:
    """`clients` clients with `each` examples on average and a small network with one hidden layer, in float64."""
    train = examples(clients * each)
    train = Examples(train.x.double(), train.y)
    test = examples(60, seed=1)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    victim = Victim.of(module.double(), Pixels(SHAPE), CLASSES, mode="train")
    options = PopulationOptions(clients=clients, **population)  # type: ignore[arg-type]
    return Task(victim, train, draw_population(options, train.y, seed=0), Examples(test.x.double(), test.y))


def simulation(world: Task | None = None, steps: int = 5, every: int = 100, seed: int = 0) -> Simulation:
    """Every step is seen, in memory."""
    world = world or task()
    return Simulation(world, Trainer(world), Seen(lambda step: True), Limits(steps=steps, every=every), seed)


Model = dict[str, torch.Tensor]


def trained(
    options: SystemOptions, world: Task, steps: int = 12, together: int = 16
) -> tuple[Simulation, list[Model]]:
    """A run, and its model after every step."""
    run = simulation(world, steps=steps)
    run.trainer = Trainer(world, together=together)
    history = [dict(run.params)]
    run.on_step = lambda *_: history.append(dict(run.params))
    run.run(options)
    return run, history
