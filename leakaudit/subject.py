"""From files to a `Subject`: the victim, the update, what the adversary can learn by looking."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leakaudit.atomic import sha256_of
from leakaudit.defenses import Defense
from leakaudit.defenses.naming import Parts, adapted, parse_defense
from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import load_checkpoint, parameters_sha256
from leakaudit.formats.loading import SharedUpdate, check_checkpoint, load_update
from leakaudit.formats.manifest import Manifest
from leakaudit.formats.masked import masked, refuse_masked
from leakaudit.formats.phrases import counted, first_line
from leakaudit.formats.reading import read_file
from leakaudit.formats.run_models import model_beside
from leakaudit.inspection import Inspection
from leakaudit.media import medium_of
from leakaudit.messages import message_findings
from leakaudit.models.victim import Victim
from leakaudit.models.zoo import LANGUAGE, MODEL_PLUGINS, MODELS, load_victim, pixels
from leakaudit.randomness import fork
from leakaudit.results import Finding
from leakaudit.rounds import from_own_bases
from leakaudit.threat import View, inferred, known, see


@dataclass(frozen=True)
class Sources:
    """The files and facts an audit starts from.

    Attributes:
        update: the file the client shared.
        model: a spec for `leakaudit.models.zoo`, a module with its checkpoint loaded, or None
            to go by the manifest (built-in and torchvision models only).
        checkpoint: the model as the client downloaded it; None for freshly initialised weights
            of seed 0, which must then match the manifest's hash, or for what `hf:` itself holds.
        before: checkpoint before local training, when `update` is the one after it; without a
            `checkpoint` also the model as downloaded.
        manifest: facts that win over those in the file.
        labels: given to the adversary.
        truth: the private batch, as written by `capture`.
        pool: images or sentences to tell the private ones from; None for crops of the bundled photos, or the
            bundled sentences.
        device: "cpu", "cuda", ..., or "auto".
    """

    update: str | Path
    model: str | nn.Module | None = None
    checkpoint: str | Path | None = None
    before: str | Path | None = None
    manifest: Manifest | None = None
    labels: Sequence[int] | None = None
    truth: str | Path | None = None
    pool: str | Path | None = None
    device: str = "auto"


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one; `InputError` for a device that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # "meta" holds no numbers
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {first_line(error)}") from error


def open_victim(sources: Sources, manifest: Manifest) -> Victim:
    """The model as the client downloaded it, checked against the manifest's hash."""
    loss, reduction = manifest.loss or "cross-entropy", manifest.reduction or "mean"
    if isinstance(sources.model, nn.Module):
        victim = _victim_of_module(sources.model, sources.checkpoint, manifest)
    else:
        spec = sources.model or _spec_from_manifest(manifest)
        checkpoint = sources.checkpoint or sources.before
        language = spec.startswith(LANGUAGE)
        if checkpoint is None and manifest.checkpoint_sha256 is None and not language:
            raise InputError(
                "no checkpoint given, and the update does not say which it belongs to; pass --checkpoint"
            )
        victim = load_victim(
            spec,
            checkpoint=checkpoint,
            num_classes=manifest.num_classes,
            input_shape=manifest.input_shape,
            normalisation=manifest.normalisation,
            mode="eval" if language else manifest.mode or "eval",  # nobody knows the dropout masks
            loss=loss,
            reduction=reduction,
            task=manifest.task,
            lora=_lora(sources, manifest),
        )
    check_checkpoint(manifest, parameters_sha256(victim.module))
    return victim.to(pick_device(sources.device))


def _lora(sources: Sources, manifest: Manifest) -> str | None:
    """A stranger's file may state options of adapters, but name no folder to read."""
    stated = None if sources.manifest is None else sources.manifest.lora
    if stated is None and manifest.lora is not None and Path(manifest.lora).exists():
        raise InputError(f"the update names the folder {manifest.lora!r} of its adapters; pass it as --lora")
    return manifest.lora


def _victim_of_module(module: nn.Module, checkpoint: str | Path | None, manifest: Manifest) -> Victim:
    if manifest.task is not None:
        from leakaudit.models.pretrained import victim_of_pretrained  # transformers, which images do without

        return victim_of_pretrained(
            module,
            manifest.task,
            checkpoint,
            manifest.loss or "cross-entropy",
            manifest.reduction or "mean",
        )
    if manifest.input_shape is None or manifest.num_classes is None:
        raise InputError(
            "input_shape and num_classes are needed with a module, or the task of a language model; pass them in"
            " the manifest"
        )
    if checkpoint is not None:
        load_checkpoint(module, checkpoint)
    return Victim.of(
        module,
        pixels(manifest.input_shape, manifest.normalisation),
        manifest.num_classes,
        manifest.mode or "eval",
        manifest.loss or "cross-entropy",
        manifest.reduction or "mean",
        name=type(module).__name__,
    )


def _spec_from_manifest(manifest: Manifest) -> str:
    """A stranger's file may name a built-in or torchvision model or that of an installed plugin, but no other
    code to import."""
    spec = manifest.model
    if spec is None:
        raise InputError("no model given, and the update does not name one; pass --model")
    if spec.partition(":")[0].strip() not in (*MODELS, *MODEL_PLUGINS, "torchvision"):
        what = "a model of the hub is fetched" if spec.startswith(LANGUAGE) else "code is loaded"
        raise InputError(f"the update names its model {spec!r}; {what} only when you pass it as --model")
    return spec


@dataclass(frozen=True)
class Opened:
    """What the files hold, after looking and before attacking."""

    shared: SharedUpdate
    view: View
    inspection: Inspection
    files: dict[str, str]
    findings: tuple[Finding, ...]


def open_update(sources: Sources, seed: int = 0) -> Opened:
    """Read everything but the truth, inspect it, and give the adversary what it reveals.

    An adversary who is told of defenses adapts to those we know.
    Raises `InputError` for anything that does not fit together.
    """
    raw = read_file(sources.update)
    manifest = raw.manifest.merged(sources.manifest)
    refuse_masked(replace(raw, manifest=manifest))
    sources, beside = _with_model_beside(sources, manifest)
    victim = open_victim(sources, manifest)
    shared = load_update(sources.update, victim, before=sources.before, overrides=sources.manifest)
    device = victim.device
    shared = replace(shared, update=shared.update.to(device))
    labels = None if sources.labels is None else _labels(sources.labels, victim)
    parts, unknown = _stated_defenses(manifest)
    view, inspection = inspected(see(victim, shared, labels), shared, parts, seed)
    view, started = _from_bases(view, sources, manifest)
    remarks = medium_of(victim).remarks(victim, manifest)
    seen = (*beside, *_seen(manifest), *started)
    findings = (*_findings(shared, inspection), *seen, *unknown, *remarks, *message_findings(manifest))
    return Opened(shared, view, inspection, _hashes(sources, shared), findings)


def look(sources: Sources, seed: int = 0) -> list[Finding]:
    """All that a file gives away without an attack; a masked one needs no model for that, and is not opened.

    Raises `InputError` as `open_update` does.
    """
    raw = read_file(sources.update)
    hidden = masked(replace(raw, manifest=raw.manifest.merged(sources.manifest)))
    if hidden is not None:
        return message_findings(raw.manifest.merged(sources.manifest), hidden)
    opened = open_update(sources, seed)
    return [*opened.inspection.findings, *opened.findings]


def _with_model_beside(sources: Sources, manifest: Manifest) -> tuple[Sources, tuple[Finding, ...]]:
    """With the checkpoint of the run folder that the update lies in, where none was given and there is one."""
    given = sources.checkpoint or sources.before or isinstance(sources.model, nn.Module)
    if given or manifest.checkpoint_sha256 is None:
        return sources, ()
    path = model_beside(sources.update, manifest.checkpoint_sha256)
    if path is None:
        return sources, ()
    text = f"No checkpoint was given; {path} lies beside the update and has the hash that it states."
    return replace(sources, checkpoint=path), (Finding(name="checkpoint", severity="info", text=text),)


def _from_bases(view: View, sources: Sources, manifest: Manifest) -> tuple[View, tuple[Finding, ...]]:
    """The view of an adversary who has the models that the clients of a cohort started from, where they differ."""
    hashes = manifest.bases or ()
    if len({*hashes, manifest.checkpoint_sha256 or hashes[0]} if hashes else ()) < 2:
        return view, ()
    files = {sha256: model_beside(sources.update, sha256) for sha256 in hashes}
    count = counted(len(files), "model")
    text = f"The {len(hashes)} clients did not all start from the model in use, but from {count}"
    lacking = sum(path is None for path in files.values())
    if lacking:
        text += (
            f", of which {lacking} are not in the run folder: the attacks take them all for the one in use."
        )
        return view, (Finding(name="models", severity="warning", text=text),)
    known = {sha256: _parameters(view.victim, path, sha256) for sha256, path in files.items() if path}
    text += ", found beside the update by their hashes: each client is simulated from its own."
    client = from_own_bases(view.client, [known[sha256] for sha256 in hashes])
    return replace(view, client=client), (Finding(name="models", severity="info", text=text),)


def _parameters(victim: Victim, path: Path, sha256: str) -> dict[str, Tensor]:
    """Of the model in the file, those that the victim trains; `InputError` where it is another model."""
    module = copy.deepcopy(victim.module)
    found = load_checkpoint(module, path)
    if found != sha256:
        raise InputError(f"{path} holds a model of hash {found[:12]}..., the update names {sha256[:12]}...")
    held = dict(module.named_parameters())
    return {name: held[name].detach() for name in victim.params}


def _seen(manifest: Manifest) -> tuple[Finding, ...]:
    """Who saw the update, in which system, and what of it the round does not say."""
    findings = []
    if manifest.role is not None:
        system = "" if manifest.system is None else f" of {manifest.system}"
        step = "" if manifest.step is None else f" at step {manifest.step}"
        text = f"Seen by the {manifest.role}{system}{step}" + (f": {manifest.note}" if manifest.note else "")
        findings.append(Finding(name="view", severity="info", text=text.rstrip(".") + "."))
    if manifest.exact is False:
        text = (
            "The update is not what the stated round alone gives (a residual of older steps, a mask, or defenses"
            " of each client in a cohort): an attack that fails on it shows nothing."
        )
        findings.append(Finding(name="round", severity="warning", text=text))
    return tuple(findings)


def inspected(
    view: View, shared: SharedUpdate, known: Parts, seed: int, *, unaware: bool = False
) -> tuple[View, Inspection]:
    """The view of an adversary who has inspected the update and knows these defenses, and what the update gives
    away by itself.

    One who is `unaware` that there may be any makes nothing of noise that the inspection finds.
    """
    inspection = medium_of(view.victim).inspect(
        replace(view, knowledge=adapted(view, known).knowledge),  # that there is noise, or no scale
        buffers_after=shared.buffers or None,
        raw=shared.raw,
        dtypes=shared.dtypes,
        generator=fork(seed, "inspection"),
    )
    if unaware:
        inspection = replace(inspection, noise_std=None)
    return adapted(learn(view, inspection), known), inspection


def _stated_defenses(manifest: Manifest) -> tuple[Parts, tuple[Finding, ...]]:
    """The defenses that the file states and we know, and a note for each of the others."""
    parts: list[tuple[str, Defense]] = []
    notes = []
    for spec in manifest.defenses or ():
        try:
            parts += parse_defense(spec)
        except InputError as error:
            text = f"The file states a defense that the attacks cannot allow for: {error}"
            notes.append(Finding(name="defense", severity="info", text=text))
    return tuple(parts), tuple(notes)


def _hashes(sources: Sources, shared: SharedUpdate) -> dict[str, str]:
    """Name -> sha256 of every file; with its folders, where another file has the same name."""
    files = {Path(sources.update): shared.sha256}
    files |= {
        Path(path): sha256_of(path) for path in (sources.checkpoint, sources.before) if path is not None
    }
    names = [path.name for path in files]
    return {path.name if names.count(path.name) == 1 else str(path): hash for path, hash in files.items()}


def _findings(shared: SharedUpdate, inspection: Inspection) -> tuple[Finding, ...]:
    """What reading the file showed.  A guess is a warning, unless the last layer proves that it is right."""
    proof = inspection.consistency
    proven = proof is not None and proof.single_example and proof.belongs is True and proof.factor > 0
    guesses = () if proven else shared.guesses
    warnings = [Finding(name="file", severity="warning", text=text) for text in guesses]
    notes = [Finding(name="file", severity="info", text=note) for note in shared.notes]
    manifest = shared.manifest
    if shared.has_scale and manifest.reduction is None and manifest.num_examples not in (None, 1):
        text = (
            "The file does not say whether the loss is the mean or the sum over the batch; the mean was"
            " assumed (state reduction=mean or reduction=sum)."
        )
        warnings.append(Finding(name="loss reduction", severity="warning", text=text))
    return (*notes, *warnings)


def learn(view: View, inspection: Inspection) -> View:
    """The view with what the inspection found out; what the manifest says stays as it is."""
    knowledge, round = view.knowledge, view.round
    changes: dict[str, Any] = {}
    if knowledge.batch_size.value is None and inspection.batch_size_hint is not None:
        changes["batch_size"] = inferred(inspection.batch_size_hint, "rank of the last layer's gradient")
        count, size = inspection.batch_size_hint, round.local_batch_size
        round = round.of(count, size and min(size, count))
    if knowledge.local_steps.value is None and inspection.local_steps is not None:
        changes["local_steps"] = inferred(inspection.local_steps, "num_batches_tracked")
        round = replace(round, local_steps=inspection.local_steps)
    if knowledge.labels.value is None and inspection.labels is not None:
        labels = inspection.labels.labels.to(view.victim.device)
        if len(labels) == round.num_examples:
            changes["labels"] = inferred(labels, f"last layer's gradient, {inspection.labels.method}")
    if knowledge.mode.value is None and inspection.mode is not None:
        changes["mode"] = inferred(inspection.mode, "num_batches_tracked")
        view = replace(view, victim=view.victim.with_mode(inspection.mode))
    if knowledge.noise_std.value is None and inspection.noise_std is not None:
        changes["noise_std"] = inferred(
            inspection.noise_std, "class sums of the last layer's gradient, which vanish without noise"
        )
    if inspection.statistics:
        changes["statistics"] = known(inspection.statistics, "leaked BatchNorm buffers")
    if view.scale_free and inspection.consistency is not None and inspection.consistency.unscaled:
        proof = "the last layer's gradient fits one example at factor 1"
        changes["scale"] = inferred(True, proof)
        if knowledge.local_steps.value is None:
            changes["local_steps"] = inferred(1, proof)
    return replace(view, knowledge=replace(knowledge, **changes), round=round)


def _labels(labels: Sequence[int], victim: Victim) -> Tensor:
    task = medium_of(victim).task(victim)
    if task not in (None, "classification"):
        raise InputError(
            f"labels are of classification; those of task {task} are the private tokens themselves"
        )
    wrong = [label for label in labels if not 0 <= label < victim.num_classes]
    if wrong:
        raise InputError(f"label {wrong[0]} is not a class; accepted: 0 to {victim.num_classes - 1}")
    return torch.tensor(list(labels), dtype=torch.int64, device=victim.device)


def private_source(
    model: str, data: str | Path | None, text: str | Path | None, max_length: int | None
) -> str | Path:
    """Where the private examples are; `InputError` unless they are of the kind the model takes."""
    source = data if text is None else text
    if source is None or (data is not None and text is not None):
        given = "no private data" if source is None else f"images {data} and sentences {text}"
        raise InputError(f"{given} given; accepted: one of data (images) and text (sentences)")
    if model.startswith(LANGUAGE) != (text is not None):
        takes = "images, accepted: data" if text is not None else "text, accepted: text"
        raise InputError(f"model {model} takes {takes}")
    if text is None and max_length is not None:
        raise InputError(f"max length {max_length} is of sentences; accepted with text")
    return source
