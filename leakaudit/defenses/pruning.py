"""Sparse updates: only some of the numbers are shared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakaudit.defenses.base import Defense, after
from leakaudit.defenses.clipping import shortened
from leakaudit.errors import InputError
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import ClientUpdate, Round
from leakaudit.threat import View
from leakaudit.update import Update

Scope = Literal["tensor", "global"]


@dataclass(frozen=True)
class TopK(Defense):
    """Keep the largest share `keep` of every tensor by magnitude, zero the rest (Zhu et al. 2019, section 5.2).

    Attributes:
        keep: in (0, 1]; at least one number is kept.
        scope: "tensor" keeps that share of each, "global" the largest of all numbers together.
    """

    keep: float = 0.1
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        _require_share(self.keep)

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        return after(client, lambda update: masked(update, largest(update, self.keep, self.scope)))

    def adapt(self, view: View) -> View:
        """Only what was kept is matched, where the mask shows."""
        return _adapted(view, self.keep, self.scope, lambda client, mask: after(client, _masking(mask)))


@dataclass(frozen=True)
class RandomK(Defense):
    """Keep a random share `keep` of the numbers, zero the rest (Konečný et al. 2016, section 2, random mask).

    Attributes:
        keep: in (0, 1]; at least one number is kept.
        scope: "tensor" keeps that share of each, "global" of all numbers together.
        unbiased: divide what is kept by the share kept, so that the expected update is the plain one.
    """

    keep: float = 0.1
    scope: Scope = "tensor"
    unbiased: bool = False

    def __post_init__(self) -> None:
        _require_share(self.keep)

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        def prune(update: Update) -> Update:
            lots = update.map(
                lambda t: torch.rand(t.shape, generator=generator, device=generator.device).to(t.device)
            )
            return self._scaled(masked(update, largest(lots, self.keep, self.scope)))

        return after(client, prune)

    def _scaled(self, update: Update) -> Update:
        if not self.unbiased:
            return update
        whole = update.numel() / kept_numbers(update.numel(), self.keep)
        return update.map(
            lambda t: (
                t * (t.numel() / kept_numbers(t.numel(), self.keep) if self.scope == "tensor" else whole)
            )
        )

    def adapt(self, view: View) -> View:
        """Only what was kept is matched, where the mask shows, at the size it was given."""
        return _adapted(
            view,
            self.keep,
            self.scope,
            lambda client, mask: after(client, lambda update: _masking(mask)(self._scaled(update))),
        )


@dataclass(frozen=True)
class Memory:
    """What Deep Gradient Compression keeps from round to round.

    Attributes:
        velocity: the momentum, u.
        residual: what was gathered and not sent yet, v.
    """

    velocity: Update
    residual: Update


@dataclass(frozen=True)
class DeepGradientCompression(Defense):
    """Top-k with a memory: momentum correction, local clipping, residuals, momentum factor masking (Lin et al. 2018).

    Algorithm 4 with momentum (without Nesterov) and one local gradient a round:
    u = m u + clip(g), v = v + u; the largest of v are sent; u and v are zeroed where they were.
    Deviation: all rounds are at the same parameters, as if the learning rate were small, and the threshold is
    that of the exact share, not of a sample.

    Attributes:
        keep: share of each tensor that is sent, in (0, 1]; the paper ends at 0.001.
        momentum: m, in [0, 1).
        clip: bound on the length of the local gradient, over the square root of `nodes` (section 3.2); None for none.
        nodes: clients that train together, N.
        rounds: how many the memory gathers; the update shared is that of the last.  Each has its own examples,
            so an update is behind `rounds` times as many.
    """

    remembers: ClassVar[bool] = True
    keep: float = 0.01
    momentum: float = 0.9
    clip: float | None = None
    nodes: int = 1
    rounds: int = 1

    def __post_init__(self) -> None:
        _require_share(self.keep)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise ValueError(f"clip must be positive and finite, got {self.clip}")
        if min(self.nodes, self.rounds) < 1:
            raise ValueError(f"nodes and rounds must be at least 1, got {self.nodes} and {self.rounds}")

    def round(self, round: Round) -> Round:
        """`rounds` times as many examples; `InputError` where the local steps have batches of their own."""
        if self.rounds > 1 and round.local_batch_size is not None:
            raise InputError(
                f"dgc:rounds={self.rounds} takes all of a round's examples in each local step, got"
                f" local_batch_size={round.local_batch_size}"
            )
        return replace(round, num_examples=self.rounds * round.num_examples)

    def wrap(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        return self._through(client, lambda memory: self.send(memory)[0])

    def training(self, client: ClientUpdate, generator: torch.Generator) -> ClientUpdate:
        memory: Memory | None = None

        def compressed(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
            nonlocal memory
            gathered = self.gather(memory, client(victim, params, round, x, y))
            sent, memory = self.send(gathered)
            return sent

        return compressed

    def gather(self, memory: Memory | None, gradient: Update) -> Memory:
        """The memory with one more gradient: u = m u + clip(g), v = v + u."""
        if self.clip is not None:
            gradient = shortened(gradient, self.clip / math.sqrt(self.nodes))
        if memory is None:
            return Memory(gradient, gradient)
        velocity = memory.velocity * self.momentum + gradient
        return Memory(velocity, memory.residual + velocity)

    def send(self, memory: Memory) -> tuple[Update, Memory]:
        """What is sent of a memory, and what stays of it."""
        mask = largest(memory.residual, self.keep, "tensor")
        rest = mask.map(lambda kept: 1 - kept)
        kept = Memory(masked(memory.velocity, rest), masked(memory.residual, rest))
        return masked(memory.residual, mask), kept

    def _through(self, client: ClientUpdate, share: Callable[[Memory], Update]) -> ClientUpdate:
        """The client that gathers `rounds` rounds and shares what `share` makes of the memory in the last."""

        def compressed(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
            memory: Memory | None = None
            for part, labels in zip(x.tensor_split(self.rounds), y.tensor_split(self.rounds), strict=True):
                if len(part):  # else fewer examples than rounds, as when an attack tries one by itself
                    memory = None if memory is None else self.send(memory)[1]
                    own = replace(round, num_examples=len(part))
                    memory = self.gather(memory, client(victim, params, own, part, labels))
            assert memory is not None  # a round has at least one example
            return share(memory)

        return compressed

    def adapt(self, view: View) -> View:
        """All rounds are simulated; of the last only what was sent is matched, where the mask shows.

        What the rounds before it sent follows from the candidate's own examples.
        """

        def simulated(client: ClientUpdate, mask: Update | None) -> ClientUpdate:
            if mask is None:
                return self._through(client, lambda memory: self.send(memory)[0])
            return self._through(client, lambda memory: _masking(mask)(memory.residual))

        adapted = _adapted(view, self.keep, "tensor", simulated)
        return adapted if adapted is not view else replace(view, client=simulated(view.client, None))


def kept_numbers(numbers: int, keep: float) -> int:
    """How many of `numbers` the share `keep` is: rounded up, at least one."""
    return max(1, math.ceil(keep * numbers))


def largest(update: Update, keep: float, scope: Scope) -> Update:
    """1 for the share `keep` of largest magnitude, of each tensor or of all numbers together; else 0."""
    detached = update.detach()
    if scope == "tensor":
        return detached.map(lambda tensor: _largest(tensor.reshape(-1), keep).reshape(tensor.shape))
    flat = _largest(detached.flat(), keep)
    parts = torch.split(flat, [tensor.numel() for tensor in update.values()])
    return Update(
        {name: part.reshape(t.shape) for (name, t), part in zip(update.items(), parts, strict=True)}
    )


def masked(update: Update, mask: Update) -> Update:
    """The update where the mask is 1, exactly 0 elsewhere."""
    return update.combine(mask, torch.mul)


def _largest(flat: Tensor, keep: float) -> Tensor:
    kept = flat.abs().topk(kept_numbers(flat.numel(), keep)).indices
    return torch.zeros_like(flat).scatter(0, kept, 1.0)


def _masking(mask: Update) -> Callable[[Update], Update]:
    """Masks the tensors that `mask` has, and leaves out the others."""
    return lambda update: update.select(mask).combine(mask, lambda t, m: t * m.to(t.device, t.dtype))


def _adapted(
    view: View, keep: float, scope: Scope, simulated: Callable[[ClientUpdate, Update], ClientUpdate]
) -> View:
    """The view that matches only what was kept; the same view where something later hid the mask.

    Tensors of which nothing was kept are left out.
    """
    mask = view.observed.map(lambda tensor: tensor != 0)
    numbers = {name: int(kept.sum()) for name, kept in mask.items()}
    if scope == "tensor":
        visible = all(numbers[name] <= kept_numbers(t.numel(), keep) for name, t in view.observed.items())
    else:
        visible = sum(numbers.values()) <= kept_numbers(view.observed.numel(), keep)
    kept = [name for name in view.observed if numbers[name]]
    if not visible or not kept or keep == 1:
        return view
    view, mask = view.only(kept), mask.select(kept)
    slack = None if view.slack is None else masked(view.slack, mask)
    return replace(view, client=simulated(view.client, mask), slack=slack)


def _require_share(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
