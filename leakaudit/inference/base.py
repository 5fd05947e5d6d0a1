"""What an inference is: `applies(view, evidence)` and `scores(view, evidence, generator)`.

Reconstruction asks what the private records look like; inference asks a yes-or-no question about them: is this
record among them, do they have that property.  An inference sees a `View` and the records that the adversary
holds, and nothing else; which of them were in the batch is known to the one who measures alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from leakaudit.threat import View
from leakaudit.update import Update

T = TypeVar("T")
Question = Literal["membership", "property"]


@dataclass(frozen=True)
class Records:
    """Records as the model takes them.

    Attributes:
        x: model inputs (n, C, H, W), or token numbers (n, L) filled up with `NO_TOKEN`.
        y: (n,) integer labels, or (n, L) tokens.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor) -> Records:
        """The records at these positions."""
        return Records(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Evidence:
    """What the adversary holds besides the view.

    Attributes:
        candidates: records that may have been in the batch, or not.
        reference: records of its own, of the same kind, none of them in the batch.
        has_property: (R,) bool, for each reference record; None where no property is asked for.
        kept: what was worked out for one update and serves the next, because many are judged by the same records.
    """

    candidates: Records
    reference: Records
    has_property: Tensor | None = None
    kept: dict[str, tuple[View, Any, Any]] = field(default_factory=dict, compare=False, repr=False)

    def remembered(self, what: str, view: View, facts: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave the last time, when it was for the same model, simulated client and facts.

        A client whose simulation depends on the update observed (through a mask) is another one every time.
        """
        held = self.kept.get(what)
        if held is not None:
            before, known, value = held
            if before.victim is view.victim and before.client is view.client and known == facts:
                found: T = value
                return found
        made = make()
        self.kept[what] = (view, facts, made)
        return made


class Inference(Protocol):
    """One family a file; a preset is an instance of a frozen dataclass."""

    @property
    def question(self) -> Question:
        """membership: a score for every candidate.  property: one score for the whole batch."""

    def applies(self, view: View, evidence: Evidence) -> str | None:
        """None when it can be run, else the reason it cannot."""

    def scores(self, view: View, evidence: Evidence, generator: torch.Generator) -> Tensor:
        """(M,) float64, one a candidate, or (1,) of the batch; larger is more likely yes, of any unit."""


@dataclass(frozen=True)
class Imagined:
    """An update that the adversary made up: of the reference records at `rows` (N,)."""

    rows: Tensor
    update: Update


def imagined(view: View, evidence: Evidence, count: int, generator: torch.Generator) -> list[Imagined]:
    """`count` updates of batches drawn from the reference records, with noise as the view says there is.

    A batch has as many records as the adversary believes the private one has; records repeat where the reference
    has fewer.
    """

    def one() -> Imagined:
        rows = draw(len(evidence.reference), view.round.num_examples, generator)
        batch = evidence.reference.take(rows)
        return Imagined(rows, disturbed(view, view.simulate(batch.x, batch.y), generator))

    facts = (tuple(view.observed), tuple(view.spread.items()), view.round)
    return evidence.remembered(f"updates/{count}", view, facts, lambda: [one() for _ in range(count)])


def disturbed(view: View, update: Update, generator: torch.Generator) -> Update:
    """The update with Gaussian noise of the size that `view.spread` states."""

    def noisy(name: str, tensor: Tensor) -> Tensor:
        std = view.spread.get(name, 0.0)
        if not std:
            return tensor
        drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=generator.device)
        return tensor + std * drawn.to(tensor.device)

    return Update({name: noisy(name, tensor) for name, tensor in update.detach().items()})


def draw(population: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` positions of `population`, without repetition as long as there are enough."""
    passes = -(-count // population)
    rows = [torch.randperm(population, generator=generator, device=generator.device) for _ in range(passes)]
    return torch.cat(rows)[:count].cpu()


def enough_reference(evidence: Evidence, least: int) -> str | None:
    """Why there is too little reference, or None."""
    held = len(evidence.reference)
    return None if held >= least else f"it needs at least {least} reference records, got {held}"
