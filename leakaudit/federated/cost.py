"""What training costs: seconds of computing, seconds and bytes on the network.  Everything is stated, nothing fitted.

One message of b bytes takes latency + b / bandwidth seconds from sender to receiver (the alpha-beta model,
Hockney 1994).  Links neither share their bandwidth nor lose messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from leakaudit.update import Update

INDEX_BYTES = 4
"""Of the position of a number in a sparse tensor."""


@dataclass(frozen=True)
class Device:
    """A client's machine and its link to the server.

    Attributes:
        step_seconds: of one local step, >= 0.
        latency: seconds one way, >= 0; half of a round trip.
        bandwidth: bytes a second in either direction, > 0; `inf` leaves it out.
    """

    step_seconds: float = 0.3
    latency: float = 0.05
    bandwidth: float = 12.5e6

    def __post_init__(self) -> None:
        for name in ("step_seconds", "latency"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0 seconds and finite, got {getattr(self, name)}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, got {self.bandwidth}")

    def compute(self, steps: int) -> float:
        """Seconds of so many local steps."""
        return steps * self.step_seconds

    def transfer(self, size: float) -> float:
        """Seconds from the first byte sent to the last one received, of one message of `size` bytes."""
        return self.latency + size / self.bandwidth


def all_reduce_seconds(size: float, workers: int, device: Device) -> float:
    """Of a ring all-reduce of `size` bytes: 2 (n - 1) messages of size / n each (Patarasuk and Yuan 2009)."""
    return 0.0 if workers == 1 else 2 * (workers - 1) * device.transfer(size / workers)


def dense_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all numbers as they are."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def sparse_bytes(update: Update) -> int:
    """Bytes of the numbers that are not zero, each with its position, or of all where that is less."""
    sparse = sum(
        int(tensor.count_nonzero()) * (tensor.element_size() + INDEX_BYTES) for tensor in update.values()
    )
    return min(sparse, dense_bytes(update))
