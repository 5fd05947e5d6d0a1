"""Layers that do not train, whose gradients are therefore never shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from leakaudit.defenses.base import Defense
from leakaudit.errors import InputError
from leakaudit.models.victim import Victim
from leakaudit.rounds import ClientUpdate
from leakaudit.threat import View


@dataclass(frozen=True)
class Freeze(Defense):
    """Some layers keep the downloaded parameters and are not shared (Gupta et al. 2022, section 6, for word rows).

    A weight that is used in two places is one parameter: freezing the word embedding of a language model with
    tied weights freezes the layer that scores tokens too.

    Attributes:
        layers: "first" for the layers that see the input; "embeddings" for every table of rows (words, positions,
            token types); or patterns of parameter names with *, ? and [...], several with | between them, such
            as "conv1.*|*.bias".
    """

    layers: str = "first"

    def __post_init__(self) -> None:
        if not all(part.strip() for part in self.layers.split("|")):
            raise ValueError(f"layers must name something, got {self.layers!r}")

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        return client

    def victim(self, victim: Victim) -> Victim:
        """The victim with the layers moved from `params` to `frozen`.

        Raises `InputError` when they are no trainable parameter, or all of them.
        """
        chosen = _NAMED.get(self.layers, self._matching)(victim) & victim.params.keys()
        if not chosen or len(chosen) == len(victim.params):
            what = "none" if not chosen else "all"
            raise InputError(
                f"freeze:layers={self.layers} freezes {what} of the {len(victim.params)} parameters that train in"
                f" model {victim.name}; accepted: first, embeddings, or patterns of some of their names, such as"
                f" {next(iter(victim.params))}"
            )
        return replace(
            victim,
            params={name: tensor for name, tensor in victim.params.items() if name not in chosen},
            frozen={**victim.frozen, **{name: victim.params[name] for name in chosen}},
        )

    def adapt(self, view: View) -> View:
        """The same layers stay as they are in the adversary's simulation."""
        victim = self.victim(view.victim)
        return replace(view.only([name for name in view.observed if name in victim.params]), victim=victim)

    def _matching(self, victim: Victim) -> set[str]:
        patterns = [part.strip() for part in self.layers.split("|")]
        return {name for name in victim.params if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _first(victim: Victim) -> set[str]:
    """Parameters of the first layer that has any, and of others that take the same input; the tables of rows of a
    language model."""
    if not victim.probe().is_floating_point():
        return _embeddings(victim)
    layers = [call for call in victim.modules_in_order() if any(True for _ in call[1].parameters())]
    if not layers:
        return set()
    seen = layers[0][2].data_ptr()
    return {
        name
        for prefix, module, inputs, _ in layers
        if inputs.data_ptr() == seen
        for name in _own(prefix, module)
    }


def _embeddings(victim: Victim) -> set[str]:
    """Names as `named_parameters` gives them: a shared weight has one, wherever else it is used."""
    tables = {id(m.weight) for m in victim.module.modules() if isinstance(m, nn.Embedding)}
    return {name for name, parameter in victim.module.named_parameters() if id(parameter) in tables}


def _own(prefix: str, module: nn.Module) -> list[str]:
    return [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()]


_NAMED: dict[str, Callable[[Victim], set[str]]] = {"first": _first, "embeddings": _embeddings}
