"""Files of tensors as people have them -> `RawFile`, without running anything in them.

Accepted are .safetensors, .npz, and what `torch.save` writes (.pt, .pth, .th, .bin),
holding a dict of tensors (also nested by module, or under `gradients`, `state_dict` and the
like beside other things), `{name: p.grad}`, a list of (name, tensor) pairs, or an ordered
list of tensors.  Nothing is unpickled but tensors and plain containers.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from leakaudit.errors import AmbiguityError, InputError
from leakaudit.formats import nvflare
from leakaudit.formats.manifest import MANIFEST_KEY, Manifest, build_manifest, parse_manifest
from leakaudit.formats.phrases import first_line, limit, listing, quoted

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)
UPDATE_KEYS = ("gradients", "gradient", "grads", "grad", "delta", "update")
STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "module",
    "params",
    "parameters",
    "weights",
    "model_weights",
)

_LARGEST = 1 << 30
"""Bytes that any file may unpack to; more only in proportion to its size."""


@dataclass(frozen=True)
class RawFile:
    """The numbers of one file, before anybody says which parameter each belongs to.

    Exactly one of `tensors` and `ordered` is set.  Floating point tensors are float32 on
    the CPU and finite; others keep their type (integer buffers).

    Attributes:
        tensors: name -> tensor.
        ordered: tensors without names; None stands for a parameter without a gradient.
        manifest: what the file says about itself; empty when it says nothing.
        sha256: of the file.
        dtypes: name, or "entry 0", "entry 1", ... -> type in the file ("float16", "int64", ...).
        in_order: whether the order of `tensors` is the module's own (safetensors sorts its keys).
        nested_under: key of the dict the tensors were found under ("gradients", "state_dict", ...).
        notes: what was left out, in sentences.
    """

    path: Path
    tensors: dict[str, Tensor] | None
    ordered: list[Tensor | None] | None
    manifest: Manifest
    sha256: str
    dtypes: dict[str, str]
    in_order: bool
    nested_under: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> dict[str, Tensor | None]:
        """All tensors by the label that messages use: their name, or "entry 0", "entry 1", ..."""
        if self.tensors is not None:
            return dict(self.tensors)
        return {entry_label(index): tensor for index, tensor in enumerate(self.ordered or [])}


def entry_label(index: int) -> str:
    return f"entry {index}"


def read_file(path: str | Path) -> RawFile:
    """Read a file of tensors and its manifest (in its metadata, or beside it as NAME.manifest.json).

    Raises `InputError` for a file that is missing, empty, truncated, of another format,
    that holds code or anything but numbers, NaN or infinite values, or an invalid manifest.
    """
    path = Path(path)
    parse = _PARSERS.get(path.suffix.lower())
    if path.suffix.lower() == nvflare.SUFFIX:
        nvflare.refuse_fobs(path)
    if parse is None:
        raise InputError(f"{path} is of no known format; accepted: {', '.join(SUFFIXES)}")
    data = _read_bytes(path)
    found, metadata = parse(data, path)
    dump = nvflare.recognise(found, path)
    stated = Manifest() if dump is None else build_manifest(dump.fields)
    manifest = stated.merged(_find_manifest(metadata, path))
    content = _unwrap(found, path) if dump is None else _of_dump(dump)
    tensors, ordered = _name_or_order(content.value, path)
    entries = {entry_label(i): t for i, t in enumerate(ordered)} if tensors is None else tensors
    _refuse_bombs(entries, len(data), path)
    dtypes = {name: _dtype_name(tensor) for name, tensor in entries.items() if tensor is not None}
    plain = {name: None if t is None else _plain(t, name, path) for name, t in entries.items()}
    if not any(tensor is not None for tensor in plain.values()):
        raise InputError(f"{path} holds no tensors")
    return RawFile(
        path=path,
        tensors=None
        if tensors is None
        else _sorted({n: t for n, t in plain.items() if t is not None}, manifest),
        ordered=None if tensors is not None else list(plain.values()),
        manifest=manifest,
        sha256=hashlib.sha256(data).hexdigest(),
        dtypes=dtypes,
        in_order=path.suffix.lower() != ".safetensors" or manifest.parameter_order is not None,
        nested_under=content.key,
        notes=content.notes,
    )


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as stored, and the metadata; `InputError` when `path` is not a whole safetensors file."""
    return _safetensors(_read_bytes(Path(path)), Path(path))


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a file")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not data:
        raise InputError(f"{path} is empty")
    return data


def _parse_safetensors(data: bytes, path: Path) -> tuple[object, dict[str, str]]:
    return _safetensors(data, path)


def _safetensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return dict(sorted(tensors.items())), header.get("__metadata__") or {}
    except Exception as error:  # a stranger's bytes: the parser may fail in any way
        raise InputError(f"{path} is truncated or not a safetensors file: {first_line(error)}") from error


def _parse_npz(data: bytes, path: Path) -> tuple[object, dict[str, str]]:
    if data[:2] != b"PK":
        raise InputError(f"{path} is truncated or not an .npz archive: it is no zip file")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path} is not an .npz archive")
            arrays = {name: archive[name] for name in archive.files}
    except InputError:
        raise
    except Exception as error:  # a stranger's bytes: the parser may fail in any way
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path} holds Python objects, which are never unpickled; accepted: arrays of numbers"
            ) from error
        raise InputError(f"{path} is truncated or not an .npz archive: {first_line(error)}") from error
    positions = {_position(name): array for name, array in arrays.items()}
    if positions and positions.keys() == set(range(len(arrays))):
        return [_from_numpy(positions[i], f"arr_{i}", path) for i in range(len(arrays))], {}
    return {name: _from_numpy(array, name, path) for name, array in arrays.items()}, {}


def _position(name: str) -> int | None:
    match = re.fullmatch(r"arr_(0|[1-9]\d{0,8})", name)
    return int(match[1]) if match else None


def _from_numpy(array: object, name: str, path: Path) -> Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        kind = getattr(array, "dtype", "bytes")
        raise InputError(f"{path}: {quoted(name)} is of type {kind}; accepted: arrays of numbers")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]).reshape(array.shape))


def _parse_torch(data: bytes, path: Path) -> tuple[object, dict[str, str]]:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(nvflare.STAND_INS):
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), {}
    except Exception as error:  # a stranger's bytes: the parser may fail in any way
        if nvflare.FOBS_MARK in data[:4096]:
            nvflare.refuse_fobs(path)
        code = re.search(r"GLOBAL\s+([\w.]+\.\w+)", str(error))
        if code and code[1].startswith("numpy."):
            raise InputError(
                f"{path} holds NumPy arrays, which torch.save keeps as objects ({limit(code[1])}) that are never"
                " loaded; accepted: numpy.savez('update.npz', **arrays), or torch.as_tensor(array) for each"
            ) from error
        if code:
            raise InputError(
                f"{path} holds code or objects ({limit(code[1])}), which are never loaded; accepted: tensors"
                " in a dict or list, such as {name: p.grad} or model.state_dict()"
            ) from error
        detail = re.search(r"WeightsUnpickler error: *(.+)", str(error))
        pickle = ", perhaps a plain pickle, which is never loaded" if data[:1] == b"\x80" else ""
        raise InputError(
            f"{path} is truncated or was not written by torch.save{pickle}:"
            f" {limit(detail[1].strip()) if detail else first_line(error)}"
        ) from error


_PARSERS: dict[str, Callable[[bytes, Path], tuple[object, dict[str, str]]]] = {
    ".safetensors": _parse_safetensors,
    ".npz": _parse_npz,
    **dict.fromkeys(TORCH_SUFFIXES, _parse_torch),
}


@dataclass(frozen=True)
class _Content:
    value: object
    key: str | None = None
    notes: tuple[str, ...] = ()


def _of_dump(dump: nvflare.Dump) -> _Content:
    return _Content(dump.params, "delta" if dump.differs else "params", dump.notes)


def _unwrap(found: object, path: Path, depth: int = 0) -> _Content:
    """Descend to the tensors: `{"gradients": {...}, "epoch": 3}` -> `{...}`."""
    if not isinstance(found, Mapping) or depth > 3:
        return _Content(found)
    for keys in (UPDATE_KEYS, STATE_KEYS):
        inside = [key for key in keys if isinstance(found.get(key), (Mapping, list, tuple))]
        if keys is STATE_KEYS and any(isinstance(value, Tensor) for value in found.values()):
            return _Content(found)
        if len(inside) > 1:
            raise AmbiguityError(
                f"{path} holds tensors under several keys ({', '.join(inside)}); keep only the update"
            )
        if inside:
            content = _unwrap(found[inside[0]], path, depth + 1)
            left = [str(key) for key in found if key != inside[0]]
            note = f"Read from {inside[0]!r} in the file" + (
                f"; left out beside it: {listing(left)}." if left else "."
            )
            return _Content(content.value, content.key or inside[0], (note, *content.notes))
    return _Content(found)


def _name_or_order(value: object, path: Path) -> tuple[dict[str, Tensor | None] | None, list[Tensor | None]]:
    """(name -> tensor, []) or (None, tensors in order)."""
    if isinstance(value, Tensor):
        return None, [value]
    if isinstance(value, Mapping):
        named = _flatten(value, path)
        if named and sorted(named) == sorted(str(i) for i in range(len(named))):
            return None, [named[str(i)] for i in range(len(named))]
        return named, []
    if isinstance(value, (list, tuple)):
        if value and all(_is_pair(item) for item in value):
            return _flatten(dict(value), path), []
        wrong = next((v for v in value if v is not None and not isinstance(v, Tensor)), None)
        if wrong is None:
            return None, list(value)
        raise InputError(f"{path} is a list that holds a {type(wrong).__name__}; accepted: a list of tensors")
    raise InputError(f"{path} holds a {type(value).__name__}; accepted: a dict or list of tensors")


def _is_pair(item: object) -> bool:
    return (
        isinstance(item, Sequence)
        and len(item) == 2
        and isinstance(item[0], str)
        and (item[1] is None or isinstance(item[1], Tensor))
    )


def _flatten(
    value: Mapping[Any, Any], path: Path, prefix: str = "", depth: int = 0
) -> dict[str, Tensor | None]:
    """Tensors and None by dotted name; `{"conv": {"weight": w}}` -> `{"conv.weight": w}`.  Plain values are
    left out."""
    flat: dict[str, Tensor | None] = {}
    if depth > 20:
        raise InputError(f"{path} nests dictionaries more than 20 deep")
    for key, item in value.items():
        if not isinstance(key, (str, int)):
            raise InputError(f"{path}: the key {quoted(key)} is not a name; accepted: text")
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            flat.update(_flatten(item, path, f"{name}.", depth + 1))
        elif item is None or isinstance(item, Tensor):
            flat[name] = item
    return flat


def _refuse_bombs(entries: Mapping[str, Tensor | None], size: int, path: Path) -> None:
    unpacked = sum(
        t.numel() * t.element_size() for t in entries.values() if t is not None and not t.is_nested
    )
    if unpacked > max(_LARGEST, 1100 * size):  # 1,032 is the best that zip can do
        raise InputError(f"{path} has {size:,} bytes and unpacks to {unpacked:,}; that is refused")


def _plain(tensor: Tensor, name: str, path: Path) -> Tensor:
    """A dense tensor on the CPU that owns its memory; floating point becomes finite float32."""
    if tensor.is_nested or tensor.is_meta or tensor.is_complex():
        raise InputError(f"{path}: {quoted(name)} is a {_dtype_name(tensor)} tensor; accepted: real numbers")
    try:
        dense = tensor.detach()
        dense = dense.dequantize() if dense.is_quantized else dense
        dense = dense if dense.layout == torch.strided else dense.to_dense()
        dense = dense.cpu().clone(memory_format=torch.contiguous_format)
    except Exception as error:  # indices and strides of a stranger's file may be anything
        raise InputError(f"{path}: {quoted(name)} cannot be read: {first_line(error)}") from error
    if not dense.is_floating_point():
        return dense
    single = dense.to(torch.float32)
    if not bool(single.isfinite().all()):
        raise InputError(
            f"{path}: {quoted(name)} holds {_count_bad(dense, single)} of {single.numel():,} numbers"
        )
    return single


def _count_bad(dense: Tensor, single: Tensor) -> str:
    kinds = {
        "NaN": int(single.isnan().sum()),
        "Inf": int(dense.isinf().sum()),
        "beyond float32": int((single.isinf() & ~dense.isinf()).sum()),
    }
    return " and ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _find_manifest(metadata: Mapping[str, str], path: Path) -> Manifest:
    """From the metadata; fields stated in a file beside win."""
    inside = parse_manifest(metadata[MANIFEST_KEY], path) if MANIFEST_KEY in metadata else Manifest()
    for beside in (path.with_name(f"{path.name}.manifest.json"), path.with_suffix(".manifest.json")):
        if beside.is_file():
            return inside.merged(parse_manifest(_read_bytes(beside), beside))
    return inside


def _sorted(tensors: dict[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """In the manifest's order, what it does not list last."""
    first = [name for name in manifest.parameter_order or () if name in tensors]
    return {name: tensors[name] for name in dict.fromkeys([*first, *tensors])}
