"""One integer seed, forked by name: same seed and name, same stream of numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def fork(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` for the purpose called `name`, independent of every other name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def seeded(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """torch's own generators, from which dropout draws, seeded with those of `fork`; put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(fork(seed, name).initial_seed())
        yield
