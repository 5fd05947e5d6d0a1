"""What a defense costs: held-out accuracy of the same model, trained with the same defense on the user's data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leakaudit.data import PrivateBatch
from leakaudit.defenses import Defense
from leakaudit.errors import InputError
from leakaudit.federated.training import Examples, TrackedClient, accuracy, shuffled, split, train
from leakaudit.formats.phrases import counted
from leakaudit.media import medium_of
from leakaudit.models.victim import Params, Victim
from leakaudit.randomness import fork, seeded
from leakaudit.rounds import ClientUpdate, Round, client_update
from leakaudit.sweep.curves import summary
from leakaudit.sweep_results import Curve, Utility

if TYPE_CHECKING:
    from leakaudit.text_data import PrivateText

_TOKEN_TASKS = {
    "mlm": "accuracy is of the masked words: share of them the model finds",
    "causal-lm": "accuracy is of the next token: share of them the model finds",
}

_SHUFFLED = "epsilon is that of Poisson-sampled batches, these were shuffled"

BARELY = 0.02
"""Accuracy above that of always saying the commonest class which still counts as having learnt nothing."""


@dataclass(frozen=True)
class Training:
    """How long and on what every defense is trained.

    Attributes:
        steps: of the server, >= 1: updates that it applies.
        batch_size: examples a local step of a client, >= 1; not more than there are to train on.
        learning_rate: of the server in FedSGD, > 0.  Rounds of several local steps have their own.
        momentum: of the server, in [0, 1).
        holdout: share of the data held out for accuracy, in (0, 1), stratified by class.
        evaluations: points of the curve after the start, >= 1, evenly spaced, the last at the end.
        seeds: trainings, >= 1, each with its own split, batches and fresh parameters.
        delta: of differential privacy, in (0, 1); None for 1 / number of examples trained on.
    """

    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 0.1
    momentum: float = 0.0
    holdout: float = 0.2
    evaluations: int = 10
    seeds: int = 3
    delta: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluations", "seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 < self.holdout < 1:
            raise InputError(f"holdout must be between 0 and 1, got {self.holdout}")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InputError(f"delta must be between 0 and 1, got {self.delta}")

    @property
    def evaluated(self) -> set[int]:
        """The steps after which accuracy is measured; 0 is before the first."""
        return {round(self.steps * i / self.evaluations) for i in range(self.evaluations + 1)}


def measure_utility(
    victim: Victim,
    data: PrivateBatch | PrivateText,
    defenses: Sequence[tuple[str, Defense]],
    round: Round,
    training: Training,
    *,
    protocol: str,
    defense: str,
    seed: int,
    fresh: Callable[[int], Victim] | None = None,
) -> Utility:
    """Held-out accuracy after federated training with the defenses, from its seeds `seed`, `seed + 1`, ...

    Args:
        victim: the model under audit.  Training is in train mode, where BatchNorm takes the statistics of the
            batch and moves its running ones, and evaluation in eval mode; dropout of image models is off, as
            everywhere in leakaudit.
        data: all the examples there are; they are split here.
        defenses: (spec, defense) in the order they are applied, as for `leakaudit.capture.capture`.
        round: of the audit, before `Defense.round`.  It says how many clients, local steps and passes there
            are and the local learning rate of several steps; the audited batch may be one example, but
            here every local step takes `training.batch_size` of them, more where a defense enlarges
            the audited batch beyond that.
        protocol, defense: specs, for the result.
        fresh: the model initialised from a seed; None to start every seed from the victim's own parameters,
            which is fine-tuning.

    Clients draw from one shuffled pile, so their data are alike (iid), and every example is used once an epoch.
    Equal seeds mean equal splits, batches and starts whatever the defense, so differences between
    defenses are paired.  A diverged training counts with chance, one in the number of classes.
    Epsilon is for all local steps at sample rate clients * batch size / examples trained on.  Accountants assume
    that batches are Poisson samples; where the defense does not sample so, batches are shuffled and the
    reason says it.

    `Utility.accuracy` is None, with a reason, where fewer than 2 examples can be held out, or a defense
    cannot train this model (it raises `InputError`).
    Raises `InputError` for data that do not fit the model.
    """
    began = time.monotonic()
    x, y = medium_of(victim).tensors(victim, data)
    examples = Examples(x, y)
    found = Utility(protocol=protocol, defense=defense, accuracy=None)
    held_out = _held_out(len(data), training.holdout)
    if held_out < 2 or held_out == len(data):
        reason = (
            f"{counted(len(data), 'example')} with holdout={training.holdout} leave {held_out} held out and"
            f" {len(data) - held_out} to train on; at least 2 and 1 are needed"
        )
        return found.model_copy(update={"reason": reason})
    chain = [each for _, each in defenses]
    trained_on = len(data) - held_out
    plan = training_round(round, chain, training, trained_on)
    runs: list[_Run] = []
    try:
        for run_seed in range(seed, seed + training.seeds):
            start = victim if fresh is None else fresh(run_seed).to(victim.device, victim.dtype)
            runs.append(_train_once(start, examples, chain, plan, training, run_seed))
        spent = _epsilon(chain, plan, training, trained_on)
    except InputError as error:
        return found.model_copy(update={"reason": str(error), "seconds": time.monotonic() - began})
    task = medium_of(victim).task(victim)
    reasons = [
        *_diverged(runs, victim),
        *_learnt_nothing(runs, y),
        *([_TOKEN_TASKS[task]] if task in _TOKEN_TASKS else []),
        *([_SHUFFLED] if spent is not None and _poisson_rate(chain, plan) is None else []),
    ]
    return found.model_copy(
        update={
            **summary([run.curve.points[-1][1] for run in runs]),
            **({} if spent is None else {"epsilon": spent[0], "delta": spent[1]}),
            "curves": [run.curve for run in runs],
            "steps": training.steps,
            "reason": "; ".join(reasons),
            "seconds": time.monotonic() - began,
        }
    )


def _learnt_nothing(runs: Sequence[_Run], labels: Tensor) -> list[str]:
    """A word where the accuracy is what a model has that always says the commonest of (N,) classes."""
    if labels.dim() != 1:
        return []
    commonest = float(labels.bincount().max()) / len(labels)
    final = sum(run.curve.points[-1][1] for run in runs) / len(runs)
    if final > commonest + BARELY:
        return []
    return [f"no better than always saying the commonest class, which is right in {commonest:.0%}"]


def training_round(audited: Round, defenses: Sequence[Defense], training: Training, available: int) -> Round:
    """What the clients of one step of the training do: clients, local steps and passes over the same examples
    as in the audited round after `Defense.round`, each local step on a batch of the training.  For a defense that
    samples every local batch itself (`Defense.poisson_rate`) the clients hold all there is, in equal shares.

    Its learning rate is also what the server multiplies the update by.
    """
    defended = audited
    for defense in defenses:
        defended = defense.round(defended)
    enlarged = defended.batch_size if defended.batch_size > audited.batch_size else 1
    size = min(max(training.batch_size, enlarged), available)
    own = size * -(-defended.own_examples // defended.batch_size)
    if _poisson_rate(defenses, defended) is not None:
        own = max(size, available // defended.clients)
    return Round(
        num_examples=defended.clients * own,
        local_steps=defended.local_steps,
        local_batch_size=size,
        learning_rate=training.learning_rate if defended.local_steps == 1 else defended.learning_rate,
        clients=defended.clients,
    )


@dataclass(frozen=True)
class _Run:
    """One seed; `diverged` is the step after which the model was not finite."""

    curve: Curve
    diverged: int | None = None


def _train_once(
    start: Victim,
    examples: Examples,
    defenses: Sequence[Defense],
    round: Round,
    training: Training,
    seed: int,
) -> _Run:
    trained, held_out = _split(examples, training.holdout, seed)
    victim = start.with_mode("train")
    for defense in defenses:
        victim = defense.victim(victim)
    evaluated = victim.with_mode("eval")
    tracked = TrackedClient()
    batches = _batches(round, defenses, len(trained), fork(seed, "utility/batches"))
    client = _client(victim, tracked, defenses, seed)
    points = [(0, accuracy(evaluated, held_out))]
    with seeded(seed, "utility/dropout", victim.device):
        models = train(victim, client, tracked, round, trained, batches, training.momentum)
        for step in range(1, training.steps + 1):
            params, buffers = next(models)
            if not _finite(params):
                later = sorted(each for each in training.evaluated if each >= step)
                chance = 1 / start.num_classes
                curve = Curve(seed=seed, points=points + [(each, chance) for each in later])
                return _Run(curve, diverged=step)
            if step in training.evaluated:
                now = replace(evaluated, params=dict(params), buffers=buffers)
                points.append((step, accuracy(now, held_out)))
    return _Run(Curve(seed=seed, points=points))


def _client(victim: Victim, tracked: TrackedClient, defenses: Sequence[Defense], seed: int) -> ClientUpdate:
    """The defended client.  A defense that replaces the client's SGD (DP-SGD) accepts none but `client_update`."""
    if victim.batch_norms():
        with suppress(InputError):
            return _defended(tracked, defenses, seed)
    return _defended(client_update, defenses, seed)


def _defended(client: ClientUpdate, defenses: Sequence[Defense], seed: int) -> ClientUpdate:
    """Wrapped as `leakaudit.defenses.apply` does, the first innermost, but for many rounds."""
    generator = fork(seed, "utility/defenses")
    for defense in defenses:
        client = defense.training(client, generator)
    return client


def _batches(
    round: Round, defenses: Sequence[Defense], available: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Rows of every step: of the next batches, or, where a defense samples itself, all that the clients have."""
    batches = shuffled(available, round.num_examples, generator)
    return batches if _poisson_rate(defenses, round) is None else repeat(next(batches))


def _poisson_rate(defenses: Sequence[Defense], round: Round) -> float | None:
    rates = [defense.poisson_rate(round) for defense in defenses]
    return next((rate for rate in rates if rate is not None), None)


def _held_out(count: int, share: float) -> int:
    return round(share * count)


def _split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    inside, outside = split(examples.y, share, fork(seed, "utility/split"))
    return examples.rows(inside), examples.rows(outside)


def _finite(params: Params) -> bool:
    return bool(torch.stack([_sum(tensor) for tensor in params.values()]).isfinite().all())


def _sum(tensor: Tensor) -> Tensor:
    """Not finite as soon as one number is not."""
    return (tensor * 0).sum()


def _epsilon(
    defenses: Sequence[Defense], round: Round, training: Training, trained_on: int
) -> tuple[float, float] | None:
    """(epsilon, delta) of the least epsilon that a defense gives; None when none does."""
    delta = training.delta or 1 / trained_on
    rate = _poisson_rate(defenses, round) or min(1.0, round.clients * round.batch_size / trained_on)
    steps = training.steps * round.local_steps
    spent = [each.epsilon(sample_rate=rate, steps=steps, delta=delta) for each in defenses]
    known = [epsilon for epsilon in spent if epsilon is not None]
    return (min(known), delta) if known else None


def _diverged(runs: Sequence[_Run], victim: Victim) -> list[str]:
    steps = [run.diverged for run in runs if run.diverged is not None]
    if not steps:
        return []
    return [
        f"training diverged in {len(steps)} of {counted(len(runs), 'seed')} (first after step {min(steps)});"
        f" accuracy there is chance, 1/{victim.num_classes}"
    ]
