"""FedBuff: federated learning with buffered asynchronous aggregation (Nguyen et al. 2022, algorithm 1).

    w_{i+1} = w_i + eta_g sum_{k in buffer} p_k s(tau_k) (w_k - w_{i - tau_k})

with p_k = 1 / K, or by examples as shares of the buffer.  tau_k counts the server's steps between a client's
download and its report.  The weights are not normalised by s: a stale buffer moves the model less.  A client
that reported or dropped out is replaced at once, as in Papaya (Huba et al. 2022), by one that is idle; only
reports of the same instant come first.  Deviation from Papaya: a client is not called back when its update has
grown too stale; the update is dropped when it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from leakaudit.errors import InputError
from leakaudit.federated.options import FedBuff
from leakaudit.federated.participation import (
    TOO_STALE,
    UNFINISHED,
    Assignment,
    Dispatcher,
    Report,
    Server,
    shares,
)
from leakaudit.federated.simulation import Simulation
from leakaudit.formats.phrases import counted

Staleness = Callable[[int, FedBuff], float]


def root(tau: int, options: FedBuff) -> float:
    """1 / sqrt(1 + tau), Nguyen et al. 2022."""
    return float((1 + tau) ** -0.5)


def constant(tau: int, options: FedBuff) -> float:
    return 1.0


def polynomial(tau: int, options: FedBuff) -> float:
    """(1 + tau)^-a, Xie, Koyejo and Gupta 2019, "Asynchronous federated optimization"."""
    return float((1 + tau) ** -options.exponent)


def hinge(tau: int, options: FedBuff) -> float:
    """1 up to the threshold b, then 1 / (1 + a (tau - b)), Xie, Koyejo and Gupta 2019."""
    return 1 / (1 + options.slope * max(0, tau - options.threshold))


STALENESS: dict[str, Staleness] = {
    "sqrt": root,
    "constant": constant,
    "polynomial": polynomial,
    "hinge": hinge,
}


def run(options: FedBuff, simulation: Simulation) -> Generator[Any, Any, None]:
    dispatcher, server = Dispatcher(options, simulation), Server(options, simulation)
    working: list[Assignment] = []
    buffer: list[Report] = []
    try:
        yield from _train(options, simulation, dispatcher, server, working, buffer)
    finally:
        dispatcher.call_back(working, UNFINISHED)
        simulation.count(UNFINISHED, len(buffer))


def _train(
    options: FedBuff,
    simulation: Simulation,
    dispatcher: Dispatcher,
    server: Server,
    working: list[Assignment],
    buffer: list[Report],
) -> Generator[Any, Any, None]:
    """Until the run is done; `working` and `buffer` hold what is under way."""
    in_vain = 0
    while not simulation.done:
        away = {assignment.client.index for assignment in working}
        idle = [client for client in simulation.clients if client.index not in away]
        working += dispatcher.send_out(idle, options.concurrency - len(working))
        in_vain += not working
        again = [simulation.env.timeout(options.retry)] if len(working) < options.concurrency else []
        back = yield from dispatcher.wait(working, *again)
        for assignment in back:
            if simulation.done:
                break
            working.remove(assignment)
            report = _fresh(options, simulation, dispatcher.take(assignment))
            if report is None:
                in_vain += 1
                continue
            buffer.append(report)
            if len(buffer) == options.buffer:
                server.apply(buffer, weights(options, buffer))
                buffer.clear()
                in_vain = 0
        if in_vain >= options.patience * options.concurrency:
            raise InputError(_hopeless(options, simulation))


def weights(options: FedBuff, buffer: list[Report]) -> list[float]:
    """p_k s(tau_k) of every report."""
    staleness = STALENESS[options.staleness]
    return [
        share * staleness(report.staleness, options)
        for share, report in zip(shares(buffer, options.weighting), buffer, strict=True)
    ]


def _fresh(options: FedBuff, simulation: Simulation, report: Report | None) -> Report | None:
    """The report, unless it is too stale."""
    if report is None or options.max_staleness is None or report.staleness <= options.max_staleness:
        return report
    simulation.count(TOO_STALE)
    return None


def _hopeless(options: FedBuff, simulation: Simulation) -> str:
    happened = ", ".join(f"{count} {what}" for what, count in simulation.counters.items())
    return (
        f"no buffer of {counted(options.buffer, 'update')} was filled in a long time, by"
        f" {simulation.env.now:.4g} s ({happened}); accepted: clients that are available, stay and send finite"
        " updates, a larger maximal staleness"
    )
