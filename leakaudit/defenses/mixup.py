"""Training on mixtures of the private images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from leakaudit.defenses.base import Defense
from leakaudit.defenses.pixels import require_images
from leakaudit.defenses.unmixing import unmix
from leakaudit.errors import InputError
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import ClientUpdate, Round
from leakaudit.threat import UNKNOWN, View
from leakaudit.update import Update


@dataclass(frozen=True)
class MixUp(Defense):
    """Every example is mixed with k - 1 others of the client's batch, inputs and labels alike (Zhang et al. 2018).

    With k > 2 and a largest coefficient as in Huang et al. 2021, section 3 (theirs are k = 4 and 6, 0.65).
    Deviations: the coefficients of an example come from a symmetric Dirichlet distribution (for k = 2 the paper's
    Beta) of its own; those above `largest` are drawn towards 1/k until they are not, where Huang et al. draw again;
    partners are the next examples in a random cyclic order, so that nobody is mixed with himself; a round has
    one mixture, not one a step.

    Attributes:
        k: examples in a mixture, >= 2; a client needs as many.
        alpha: of the distribution, > 0; large for even mixtures.
        largest: coefficient, in (1/k, 1].
    """

    k: int = 2
    alpha: float = 1.0
    largest: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k must be at least 2, got {self.k}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if not 1 / self.k < self.largest <= 1:
            raise ValueError(
                f"largest must be above 1/k = {1 / self.k:.3g} and at most 1, got {self.largest}"
            )

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def defended(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
            require_images(victim, "mixup")
            mixtures = [self.mixture(own.num_examples, generator) for own in round.each()]
            weights = torch.block_diag(*mixtures).to(x)  # type: ignore[no-untyped-call]
            y = y if y.is_floating_point() else F.one_hot(y, victim.num_classes)
            return client(victim, params, round, mixed(weights, x), weights @ y.to(x))

        return defended

    def adapt(self, view: View) -> View:
        """Looks for the mixtures and for the shares of the classes in them, which are the coefficients, jointly, and
        takes them apart afterwards.

        Labels that were known become the classes that may be in a mixture.
        """
        require_images(view.victim, "mixup")
        space, before, partners = view.victim.space, view.decode, self.k
        size = view.round.own_examples

        def decode(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x, y = before(x, y)
            return unmix(x, y, space, partners) if len(x) == size else (x, y)

        classes = torch.ones(view.victim.num_classes, dtype=torch.bool)
        if view.knowledge.labels.value is not None:
            labels = torch.as_tensor(view.knowledge.labels.value).cpu()
            classes = torch.isin(torch.arange(len(classes)), labels)
        return replace(view, decode=decode, soft=classes, knowledge=replace(view.knowledge, labels=UNKNOWN))

    def mixture(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, count) coefficients, every row with k of them that sum to 1; `InputError` below k examples."""
        if count < self.k:
            raise InputError(
                f"mixup:k={self.k} mixes {self.k} examples of one client, which has {count};"
                f" accepted: a batch of at least {self.k}, or a smaller k"
            )
        own = torch.full((count, self.k), self.alpha, dtype=torch.float64)
        shares = capped(torch._sample_dirichlet(own, generator), self.largest)
        order = torch.randperm(count, generator=generator)
        weights = torch.zeros(count, count, dtype=torch.float64)
        for partner in range(self.k):
            weights[order, order.roll(-partner)] = shares[:, partner]
        return weights


def capped(shares: Tensor, largest: float) -> Tensor:
    """Rows (..., k) that sum to 1, drawn towards 1/k where their largest number is above `largest` > 1/k."""
    even = 1 / shares.shape[-1]
    top = shares.amax(-1, keepdim=True)
    return even + (shares - even) * ((largest - even) / (top - even).clamp_min(1e-12)).clamp(max=1.0)


def mixed(weights: Tensor, x: Tensor) -> Tensor:
    """weights (M, N) times images (N, C, H, W)."""
    return (weights @ x.flatten(1)).view(-1, *x.shape[1:])
