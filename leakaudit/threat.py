"""What the adversary knows and sees.

This is the only place that decides it.  `Knowledge` lists every assumption as a
`Fact`; `View` is all an attack gets.  The truth is in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from leakaudit.errors import InputError
from leakaudit.formats.loading import SharedUpdate
from leakaudit.formats.manifest import Manifest
from leakaudit.models.victim import Victim
from leakaudit.rounds import ClientUpdate, Round, client_update
from leakaudit.update import Update

Status = Literal["known", "inferred", "unknown"]


@dataclass(frozen=True)
class Fact:
    """One thing the adversary may know: its value, how, and from where.

    `upper_bound` marks knowledge a real adversary would not usually have.
    """

    value: Any = None
    status: Status = "unknown"
    source: str = ""
    upper_bound: bool = False

    def __post_init__(self) -> None:
        if (self.status == "unknown") != (self.value is None):
            raise ValueError(
                f"a fact is unknown exactly when it has no value, got {self.status}: {self.value}"
            )


def known(value: Any, source: str, *, upper_bound: bool = False) -> Fact:
    return Fact(value, "known", source, upper_bound)


def inferred(value: Any, source: str) -> Fact:
    return Fact(value, "inferred", source)


UNKNOWN = Fact()


@dataclass(frozen=True)
class Knowledge:
    """The adversary's knowledge, field by field.

    Attributes:
        labels: (N,) integer tensor, in no particular order.
        batch_size: examples behind the update, int.
        local_steps: int.
        local_batch_size: examples a local step, int.
        learning_rate: of the local steps, float; unknown means the update has no scale.
        mode: "train" or "eval".
        loss: "cross-entropy/mean" and the like.
        normalisation: (mean, std) a channel.
        statistics: BatchNorm statistics of the private batch: a dict of module name ->
            (mean, variance), each (C,); from leaked buffers.
        defense: tuple of defense specs applied before sharing; () is none.
        noise_std: standard deviation per number of noise added, in units of the update.
        scale: whether the update's length is meaningful, bool.
    """

    labels: Fact = UNKNOWN
    batch_size: Fact = UNKNOWN
    local_steps: Fact = UNKNOWN
    local_batch_size: Fact = UNKNOWN
    learning_rate: Fact = UNKNOWN
    mode: Fact = UNKNOWN
    loss: Fact = UNKNOWN
    normalisation: Fact = UNKNOWN
    statistics: Fact = UNKNOWN
    defense: Fact = UNKNOWN
    noise_std: Fact = UNKNOWN
    scale: Fact = UNKNOWN

    def __iter__(self) -> Iterator[tuple[str, Fact]]:
        for item in fields(self):
            yield item.name, getattr(self, item.name)

    @property
    def setting(self) -> Literal["realistic", "upper bound"]:
        """ "upper bound" as soon as one fact is more than a real adversary would usually have."""
        return "upper bound" if any(fact.upper_bound for _, fact in self) else "realistic"


def as_it_is(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y


@dataclass(frozen=True)
class View:
    """All that an attack sees.

    Attributes:
        victim: the model as the client downloaded it.
        round: the adversary's belief of what the client did.
        observed: the shared update, restricted to parameters of the victim.
        knowledge: what is known besides.
        client: how the adversary simulates a client; a defense it knows is simulated too.
        rounding: relative error of the observed update from how its file stored it, >= 0.
        spread: name -> standard deviation of what was added to each number of that tensor of the update
            (noise, or rounding taken for noise), as far as the adversary knows; names left out have none.
        slack: half the width, number by number, of the interval around the observed value in which the
            undisturbed one lies, where the update was quantised; None where it was not.
        decode: from what the client trained on, as an attack finds it, to the private examples:
            (x, y) -> (x, y).  Another thing than identity where inputs were mixed or disturbed.
        soft: (K,) bool, the classes that may be in it, where the client trained on mixtures of labels; an attack
            finds their shares jointly with the inputs.  None where every example has one label.
    """

    victim: Victim
    round: Round
    observed: Update
    knowledge: Knowledge = field(default_factory=Knowledge)
    client: ClientUpdate = client_update
    rounding: float = 0.0
    spread: Mapping[str, float] = field(default_factory=dict)
    slack: Update | None = None
    decode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = as_it_is
    soft: Tensor | None = None

    def simulate(self, x: Tensor, y: Tensor) -> Update:
        """The update a client holding (x, y) would share, differentiable in x and y."""
        update = self.client(self.victim, self.victim.params, self.round, x, y)
        return update.select(self.observed)

    @property
    def scale_free(self) -> bool:
        """True when only the update's direction means anything."""
        return self.knowledge.scale.value is False

    @property
    def unknowns(self) -> int:
        """Numbers to find: all pixels, or tokens at most, of all examples."""
        return self.round.num_examples * self.victim.space.unknowns

    def residual(self, x: Tensor, y: Tensor) -> float:
        """The common yardstick of all attacks, >= 0: |g(x) - g*| / |g*|, g(x) in the view's own precision.

        For a scale-free view the simulated update is first scaled to fit best, which
        gives sqrt(1 - cos^2), or 1 when the cosine is not positive.
        """
        dtype = self.victim.dtype
        x, y = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in (x, y))
        simulated = self.simulate(x, y).detach()
        if self.scale_free:
            fit = simulated.fit(self.observed)
            return simulated.distance(self.observed, fit) if fit > 0 else 1.0
        return simulated.distance(self.observed)

    def only(self, names: Collection[str]) -> View:
        """The view of these tensors of the update, in order; the others are left out of matching."""
        slack = None if self.slack is None else self.slack.select(names)
        return replace(self, observed=self.observed.select(names), slack=slack)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> View:
        """The same view on another device or in another precision."""
        return replace(
            self,
            victim=self.victim.to(device, dtype),
            observed=self.observed.to(device=device, dtype=dtype),
            slack=None if self.slack is None else self.slack.to(device=device, dtype=dtype),
        )


def stated_round(manifest: Manifest, count: int | None) -> Round:
    """What a manifest says that the clients did, with `count` examples in all; see `see` for what it leaves out.

    Raises `InputError` when that is no round.
    """
    steps = manifest.local_steps or (1 if manifest.kind == "gradient" else None)
    try:
        return Round(
            num_examples=count or manifest.local_batch_size or 1,
            local_steps=steps or 1,
            local_batch_size=manifest.local_batch_size,
            learning_rate=manifest.learning_rate or 1.0,
            clients=manifest.clients or 1,
            sizes=manifest.sizes,
            weights=manifest.weights,
            client_steps=manifest.client_steps,
        )
    except ValueError as error:
        raise InputError(f"the manifest is not a round: {error}") from error


def see(victim: Victim, shared: SharedUpdate, labels: Tensor | None = None) -> View:
    """The adversary's view of a file: what its manifest says is known, the rest is not.

    Args:
        victim: the downloaded model, built as the manifest or the user says.
        shared: the file, read by `leakaudit.formats.loading.load_update`.
        labels: (N,) integers given to the adversary, which makes the setting an upper bound.

    An unknown batch size is assumed to be one local batch where that is known, else 1, and an unknown step
    count 1, until `leakaudit.hypotheses` knows better.
    Raises `InputError` when the manifest contradicts itself, or the labels their number.
    """
    manifest = shared.manifest
    count = manifest.num_examples or (None if labels is None else len(labels))
    if labels is not None and len(labels) != count:
        raise InputError(f"{len(labels)} labels given for an update of {count} examples")
    steps = manifest.local_steps or (1 if manifest.kind == "gradient" else None)
    if count is None and steps == 1:
        count = manifest.local_batch_size
    round = stated_round(manifest, count)
    knowledge = Knowledge(
        labels=UNKNOWN if labels is None else known(labels, "given by the user", upper_bound=True),
        batch_size=_said(count, f"assumed {manifest.local_batch_size or 1}"),
        local_steps=_said(steps, "assumed 1"),
        local_batch_size=_said(
            manifest.local_batch_size or (count if steps == 1 else None), "assumed the whole batch"
        ),
        learning_rate=_said(manifest.learning_rate, "not needed for one step"),
        mode=_mode(victim, manifest.mode),
        loss=_said(
            None if manifest.loss is None else f"{manifest.loss}/{manifest.reduction or 'mean'}",
            f"assumed {manifest.loss or 'cross-entropy'}, {manifest.reduction or 'mean'}",
        ),
        normalisation=_said(
            victim.normalisation,
            "pixels are shown as model inputs, without a box to stay in",
        ),
        defense=_said(manifest.defenses, "assumed none"),
        noise_std=_said(manifest.noise_std or None, ""),
        scale=_said(shared.has_scale, ""),
    )
    return View(victim, round, shared.update, knowledge, rounding=shared.rounding)


def _said(value: Any, otherwise: str) -> Fact:
    return Fact(source=otherwise) if value is None else known(value, "manifest or option")


def _mode(victim: Victim, mode: str | None) -> Fact:
    if mode is not None:
        return known(mode, "manifest or option")
    if not victim.mode_matters:
        return inferred(victim.mode, "no BatchNorm: both modes give the same gradients")
    return Fact(source=f"assumed {victim.mode}")
