"""`save_update`: capture in one line of anybody's training loop; and files of named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leakaudit import __version__
from leakaudit.atomic import write_atomically
from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import parameters_sha256
from leakaudit.formats.manifest import MANIFEST_KEY, Manifest, build_manifest
from leakaudit.formats.names import strip_prefixes
from leakaudit.formats.phrases import counted, listing, quoted

CREATED_BY = f"leakaudit {__version__}"


def save_update(
    path: str | Path,
    model: nn.Module,
    *,
    before: nn.Module | Mapping[str, Tensor] | None = None,
    learning_rate: float | None = None,
    local_steps: int | None = None,
    num_examples: int | None = None,
    batch_size: int | None = None,
    loss: str | None = None,
    reduction: Literal["mean", "sum"] | None = None,
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
    input_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    task: str | None = None,
    lora: str | None = None,
    model_name: str | None = None,
    checkpoint_sha256: str | None = None,
    defenses: Sequence[str] | None = None,
    noise_std: float | None = None,
    buffers: bool = False,
) -> Path:
    """Save what `model` would share, as .safetensors with a manifest.

    After `loss.backward()`, and before the optimiser's step clears or changes anything:

        leakaudit.save_update("shared.safetensors", model, batch_size=8)

    Or, with a copy of the weights from before local training, the delta:

        before = copy.deepcopy(model.state_dict())
        ...                                           # local training
        leakaudit.save_update("shared.safetensors", model, before=before, learning_rate=0.1, local_steps=5)

    Args:
        before: module or state dict before training; saved is before - after, of trainable parameters.
        learning_rate: of the local SGD; without it a delta has no scale.
        local_steps: SGD steps between `before` and now; a gradient has 1.
        num_examples: private examples behind the update; for a gradient `batch_size` is enough.
        batch_size: examples of one step.
        loss, reduction: "cross-entropy" and "mean" or "sum".
        normalisation: (mean, std) a channel, of pixels in [0, 1].
        input_shape: (C, H, W).
        task, lora: of a language model, see `leakaudit.models.language`; of adapters the options, such as
            "rank=8,alpha=16,targets=query+value".
        num_classes, model_name, checkpoint_sha256, defenses, noise_std: see `Manifest`.
        buffers: also save BatchNorm statistics and the like.

    Nothing is guessed: what is not given stays unknown, except what the model itself says,
    which is its mode, and for a delta the hash of `before`.  Names lose wrapper prefixes
    (DataParallel, torch.compile, Opacus); tied parameters are saved once, under their first
    name; sparse gradients are saved dense; types are kept.

    Returns the path.  Raises `InputError` when there is no gradient, when `before` is the live
    weights or lacks some, for NaN or infinite values, or when the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"updates are saved as .safetensors, got {quoted(path.name)}")
    tensors = _gradients(model) if before is None else _delta(model, before)
    shared_buffers = _buffers(model) if buffers else {}
    manifest = build_manifest(
        {
            "kind": "gradient" if before is None else "delta",
            "sign": None if before is None else "before-minus-after",
            "learning_rate": learning_rate,
            "local_steps": 1 if before is None and local_steps is None else local_steps,
            "num_examples": batch_size if num_examples is None and before is None else num_examples,
            "local_batch_size": batch_size,
            "loss": loss,
            "reduction": reduction,
            "mode": _mode(model),
            "normalisation": _normalisation(normalisation),
            "input_shape": input_shape,
            "num_classes": num_classes,
            "task": task,
            "lora": lora,
            "model": model_name,
            "checkpoint_sha256": checkpoint_sha256 or _hash_of(before, model),
            "defenses": defenses,
            "noise_std": noise_std,
            "parameter_order": tuple(tensors),
            "buffers": tuple(shared_buffers),
            "created_by": CREATED_BY,
        }
    )
    if manifest.kind == "gradient" and manifest.local_steps != 1:
        raise InputError(
            f"a gradient belongs to one step, got local_steps={local_steps}; pass before= to save a delta"
        )
    write_update(path, {**tensors, **shared_buffers}, manifest)
    return path


def write_update(path: str | Path, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Tensors with their manifest in one .safetensors file; `InputError` for NaN or infinite values."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise InputError(f"{quoted(name)} holds {bad:,} NaN or infinite numbers; nothing was saved")
    save_tensors(path, tensors, {MANIFEST_KEY: manifest.to_json()})


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as .safetensors, whole or not at all; any device, layout and sharing of memory.

    Raises `InputError` when the file cannot be written.
    """
    own = {
        name: _dense(tensor).cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_atomically(path, safetensors.torch.save(own, dict(metadata or {})))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in _parameters(model).items() if p.grad is not None}
    if not found:
        raise InputError("no parameter of the model has a gradient; call save_update after loss.backward()")
    return {name: _dense(gradient) for name, gradient in found.items()}


def _delta(model: nn.Module, before: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """before - after of every trainable parameter, rounded once, in the parameter's type."""
    old = _named(before)
    now = {name: p.detach() for name, p in _parameters(model).items() if p.requires_grad}
    lacking = [name for name in now if name not in old]
    if lacking or not now:
        raise InputError(f"`before` lacks {counted(len(lacking), 'trainable parameter')}: {listing(lacking)}")
    for name, tensor in now.items():
        if old[name].shape != tensor.shape:
            raise InputError(
                f"`before` has {name} of shape {tuple(old[name].shape)}, not {tuple(tensor.shape)}"
            )
    if any(old[name].data_ptr() == tensor.data_ptr() for name, tensor in now.items() if tensor.numel()):
        raise InputError("`before` is the model's own live weights; keep copy.deepcopy(model.state_dict())")
    return {
        name: (old[name].to(tensor.device, torch.float64) - tensor.double()).to(
            torch.promote_types(tensor.dtype, torch.float32)
        )
        for name, tensor in now.items()
    }


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    return {bare: named[name] for name, bare in strip_prefixes(named).items()}


def _named(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
    return {bare: named[name].detach() for name, bare in strip_prefixes(named).items()}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict carries."""
    carried = model.state_dict()
    named = {name: tensor for name, tensor in model.named_buffers() if name in carried}
    return {bare: named[name] for name, bare in strip_prefixes(named).items()}


def _mode(model: nn.Module) -> str | None:
    """The mode that BatchNorm was in, else the model's; None when its layers were in both."""
    norms = {module.training for module in model.modules() if isinstance(module, _BatchNorm)}
    modes = norms or {model.training}
    return {True: "train", False: "eval"}[modes.pop()] if len(modes) == 1 else None


def _hash_of(before: nn.Module | Mapping[str, Tensor] | None, model: nn.Module) -> str | None:
    """Hash of the whole of `before`; None when it holds only some of the parameters."""
    named = {} if before is None else _named(before)
    names = list(_parameters(model))
    return parameters_sha256({n: named[n] for n in names}) if named and named.keys() >= set(names) else None


def _normalisation(
    value: tuple[Sequence[float], Sequence[float]] | None,
) -> dict[str, Sequence[float]] | None:
    return None if value is None else {"mean": value[0], "std": value[1]}


def _dense(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached if detached.layout == torch.strided else detached.to_dense()
