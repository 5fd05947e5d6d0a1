"""Buffered asynchronous training (Nguyen et al. 2022, FedBuff) with the enclave of Papaya (Huba et al. 2022).

    each of `concurrency` clients:  downloads w and the quote -> trains -> masks, sends; another takes its place
    after `buffer` contributions:   w <- w - server rate * local rate * (1 / buffer) sum_i s(tau_i) Delta_i

The server must not see a single update, so the client puts on the weight of its staleness,
s(tau) = 1 / (1 + tau)^exponent, before it masks: when it begins to send, it is told how many steps the server has
made since its download.  Steps made while its message travels are not in its weight.  (FedBuff's server puts the
weight on each update; what Papaya does where the enclave sums is not claimed here.)

SIMULATED: the enclave is `SimulatedEnclave`, by default in this process, with `isolated` in one of its own.  As in
FedBuff the sum is divided by the size of the buffer, not by the sum of the weights.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from leakaudit.errors import InputError
from leakaudit.federated.cost import dense_bytes
from leakaudit.federated.network import SERVER
from leakaudit.federated.options import SecureAsync
from leakaudit.federated.population import Client
from leakaudit.federated.secure.enclave import (
    SESSION_BYTES,
    Contribution,
    Enclave,
    Host,
    SimulatedEnclave,
    SimulatedVendor,
    Terms,
    contribute,
)
from leakaudit.federated.secure.enclave_process import IsolatedEnclave
from leakaudit.federated.secure.fixed_point import FixedPoint
from leakaudit.federated.secure.local import encode, fixed_point, submit, template
from leakaudit.federated.secure.primitives import Randomness, simulated_randomness
from leakaudit.federated.seen import Member, Observation
from leakaudit.federated.simulation import Simulation, descend, name_of
from leakaudit.federated.trainer import Pending
from leakaudit.update import Update


def run(options: SecureAsync, simulation: Simulation) -> Generator[Any, Any, None]:
    randomness = simulated_randomness(simulation.seed, "async-secagg")
    numbers = fixed_point(options, options.buffer)
    terms = Terms(numbers.ring(template(simulation)), options.buffer, randomness(SESSION_BYTES))
    vendor = SimulatedVendor(randomness(32))
    enclave = (IsolatedEnclave if options.isolated else SimulatedEnclave)(terms, vendor)
    try:
        buffered = Buffered(options, simulation, numbers, terms, vendor.public, enclave, randomness)
        finished = simulation.env.any_of(
            [simulation.env.process(buffered.slot()) for _ in range(options.concurrency)]
        )
        yield finished
    finally:
        enclave.close()


@dataclass
class Buffered:
    """The server, and the slots in which clients train.

    Attributes:
        idle: clients that do not train at present.
        members: whose contributions are in the buffer.
        first: of the buffer, as the host sees it.
        lost: contributions in a row that did not arrive.
    """

    options: SecureAsync
    simulation: Simulation
    numbers: FixedPoint
    terms: Terms
    vendor: bytes
    enclave: Enclave
    randomness: Randomness
    members: list[Member] = field(default_factory=list)
    first: Contribution | None = None
    lost: int = 0

    def __post_init__(self) -> None:
        self.host = Host(self.terms, self.enclave)
        self.idle = list(self.simulation.clients)
        self.draws = self.simulation.generator("async-secagg")

    def slot(self) -> Generator[Any, Any, None]:
        """One client after the other; ends with the run."""
        while not self.simulation.done:
            client = self._next()
            yield from self._take_part(client)
            self.idle.append(client)

    def _next(self) -> Client:
        """A client at random of those that are idle and, when asked, there."""
        while True:
            client = self.idle[int(torch.randint(len(self.idle), (), generator=self.draws))]
            if self._chance() < client.availability:
                self.idle.remove(client)
                return client

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.draws, dtype=torch.float64))

    def _take_part(self, client: Client) -> Generator[Any, Any, None]:
        simulation, quote = self.simulation, self.enclave.quote()
        pending, version = submit(self.options, simulation, client), simulation.step
        yield from simulation.download(client, dense_bytes(pending.base))
        yield from simulation.send(
            SERVER, name_of(client), "quote", quote.size, client.device.transfer(quote.size)
        )
        seconds = client.device.compute(self.options.local_steps)
        if self._chance() < client.dropout:
            yield simulation.env.timeout(seconds * self._chance())
            pending.cancel()
            self._lose("dropped out", f"client {client.index} dropped out")
            return
        yield simulation.env.timeout(seconds)
        weight = (1 + simulation.step - version) ** -self.options.staleness_exponent
        try:
            update = pending.result() * weight
            vector = encode(self.options, simulation, client, update, self.numbers)
            contribution = contribute(self.terms, quote, self.vendor, client.index, vector, self.randomness)
        except InputError as error:
            self._lose("refused clients", str(error))
            return
        size = contribution.size
        yield from simulation.send(
            name_of(client), SERVER, "masked update", size, client.device.transfer(size)
        )
        if not simulation.done:
            self._arrive(contribution, pending, version, weight)

    def _lose(self, what: str, why: str) -> None:
        self.simulation.count(what)
        self.lost += 1
        if self.lost >= self.options.patience:
            raise InputError(
                f"{self.lost} contributions in a row were lost, the last one because {why};"
                " accepted: fewer dropouts or a lower learning rate"
            )

    def _arrive(self, contribution: Contribution, pending: Pending, version: int, weight: float) -> None:
        """The host and the enclave each take their part; a full buffer is a step of the server."""
        simulation = self.simulation
        self.host.add(contribution)
        self.lost, self.first = 0, self.first or contribution
        base = None if pending.base is simulation.params else pending.base
        staleness = simulation.step - version
        self.members.append(Member(contribution.client, pending.round, pending.rows, weight, base, staleness))
        if self.host.full:
            self._step()

    def _step(self) -> None:
        """One step of the server with the mean of the buffer."""
        simulation, options, count = self.simulation, self.options, self.options.buffer
        mean = self.numbers.decode(self.host.release(), template(simulation)) / count
        self._observe(mean)
        self.members, self.first = [], None
        rate = options.server_learning_rate * options.learning_rate
        simulation.apply(descend(simulation.params, mean, rate), count)

    def _observe(self, mean: Update) -> None:
        """The server sees the mean, the host of the enclave one masked vector after the other."""
        simulation = self.simulation
        if not simulation.seen.wants(simulation.step):
            return
        count, step, now = len(self.members), simulation.step, simulation.env.now
        members = tuple(replace(member, weight=member.weight / count) for member in self.members)
        uniform = self.options.rounding == "nearest"
        simulation.seen.record(
            Observation(
                "server",
                step,
                now,
                mean,
                simulation.params,
                members,
                defenses=(self.numbers.spec,) if uniform else (),
                note=f"the sum over {count} contributions, by the masks that a SIMULATED enclave released once;"
                f" each weighted by its client and rounded to steps of {self.numbers.step:.3g}"
                f" ({self.options.rounding})",
            )
        )
        assert self.first is not None
        masked = self.numbers.decode(self.terms.ring.unpack(self.first.masked), template(simulation))
        simulation.seen.record(
            Observation(
                "enclave-host",
                step,
                now,
                masked,
                simulation.params,
                (self.members[0],),
                observer=self.first.client,
                exact=False,
                note="one client's masked vector, the first of the buffer, read as fixed point: uniform whatever the"
                " update, as long as its seed is known to its client and the SIMULATED enclave only",
            )
        )
