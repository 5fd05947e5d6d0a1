"""Federated averaging (McMahan et al. 2017) in which every round runs the protocol of Bonawitz et al. 2017.

    cohort downloads the model -> rounds 0, 1 -> local training -> rounds 2, 3 -> the server applies the mean

A client drops out of a round with its own probability, at each of the four rounds of the protocol as likely as at
the others; so does one whose message is refused.  The server closes a round of the protocol when the last of those
that are left has sent.  Time is that of the model, of local training and of the real messages' bytes; the seconds
of cryptography are not in it (docs/systems.md has them), and neither is a wait for those who dropped out.

With weights by examples a client multiplies its update by examples / most before it is rounded, where `most`, the
largest client's number of examples, is public, and adds its number of examples to the vector.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from leakaudit.errors import InputError
from leakaudit.federated.cost import dense_bytes
from leakaudit.federated.network import SERVER
from leakaudit.federated.options import SecureSync
from leakaudit.federated.population import Client
from leakaudit.federated.secure import bonawitz
from leakaudit.federated.secure.bonawitz import ROUNDS, Aborted, Exchange, Leg, Outcome, Setup, Stage
from leakaudit.federated.secure.fixed_point import FixedPoint
from leakaudit.federated.secure.local import encode, fixed_point, submit, template
from leakaudit.federated.secure.messages import SESSION_BYTES
from leakaudit.federated.secure.primitives import ProtocolError, simulated_randomness
from leakaudit.federated.secure.ring import Vector
from leakaudit.federated.seen import Member, Observation
from leakaudit.federated.simulation import Simulation, descend, name_of
from leakaudit.federated.trainer import Pending
from leakaudit.update import Update

KINDS: Mapping[Stage, str] = {
    Stage.ADVERTISE_KEYS: "public keys",
    Stage.SHARE_KEYS: "encrypted shares",
    Stage.MASKED_INPUT: "masked update",
    Stage.UNMASK: "revealed shares",
}
"""Of what a client sends; the server's answers have the same name."""


def run(options: SecureSync, simulation: Simulation) -> Generator[Any, Any, None]:
    _check_weights(options, simulation)
    attempts = in_a_row = 0
    while not simulation.done:
        attempt = Attempt.draw(options, simulation, attempts)
        attempts += 1
        try:
            outcome = yield from attempt.run()
        except ProtocolError as error:
            in_a_row += 1
            simulation.count("aborted rounds")
            if in_a_row >= options.patience:
                why = "; ".join([str(error), *sorted(set(attempt.refused.values()))])
                raise InputError(
                    f"{in_a_row} rounds of secure aggregation in a row were aborted, the last one because {why};"
                    " accepted: fewer dropouts, a larger cohort or a lower threshold"
                ) from error
            yield simulation.env.timeout(options.wait)
            continue
        in_a_row = 0
        attempt.apply(outcome)


def _check_weights(options: SecureSync, simulation: Simulation) -> None:
    most = max(client.examples for client in simulation.clients)
    largest = fixed_point(options, options.cohort).largest
    if options.weighting == "examples" and most > largest:
        raise InputError(
            f"a client has {most} examples, more than the {largest} that a number of {options.bits} bits can say;"
            " accepted: more bits, or equal weights"
        )


@dataclass
class Attempt:
    """One round, which may be aborted.

    Attributes:
        cohort: the clients that are asked.
        leaving: who drops out, and in which round of the protocol.
        pending: the training of those who come as far as to send a masked update.
        refused: whose message was refused, and why.
    """

    options: SecureSync
    simulation: Simulation
    name: str
    cohort: dict[int, Client]
    leaving: Mapping[int, Stage]
    pending: dict[int, Pending]
    numbers: FixedPoint
    refused: dict[int, str] = field(default_factory=dict)

    @classmethod
    def draw(cls, options: SecureSync, simulation: Simulation, index: int) -> Attempt:
        name = f"secagg/{index}"
        generator = simulation.generator(name)
        chance = torch.rand(2, len(simulation.clients), generator=generator, dtype=torch.float64)
        there = [c for c in simulation.clients if chance[0, c.index] < c.availability]
        order = torch.randperm(len(there), generator=generator)[: options.cohort]
        cohort = {there[int(i)].index: there[int(i)] for i in order.sort().values}
        stages = torch.randint(len(ROUNDS), (len(simulation.clients),), generator=generator)
        leaving = {
            index: ROUNDS[int(stages[index])]
            for index, client in cohort.items()
            if chance[1, index] < client.dropout
        }
        pending = {
            index: submit(options, simulation, client)
            for index, client in cohort.items()
            if leaving.get(index, Stage.UNMASK) > Stage.MASKED_INPUT
        }
        numbers = fixed_point(options, options.cohort)
        return cls(options, simulation, name, cohort, leaving, pending, numbers)

    def run(self) -> Generator[Any, Any, Outcome]:
        """The sum of the survivors' vectors; `ProtocolError` where the protocol aborts."""
        simulation = self.simulation
        if self.leaving:
            simulation.count("dropped out", len(self.leaving))
        try:
            exchange = self._exchange()
            size = dense_bytes(simulation.params)
            yield from self._together(simulation.download(client, size) for client in self.cohort.values())
            for leg in exchange.run():
                yield from self._together(self._message(index, leg) for index in leg.sizes)
        finally:
            if self.refused:
                simulation.count("refused clients", len(self.refused))
            for pending in self.pending.values():
                pending.cancel()
        return exchange.outcome

    def apply(self, outcome: Outcome) -> None:
        """One step of the server with the survivors' weighted mean."""
        simulation, options = self.simulation, self.options
        mean, weights = self._mean(outcome)
        self._observe(mean, weights)
        rate = options.server_learning_rate * options.learning_rate
        simulation.apply(descend(simulation.params, mean, rate), len(weights))

    def _exchange(self) -> Exchange:
        """The parties at the beginning.  `Aborted` where fewer clients are there than the threshold."""
        threshold = self.options.quorum
        if len(self.cohort) < threshold:
            raise Aborted(f"{len(self.cohort)} clients are there, fewer than the threshold of {threshold}")
        randomness = simulated_randomness(self.simulation.seed, self.name)
        ring = self.numbers.ring(template(self.simulation), extra=int(self._weighted))
        setup = Setup(tuple(self.cohort), threshold, ring, randomness(SESSION_BYTES))
        clients = {index: bonawitz.Client(setup, index, randomness) for index in self.cohort}
        return Exchange(bonawitz.Server(setup), clients, self._vector, self.leaving, self.refused)

    def _together(self, messages: Iterable[Generator[Any, Any, None]]) -> Generator[Any, Any, None]:
        """Wait for the last of them."""
        env = self.simulation.env
        yield env.all_of([env.process(message) for message in messages])

    def _message(self, index: int, leg: Leg) -> Generator[Any, Any, None]:
        """One message of a leg; a client trains before it sends its masked update."""
        simulation, client, size = self.simulation, self.cohort[index], leg.sizes[index]
        if leg.upward and leg.stage == Stage.MASKED_INPUT:
            yield simulation.env.timeout(client.device.compute(self.options.local_steps))
        ends = (name_of(client), SERVER) if leg.upward else (SERVER, name_of(client))
        yield from simulation.send(*ends, KINDS[leg.stage], size, client.device.transfer(size))

    @property
    def _weighted(self) -> bool:
        return self.options.weighting == "examples"

    @property
    def _most(self) -> int:
        return max(client.examples for client in self.simulation.clients)

    def _vector(self, index: int) -> Vector:
        """What a client gives into the sum."""
        client, update = self.cohort[index], self.pending[index].result()
        if not self._weighted:
            return encode(self.options, self.simulation, client, update, self.numbers)
        share = update * (client.examples / self._most)
        vector = encode(self.options, self.simulation, client, share, self.numbers)
        return np.append(vector, self.numbers.integers(torch.tensor([client.examples])))

    def _mean(self, outcome: Outcome) -> tuple[Update, dict[int, float]]:
        """The survivors' mean, as the server computes it, and their weights in it."""
        like, survivors = template(self.simulation), outcome.survivors
        if not self._weighted:
            mean = self.numbers.decode(outcome.total, like) / len(survivors)
            return mean, dict.fromkeys(survivors, 1 / len(survivors))
        examples = int(outcome.total[-1])
        mean = self.numbers.decode(outcome.total[:-1], like) * (self._most / examples)
        return mean, {index: self.cohort[index].examples / examples for index in survivors}

    def _observe(self, mean: Update, weights: Mapping[int, float]) -> None:
        """The server sees the mean; of the masked vectors it could see only uniform numbers."""
        simulation = self.simulation
        if not simulation.seen.wants(simulation.step):
            return
        members = tuple(
            Member(index, self.pending[index].round, self.pending[index].rows, weight)
            for index, weight in weights.items()
        )
        plain = not self._weighted and self.options.rounding == "nearest"
        simulation.seen.record(
            Observation(
                "server",
                simulation.step,
                simulation.env.now,
                mean,
                simulation.params,
                members,
                defenses=(self.numbers.spec,) if plain else (),
                note=f"the sum over {len(members)} of {len(self.cohort)} clients by secure aggregation, and nothing"
                f" else of them; each rounded to steps of {self.numbers.step:.3g}"
                f" ({self.options.rounding}, weights: {self.options.weighting})",
            )
        )
