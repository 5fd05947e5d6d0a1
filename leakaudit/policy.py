"""What counts as leakage: thresholds on scores, such as `psnr>20` or `rouge-l>0.5`.

A policy is broken as soon as one private example crosses one threshold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from leakaudit.errors import InputError
from leakaudit.results import NEVER
from leakaudit.spec import suggest

Medium: TypeAlias = Literal["images", "text"]

MEDIUM_METRICS: dict[Medium, tuple[str, ...]] = {
    "images": ("psnr", "ssim", "lpips", "lpips-alex", "mse"),
    "text": (
        "token-accuracy",
        "special-accuracy",
        "bag-precision",
        "bag-recall",
        "bag-f1",
        "words-f1",
        "exact-match",
        "rouge-1",
        "rouge-2",
        "rouge-l",
    ),
}
POLICY_METRICS = MEDIUM_METRICS["images"] + MEDIUM_METRICS["text"]
DEFAULT_POLICY = "psnr>20,ssim>0.5"
DEFAULT_TEXT_POLICY = "token-accuracy>0.5,words-f1>0.5,rouge-l>0.5"
DEFAULT_POLICIES: dict[Medium, str] = {"images": DEFAULT_POLICY, "text": DEFAULT_TEXT_POLICY}


@dataclass(frozen=True)
class Threshold:
    metric: str
    operator: Literal[">", "<"]
    value: float

    def crossed(self, score: float | None) -> bool:
        if score is None or math.isnan(score):
            return False
        return score > self.value if self.operator == ">" else score < self.value

    def within(self, least: float, most: float) -> bool:
        """Whether a score from `least` to `most` can cross it."""
        return self.crossed(most) or self.crossed(least)

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.value:g}"


@dataclass(frozen=True)
class Policy:
    """Crossing any threshold is leakage; when not `enforced` it is reported, but fails nothing."""

    thresholds: tuple[Threshold, ...]
    enforced: bool = True

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics it needs, each once."""
        return tuple(dict.fromkeys(threshold.metric for threshold in self.thresholds))

    def unmeasured(self, examples: Iterable[Mapping[str, float | None]]) -> list[str]:
        """Metrics of the policy that no example was measured with: it could not have been broken by them."""
        rows = list(examples)
        return [metric for metric in self.metrics if all(row.get(metric) is None for row in rows)]

    def broken_by(self, examples: Iterable[Mapping[str, float | None]]) -> list[str]:
        """One sentence for every threshold that some example crosses, with the worst score."""
        sentences = []
        rows = list(examples)
        for threshold in self.thresholds:
            crossed = [
                score
                for row in rows
                if threshold.crossed(score := row.get(threshold.metric)) and score is not None
            ]
            if crossed:
                worst = max(crossed) if threshold.operator == ">" else min(crossed)
                sentences.append(
                    f"{len(crossed)} of {len(rows)} examples cross {threshold} (worst {threshold.metric} {worst:.4g})"
                )
        return sentences

    def __str__(self) -> str:
        return ",".join(map(str, self.thresholds)) if self.enforced else NEVER


def parse_policy(text: str, medium: Medium = "images") -> Policy:
    """`psnr>20,ssim>0.5`, or `never`: the default thresholds of the medium, which then fail nothing.

    `token_accuracy` is read as `token-accuracy`.  Raises `InputError` for anything else.  Metrics of both
    media are read; see `check_medium`.
    """
    if text.strip() == NEVER:
        return replace(parse_policy(DEFAULT_POLICIES[medium]), enforced=False)
    return Policy(tuple(_parse_threshold(item.strip()) for item in text.split(",")))


def check_medium(policy: Policy, medium: Medium) -> None:
    """Raises `InputError` when a metric of the policy does not measure this medium, or no score can cross."""
    known = MEDIUM_METRICS[medium]
    for threshold in policy.thresholds:
        if threshold.metric not in known:
            raise InputError(
                f"policy {str(threshold)!r}: {threshold.metric} does not measure {medium}; "
                f"known for {medium}: {', '.join(known)}"
            )
        if medium == "text" and not threshold.within(0, 1):
            raise InputError(
                f"policy {str(threshold)!r} cannot be broken: scores of text lie in 0 to 1; accepted: >0 to <1"
            )


def _parse_threshold(text: str) -> Threshold:
    found = re.fullmatch(r"([a-z][a-z0-9_-]*)\s*([<>])\s*([-+0-9.eE]+)", text)
    if found is None:
        raise InputError(f"policy {text!r} is not METRIC>NUMBER or METRIC<NUMBER, such as ssim>0.5")
    written, operator, number = found.groups()
    metric = written.replace("_", "-")
    if metric not in POLICY_METRICS:
        known = ", ".join(POLICY_METRICS)
        raise InputError(
            f"policy {text!r}: unknown metric {metric!r}{suggest(metric, POLICY_METRICS)}; known: {known}"
        )
    try:
        value = float(number)
    except ValueError as error:
        raise InputError(f"policy {text!r}: {number!r} is not a number") from error
    return Threshold(metric, ">" if operator == ">" else "<", value)
