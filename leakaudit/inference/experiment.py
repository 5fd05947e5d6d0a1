"""The one orchestrator of inference: capture many updates, ask each, and hold the answers against the truth.

The inferences see a `View` and `Evidence`; who was in the batch is known here alone.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leakaudit.capture import Captured, as_shared, capture
from leakaudit.data import PrivateBatch
from leakaudit.defenses.naming import Parts, adapted, defended
from leakaudit.errors import InputError
from leakaudit.formats.phrases import counted
from leakaudit.inference import INFERENCES
from leakaudit.inference.base import Evidence, Inference, Question, Records
from leakaudit.inference.measures import Trialled, curve, rates
from leakaudit.inference.properties import mixed_rows
from leakaudit.inference.traits import has_trait, traits_of
from leakaudit.inference_results import (
    InferenceOutcome,
    InferenceResult,
    broken_limits,
    parse_limits,
)
from leakaudit.media import medium_of
from leakaudit.models.victim import Victim
from leakaudit.progress import OnTrial
from leakaudit.randomness import fork
from leakaudit.results import ModelSummary, RoundSummary
from leakaudit.rounds import Round
from leakaudit.spec import format_spec, parse
from leakaudit.text_data import PrivateText
from leakaudit.threat import View, see

MEMBERSHIP = ("membership-likelihood", "membership-gradient", "membership-loss")
"""What is asked of images unless somebody says otherwise; of text `membership-words` too."""


@dataclass(frozen=True)
class Plan:
    """What to ask, of how many updates.

    Attributes:
        attacks: specs of `INFERENCES`; empty for the membership inferences of the medium.
        candidates: records that batches are drawn from, the first of the data; None for the half of it.
        reference: records of the adversary's own, the next; None for the rest.
        trials: updates, each of another batch; the first question of each is membership, and a property is
            looked for in as many updates again, half of which have it.
        trait: the property to look for, see `leakaudit.inference.traits`; None for the usual one.
        policy: as `parse_limits` reads it; empty for none.
    """

    attacks: tuple[str, ...] = ()
    candidates: int | None = None
    reference: int | None = None
    trials: int = 20
    trait: str | None = None
    policy: str = ""
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")


@dataclass(frozen=True)
class Asked:
    """One inference with its name, and the answers gathered so far."""

    name: str
    inference: Inference
    answers: list[Trialled] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def spec(self) -> str:
        return format_spec(self.name, self.inference, INFERENCES[self.name])


def infer_membership(
    victim: Victim,
    data: PrivateBatch | PrivateText,
    round: Round,
    defenses: Parts = (),
    plan: Plan | None = None,
    on_trial: OnTrial | None = None,
) -> InferenceResult:
    """Draw batches from the data, capture their updates, and ask every inference about each.

    Args:
        victim: the model as downloaded.
        data: all records: candidates first, then the adversary's own.
        round: what the client does, before defenses that change it.
        defenses: (spec, defense) in the order they are applied; the adversary knows them, with their options.

    Each trial draws `num_examples` members of the candidates without repetition; all other candidates are
    non-members.  The adversary is told the round, and the label of every candidate.
    Raises `InputError` where the data are too few, or the round does not fit.
    """
    plan = plan or Plan()
    began = time.monotonic()
    limits = parse_limits(plan.policy) if plan.policy else ()
    round = defended(round, defenses)
    asked = _parse(plan.attacks or default_attacks(victim))
    pool, evidence = _evidence(victim, data, round, plan, asked)
    session = _Session(victim, data, pool, evidence, round, defenses, plan)
    questions = _questions(asked, plan.trials)
    for done, (question, trial) in enumerate(questions):
        session.ask(question, trial, [item for item in asked if item.inference.question == question])
        if on_trial is not None:
            on_trial(done + 1, len(questions))
    outcomes = [session.outcome(item) for item in asked]
    return InferenceResult(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=plan.command,
        medium=medium_of(victim).name,
        seed=plan.seed,
        model=_model_summary(victim),
        round=RoundSummary(
            num_examples=round.num_examples,
            local_steps=round.local_steps,
            local_batch_size=round.batch_size,
            learning_rate=round.learning_rate if round.local_steps > 1 else None,
        ),
        defenses=[spec for spec, _ in defenses],
        candidates=len(evidence.candidates),
        reference=len(evidence.reference),
        trials=plan.trials,
        outcomes=outcomes,
        notes=[*data.notes, *_notes(round)],
        policy=",".join(map(str, limits)),
        broken=broken_limits(limits, outcomes),
        seconds=time.monotonic() - began,
    )


def default_attacks(victim: Victim) -> tuple[str, ...]:
    """The membership inferences of the victim's medium."""
    return MEMBERSHIP if medium_of(victim).name == "images" else ("membership-words", *MEMBERSHIP)


def observe(victim: Victim, captured: Captured, defenses: Parts) -> View:
    """What an adversary sees of a capture who knows the defenses, their options, and the round."""
    return adapted(see(victim, as_shared(captured, victim)), defenses)


@dataclass(frozen=True)
class _Session:
    """What stays the same over all trials."""

    victim: Victim
    data: Any
    pool: Records
    evidence: Evidence
    round: Round
    defenses: Parts
    plan: Plan

    def ask(self, question: Question, trial: int, asked: Sequence[Asked]) -> None:
        """Capture one update and put the question to every inference of its kind."""
        members, truth = self._batch(question, trial)
        seed = fork(self.plan.seed, f"infer/{question}/{trial}").initial_seed()
        captured = capture(
            self.victim, self.data.rows(members.tolist()), self.round, defenses=self.defenses, seed=seed
        )
        view = observe(self.victim, captured, self.defenses)
        for item in asked:
            began = time.monotonic()
            reason = item.inference.applies(view, self.evidence)
            if reason is not None:
                item.refusals.append(reason)
                continue
            generator = fork(self.plan.seed, f"infer/{item.name}/{trial}")
            scores = item.inference.scores(view, self.evidence, generator).cpu()
            item.answers.append(Trialled(scores[truth], scores[~truth]))
            item.seconds.append(time.monotonic() - began)

    def _batch(self, question: Question, trial: int) -> tuple[Tensor, Tensor]:
        """(positions of the batch's records, which answers are yes)."""
        generator = fork(self.plan.seed, f"infer/{question}/batch/{trial}")
        candidates, count = len(self.evidence.candidates), self.round.num_examples
        if question == "membership":
            members = torch.randperm(candidates, generator=generator)[:count]
            return members, torch.zeros(candidates, dtype=torch.bool).index_fill(0, members, True)
        has_it = trial % 2 == 0
        flags = has_trait(self.victim, self.pool, self.trait)[:candidates].cpu()
        return mixed_rows(flags, count, float(has_it), generator), torch.tensor([has_it])

    @property
    def trait(self) -> str:
        return self.plan.trait or next(iter(traits_of(self.victim)))

    def outcome(self, item: Asked) -> InferenceOutcome:
        positive = torch.cat([answer.positive for answer in item.answers] or [torch.zeros(0)])
        negative = torch.cat([answer.negative for answer in item.answers] or [torch.zeros(0)])
        both = bool(len(positive) and len(negative))
        return InferenceOutcome(
            attack=item.name,
            spec=item.spec,
            question=item.inference.question,
            property=self.trait if item.inference.question == "property" else None,
            positives=len(positive),
            negatives=len(negative),
            rates=rates(item.answers, fork(self.plan.seed, "infer/bootstrap")) if item.answers else [],
            curve=curve(positive, negative) if both else [],
            skipped=_refusal(item, self.plan.trials),
            seconds=sum(item.seconds),
        )


def _refusal(item: Asked, trials: int) -> str:
    if not item.refusals:
        return ""
    often = "" if len(item.refusals) == trials else f" ({len(item.refusals)} of {trials} updates)"
    return item.refusals[0] + often


def _questions(asked: Sequence[Asked], trials: int) -> list[tuple[Question, int]]:
    kinds: list[Question] = list(dict.fromkeys(item.inference.question for item in asked))
    return [(question, trial) for question in kinds for trial in range(trials)]


def _parse(specs: Sequence[str]) -> list[Asked]:
    return [
        Asked(spec.partition(":")[0].strip(), parse(spec, INFERENCES, "inference"))
        for spec in dict.fromkeys(specs)
    ]


def _evidence(
    victim: Victim, data: Any, round: Round, plan: Plan, asked: Sequence[Asked]
) -> tuple[Records, Evidence]:
    """All records, and what the adversary holds of them; `InputError` where they are too few."""
    candidates = len(data) // 2 if plan.candidates is None else plan.candidates
    reference = max(len(data) - candidates, 0) if plan.reference is None else plan.reference
    if candidates < 2 or reference < 0 or candidates + reference > len(data):
        raise InputError(
            f"{candidates} candidates and {reference} reference records of {counted(len(data), 'record')}; accepted:"
            " at least 2 candidates, both together at most as many"
        )
    if candidates <= round.num_examples:
        raise InputError(
            f"{counted(candidates, 'candidate')} for batches of {round.num_examples}; accepted: more candidates than"
            " examples in the update"
        )
    pool = Records(*medium_of(victim).tensors(victim, data.part(0, candidates + reference)))
    own = pool.take(torch.arange(candidates, candidates + reference))
    flags = None
    if any(item.inference.question == "property" for item in asked):
        trait = plan.trait or next(iter(traits_of(victim)))
        flags = has_trait(victim, pool, trait)[candidates:].cpu()
    return pool, Evidence(pool.take(torch.arange(candidates)), own, flags)


def _notes(round: Round) -> list[str]:
    notes = [
        "The adversary knows the round, the defenses with their options, and the label of every candidate."
    ]
    if round.clients > 1:
        notes.append(
            f"An update is the mean of {round.clients} clients; a member is a record of any of them."
        )
    return notes


def _model_summary(victim: Victim) -> ModelSummary:
    parameters = sum(p.numel() for p in (*victim.params.values(), *victim.frozen.values()))
    return ModelSummary(
        name=victim.name,
        parameters=parameters,
        num_classes=victim.num_classes,
        input_shape=list(victim.space.shape),
        mode=victim.mode,
        task=medium_of(victim).task(victim),
    )
