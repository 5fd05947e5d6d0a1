"""What a client of the two secure systems does before it masks: train, weigh, round."""

from __future__ import annotations

from leakaudit.federated.options import SecureOptions
from leakaudit.federated.participation import local_round
from leakaudit.federated.population import Client
from leakaudit.federated.secure.fixed_point import FixedPoint
from leakaudit.federated.secure.ring import Vector
from leakaudit.federated.simulation import Simulation
from leakaudit.federated.trainer import Pending
from leakaudit.update import Update


def fixed_point(options: SecureOptions, clients: int) -> FixedPoint:
    """The numbers of so many clients."""
    return FixedPoint(clients, options.bits, options.limit, options.modulus_bits)


def submit(options: SecureOptions, simulation: Simulation, client: Client) -> Pending:
    """The client's local steps from the server's present model, to be computed later."""
    round = local_round(client.examples, options.batch_size, options.learning_rate, options.local_steps)
    rows = simulation.batch(client, round.num_examples)
    return simulation.trainer.submit(simulation.params, round, rows)


def template(simulation: Simulation) -> Update:
    """Names, shapes and types that all clients agree on."""
    return Update(simulation.task.victim.params)


def encode(
    options: SecureOptions,
    simulation: Simulation,
    client: Client,
    update: Update,
    numbers: FixedPoint,
) -> Vector:
    """The update as integers; counts the numbers that the limit clamps.  `InputError` for NaN or a wrong shape."""
    draw = simulation.generator(f"rounding/{client.index}/{simulation.env.now}")
    vector = numbers.encode(update, template(simulation), draw if options.rounding == "stochastic" else None)
    clamped = numbers.clamped(update)
    if clamped:
        simulation.count("numbers clamped to the limit", clamped)
    return vector
