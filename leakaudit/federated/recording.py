"""What each party sees, as files that `inspect`, `attack` and `defend` take unchanged.

    views/NAME.safetensors      a shared update with its manifest
    views/index.json            who saw what; see `leakaudit.federated.views`
    models/HASH.safetensors     the models that clients started from, each once
    truth/NAME.safetensors      the private examples, where the task has any

The truth is for scoring only: whoever hands on the views leaves that folder out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from leakaudit.atomic import write_atomically
from leakaudit.capture import Captured, manifest_fields, write_captured
from leakaudit.defenses import Defense
from leakaudit.defenses.naming import parse_all
from leakaudit.defenses.secure_aggregation import SecureAggregation
from leakaudit.errors import InputError
from leakaudit.federated.seen import Member, Observation
from leakaudit.federated.task import Task
from leakaudit.federated.views import INDEX_NAME, ViewIndex, ViewMember, ViewRecord
from leakaudit.formats.checkpoint import parameters_sha256, save_checkpoint
from leakaudit.formats.manifest import build_manifest
from leakaudit.formats.run_models import MODELS, TRUTH, VIEWS, model_file
from leakaudit.media import medium_of
from leakaudit.models.victim import Params, Victim
from leakaudit.rounds import Round
from leakaudit.update import Update


class ViewWriter:
    """Writes observations to a run folder as they are made; `write` is the sink of a `Seen`.

    Args:
        folder: of the run; made when missing.  Views of an earlier run in it are forgotten.
        task: the model, and the private examples for the truth files.
        model: spec of the model for the manifest, see `leakaudit.models.zoo`.
        system: name of the training system, for the manifest.

    Parameters and updates are written in float32, which is what files are read as.
    """

    def __init__(self, folder: Path, task: Task, model: str, system: str | None = None) -> None:
        self._folder, self._task, self._system = folder, task, system
        self._victim = replace(task.victim, name=model)
        self._records: list[ViewRecord] = []
        self._write_index()

    def records(self) -> tuple[ViewRecord, ...]:
        """What was written so far, in order."""
        return tuple(self._records)

    def write(self, observation: Observation) -> None:
        """Write the files of one observation, then the index.  `InputError` where the folder cannot be written."""
        name = self._unused(observation.name)
        finite = observation.update.is_finite()
        base = common_base(observation)
        note = observation.note if finite else f"{observation.note} (not finite, so not written)".lstrip()
        record = ViewRecord(
            name=name,
            role=observation.role,
            observer=observation.observer,
            step=observation.step,
            time=observation.time,
            members=[_member(member) for member in observation.members],
            defenses=list(observation.defenses),
            exact=observation.exact and stated_exactly(observation),
            note=note,
            model=f"{MODELS}/{model_file(self._keep_model(base))}",
            update=self._keep_update(name, observation, base) if finite else None,
            truth=self._keep_truth(name, observation.members),
        )
        self._records.append(record)
        self._write_index()

    def _unused(self, name: str) -> str:
        """A client may take part twice in one step of an asynchronous server."""
        taken = {record.name for record in self._records}
        names = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
        return next(free for free in names if free not in taken)

    def _write_index(self) -> None:
        index = ViewIndex(system=self._system, model=self._victim.name, views=self._records)
        write_atomically(
            self._folder / INDEX_NAME, index.model_dump_json(indent=1).encode(), make_folder=True
        )

    def _keep_update(self, name: str, observation: Observation, base: Params) -> str:
        update, round = seen_round(observation)
        update = update.detach().to("cpu", torch.float32)
        order = [parameter for parameter in self._victim.params if parameter in update]
        update = update.select(order)
        victim = self._with(base)
        fields = manifest_fields(victim, round or Round(1), update, {}, _known_defenses(observation.defenses))
        if not stated_exactly(observation):
            fields["noise_std"] = None  # of each client, not of their sum
        if round is None:
            unsaid = ("num_examples", "local_batch_size", "local_steps", "clients", "sizes", "weights")
            fields |= dict.fromkeys((*unsaid, "client_steps"))
        members = observation.members
        fields |= {
            "defenses": observation.defenses,
            "system": self._system,
            "role": observation.role,
            "step": observation.step,
            "staleness": tuple(member.staleness for member in members) if round and members else None,
            "bases": self._bases(observation) if round else None,
            "exact": observation.exact and stated_exactly(observation),
            "note": observation.note or None,
        }
        path = f"{VIEWS}/{name}.safetensors"
        write_captured(self._folder / path, Captured(update, {}, build_manifest(fields)))
        return path

    def _bases(self, observation: Observation) -> tuple[str, ...] | None:
        """Hashes of the models of several members, each kept in a file, where they differ."""
        if len(observation.members) < 2 or not _differ(observation):
            return None
        return tuple(self._keep_model(member.base or observation.base) for member in observation.members)

    def _keep_model(self, base: Params) -> str:
        """Write the model once, and return the hash of its parameters."""
        victim = self._with(base)
        parameters = {**victim.params, **victim.frozen}
        found = parameters_sha256(parameters)
        path = self._folder / MODELS / model_file(found)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            held = {**parameters, **victim.buffers}
            save_checkpoint({name: held[name] for name in victim.module.state_dict() if name in held}, path)
        return found

    def _with(self, base: Params) -> Victim:
        """The model with these parameters, in float32."""

        def single(tensors: Params) -> dict[str, torch.Tensor]:
            return {
                name: tensor.detach().float() if tensor.is_floating_point() else tensor
                for name, tensor in tensors.items()
            }

        victim = self._victim
        params = {name: base[name] for name in victim.params}
        return replace(
            victim, params=single(params), frozen=single(victim.frozen), buffers=single(victim.buffers)
        )

    def _keep_truth(self, name: str, members: Sequence[Member]) -> str | None:
        data = self._task.data
        if data is None or not members:
            return None
        rows = [int(row) for member in members for row in member.rows]
        path = self._folder / TRUTH / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        medium_of(self._victim).save_truth(path, data.rows(rows))
        return f"{TRUTH}/{name}.safetensors"


def _member(member: Member) -> ViewMember:
    return ViewMember(
        client=member.client,
        examples=member.round.num_examples,
        local_steps=member.round.local_steps,
        weight=member.weight,
        staleness=member.staleness,
    )


def _known_defenses(specs: Sequence[str]) -> list[tuple[str, Defense]]:
    """The defenses named; none of them where one has no name that we know, so that nothing is taken for known."""
    try:
        return list(parse_all(specs))
    except InputError:
        return []


def seen_round(observation: Observation) -> tuple[Update, Round | None]:
    """The update as a file states it, and what its members did together; None where a manifest cannot say that.

    The update of a single client, and of several without defenses, is divided by the sum of their weights, which
    whoever applied it knows: then it is the client's own, or a mean.
    """
    members, total = observation.members, sum(member.weight for member in observation.members)
    if members and not any(member.weight for member in members):
        return observation.update, None  # nothing is left of them
    if len(members) > 1 and (observation.defenses or not total > 0 or abs(total - 1) < 1e-9):
        return observation.update, cohort(members)
    if total in (0, 1):
        return observation.update, members[0].round if members else None
    together = [replace(member, weight=member.weight / total) for member in members]
    return observation.update / total, members[0].round if len(members) == 1 else cohort(together)


def stated_exactly(observation: Observation) -> bool:
    """Whether a manifest can say what was done: one round, and defenses that acted on what is seen.

    What is left of secure aggregation in a chain acts on each client; other defenses of a cohort's clients would be
    read as acting on their sum.
    """
    several = len(observation.members) > 1
    on_each = several and observation.defenses and not any(map(_sums_up, observation.defenses))
    return not on_each and (seen_round(observation)[1] is not None or not observation.members)


def _sums_up(spec: str) -> bool:
    return any(isinstance(defense, SecureAggregation) for _, defense in _known_defenses([spec]))


def cohort(members: Sequence[Member]) -> Round | None:
    """What several clients did together; None for nobody, or where learning rates or batch sizes differ."""
    if not members:
        return None
    rounds = [member.round for member in members]
    size = max(round.batch_size for round in rounds)
    alike = all(
        round.clients == 1
        and round.learning_rate == rounds[0].learning_rate
        and round.batch_size == min(size, round.num_examples)
        for round in rounds
    )
    if not alike:
        return None
    sizes = tuple(round.num_examples for round in rounds)
    steps = tuple(round.local_steps for round in rounds)
    weights = tuple(member.weight for member in members)
    return Round(
        num_examples=sum(sizes),
        local_steps=max(steps),
        local_batch_size=size if size < max(sizes) else None,
        learning_rate=rounds[0].learning_rate,
        clients=len(members),
        sizes=sizes if len(set(sizes)) > 1 else None,
        weights=weights if any(abs(w * len(members) - 1) > 1e-9 for w in weights) else None,
        client_steps=steps if len(set(steps)) > 1 else None,
    )


def common_base(observation: Observation) -> Params:
    """The model that the members started from; where they differ, the one of the observation."""
    if observation.members and not _differ(observation):
        return observation.members[0].base or observation.base
    return observation.base


def _differ(observation: Observation) -> bool:
    """Whether the members started from different models; the same numbers twice are one model."""
    first, *others = [member.base or observation.base for member in observation.members]
    return any(
        other is not first and any(not torch.equal(other[name], first[name]) for name in first)
        for other in others
    )
