"""Which parameter of the model is each tensor of a file?

By name (without wrapper prefixes), then by position against the module's own order, then
by unique shape.  Where two readings fit, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn

from leakaudit.errors import AmbiguityError, InputError
from leakaudit.formats.names import strip_prefixes
from leakaudit.formats.phrases import counted, listing, quoted, shape_text
from leakaudit.formats.reading import RawFile
from leakaudit.models.victim import Victim


@dataclass(frozen=True)
class Resolved:
    """A file's tensors under the victim's names.

    Attributes:
        params: parameters, float32, in the module's order, frozen ones included.
        buffers: buffers, as stored.
        sources: victim name -> name of the entry in the file ("entry 3" when it has none).
        missing: trainable parameters that the file does not hold.
        notes: how the names were resolved and what was left out, in sentences.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    sources: dict[str, str]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def resolve(raw: RawFile, victim: Victim) -> Resolved:
    """Match every tensor in `raw` to a parameter or buffer of `victim`.

    A file that lacks some parameters (frozen layers) is fine and noted.  Raises
    `AmbiguityError`, listing the candidates, when several readings fit, and `InputError` when
    nothing fits, a tensor is unknown to the model, has another shape, or is not floating
    point where the model has a parameter.
    """
    layout = _Layout.of(victim)
    split = _split_vector(raw, layout)
    entries, names, notes = split or _match(raw, layout)
    found = _gather(raw, entries, names, layout)
    sources: dict[str, str] = {}
    for label, name in names.items():
        if entries[label] is not None:
            sources.setdefault(name, label if split is None else next(iter(raw.entries)))
    missing = tuple(name for name in victim.trainable() if name not in found)
    if missing:
        notes.append(f"The file lacks {counted(len(missing), 'trainable parameter')}: {listing(missing)}.")
    return Resolved(
        params={name: found[name] for name in layout.params if name in found},
        buffers={name: found[name] for name in victim.buffers if name in found},
        sources=sources,
        missing=missing,
        notes=(*raw.notes, *notes),
    )


@dataclass(frozen=True)
class _Layout:
    """Names and shapes of a model, and every order in which people list them.

    Attributes:
        aliases: every name, also those of tied parameters, -> the name the victim uses.
        orders: description -> names in that order.
    """

    model: str
    shapes: dict[str, Size]
    params: tuple[str, ...]
    aliases: dict[str, str]
    orders: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, victim: Victim) -> _Layout:
        aliases = _aliases(victim.module)
        aliases = {**_without_head(victim.module, aliases), **aliases}
        state = [aliases[name] for name in victim.module.state_dict() if name in aliases]
        repeated = [aliases[n] for n, _ in victim.module.named_parameters(remove_duplicate=False)]
        params = tuple(name for name, _ in victim.module.named_parameters())
        return cls(
            model=victim.name,
            shapes={
                name: t.shape for name, t in {**victim.params, **victim.frozen, **victim.buffers}.items()
            },
            params=params,
            aliases=aliases,
            orders={
                "the state dict": tuple(state),
                "the state dict without num_batches_tracked": tuple(
                    name for name in state if not name.endswith("num_batches_tracked")
                ),
                "parameters()": params,
                "parameters(), tied ones repeated": tuple(repeated),
                "the trainable parameters": tuple(victim.trainable()),
            },
        )

    def orders_where(self, fits: Callable[[tuple[str, ...]], bool]) -> dict[tuple[str, ...], list[str]]:
        """Names in an order that fits -> the descriptions of that order."""
        found: dict[tuple[str, ...], list[str]] = {}
        for reading, names in self.orders.items():
            if fits(names):
                found.setdefault(names, []).append(reading)
        return found


def _aliases(module: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        aliases[name] = first.setdefault(id(tensor), name)
    return aliases


def _without_head(module: nn.Module, aliases: Mapping[str, str]) -> dict[str, str]:
    """Names as the base model of a transformers model has them: `bert.pooler.weight` is `pooler.weight`."""
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    return {name.removeprefix(prefix): known for name, known in aliases.items() if name.startswith(prefix)}


Entries = Mapping[str, Tensor | None]


def _match(raw: RawFile, layout: _Layout) -> tuple[Entries, dict[str, str], list[str]]:
    """(entries by label, entry label -> victim name, notes)."""
    entries = raw.entries
    match = _by_name(raw, raw.tensors, layout) if raw.tensors is not None else None
    if match is None and raw.in_order:
        match = _by_position(raw, entries, layout)
    return (entries, *(match or _by_shape(raw, entries, layout)))


def _by_name(
    raw: RawFile, tensors: Mapping[str, Tensor], layout: _Layout
) -> tuple[dict[str, str], list[str]] | None:
    """None when not one name is the model's."""
    model_names = {bare: layout.aliases[name] for name, bare in strip_prefixes(layout.aliases).items()}
    bare_names = {
        name: name if name in layout.aliases else bare for name, bare in strip_prefixes(tensors).items()
    }
    known = {**model_names, **layout.aliases}
    names = {name: known[bare] for name, bare in bare_names.items() if bare in known}
    if not names:
        return None
    extra = [name for name in tensors if name not in names]
    unknown = [name for name in extra if tensors[name].is_floating_point() and tensors[name].numel() > 1]
    if unknown:
        adapters = any(".lora_" in name for name in unknown)
        advice = "pass its adapters as --lora" if adapters else "does it belong to another model?"
        raise InputError(
            f"{raw.path} holds {counted(len(unknown), 'tensor')} that model {layout.model} does not have"
            f" ({listing(unknown)}); {advice}"
        )
    notes = []
    if any(bare != name for name, bare in bare_names.items()):
        notes.append("Names were matched after removing wrapper prefixes such as 'module.'.")
    if extra:
        notes.append(
            f"{counted(len(extra), 'entry')} that the model does not have: {listing(extra)}; left out."
        )
    return names, notes


def _by_position(raw: RawFile, entries: Entries, layout: _Layout) -> tuple[dict[str, str], list[str]] | None:
    """None when no order of the model has these shapes."""
    labels = list(entries)
    fits = layout.orders_where(
        lambda names: len(names) == len(labels) and _shapes_fit(entries, names, layout)
    )
    if not fits:
        return None
    names, reading = _only(fits, raw, layout)
    without = "the file has no names" if raw.ordered is not None else "the file's names are not the model's"
    return dict(zip(labels, names, strict=True)), [
        f"Tensors were matched by position to {reading}, because {without}."
    ]


def _shapes_fit(entries: Entries, names: tuple[str, ...], layout: _Layout) -> bool:
    return all(
        tensor is None or tensor.shape == layout.shapes[name]
        for tensor, name in zip(entries.values(), names, strict=True)
    )


def _only(
    fits: dict[tuple[str, ...], list[str]], raw: RawFile, layout: _Layout
) -> tuple[tuple[str, ...], str]:
    """The one order that fits; several names for the same order are no ambiguity."""
    if len(fits) > 1:
        raise AmbiguityError(
            f"{raw.path} fits {' and also '.join(readings[0] for readings in fits.values())} of model"
            f" {layout.model}; give the tensors names"
        )
    [(names, readings)] = fits.items()
    return names, readings[0]


def _split_vector(raw: RawFile, layout: _Layout) -> tuple[Entries, dict[str, str], list[str]] | None:
    """A file with one long vector, as `parameters_to_vector` makes it; None when it is something else."""
    [vector, *others] = raw.entries.values()
    if others or vector is None or vector.dim() != 1 or vector.shape in layout.shapes.values():
        return None
    fits = layout.orders_where(
        lambda names: sum(layout.shapes[name].numel() for name in names) == vector.numel()
    )
    if not fits:
        return None
    names, reading = _only(fits, raw, layout)
    pieces = torch.split(vector, [layout.shapes[name].numel() for name in names])
    entries = {
        name: piece.reshape(layout.shapes[name]).clone() for name, piece in zip(names, pieces, strict=True)
    }
    note = f"One vector of {vector.numel():,} numbers was cut into {reading}."
    return entries, {name: name for name in names}, [note]


def _by_shape(raw: RawFile, entries: Entries, layout: _Layout) -> tuple[dict[str, str], list[str]]:
    """Each tensor to the one parameter of its shape; buffers have no shapes of their own and are left out."""
    floats = {label: t for label, t in entries.items() if t is not None and t.is_floating_point()}
    fits = {
        label: [name for name in layout.params if layout.shapes[name] == tensor.shape]
        for label, tensor in floats.items()
    }
    if not any(fits.values()):
        raise InputError(
            f"{raw.path} has nothing in common with model {layout.model}: it holds {_describe(floats)}; the"
            f" model has {_describe_shapes({name: layout.shapes[name] for name in layout.params})}"
        )
    misfit = next((label for label, names in fits.items() if not names), None)
    if misfit is not None:
        raise InputError(
            f"{raw.path}: {quoted(misfit)} has shape {shape_text(floats[misfit].shape)}"
            f"{_expected_at(list(entries).index(misfit), len(entries), layout)}; no parameter of model"
            f" {layout.model} has that shape"
        )
    owners: dict[str, list[str]] = {}
    for label, names in fits.items():
        for name in names:
            owners.setdefault(name, []).append(label)
    for label, names in fits.items():
        if len(names) > 1 or len(owners[names[0]]) > 1:
            raise AmbiguityError(
                f"{raw.path}: {', '.join(map(quoted, owners[names[0]][:5]))} of shape"
                f" {shape_text(floats[label].shape)} could be any of {listing(names)}; name the tensors as"
                " the model does, or save them in its order"
            )
    left = [label for label in entries if label not in floats and entries[label] is not None]
    notes = ["Tensors were matched by their shapes, each of which only one parameter has."]
    if left:
        notes.append(f"{counted(len(left), 'entry')} of integers left out: {listing(left)}.")
    return {label: names[0] for label, names in fits.items()}, notes


def _expected_at(index: int, count: int, layout: _Layout) -> str:
    """What the model has at this position, when some order of it has as many entries."""
    for reading, names in layout.orders.items():
        if len(names) == count:
            return (
                f" where {reading} of the model has {names[index]} {shape_text(layout.shapes[names[index]])}"
            )
    return f" ({counted(count, 'tensor')} in the file, {len(layout.params)} parameters in the model)"


def _describe(tensors: Mapping[str, Tensor]) -> str:
    return _describe_shapes({label: tensor.shape for label, tensor in tensors.items()})


def _describe_shapes(shapes: Mapping[str, Size]) -> str:
    return listing([f"{name} {shape_text(shape)}" for name, shape in shapes.items()], most=3) or "no numbers"


def _gather(raw: RawFile, entries: Entries, names: Mapping[str, str], layout: _Layout) -> dict[str, Tensor]:
    """Victim name -> tensor, checked; tied parameters may come twice with the same values."""
    found: dict[str, Tensor] = {}
    for label, name in names.items():
        tensor = entries[label]
        if tensor is None:
            continue
        _check(raw, label, tensor, name, layout)
        if name in found and not torch.equal(found[name], tensor):
            raise InputError(f"{raw.path}: {name} is tied, and the file has two different tensors for it")
        found[name] = tensor
    return found


def _check(raw: RawFile, label: str, tensor: Tensor, name: str, layout: _Layout) -> None:
    if tensor.shape != layout.shapes[name]:
        raise InputError(
            f"{raw.path}: {quoted(label)} has shape {shape_text(tensor.shape)}, but {name} of model"
            f" {layout.model} has shape {shape_text(layout.shapes[name])}"
        )
    if name in layout.params and not tensor.is_floating_point():
        raise InputError(
            f"{raw.path}: {quoted(label)} is of type {raw.dtypes.get(label, tensor.dtype)}; accepted for a"
            " parameter: floating point"
        )
