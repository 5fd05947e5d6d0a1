"""Who takes part: every client's share of the data and its device, drawn from stated distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leakaudit.federated.cost import Device
from leakaudit.formats.phrases import counted
from leakaudit.randomness import fork


@dataclass(frozen=True)
class Client:
    """Attributes:
    index: from 0.
    rows: (n,) int64, which examples of the training data are the client's, n >= 1.
    device: of the client.
    dropout: probability that a client which began a round does not finish it, in [0, 1).
    availability: probability that a client is there when it is asked, in (0, 1].
    """

    index: int
    rows: Tensor
    device: Device
    dropout: float = 0.0
    availability: float = 1.0

    @property
    def examples(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class PopulationOptions:
    """Attributes:
    clients: how many, >= 1.
    size_spread: sigma of the log-normal share of the data of a client, >= 0; 0 for equal shares.
    label_skew: concentration of the Dirichlet distribution of a client's classes (Hsu, Qi and Brown 2019), > 0;
        None for clients whose data are alike.
    step_seconds: of a local step of the median client; speed_spread: sigma of its log-normal distribution.
    slow_with_data: correlation in [-1, 1] of the logarithms of a client's data and of its seconds a step.
    latency: seconds one way; bandwidth: bytes a second of the median client; bandwidth_spread: its sigma.
    dropout, availability: as in `Client`, the same for all.
    """

    clients: int = 8
    size_spread: float = 0.0
    label_skew: float | None = None
    step_seconds: float = 0.3
    speed_spread: float = 0.0
    slow_with_data: float = 0.0
    latency: float = 0.05
    bandwidth: float = 12.5e6
    bandwidth_spread: float = 0.0
    dropout: float = 0.0
    availability: float = 1.0

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ValueError(f"clients must be at least 1, got {self.clients}")
        for name in ("size_spread", "speed_spread", "bandwidth_spread"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.label_skew is not None and not 0 < self.label_skew < float("inf"):
            raise ValueError(f"label_skew must be positive, got {self.label_skew}")
        if not -1 <= self.slow_with_data <= 1:
            raise ValueError(f"slow_with_data must be between -1 and 1, got {self.slow_with_data}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.availability <= 1:
            raise ValueError(f"availability must be in (0, 1], got {self.availability}")
        Device(self.step_seconds, self.latency, self.bandwidth)


def draw_population(options: PopulationOptions, labels: Tensor, seed: int) -> tuple[Client, ...]:
    """Clients that share all examples among them, each with at least one.

    Args:
        labels: (N,) classes of the training data, or (N, L) tokens, which are not skewed.

    Raises `ValueError` where there are fewer examples than clients.
    """
    count, clients = len(labels), options.clients
    if count < clients:
        raise ValueError(
            f"{counted(count, 'example')} cannot be shared by {clients} clients, one each at least"
        )
    draw = torch.randn(4, clients, generator=fork(seed, "population/devices"), dtype=torch.float64)
    sizes = _sizes(draw[0] * options.size_spread, count)
    slow = options.slow_with_data * draw[0] + (1 - options.slow_with_data**2) ** 0.5 * draw[1]
    seconds = options.step_seconds * (options.speed_spread * slow).exp()
    bandwidth = options.bandwidth * (options.bandwidth_spread * draw[2]).exp()
    shards = _shards(sizes, labels, options.label_skew, fork(seed, "population/data"))
    return tuple(
        Client(
            index,
            rows,
            Device(float(seconds[index]), options.latency, float(bandwidth[index])),
            options.dropout,
            options.availability,
        )
        for index, rows in enumerate(shards)
    )


def _sizes(logarithms: Tensor, count: int) -> list[int]:
    """Shares proportional to the exponentials, at least one each, that come to `count`."""
    spare = count - len(logarithms)
    edges = (logarithms.softmax(0).cumsum(0) * spare).round().long()
    return [1 + int(n) for n in edges.diff(prepend=edges.new_zeros(1))]


def _shards(
    sizes: Sequence[int], labels: Tensor, skew: float | None, generator: torch.Generator
) -> list[Tensor]:
    """Rows of every client.  With a skew, a client draws its classes from its own mixture, as long as they last."""
    order = torch.randperm(len(labels), generator=generator)
    if skew is None or labels.dim() > 1:
        return [rows.sort().values for rows in torch.split(order, list(sizes))]
    classes = int(labels.max()) + 1
    piles = [order[labels[order] == c].tolist() for c in range(classes)]
    gamma = torch._standard_gamma(
        torch.full((len(sizes), classes), skew, dtype=torch.float64), generator=generator
    )
    shards = []
    for size, mixture in zip(sizes, gamma + 1e-12, strict=True):
        rows = []
        for _ in range(size):
            weights = mixture * torch.tensor([bool(pile) for pile in piles])
            weights = weights if weights.sum() > 0 else torch.tensor([float(len(pile)) for pile in piles])
            rows.append(piles[int(torch.multinomial(weights, 1, generator=generator))].pop())
        shards.append(torch.tensor(rows).sort().values)
    return shards
