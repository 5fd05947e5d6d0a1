"""A disturbed representation: the gradient of one fully connected layer says less about its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp, vmap

from leakaudit.defenses.base import Defense
from leakaudit.defenses.pixels import require_images
from leakaudit.errors import InputError
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import ClientUpdate, Round
from leakaudit.threat import View
from leakaudit.update import Update

FEATURES_AT_ONCE = 64
Pullback = Callable[[Tensor], tuple[Tensor]]


@dataclass(frozen=True)
class Soteria(Defense):
    """The features of an example that tell most about it are left out of one layer's weight gradient.

    Sun et al. 2021, section 4, "Soteria": of the representation r, the input of a fully connected layer, those
    r_i with the largest |r_i| / |dr_i/dx| are zeroed where the layer's weight gradient (dL/dy) r^T is taken; all
    other gradients are those of the undisturbed r.

    Deviations: every example has features of its own left out, as in the paper's text (its code sums the score
    over the batch and takes one mask for all, and adds 0.1 to r); exactly the share `prune` of the features is
    left out (the code's threshold is a percentile); the mask is made anew in every local step.

    Attributes:
        layer: name of the fully connected layer, or "auto" for the one that makes the class scores.
        prune: share of its input features, in (0, 1); at least one is left out.
    """

    layer: str = "auto"
    prune: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.prune < 1:
            raise ValueError(f"prune must be between 0 and 1, got {self.prune}")

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def defended(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
            return client(self._perturbed(victim), params, round, x, y)

        return defended

    def adapt(self, view: View) -> View:
        """Matches what the defense leaves as it was.

        Columns of the weight that never train are zero, which shows: the simulated client does not train them
        either.  Where fewer are zero than are left out of one example (of a batch, under noise, or when
        the features left out change from step to step), the whole weight is left out of matching as well; after
        several steps the layers before it are then not explained to the last digit, as they saw it train
        differently.
        """
        name, linear = self._layer(view.victim)
        weight = f"{name}.weight" if name else "weight"
        if weight not in view.observed:
            return view
        silent = ~view.observed[weight].any(dim=0)
        if bool(silent.any()):
            view = replace(view, client=_holding(view.client, weight, silent))
        rest = [key for key in view.observed if key != weight]
        if not rest or int(silent.sum()) >= self._count(linear.in_features):
            return view
        return view.only(rest)

    def _count(self, features: int) -> int:
        return max(1, round(self.prune * features))

    def _layer(self, victim: Victim) -> tuple[str, nn.Linear]:
        """Name and module of the defended layer; `InputError` for one that is not fully connected or not there."""
        require_images(victim, "soteria")
        rows = {
            name: module
            for name, module, inputs, _ in victim.modules_in_order()
            if isinstance(module, nn.Linear) and inputs.dim() == 2
        }
        head = victim.classifier() if self.layer == "auto" else None
        name = self.layer if head is None else head.module
        if name not in rows:
            raise InputError(
                f"soteria:layer={self.layer} is no fully connected layer of model {victim.name} with one row an"
                f" example; accepted: {', '.join(map(repr, rows)) or 'none of its layers'}"
            )
        return name, rows[name]

    def _perturbed(self, victim: Victim) -> Victim:
        name, linear = self._layer(victim)
        return _Perturbed(**_same(victim), layer=name, pruned=self._count(linear.in_features))


@dataclass(frozen=True)
class _Perturbed(Victim):
    """A victim whose loss has the same value, and the same gradients but for one layer's weight."""

    layer: str = ""
    pruned: int = 1

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        leaving_out = most_telling(self, params, x, self.layer, self.pruned)

        def perturb(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert isinstance(module.weight, Tensor)
            hidden = inputs[0] * leaving_out
            through = F.linear(hidden, module.weight)
            return output - (through - F.linear(hidden, module.weight.detach()))  # 0, but not its gradient

        handle = self.module.get_submodule(self.layer).register_forward_hook(perturb)
        try:
            return super().loss(params, x, y)
        finally:
            handle.remove()


def most_telling(victim: Victim, params: Params, x: Tensor, layer: str, count: int) -> Tensor:
    """(B, F) ones at the `count` features r_i of every example with the largest |r_i| / |dr_i/dx|, else zeros.

    r is the input of the fully connected `layer`.  A feature that is zero tells nothing and comes last.
    """
    fixed = {name: tensor.detach() for name, tensor in params.items()}

    def representation(inputs: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = victim.module.get_submodule(layer).register_forward_pre_hook(
            lambda _, given: kept.append(given[0])
        )
        try:
            victim.logits(fixed, inputs)
        finally:
            handle.remove()
        return kept[0]

    features, pullback = cast(tuple[Tensor, Pullback], vjp(representation, x.detach()))

    def sensitivity(feature: Tensor) -> Tensor:
        lengths: Tensor = pullback(feature.expand_as(features))[0].flatten(1).norm(dim=1)
        return lengths

    units = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    lengths = vmap(sensitivity, chunk_size=FEATURES_AT_ONCE)(units).T
    scores = torch.where(features == 0, 0.0, features.abs() / lengths)
    return torch.zeros_like(scores).scatter(1, scores.topk(count, dim=1).indices, 1.0)


@dataclass(frozen=True)
class _Held(Victim):
    """A victim of which some columns of one weight stay as they were downloaded."""

    weight: str = ""
    columns: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def logits(self, params: Params, x: Tensor) -> Tensor:
        trained = params[self.weight]
        held = torch.where(self.columns.to(trained.device), self.params[self.weight], trained)
        return super().logits({**params, self.weight: held}, x)


def _holding(client: ClientUpdate, weight: str, columns: Tensor) -> ClientUpdate:
    """The client for whom these columns, (F,) bool, do not train."""

    def simulated(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        return client(_Held(**_same(victim), weight=weight, columns=columns), params, round, x, y)

    return simulated


def _same(victim: Victim) -> dict[str, Any]:
    return {item.name: getattr(victim, item.name) for item in fields(Victim)}
