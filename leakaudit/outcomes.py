"""What running an attack leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leakaudit.attacks.base import Attack, Reconstruction
from leakaudit.results import Verification

MATCHED = 1e-4
"""Relative residual below which a further restart is not worth its time."""


@dataclass(frozen=True)
class Chosen:
    """An attack to run; `automatic` when nobody asked for it by name."""

    name: str
    spec: str
    attack: Attack
    automatic: bool


@dataclass(frozen=True)
class Measured:
    """One attempt with its residual (`View.residual`) and wall time in seconds."""

    restart: int
    found: Reconstruction
    residual: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """All attempts of one attack; `best` is the one with the smallest residual."""

    chosen: Chosen
    attempts: tuple[Measured, ...]
    status: Literal["done", "interrupted", "failed"]
    reason: str
    seconds: float
    verification: Verification | None = None

    @property
    def best(self) -> Measured | None:
        return min(self.attempts, key=lambda attempt: attempt.residual, default=None)

    @property
    def proven(self) -> bool:
        """Whether the attack proved its find by other means than the residual (`details["proven"]`)."""
        return self.best is not None and bool(self.best.found.details.get("proven"))
