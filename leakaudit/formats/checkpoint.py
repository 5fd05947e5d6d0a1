"""Checkpoints: state dicts in files as people really have them <-> modules."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from leakaudit.atomic import write_atomically
from leakaudit.errors import InputError
from leakaudit.formats.names import strip_prefixes
from leakaudit.formats.reading import TORCH_SUFFIXES, UPDATE_KEYS, read_file

SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

_LISTED = 3
"""Differences of each kind that an error spells out."""


def read_state_dict(path: str | Path, module: nn.Module | None = None) -> dict[str, Tensor]:
    """The parameters and buffers in a checkpoint file, by name without wrapper prefixes, on the CPU.

    Tensors without names (a list, or "0", "1", ... as Flower's legacy applications send them) get those of
    the state dict of `module`, in its order, when there are as many.

    Accepts .safetensors, .pt, .pth, .th and .bin; a state dict, or a dictionary that holds
    one under state_dict, model_state_dict, model, net, module and the like (also nested).
    Floating point becomes float32.  Nothing in the file is executed.
    Raises `InputError` for a file that is missing, empty, truncated, not a checkpoint, that
    holds code, or NaN or infinite values.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"checkpoint {path} is of no known format; accepted: {', '.join(SUFFIXES)}")
    raw = read_file(path)
    if raw.tensors is None:
        return _by_position(raw.ordered or [], module, path)
    if raw.nested_under in UPDATE_KEYS:
        raise InputError(f"checkpoint {path} holds an update ({raw.nested_under!r}), expected a state dict")
    names = strip_prefixes(raw.tensors)
    return {names[name]: tensor for name, tensor in raw.tensors.items()}


def _by_position(ordered: Sequence[Tensor | None], module: nn.Module | None, path: Path) -> dict[str, Tensor]:
    found = [tensor for tensor in ordered if tensor is not None]
    if module is None:
        raise InputError(f"checkpoint {path} holds tensors without names, expected a state dict")
    wanted = module.state_dict()
    if len(wanted) != len(found):
        raise InputError(
            f"checkpoint {path} holds {len(found)} tensors without names, the model's state dict {len(wanted)}"
        )
    return dict(zip(wanted, found, strict=True))


def load_checkpoint(module: nn.Module, path: str | Path) -> str:
    """Load a checkpoint file into `module`, in place, and return its `parameters_sha256`.

    Values are converted to the module's own dtypes.  `num_batches_tracked`, which old
    checkpoints lack, may be missing, and tied parameters under all but one of their names.
    Raises `InputError`, with the module untouched, that lists missing and unexpected names and
    wrong shapes, or as `read_state_dict` does.
    """
    state = _with_tied(read_state_dict(path, module), module)
    differences = compare(state, module)
    if differences:
        raise InputError(f"checkpoint {path} does not fit the model: {'; '.join(differences)}")
    module.load_state_dict(state, strict=False)
    return parameters_sha256(module)


def compare(state: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    """What keeps `state` from being loaded into `module`, a phrase for each kind; empty when it fits."""
    expected = module.state_dict()
    there = {expected[name].data_ptr() for name in state if name in expected}  # tied weights may come once
    missing = [
        name
        for name, tensor in expected.items()
        if name not in state
        and not name.endswith("num_batches_tracked")
        and not (tensor.numel() and tensor.data_ptr() in there)
    ]
    unexpected = [name for name in state if name not in expected]
    shared = [(name, state[name], tensor) for name, tensor in expected.items() if name in state]
    shapes = [
        f"{name} is {_shape(found)} where the model has {_shape(wanted)}"
        for name, found, wanted in shared
        if found.shape != wanted.shape
    ]
    types = [
        f"{name} is {found.dtype} where the model has {wanted.dtype}"
        for name, found, wanted in shared
        if found.is_floating_point() != wanted.is_floating_point()
    ]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "of another type": types,
    }
    return [f"{len(items)} {kind} ({_abbreviate(items)})" for kind, items in kinds.items() if items]


def _with_tied(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The state with tied tensors under each of their names; transformers writes only one."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    copies = {name: group for group in names.values() for name in group if name in state}
    return {**{other: state[name] for name, group in copies.items() for other in group}, **state}


def save_checkpoint(module: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write parameters and buffers as .safetensors, whole or not at all.

    Raises `InputError` for another suffix or a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"checkpoints are written as .safetensors, got {path.name!r}")
    state = module.state_dict() if isinstance(module, nn.Module) else module
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    write_atomically(path, safetensors.torch.save(tensors))


def parameters_sha256(parameters: nn.Module | Mapping[str, Tensor]) -> str:
    """Hash of the parameters' names, shapes and values, the same whichever file they came from.

    Buffers are left out, so BatchNorm averages that moved since do not change it.
    `manifest.checkpoint_sha256` is this number.
    """
    named = dict(parameters.named_parameters()) if isinstance(parameters, nn.Module) else parameters
    digest = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {_shape(tensor)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _abbreviate(items: Sequence[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")
