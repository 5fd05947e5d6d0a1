"""Verdict and controls: what may be said after the attacks, and no more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from leakaudit.policy import Medium, Policy
from leakaudit.results import NO_CONTROL, Control, Finding, Score, Trial, Verdict

CONTRADICTION = 10.0
"""Measured error over proven error (both RMS) above which the originals are not those of the update."""
HOPELESS = 0.9
"""Relative residual above which the checkpoint itself is in doubt."""
OPEN = 0.5
"""Share of the pixels' variance left open above which a match is no leak by itself."""
DISCRETE: frozenset[Medium] = frozenset({"text"})
"""Media in which the private input itself must explain the update, and a proven input is the private one."""


@dataclass(frozen=True)
class Nouns:
    """How a verdict speaks of the private data.

    Attributes:
        private: as the subject of a sentence in the past tense, verb included.
        possession: as its object.
        specimen: one example.
        unrelated: examples that have nothing to do with it.
        proven: what a finding says that proves a leak by itself.
    """

    private: str
    possession: str
    specimen: str
    unrelated: str
    proven: str


NOUNS: dict[Medium, Nouns] = {
    "images": Nouns(
        "Private images were",
        "the private images",
        "image",
        "Unrelated images",
        "The private images are in the shared update.",
    ),
    "text": Nouns(
        "Private text was",
        "the private text",
        "sentence",
        "Unrelated sentences",
        "The words of the private text are in the shared update.",
    ),
}


def judge(
    trials: Sequence[Trial],
    best: int | None,
    controls: Sequence[Control],
    policy: Policy,
    *,
    truth_known: bool,
    findings: Sequence[Finding] = (),
    medium: Medium = "images",
    not_begun: Sequence[str] = (),
) -> Verdict:
    """The verdict over all trials; `not_begun` are attacks that apply, and for which no time was left.

    "leaks" as soon as one trial breaks the policy or, without the truth, explains the update to
    its floor, unless other inputs are known to share the update, or a finding proves a leak
    (severity "leak", `data["proven"]`).  Text that is verified, or proven, is a leak whatever the
    truth file holds, which may be another client's;
    "not-recovered" only when the truth is known, nothing breaks the policy, the positive control
    succeeded, and time neither ended the attack that came nearest nor kept one from beginning;
    "inconclusive" otherwise.
    """
    broken = [
        f"{trial.attack}: {sentence}"
        for trial in trials
        for sentence in policy.broken_by(example.scores for example in trial.examples)
    ]
    verified, matched = _checked(trials, "verified"), _checked(trials, "consistent")
    text, nouns = str(policy), NOUNS[medium]
    if truth_known and broken:
        return Verdict(
            status="leaks",
            headline=f"{nouns.private} reconstructed.",
            reasons=[*broken, *verified],
            policy=text,
        )
    if verified and (not truth_known or medium in DISCRETE):
        foreign = ["The originals given are another text: the truth file does not belong to this update, or the"
                   " policy cannot be broken by it."]  # fmt: skip
        return Verdict(
            status="leaks",
            headline=f"The shared update determines {nouns.possession}.",
            reasons=[*verified, *(foreign if truth_known else [])],
            policy=text,
        )
    if not truth_known and matched:
        return Verdict(
            status="leaks",
            headline="An input that explains the shared update was found.",
            reasons=[*matched, "Without a proof that it is the only one, take it for the private batch."],
            policy=text,
        )
    proven = [
        finding.text
        for finding in findings
        if finding.severity == "leak" and finding.data.get("proven") is True
    ]
    if proven:
        return Verdict(status="leaks", headline=nouns.proven, reasons=proven, policy=text)
    reasons = _doubts(trials, best, findings)
    if truth_known and best is not None:
        scores = [example.scores for example in trials[best].examples]
        reasons += [
            f"The policy asks for {name}, which was not measured." for name in policy.unmeasured(scores)
        ]
        reasons += _contradictions(trials)
        reasons += _out_of_time(trials, best, policy, not_begun)
    positive = next((control for control in controls if control.name == "positive"), None)
    if not truth_known:
        return Verdict(
            status="inconclusive",
            headline="No reconstruction could be proven without the originals.",
            reasons=[*reasons, "Without the originals a failed attack says nothing about safety."],
            policy=text,
        )
    if best is not None and positive is not None and positive.passed and not reasons:
        return Verdict(
            status="not-recovered",
            headline=f"No attack that ran recovered {nouns.possession}.",
            reasons=[
                f"The same attack succeeds on an undefended update of one {nouns.specimen}.",
                "This is what these attacks reached, not a bound on what others may reach.",
                *_more_time(trials),
            ],
            policy=text,
        )
    reasons.append(positive.text if positive is not None else f"{NO_CONTROL}.")
    return Verdict(
        status="inconclusive",
        headline="The attacks failed, and so may the audit.",
        reasons=reasons,
        policy=text,
    )


def _checked(trials: Sequence[Trial], status: str) -> list[str]:
    """What verification says of the trials with `status`; a proven lack of uniqueness does not count, nor does
    a match that leaves most of the pixels open, as any under enough noise."""
    return [
        f"{trial.attack}: {check.text}"
        for trial in trials
        if (check := trial.verification) is not None
        and check.status == status
        and (check.rank is None or check.rank == check.unknowns)
        and (check.left_open is None or check.left_open <= OPEN)
    ]


def _contradictions(trials: Sequence[Trial]) -> list[str]:
    """Trials proven to be nearer to the private batch than the truth file says they are."""
    texts = []
    for trial in trials:
        check = trial.verification
        errors = [
            error for example in trial.examples if (error := _squared_error(example.scores)) is not None
        ]
        if check is None or check.status != "verified" or check.distance is None or not errors:
            continue
        measured = math.sqrt(sum(errors) / len(errors))
        if measured > CONTRADICTION * check.distance:
            texts.append(
                f"{trial.attack} provably lies within {check.distance:.1e} of what the update holds, but"
                f" {measured:.1e} from the originals given (RMS): the truth file, its labels or the"
                " normalisation do not belong to this update."
            )
    return texts


def _squared_error(scores: Mapping[str, float | None]) -> float | None:
    error, psnr = scores.get("mse"), scores.get("psnr")
    return 10 ** (-psnr / 10) if error is None and psnr is not None else error


def _doubts(trials: Sequence[Trial], best: int | None, findings: Sequence[Finding]) -> list[str]:
    if best is None:
        return ["No attack produced a reconstruction."]
    trial = trials[best]
    doubts = [finding.text for finding in findings if finding.severity == "warning"]
    if trial.residual is not None and trial.residual > HOPELESS:
        doubts.append(
            f"The matching loss did not fall (relative residual {trial.residual:.2g}): the checkpoint may not "
            "belong to this update, or a defense the adversary does not know was applied."
        )
    if any(t.status == "interrupted" for t in trials):
        doubts.append("The audit was interrupted.")
    if was_cut(trial):
        doubts.append("The time budget ended the best attack early.")
    return doubts


def _out_of_time(
    trials: Sequence[Trial], best: int, policy: Policy, not_begun: Sequence[str]
) -> Iterator[str]:
    nearest = min((trial for trial in trials if trial.best is not None), key=lambda t: nearness(t, policy))
    if nearest is not trials[best] and was_cut(nearest):
        yield f"The time budget ended {nearest.attack} early, which came nearest."
    if not_begun:
        yield f"The time budget left none for {', '.join(not_begun)}."


def _more_time(trials: Sequence[Trial]) -> list[str]:
    names = [trial.attack for trial in trials if was_cut(trial)]
    return [f"The time budget ended {', '.join(names)} early: more may recover more."] if names else []


def was_cut(trial: Trial) -> bool:
    """Whether the time budget ended one of its attempts."""
    return any(attempt.stopped == "budget" for attempt in trial.attempts)


def nearness(trial: Trial, policy: Policy) -> tuple[float, ...]:
    """Smallest for the best reconstruction: by the policy's metrics in their order, then by residual."""
    keys = []
    for threshold in policy.thresholds:
        scores = [score for row in trial.examples if (score := row.scores.get(threshold.metric)) is not None]
        mean = sum(scores) / len(scores) if scores else float("-inf" if threshold.operator == ">" else "inf")
        keys.append(-mean if threshold.operator == ">" else mean)
    return (*keys, float("inf") if trial.residual is None else trial.residual)


def floor_control(scores: Sequence[Score], medium: Medium = "images") -> Control:
    """What unrelated examples score against the truth, from the chance levels of `scores`."""
    chances = [score for score in scores if score.chance is not None]
    parts = ", ".join(f"{score.metric} {score.chance:.3g} {score.unit}".strip() for score in chances)
    return Control(
        name="floor",
        passed=True,
        text=f"{NOUNS[medium].unrelated} score: {parts}.",
        scores=[score.model_copy(update={"value": score.chance, "chance": None}) for score in chances],
    )
