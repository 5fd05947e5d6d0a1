"""Federated averaging in rounds, with over-selection, stragglers, dropouts and a cut-off.

    w_{i+1} = w_i + eta_s sum_k (n_k / n) (w_k - w_i)

(McMahan et al. 2017, algorithm 1, with eta_s = 1).  A round asks cohort * (1 + over_selection) clients, takes the
first `cohort` that report and cancels the rest (Bonawitz et al. 2019); it ends early at the cut-off, or when
nobody is left who could report, with those who did.  Fewer than `minimum`: it is abandoned.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

from leakaudit.errors import InputError
from leakaudit.federated.options import FederatedAveraging
from leakaudit.federated.participation import (
    ABANDONED,
    CANCELLED,
    DISCARDED,
    TOO_LATE,
    UNFINISHED,
    Dispatcher,
    Report,
    Server,
    shares,
)
from leakaudit.federated.simulation import Simulation
from leakaudit.formats.phrases import counted


def run(options: FederatedAveraging, simulation: Simulation) -> Generator[Any, Any, None]:
    dispatcher, server = Dispatcher(options, simulation), Server(options, simulation)
    in_vain = 0
    while not simulation.done:
        reports = yield from _round(options, simulation, dispatcher)
        if len(reports) >= options.minimum:
            server.apply(reports, shares(reports, options.weighting))
            in_vain = 0
            continue
        simulation.count(ABANDONED)
        simulation.count(DISCARDED, len(reports))
        in_vain += 1
        if in_vain >= options.patience:
            raise InputError(_hopeless(options, simulation, in_vain))
        yield simulation.env.timeout(options.retry)


def _round(
    options: FederatedAveraging, simulation: Simulation, dispatcher: Dispatcher
) -> Generator[Any, Any, list[Report]]:
    env = simulation.env
    deadline = env.event() if options.cut_off is None else env.timeout(options.cut_off)
    working = dispatcher.send_out(simulation.clients, asked(options))
    reports: list[Report] = []
    while working and len(reports) < options.cohort and not deadline.processed:
        try:
            back = yield from dispatcher.wait(working, deadline)
        except GeneratorExit:
            dispatcher.call_back(working, UNFINISHED)
            simulation.count(UNFINISHED, len(reports))
            raise
        for assignment in back:
            if len(reports) == options.cohort:
                break
            working.remove(assignment)
            report = dispatcher.take(assignment)
            if report is not None:
                reports.append(report)
    full = len(reports) == options.cohort
    dispatcher.call_back(working, CANCELLED if full else TOO_LATE)
    return reports


def asked(options: FederatedAveraging) -> int:
    """Clients asked in a round, rounded up."""
    return math.ceil(round(options.cohort * (1 + options.over_selection), 9))


def _hopeless(options: FederatedAveraging, simulation: Simulation, rounds: int) -> str:
    happened = ", ".join(f"{count} {what}" for what, count in simulation.counters.items())
    return (
        f"{counted(rounds, 'round')} in a row had fewer than {counted(options.minimum, 'report')}, by"
        f" {simulation.env.now:.4g} s ({happened}); accepted: a later cut-off, a smaller minimum, clients that"
        " are available, stay and send finite updates"
    )
