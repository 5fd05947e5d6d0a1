"""Inference from names and files: what `leakaudit infer` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leakaudit.atomic import writable_folder, write_atomically
from leakaudit.capture import refuse_idle_examples, round_of
from leakaudit.defenses.naming import parse_all
from leakaudit.errors import InputError
from leakaudit.inference.experiment import Plan, infer_membership
from leakaudit.inference_results import INFERENCE_NAME, InferenceResult, parse_limits
from leakaudit.media import medium_of
from leakaudit.models.victim import Mode
from leakaudit.models.zoo import load_victim, parse_normalisation
from leakaudit.numerics import faithful
from leakaudit.progress import OnTrial
from leakaudit.subject import pick_device, private_source


def infer(
    model: str,
    data: str | Path | None = None,
    *,
    text: str | Path | None = None,
    task: str | None = None,
    lora: str | None = None,
    max_length: int | None = None,
    checkpoint: str | Path | None = None,
    attacks: Sequence[str] = (),
    batch_size: int = 1,
    num_examples: int | None = None,
    local_steps: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    mode: Mode = "eval",
    normalisation: str = "none",
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    defenses: Sequence[str] = (),
    candidates: int | None = None,
    reference: int | None = None,
    start: int = 0,
    trials: int = 20,
    trait: str | None = None,
    policy: str = "",
    seed: int = 0,
    device: str = "cpu",
    out: str | Path | None = None,
    force: bool = False,
    on_trial: OnTrial | None = None,
    command: str = "",
) -> InferenceResult:
    """Say who was in the batch, and what they have in common, from updates of records in a file.

    Args:
        model, checkpoint, task, lora, mode, normalisation, input_shape, num_classes: see
            `leakaudit.models.zoo.load_victim`.
        data or text: all records: candidates first, then the adversary's own; `start` of them are passed over.
        attacks, candidates, reference, trials, trait, policy: see `leakaudit.inference.experiment.Plan`.
        batch_size, num_examples, local_steps or epochs, learning_rate: the round; several steps need a rate.
        defenses: specs, applied in order; the adversary knows them.
        out: folder to write `inference.json` to; None writes nothing.  It is refused when it holds one, unless
            `force`.

    Raises `InputError` for anything that does not fit, before anything is computed.
    """
    if policy:
        parse_limits(policy)
    path = None if out is None else _target(out, force)
    parts = parse_all(defenses)
    round = round_of(batch_size, num_examples, local_steps, epochs, learning_rate)
    refuse_idle_examples(round)
    try:
        plan = Plan(tuple(attacks), candidates, reference, trials, trait, policy, seed, command)
    except ValueError as error:
        raise InputError(str(error)) from error
    source = private_source(model, data, text, max_length)
    victim = load_victim(
        model,
        checkpoint=checkpoint,
        num_classes=num_classes,
        input_shape=input_shape,
        normalisation=parse_normalisation(normalisation),
        mode=mode,
        seed=seed,
        task=task,
        lora=lora,
    ).to(pick_device(device))
    wanted = None if candidates is None or reference is None else candidates + reference
    records = medium_of(victim).load(source, victim, wanted, start=start, max_length=max_length, seed=seed)
    with faithful(victim.device):
        result = infer_membership(victim, records, round, parts, plan, on_trial)
    if path is not None:
        write_atomically(path, result.to_json().encode())
    return result


def _target(out: str | Path, force: bool) -> Path:
    path = writable_folder(out) / INFERENCE_NAME
    if path.exists() and not force:
        raise InputError(f"{path} exists; pass --force to overwrite it, or choose another folder")
    return path
