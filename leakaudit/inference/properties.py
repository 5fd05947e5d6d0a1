"""Does the batch have a property that the model was not asked about?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leakaudit.attacks.base import require_at_least
from leakaudit.inference.base import Evidence, Question, Records, disturbed, draw
from leakaudit.inference.responses import NUMBERS
from leakaudit.threat import View

LEAST_RECORDS = 4


@dataclass(frozen=True)
class PropertyClassifier:
    """A classifier of updates, trained on updates that the adversary simulates with and without the property
    (Melis et al. 2019, algorithm 3, passive and for one update; shadow training as in Shokri et al. 2017).

    Deviations: for their random forest a ridge regression of labels of +1 and -1 on the sizes of the numbers, in
    the updates' own span (Fisher's discriminant with a shrunk covariance), because an update has far more numbers
    than there are simulated ones; its strength is the one that errs least on updates left out.  Sizes, because
    signs tell the labels, and what is not of the labels shows in how large the numbers are.  Both kinds of
    batches are drawn from all reference records of the kind.

    Attributes:
        updates: simulated of each kind, >= 4.
        share: of a batch's records that have the property where it has it, in (0, 1]; none have it elsewhere.
        numbers: of the update that are looked at, drawn at random where it has more; >= 1.
    """

    updates: int = 128
    share: float = 1.0
    numbers: int = 4 * NUMBERS

    def __post_init__(self) -> None:
        require_at_least(self, 4, "updates")
        require_at_least(self, 1, "numbers")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    @property
    def question(self) -> Question:
        return "property"

    def applies(self, view: View, evidence: Evidence) -> str | None:
        flags = evidence.has_property
        if flags is None:
            return "it is not said which property to look for"
        least = min(int(flags.sum()), int((~flags).sum()))
        if least < LEAST_RECORDS:
            return f"it needs at least {LEAST_RECORDS} reference records with and without the property, got {least}"
        return None

    def scores(self, view: View, evidence: Evidence, generator: torch.Generator) -> Tensor:
        flags = evidence.has_property
        assert flags is not None  # `applies`
        labels = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(self.updates)
        facts = (tuple(view.observed), tuple(view.spread.items()), view.round)
        places, updates = evidence.remembered(
            f"examples/{self}",
            view,
            facts,
            lambda: self._examples(view, evidence.reference, flags, labels, generator),
        )
        observed = view.observed.flat()[places].double()
        if view.scale_free:
            observed, updates = observed / observed.norm(), updates / updates.norm(dim=1, keepdim=True)
        observed, updates = observed.abs(), updates.abs()
        mean, spread = updates.mean(0), updates.std(0)
        used = spread > 1e-9 * spread.max()
        table = (updates[:, used] - mean[used]) / spread[used]
        asked = (observed[used] - mean[used]) / spread[used]
        return discriminant(table, labels.to(table.device), asked).reshape(1)

    def _examples(
        self, view: View, reference: Records, flags: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The places (D,) looked at, and what simulated updates (n, D) hold there."""
        places = torch.randperm(view.observed.numel(), generator=generator)[: self.numbers]
        places = places.to(view.victim.device)
        shares = [self.share if label > 0 else 0.0 for label in labels.tolist()]
        updates = [self._simulated(view, reference, flags, share, generator)[places] for share in shares]
        return places, torch.stack(updates).double()

    def _simulated(
        self, view: View, reference: Records, flags: Tensor, share: float, generator: torch.Generator
    ) -> Tensor:
        batch = reference.take(mixed_rows(flags, view.round.num_examples, share, generator))
        return disturbed(view, view.simulate(batch.x, batch.y), generator).flat()


def mixed_rows(flags: Tensor, count: int, share: float, generator: torch.Generator) -> Tensor:
    """`count` positions in random order, the share (rounded up) of them with the flag set, the others without."""
    wanted = math.ceil(share * count)
    kinds = [(flags, wanted), (~flags, count - wanted)]
    rows = []
    for which, number in kinds:
        there = which.nonzero().flatten().cpu()
        rows.append(there[draw(len(there), number, generator)] if number else there[:0])
    chosen = torch.cat(rows)
    return chosen[torch.randperm(count, generator=generator, device=generator.device).cpu()]


def discriminant(table: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Ridge regression of +1 and -1 labels on rows, evaluated at `asked`; its strength by leave-one-out.

    The leave-one-out errors have a closed form: e_i / (1 - H_ii) (Allen 1974, PRESS), for labels and columns of
    mean zero.

    Args:
        table: (n, D); labels: (n,); asked: (D,).
    """
    kernel = table @ table.T
    values, vectors = torch.linalg.eigh(kernel)
    values = values.clamp_min(0)
    along = vectors.T @ labels
    best, chosen = float("inf"), 1.0
    for strength in torch.logspace(-6, 2, 17, dtype=table.dtype, device=table.device) * values.max():
        shrunk = values / (values + strength)
        errors = labels - vectors @ (shrunk * along)
        press = float((errors / (1 - (vectors.square() @ shrunk)).clamp_min(1e-9)).square().sum())
        if press < best:
            best, chosen = press, float(strength)
    return (table @ asked) @ (vectors @ (along / (values + chosen)))
