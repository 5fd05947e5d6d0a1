"""How the update answers to single records: what a client that holds one record alone would share.

Everything that asks "is this record in the batch" starts here, because to first order an update is a weighted
sum of these responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import vmap

from leakaudit.inference.base import Evidence, Records
from leakaudit.models.spaces import NO_TOKEN, Pixels
from leakaudit.models.victim import Victim, cross_entropy_sum
from leakaudit.rounds import Round
from leakaudit.threat import View
from leakaudit.update import Update

CHUNK = 32
"""Records of one vectorised pass."""
NUMBERS = 16384
"""Numbers of the update that are looked at unless an option says otherwise."""


@dataclass(frozen=True)
class Responses:
    """Responses of the adversary's records at `places`, numbers of the update, in its order.

    Attributes:
        candidates: (M, D); reference: (R, D); float64.
        places: (D,) positions in `View.observed.flat()`.
    """

    candidates: Tensor
    reference: Tensor
    places: Tensor

    def at(self, update: Update) -> Tensor:
        """(D,) float64: what an update like the observed one holds there."""
        return update.flat()[self.places].double()

    def noise(self, view: View) -> Tensor:
        """(D,) float64: standard deviation of what was added there, as far as the adversary knows."""
        stds = [
            torch.full((tensor.numel(),), float(view.spread.get(name, 0.0)), dtype=torch.float64)
            for name, tensor in view.observed.items()
        ]
        return torch.cat(stds).to(self.places.device)[self.places]


def weight(view: View) -> float:
    """How much of one record's response an update holds: u = weight * sum of responses, to first order.

    1/N for one step of a mean loss; S/N for S local steps that come to every record equally often.
    """
    round = view.round
    scale = round.batch_size if view.victim.loss_function is cross_entropy_sum else 1
    return round.local_steps * scale / round.num_examples


def responses(view: View, evidence: Evidence, numbers: int) -> Responses:
    """Responses of all records, at the `numbers` places where they are largest in the mean square.

    What no record answers in is left out: layers that are frozen, numbers that a known mask removed.
    """
    facts = (tuple(view.observed), numbers)
    return evidence.remembered("responses", view, facts, lambda: _responses(view, evidence, numbers))


def _responses(view: View, evidence: Evidence, numbers: int) -> Responses:
    everything = (evidence.candidates, evidence.reference)
    total = view.observed.numel()
    energy = torch.zeros(total, dtype=torch.float64, device=view.victim.device)
    few = total <= numbers
    rows: list[list[Tensor]] = [[], []]
    for kept, records in zip(rows, everything, strict=True):
        for chunk in _alone(view, records):
            energy += chunk.double().square().sum(0)
            if few:
                kept.append(chunk)
    places = energy.topk(min(numbers, total)).indices.sort().values
    places = places[energy[places] > 0]
    if not few:
        for kept, records in zip(rows, everything, strict=True):
            kept += [chunk[:, places] for chunk in _alone(view, records)]
    whole = [torch.cat(kept) if kept else energy.new_zeros(0, total) for kept in rows]
    candidates, reference = (matrix.double()[:, places] if few else matrix.double() for matrix in whole)
    return Responses(candidates, reference, places)


def _alone(view: View, records: Records) -> Iterator[Tensor]:
    """(n, P) responses, some records at a time: one step of the adversary's simulated client on each by itself.

    Deviation: BatchNorm uses its running averages, because one record alone has no batch statistics.
    """
    victim = view.victim
    if victim.batch_norms() and victim.mode == "train":
        victim = victim.with_mode("eval")
    round = Round(1, learning_rate=view.round.learning_rate)

    def one(x: Tensor, y: Tensor) -> Tensor:
        update = view.client(victim, victim.params, round, x[None], y[None])
        return update.select(view.observed).detach().flat()

    if isinstance(victim.space, Pixels):
        together = vmap(one)
        for start in range(0, len(records), CHUNK):
            rows = slice(start, start + CHUNK)
            yield together(records.x[rows], records.y[rows])
        return
    for x, y in zip(records.x, records.y, strict=True):
        yield one(*trimmed(x, y))[None]


def trimmed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One sentence without what fills up its row."""
    length = int((x != NO_TOKEN).sum())
    return x[:length], y[:length] if y.dim() else y


def losses(victim: Victim, params: Mapping[str, Tensor], records: Records) -> Tensor:
    """(n,) float64: the loss of every record by itself, in eval mode."""
    victim = victim.with_mode("eval") if victim.mode == "train" else victim
    rows = zip(records.x, records.y, strict=True)
    with torch.no_grad():
        if isinstance(victim.space, Pixels):
            one = replace(victim, loss_function=cross_entropy_sum)
            parts = [
                vmap(lambda x, y: one.loss(params, x[None], y[None]))(
                    records.x[i : i + 256], records.y[i : i + 256]
                )
                for i in range(0, len(records), 256)
            ]
            return torch.cat(parts).double()
        pairs = (trimmed(x, y) for x, y in rows)
        return torch.stack([victim.loss(params, x[None], y[None]) for x, y in pairs]).double()
