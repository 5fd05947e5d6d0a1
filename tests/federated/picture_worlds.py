"""A task of small pictures on a model that is named by a spec, for the tests of recorded views."""

from __future__ import annotations

import torch
from torch import nn

from leakaudit.data import PrivateBatch
from leakaudit.federated.population import PopulationOptions, draw_population
from leakaudit.federated.task import Task
from leakaudit.federated.training import Examples
from leakaudit.media import medium_of
from leakaudit.models.zoo import load_victim
from leakaudit.randomness import fork

MODEL, SHAPE, CLASSES = "mlp:activation=sigmoid,width=24,layers=1", (3, 8, 8), 4


def pictures(count: int, seed: int = 0) -> PrivateBatch:
    """Smooth pictures (count, 3, 8, 8), labels in turn."""
    coarse = torch.rand(count, 3, 3, 3, generator=fork(seed, "pictures"))
    pixels = nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear", align_corners=True)
    names = tuple(f"picture-{index}" for index in range(count))
    return PrivateBatch(pixels.contiguous(), torch.arange(count) % CLASSES, names)


def task(clients: int = 3, each: int = 4, model: str = MODEL, **population: float) -> Task:
    """Clients with `each` pictures on average."""
    victim = load_victim(model, num_classes=CLASSES, input_shape=SHAPE, mode="train", seed=3)
    data, test = pictures(clients * each), pictures(8, seed=1)
    options = PopulationOptions(clients=clients, **population)  # type: ignore[arg-type]
    return Task(
        victim,
        Examples(*medium_of(victim).tensors(victim, data)),
        draw_population(options, data.labels, seed=0),
        Examples(*medium_of(victim).tensors(victim, test)),
        data,
    )
