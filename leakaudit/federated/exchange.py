"""Means of what workers send, while the workers go on: through a server, by all-reduce, or by all-gather.

A link moves the bytes of one message after the other; latencies overlap.  So a worker whose messages are larger
than its link can carry falls behind, however long it may wait for an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import simpy
from torch import Tensor

from leakaudit.federated.cost import dense_bytes, sparse_bytes
from leakaudit.federated.network import SERVER, Message
from leakaudit.federated.population import Client
from leakaudit.federated.scaling import Cost, all_gather, ring
from leakaudit.federated.simulation import Simulation, name_of
from leakaudit.update import Update, mean_of


@dataclass(frozen=True)
class Part:
    """What one worker sends of one block of steps.

    Attributes:
        client: its index.
        block: from 0; step: the last step of the block.
        sent: what leaves the worker.
        rows: (n,) int64, the truth: the examples of the block's steps, in order.
    """

    client: int
    block: int
    step: int
    sent: Update
    rows: Tensor


@dataclass
class Link:
    """Bytes go one after the other."""

    free: float = 0.0

    def wait(self, now: float, busy: float) -> float:
        """Seconds until a message may begin that keeps the link busy for so long; the link is then taken."""
        begin = max(now, self.free)
        self.free = begin + busy
        return begin - now


class Exchange:
    """Base: collects every worker's part of a block and hands all of them the mean.

    Args:
        sparse: whether only the numbers that are not zero are sent, with their positions.
        on_mean: called with (parts in the order of the clients, mean) when the mean is made, blocks in order.
    """

    def __init__(
        self, simulation: Simulation, sparse: bool, on_mean: Callable[[list[Part], Update], None]
    ) -> None:
        self._simulation, self._on_mean = simulation, on_mean
        self._bytes: Callable[[Update], int] = sparse_bytes if sparse else dense_bytes
        self._parts: dict[int, dict[int, Part]] = {}
        self._arrivals: dict[tuple[int, int], simpy.Event] = {}

    def share(self, client: Client, part: Part) -> None:
        """The part is ready to be sent; the worker goes on."""
        raise NotImplementedError

    def mean(self, client: Client, block: int) -> Generator[Any, Any, Update]:
        """Wait for the mean of a block: `mean = yield from exchange.mean(client, block)`, once a block."""
        arrival = self._arrival(client, block)
        yield arrival
        del self._arrivals[block, client.index]
        mean: Update = arrival.value
        return mean

    def _arrival(self, client: Client, block: int) -> simpy.Event:
        return self._arrivals.setdefault((block, client.index), self._simulation.env.event())

    def _collect(self, part: Part) -> list[Part]:
        """All the parts of the block where this was the last of them, else none."""
        parts = self._parts.setdefault(part.block, {})
        parts[part.client] = part
        if len(parts) < len(self._simulation.clients):
            return []
        del self._parts[part.block]
        return [parts[client.index] for client in self._simulation.clients]

    def _average(self, parts: list[Part]) -> Update:
        mean = mean_of([part.sent for part in parts])
        self._on_mean(parts, mean)
        return mean


class ThroughServer(Exchange):
    """A parameter server; every worker has a link up and a link down of its own."""

    def __init__(
        self, simulation: Simulation, sparse: bool, on_mean: Callable[[list[Part], Update], None]
    ) -> None:
        super().__init__(simulation, sparse, on_mean)
        self._up = {client.index: Link() for client in simulation.clients}
        self._down = {client.index: Link() for client in simulation.clients}

    def share(self, client: Client, part: Part) -> None:
        self._simulation.env.process(self._upload(client, part))

    def _upload(self, client: Client, part: Part) -> Generator[Any, Any, None]:
        size = self._bytes(part.sent)
        yield self._turn(self._up, client, size)
        yield from self._simulation.upload(client, size)
        if parts := self._collect(part):
            mean = self._average(parts)
            for receiver in self._simulation.clients:
                self._simulation.env.process(self._download(receiver, part.block, mean))

    def _download(self, client: Client, block: int, mean: Update) -> Generator[Any, Any, None]:
        size = self._bytes(mean)
        yield self._turn(self._down, client, size)
        seconds = client.device.transfer(size)
        yield from self._simulation.send(SERVER, name_of(client), "mean", size, seconds)
        self._arrival(client, block).succeed(mean)

    def _turn(self, links: dict[int, Link], client: Client, size: int) -> simpy.Event:
        env = self._simulation.env
        return env.timeout(links[client.index].wait(env.now, size / client.device.bandwidth))


class AllReduce(Exchange):
    """A ring of the workers that begins when the last is ready; the slowest link counts.

    Dense parts are reduced on the way, and nobody sees anybody's own.  Sparse parts, whose positions differ, are
    gathered instead: every worker receives every other's part (Lin et al. 2018 do the same).
    """

    def __init__(
        self, simulation: Simulation, sparse: bool, on_mean: Callable[[list[Part], Update], None]
    ) -> None:
        super().__init__(simulation, sparse, on_mean)
        self._cost = all_gather if sparse else ring
        others = len(simulation.clients) - 1
        self._copies = others if sparse else 2 * others / (others + 1)
        self._link = Link()

    def share(self, client: Client, part: Part) -> None:
        if parts := self._collect(part):
            self._simulation.env.process(self._round(parts))

    def _round(self, parts: list[Part]) -> Generator[Any, Any, None]:
        simulation, clients = self._simulation, self._simulation.clients
        size = max(self._bytes(part.sent) for part in parts)
        costs = [self._cost(size, len(clients), client.device) for client in clients]
        slowest = Cost(max(cost.seconds for cost in costs), max(cost.busy for cost in costs))
        yield simulation.env.timeout(self._link.wait(simulation.env.now, slowest.busy))
        began = simulation.env.now
        yield simulation.env.timeout(slowest.seconds)
        sent = round(self._copies * size)
        for client, after in zip(clients, (*clients[1:], clients[0]), strict=True):
            simulation.note(
                Message(began, simulation.env.now, name_of(client), name_of(after), "gradient", sent)
            )
        mean = self._average(parts)
        for client in clients:
            self._arrival(client, parts[0].block).succeed(mean)


EXCHANGES: dict[str, type[Exchange]] = {"server": ThroughServer, "all-reduce": AllReduce}
"""By topology."""
