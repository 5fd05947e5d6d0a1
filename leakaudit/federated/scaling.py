"""Seconds a step of distributed training, from the cost model alone: closed formulas, no training, no torch.

All workers are alike.  An exchange turns what every worker has into a mean that every worker has.  It takes
`seconds`, and keeps a link `busy` for those in which bytes move; the next exchange may begin when the link is
free, so latencies overlap and bytes do not.  With c seconds of computing a step, a delay of d steps, an exchange
of D seconds every T steps that keeps the links busy for O:

    seconds a step = max(c, c + (D - d c) / (m T), O / T)      m = ceil((d + 1) / T)

in the long run.  Workers wait only where D > d c (their delay is too short) or O > T c (their link is too slow).
The second term follows from the longest wait: the mean of a block of T steps is needed d steps after its end,
and m T steps lie between a wait and the one it depends on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from leakaudit.federated.cost import INDEX_BYTES, Device, all_reduce_seconds

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Attributes:
    seconds: from all workers being ready to all having the mean, >= 0.
    busy: of these, those in which the busiest link moves bytes, >= 0.
    """

    seconds: float
    busy: float


def through_server(up: float, down: float, device: Device) -> Cost:
    """`up` bytes of every worker to the server, then `down` bytes back; every worker has a link of its own."""
    return Cost(device.transfer(up) + device.transfer(down), max(up, down) / device.bandwidth)


def ring(size: float, workers: int, device: Device) -> Cost:
    """All-reduce of `size` bytes by 2 (n - 1) messages of size / n, one after the other (Patarasuk and Yuan 2009)."""
    moving = 2 * (workers - 1) * (size / workers) / device.bandwidth
    return Cost(all_reduce_seconds(size, workers, device), moving)


def all_gather(size: float, workers: int, device: Device) -> Cost:
    """Every worker's `size` bytes to every other around a ring, n - 1 messages (what sparse gradients take)."""
    return Cost((workers - 1) * device.transfer(size), (workers - 1) * size / device.bandwidth)


def step_seconds(compute: float, exchange: Cost, delay: int = 0, period: int = 1) -> float:
    """Seconds a step in the long run; `compute` > 0 seconds a step, an exchange every `period` >= 1 steps,
    its mean needed `delay` >= 0 steps after the last of them."""
    cycle = math.ceil((delay + 1) / period) * period
    waiting = (exchange.seconds - delay * compute) / cycle
    return max(compute, compute + waiting, exchange.busy / period)


def speed_up(workers: int, compute: float, step: float) -> float:
    """Over one worker that trains by itself and sends nothing: workers * compute / step, at most `workers`.

    Examples a second: every worker's batch stays the same (weak scaling).
    """
    return workers * compute / step


def tolerated_seconds(compute: float, delay: int) -> float:
    """The longest exchange that costs no waiting, d c, whatever the period."""
    return delay * compute


@dataclass(frozen=True)
class Cluster:
    """Workers that train one model.

    Attributes:
        parameters: of the model, 4 bytes each; workers: >= 1.
        device: of every worker; topology: where the mean is made.
    """

    parameters: int
    workers: int
    device: Device
    topology: Literal["server", "all-reduce"] = "server"

    def exchange(self, keep: float = 1.0) -> Cost:
        """Of all numbers, or of the share `keep` in (0, 1], each with its position.

        A sparse mean holds what any worker sent: at most n times as much, and no more than all of it.
        """
        if self.workers == 1:
            return Cost(0.0, 0.0)
        dense = float(self.parameters * FLOAT_BYTES)
        sparse = math.ceil(keep * self.parameters) * (FLOAT_BYTES + INDEX_BYTES)
        size = dense if keep == 1 else min(dense, sparse)
        if self.topology == "server":
            return through_server(size, min(dense, self.workers * size), self.device)
        collective = ring if keep == 1 else all_gather
        return collective(size, self.workers, self.device)

    def step(self, delay: int = 0, period: int = 1, keep: float = 1.0) -> float:
        """Seconds a step: synchronous SGD, or with a delay, a period and a share to keep."""
        return step_seconds(self.device.step_seconds, self.exchange(keep), delay, period)

    def speed_up(self, delay: int = 0, period: int = 1, keep: float = 1.0) -> float:
        """Over one worker, in [0, workers]."""
        return speed_up(self.workers, self.device.step_seconds, self.step(delay, period, keep))
