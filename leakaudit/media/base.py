"""`Medium`: the one seam between an audit and what the private examples are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from leakaudit.attacks.base import OnStep, Reconstruction
from leakaudit.errors import InputError
from leakaudit.formats.manifest import Manifest
from leakaudit.formats.phrases import counted
from leakaudit.hypotheses import Sweep
from leakaudit.illustration import Yardstick
from leakaudit.inspection import Inspection
from leakaudit.metrics import BatchScores
from leakaudit.models.victim import Victim
from leakaudit.policy import DEFAULT_POLICIES, Policy, check_medium, parse_policy
from leakaudit.policy import Medium as MediumName
from leakaudit.results import ExampleScores, Finding, Frame, Score, Verification
from leakaudit.threat import View
from leakaudit.update import Update

T = TypeVar("T")
P = TypeVar("P")


@dataclass(frozen=True)
class Exhibit:
    """What a report shows of one reconstruction."""

    scores: list[Score] = field(default_factory=list)
    examples: list[ExampleScores] = field(default_factory=list)
    strip: list[Frame] = field(default_factory=list)


class Medium(Protocol[T, P]):
    """Images or text.  T is the type of a private batch, P that of a pool of unrelated examples."""

    @property
    def name(self) -> MediumName:
        """As in `AuditResult.medium`."""

    @property
    def specimen(self) -> str:
        """What the positive control hides: "photo" or "sentence"."""

    @property
    def auto(self) -> tuple[str, ...]:
        """The attacks that `auto` tries, in order."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores to measure where nobody says otherwise."""

    @property
    def known_metrics(self) -> tuple[str, ...]:
        """Names of all scores."""

    @property
    def facts_left_out(self) -> frozenset[str]:
        """Fields of `Knowledge` that mean nothing here."""

    def load(
        self,
        source: str | Path,
        victim: Victim,
        count: int | None,
        *,
        start: int = 0,
        max_length: int | None = None,
        seed: int = 0,
    ) -> T:
        """`count` private examples (None: all) from `start` on; `max_length` is of sentences."""

    def save_truth(self, path: str | Path, batch: T) -> None:
        """Write a private batch to a truth file."""

    def advice(self, victim: Victim, *, saved: bool) -> list[str]:
        """What a client that captured an update should know; `saved`: the model was written too."""

    def tensors(self, victim: Victim, batch: T) -> tuple[Tensor, Tensor]:
        """Model inputs x and labels y of a private batch; `InputError` when it does not fit the model."""

    def manifest_fields(self, victim: Victim) -> dict[str, Any]:
        """What a manifest says of the model's inputs."""

    def task(self, victim: Victim) -> str | None:
        """Of a language model, else None."""

    def read_truth(self, path: str | Path, view: View) -> T:
        """The private batch of a truth file, checked against the view."""

    def read_pool(self, path: str | Path | None, view: View) -> P:
        """Examples to tell the private ones from; None for those that ship with leakaudit."""

    def remarks(self, victim: Victim, manifest: Manifest) -> list[Finding]:
        """What the model and the manifest say that bears on the audit."""

    def inspect(
        self,
        view: View,
        *,
        generator: torch.Generator,
        buffers_after: Mapping[str, Tensor] | None = None,
        raw: Update | None = None,
        dtypes: Mapping[str, str] | None = None,
    ) -> Inspection:
        """See `leakaudit.inspection.inspect_update`."""

    def settle(
        self, view: View, seed: int, on_step: OnStep | None, budget: float | None
    ) -> tuple[View, Sweep]:
        """Find out what the manifest does not say; see `leakaudit.hypotheses.settle`."""

    def verify(self, view: View, x: Tensor, y: Tensor) -> Verification:
        """What re-simulation of a reconstruction proves without the truth."""

    def measure(
        self, found: Reconstruction, view: View, yardstick: Yardstick[T, P], names: Sequence[str]
    ) -> BatchScores:
        """The named scores against the truth, which the yardstick must hold."""

    def exhibit(
        self,
        found: Reconstruction,
        view: View,
        yardstick: Yardstick[T, P],
        folder: Path,
        attack: str,
        *,
        best: bool,
    ) -> Exhibit:
        """Scores, examples and film strip; pictures go to `folder`/images."""

    def control(self, view: View) -> T:
        """One example that ships with leakaudit; `InputError` when there is none for this model."""

    def contents(self, found: Reconstruction, view: View) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of the reconstruction as it is saved."""


def policy_of(text: str | None, medium: Medium[Any, Any]) -> Policy:
    """The policy as given, None for the medium's own; `InputError` for one that does not measure the medium."""
    policy = parse_policy(DEFAULT_POLICIES[medium.name] if text is None else text, medium.name)
    check_medium(policy, medium.name)
    return policy


def metrics_of(names: Sequence[str] | None, policy: Policy, medium: Medium[Any, Any]) -> tuple[str, ...]:
    """The metrics asked for, and those that the policy needs; `InputError` for those of another medium."""
    for name in names or ():
        if name not in medium.known_metrics:
            known = ", ".join(medium.known_metrics)
            raise InputError(
                f"metric {name} does not measure {medium.name}; known for {medium.name}: {known}"
            )
    return tuple(dict.fromkeys([*(names or medium.metrics), *policy.metrics]))


def check_count(path: str | Path, held: int, noun: str, view: View) -> None:
    """`InputError` when a truth file holds another number of examples than the update is stated to have."""
    stated = view.knowledge.batch_size
    if stated.status == "known" and held != stated.value:
        raise InputError(
            f"{path} holds {counted(held, noun)}, the update is of "
            f"{counted(int(stated.value), 'example')} (manifest or --batch-size)"
        )
