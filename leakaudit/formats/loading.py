"""A file that a client shared -> the pseudo-gradient it holds.

This is the one place where sign and learning rate are applied (see `leakaudit.update`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from leakaudit.errors import InputError
from leakaudit.formats.manifest import Manifest
from leakaudit.formats.masked import refuse_masked
from leakaudit.formats.phrases import counted, listing
from leakaudit.formats.reading import RawFile, read_file
from leakaudit.formats.resolve import Resolved, resolve
from leakaudit.models.victim import Victim
from leakaudit.update import Update

_CLOSE = 0.5
"""Weights after a few local steps differ from the checkpoint by far less than half its length;
a gradient, being unrelated to the weights, by about the root of the sum of squares."""
_SAME = 1e-2
"""Relative difference up to which two copies of a checkpoint (one perhaps in half precision) are the same."""


@dataclass(frozen=True)
class SharedUpdate:
    """What a file gives the adversary, under the victim's names.

    Attributes:
        update: the pseudo-gradient, float32 on the CPU, in the victim's parameter order, of
            trainable parameters only.  For a delta without a learning rate it is
            before - after, and `has_scale` is False.
        manifest: the file's, with overrides applied; what it does not say stays None.
        buffers: buffers found in the file, with their values after training.
        has_scale: whether the length of `update` means something.
        missing: trainable parameters that were not shared.
        notes: how the file was understood and what was assumed, in sentences.
        guesses: assumptions without which every attack may fail, in sentences.
        dtypes: parameter name -> type in the file ("float16", ...).
        sha256: of the file.
        raw: the numbers as in the file, before sign and learning rate are applied.
        rounding: relative error |error| / |update| to expect from the precision the numbers
            were stored in; large where a small step was taken between large weights.
    """

    update: Update
    manifest: Manifest
    buffers: dict[str, Tensor]
    has_scale: bool
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    dtypes: dict[str, str]
    sha256: str
    raw: Update
    rounding: float = 0.0
    guesses: tuple[str, ...] = ()


def load_update(
    path: str | Path,
    victim: Victim,
    *,
    before: str | Path | None = None,
    overrides: Manifest | None = None,
) -> SharedUpdate:
    """Read a shared update: a gradient, a delta, or weights after local training.

    Args:
        path: .safetensors, .npz, .pt, .pth, .th or .bin; see `leakaudit.formats.reading`.
        victim: the model as the client downloaded it.
        before: checkpoint before local training, when `path` is the one after it.
        overrides: manifest fields that win over the file's.

    What the file is comes from `manifest.kind`; weights are subtracted from the victim's.
    Without a kind a state dict of weights is recognised by its distance to the victim's, and
    anything else is read as a gradient whose scale is unknown.  A delta must say its sign,
    because read the wrong way round every attack on it would fail and look like safety.

    Raises `InputError` (`AmbiguityError` where several readings fit) with one line saying what
    is wrong.
    """
    raw = read_file(path)
    raw = replace(raw, manifest=raw.manifest.merged(overrides))
    refuse_masked(raw)
    found = resolve(raw, victim)
    values = _trainable(found, victim, raw)
    reading = _read_meaning(raw, found, values, victim, before)
    if not any(bool(tensor.any()) for tensor in reading.update.values()):
        raise InputError(f"{raw.path}: the update is zero everywhere; nothing was trained or shared")
    if not reading.update.is_finite():
        raise InputError(
            f"{raw.path}: divided by learning_rate={raw.manifest.learning_rate} the update overflows"
        )
    return SharedUpdate(
        update=reading.update,
        manifest=raw.manifest,
        buffers=reading.buffers,
        has_scale=reading.has_scale,
        missing=found.missing,
        notes=(*found.notes, *reading.notes),
        dtypes={name: raw.dtypes.get(found.sources[name], "float32") for name in values},
        sha256=raw.sha256,
        raw=values,
        rounding=reading.rounding,
        guesses=reading.guesses,
    )


def check_checkpoint(manifest: Manifest, checkpoint_sha256: str) -> None:
    """Raise `InputError` when the manifest names another checkpoint than the one in use."""
    stated = manifest.checkpoint_sha256
    if stated is not None and stated.lower() != checkpoint_sha256.lower():
        raise InputError(
            f"the update was made with checkpoint {stated[:12]}..., the checkpoint in use is"
            f" {checkpoint_sha256[:12]}...; pass the checkpoint the client downloaded"
        )


@dataclass(frozen=True)
class _Reading:
    update: Update
    has_scale: bool
    buffers: dict[str, Tensor]
    notes: tuple[str, ...]
    rounding: float
    guesses: tuple[str, ...] = ()


def _read_meaning(
    raw: RawFile, found: Resolved, values: Update, victim: Victim, before: str | Path | None
) -> _Reading:
    kind, notes = _kind(raw)
    if kind == "gradient" and (raw.manifest.local_steps or 1) > 1:
        raise InputError(
            f"{raw.path} says kind=gradient and local_steps={raw.manifest.local_steps}; a gradient is taken"
            " at one point: accepted are local_steps=1, or kind=delta with its sign and learning_rate"
        )
    if before is not None:
        if kind == "gradient" or (kind == "delta" and not _looks_like_weights(found, victim)):
            raise InputError(f"{raw.path} holds a {kind}, so there is no checkpoint before it to subtract")
        return _from_weights(raw, found, values, _read_before(before, values, victim), notes)
    if kind == "delta":
        return _from_delta(raw, found, values, victim, notes)
    if kind == "weights":
        notes = (*notes, f"The file holds weights after training.{_far(found, victim)}")
        return _from_weights(raw, found, values, _of_victim(victim, values), notes)
    if kind == "gradient":
        return _Reading(values, True, found.buffers, notes, _storage_rounding(raw, found, values))
    if _looks_like_weights(found, victim):
        notes = (
            *notes,
            "The file does not say what it is; it holds weights, so the checkpoint in use was taken as the"
            " model before training." + _far(found, victim),
        )
        return _from_weights(raw, found, values, _of_victim(victim, values), notes)
    return _Reading(
        values,
        False,
        found.buffers,
        (
            *notes,
            "The file does not say what it is; it was read as a gradient of unknown scale"
            " (state kind=gradient or kind=delta to use its scale).",
        ),
        _storage_rounding(raw, found, values),
        (
            "Nothing shows that the file is not a delta after - before, on which every attack would fail;"
            " state kind=gradient, or kind=delta and its sign.",
        ),
    )


def _kind(raw: RawFile) -> tuple[str | None, tuple[str, ...]]:
    """What the manifest says, else what the key around the tensors says."""
    if raw.manifest.kind is not None:
        return raw.manifest.kind, ()
    if raw.nested_under in ("gradients", "gradient", "grads", "grad"):
        return "gradient", (f"Taken as a gradient, because the file keeps it under {raw.nested_under!r}.",)
    if raw.nested_under == "delta":
        return "delta", ("Taken as a delta, because the file keeps it under 'delta'.",)
    return None, ()


def _trainable(found: Resolved, victim: Victim, raw: RawFile) -> Update:
    names = [name for name in victim.trainable() if name in found.params]
    if not names:
        raise InputError(f"{raw.path} holds no trainable parameter of model {victim.name}")
    return Update({name: found.params[name] for name in names})


def _from_delta(
    raw: RawFile, found: Resolved, values: Update, victim: Victim, notes: tuple[str, ...]
) -> _Reading:
    sign = raw.manifest.sign
    if sign is None:
        raise InputError(
            f"{raw.path} is a delta without a sign; state sign=before-minus-after or sign=after-minus-before"
            " (Flower, NVFlare and TFF subtract before from after)"
        )
    direction = 1 if sign == "before-minus-after" else -1
    buffers, buffer_notes = _trained_buffers(raw, found, victim, -direction)
    update, has_scale, scale_notes = _scaled(values.map(lambda t: t.double() * direction), raw)
    rounding = math.hypot(_storage_rounding(raw, found, values), _subtraction_rounding(victim, values))
    return _Reading(update, has_scale, buffers, (*notes, *buffer_notes, *scale_notes), rounding)


def _from_weights(
    raw: RawFile, found: Resolved, after: Update, before: Update, notes: tuple[str, ...]
) -> _Reading:
    difference = before.map(Tensor.double) - after.map(Tensor.double)
    update, has_scale, scale_notes = _scaled(difference, raw)
    error = torch.stack(
        [(_roundoff(raw, found, name) * tensor.double()).square().sum() for name, tensor in after.items()]
    )
    length = float(difference.norm())
    rounding = float(error.sum().sqrt()) / length if length > 0 else 0.0
    if rounding > 1e-3:
        notes = (
            *notes,
            f"Rounding of the weights leaves a relative error of about {rounding:.1e} in the delta.",
        )
    return _Reading(update, has_scale, found.buffers, (*notes, *scale_notes), rounding)


def _scaled(difference: Update, raw: RawFile) -> tuple[Update, bool, tuple[str, ...]]:
    """before - after -> pseudo-gradient, when the learning rate is known."""
    rate = raw.manifest.learning_rate
    if rate is None:
        note = "The learning rate is unknown, so the update has a direction but no scale."
        return difference.to(torch.float32), False, (note,)
    return (difference / rate).to(torch.float32), True, ()


def _read_before(path: str | Path, values: Update, victim: Victim) -> Update:
    raw = read_file(path)
    found = resolve(raw, victim)
    lacking = [name for name in values if name not in found.params]
    if lacking:
        raise InputError(f"{path} lacks {counted(len(lacking), 'parameter')} of the pair: {listing(lacking)}")
    before = Update({name: found.params[name] for name in values})
    apart = _distance(before, _of_victim(victim, values))
    if apart > _SAME:
        raise InputError(
            f"{path} is not the checkpoint in use (relative difference {apart:.2g}); the model must be loaded"
            " from the checkpoint before local training"
        )
    return before


def _of_victim(victim: Victim, values: Update) -> Update:
    params = {**victim.params, **victim.frozen}
    return Update({name: params[name].detach().cpu() for name in values})


def _looks_like_weights(found: Resolved, victim: Victim) -> bool:
    """Values close to the victim's; or, with BatchNorm averages beside them, of a similar length."""
    values = Update(found.params)
    reference = _of_victim(victim, values)
    if _distance(values, reference) < _CLOSE:
        return True
    averages = [tensor for name, tensor in found.buffers.items() if name.endswith("running_var")]
    plausible = bool(averages) and all(bool((tensor >= 0).all()) for tensor in averages)
    return plausible and _length(values) > _CLOSE * _length(reference)


def _far(found: Resolved, victim: Victim) -> str:
    values = Update(found.params)
    apart = _distance(values, _of_victim(victim, values))
    if apart < _CLOSE:
        return ""
    return f" They are far from it (relative difference {apart:.2g}): does the checkpoint belong to them?"


def _length(values: Update) -> float:
    return float(values.map(Tensor.double).norm())


def _distance(values: Update, reference: Update) -> float:
    """|values - reference| / |reference|."""
    length = _length(reference)
    apart = _length(values.map(Tensor.double) - reference.map(Tensor.double))
    return apart / length if length > 0 else float("inf")


def _trained_buffers(
    raw: RawFile, found: Resolved, victim: Victim, direction: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Buffers after training from a delta file, which holds either them or their differences."""
    if not found.buffers or raw.manifest.buffers is not None:
        return found.buffers, ()
    moved = {
        name: victim.buffers[name].cpu() + direction * tensor.to(victim.buffers[name].dtype)
        for name, tensor in found.buffers.items()
    }
    if any(name.endswith("running_var") and bool((t < 0).any()) for name, t in moved.items()):
        return found.buffers, ("Buffers in the file were taken as values after training.",)
    return moved, ("Buffers in the file were taken as differences, like the parameters beside them.",)


def _roundoff(raw: RawFile, found: Resolved, name: str) -> float:
    """Largest relative error of rounding to the type in the file; never below float32's."""
    stored: torch.dtype = getattr(torch, raw.dtypes.get(found.sources[name], "float32"))
    coarse = stored if stored.is_floating_point else torch.float32
    return max(torch.finfo(coarse).eps, torch.finfo(torch.float32).eps) / 2


def _subtraction_rounding(victim: Victim, values: Update) -> float:
    """Relative error of a delta from the float32 weights after training that it was computed from."""
    length = _length(values)
    error = torch.finfo(torch.float32).eps / 2 * _length(_of_victim(victim, values))
    return error / length if length > 0 else 0.0


def _storage_rounding(raw: RawFile, found: Resolved, values: Update) -> float:
    """Relative error of `values` from being stored in the file's types."""
    errors = [float((_roundoff(raw, found, name) * t.double()).square().sum()) for name, t in values.items()]
    length = _length(values)
    return sum(errors) ** 0.5 / length if length > 0 else 0.0
