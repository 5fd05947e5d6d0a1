"""`InferenceResult`: what membership and property inference found, as plain values with a versioned JSON form.

No torch here.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from leakaudit.errors import EXIT_INCONCLUSIVE, EXIT_LEAKAGE, EXIT_WITHIN_POLICY, InputError
from leakaudit.results import ModelSummary, RoundSummary, Value, read_versioned
from leakaudit.spec import suggest

INFERENCE_SCHEMA_VERSION = 1
INFERENCE_NAME = "inference.json"
"""The result's file in its folder."""

RATES = {"auc": 0.5, "tpr01": 0.01, "tpr001": 0.001}
"""Name of a rate -> what guessing gives: area under the ROC curve; true-positive rate at 1 % and 0.1 % false
positives."""
RATE_WORDS = {"auc": "AUC", "tpr01": "TPR at 1 % FPR", "tpr001": "TPR at 0.1 % FPR"}


class Rate(Value):
    """One rate with its 95 % interval, and what guessing gives; `value` is None when not measured, with the reason."""

    name: Literal["auc", "tpr01", "tpr001"]
    value: float | None
    low: float | None = None
    high: float | None = None
    chance: float
    reason: str = ""


class InferenceOutcome(Value):
    """One inference over all trials.

    Attributes:
        attack: its name; spec: with the options that differ from the preset.
        question: "membership", of every candidate; "property", of every batch.
        property: that was looked for.
        positives, negatives: scores of members and non-members, or of batches with and without the property.
        rates: AUC and true-positive rates; empty when the inference did not run, `skipped` says why.
        curve: (false-positive rate, true-positive rate) from (0, 0) to (1, 1), thinned.
    """

    attack: str
    spec: str
    question: Literal["membership", "property"]
    property: str | None = None
    positives: int = 0
    negatives: int = 0
    rates: list[Rate] = Field(default_factory=list)
    curve: list[tuple[float, float]] = Field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0

    def rate(self, name: str) -> Rate | None:
        return next((rate for rate in self.rates if rate.name == name), None)


class InferenceResult(Value):
    """All inferences on the updates of the same captures.

    Attributes:
        round: of the client, after defenses that change it.
        defenses: specs, in the order they were applied.
        candidates, reference: records that might have been in a batch, and of the adversary's own.
        trials: updates captured, each of another batch.
        policy: thresholds as given, empty without; broken: a sentence for each that was crossed.
    """

    schema_version: Literal[1] = 1
    created: str
    command: str = ""
    title: str = "Membership and property inference"
    medium: Literal["images", "text"] = "images"
    seed: int
    model: ModelSummary
    round: RoundSummary
    defenses: list[str] = Field(default_factory=list)
    candidates: int
    reference: int
    trials: int
    outcomes: list[InferenceOutcome]
    notes: list[str] = Field(default_factory=list)
    policy: str = ""
    broken: list[str] = Field(default_factory=list)
    seconds: float = 0.0

    @property
    def undecided(self) -> list[str]:
        """A sentence for every rate within the policy whose interval is not: more updates may be above it.  Empty
        without a policy, and where it is broken."""
        if not self.policy or self.broken:
            return []
        limits = parse_limits(self.policy)
        return [
            f"{outcome.spec}: {rate.name} {rate.value:.3g}, but its 95 % interval reaches {rate.high:.3g}, above"
            f" {limit.most:g}: more --trials tell"
            for outcome in self.outcomes
            for limit in limits
            if (rate := outcome.rate(limit.name)) is not None
            and rate.value is not None
            and rate.high is not None
            and rate.high > limit.most
        ]

    @property
    def exit_code(self) -> int:
        """1 when the policy is broken, 3 when nothing (or nothing that the policy asks for) was measured, or it is not
        shown that the policy holds (see `undecided`), else 0."""
        if self.broken:
            return EXIT_LEAKAGE
        if self.undecided:
            return EXIT_INCONCLUSIVE
        names = {limit.name for limit in parse_limits(self.policy)} if self.policy else set(RATES)
        measured = {
            rate.name for outcome in self.outcomes for rate in outcome.rates if rate.value is not None
        }
        missing = names - measured if self.policy else not names & measured
        return EXIT_INCONCLUSIVE if missing else EXIT_WITHIN_POLICY

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


class Limit(Value):
    """A rate that must not be above `most`."""

    name: str
    most: float

    def __str__(self) -> str:
        return f"{self.name}>{self.most:g}"


def parse_limits(text: str) -> tuple[Limit, ...]:
    """`auc>0.6,tpr01>0.05`: the policy is broken by any inference whose rate is above.

    Raises `InputError` for anything else.
    """
    return tuple(_parse_limit(item.strip()) for item in text.split(","))


def _parse_limit(text: str) -> Limit:
    found = re.fullmatch(r"([a-z][a-z0-9]*)\s*>\s*([-+0-9.eE]+)", text)
    if found is None:
        raise InputError(f"policy {text!r} is not RATE>NUMBER, such as auc>0.6")
    name, number = found.groups()
    if name not in RATES:
        raise InputError(
            f"policy {text!r}: unknown rate {name!r}{suggest(name, RATES)}; known: {', '.join(RATES)}"
        )
    try:
        most = float(number)
    except ValueError as error:
        raise InputError(f"policy {text!r}: {number!r} is not a number") from error
    if not (0 <= most < 1 and math.isfinite(most)):
        raise InputError(f"policy {text!r} cannot be broken; accepted: at least 0 and below 1")
    return Limit(name=name, most=most)


def broken_limits(limits: tuple[Limit, ...], outcomes: list[InferenceOutcome]) -> list[str]:
    """A sentence for every limit that some inference is above."""
    return [
        f"{outcome.spec}: {limit} ({rate.name} {rate.value:.4g}, chance {rate.chance:g})"
        for outcome in outcomes
        for limit in limits
        if (rate := outcome.rate(limit.name)) is not None
        and rate.value is not None
        and rate.value > limit.most
    ]


def read_inference(folder: Path) -> InferenceResult:
    """The result in a folder written by `leakaudit infer`; `InputError` when there is none, or another schema."""
    return read_versioned(
        folder / INFERENCE_NAME,
        InferenceResult,
        INFERENCE_SCHEMA_VERSION,
        noun="a result of inference",
        lacking=f"{folder} is not the folder of infer",
    )
