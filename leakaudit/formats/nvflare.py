"""What NVIDIA FLARE's users save, read without NVIDIA FLARE and without unpickling objects.

Read are, as `torch.save` writes them, with tensors inside:
    dxo.to_dict(), the DXO itself, and the dictionary of a Shareable that holds one;
    an FLModel, vars(model), and dictionaries with its keys params and params_type;
    FL_global_model.pt of PTFileModelPersistor and the like, which `leakaudit.formats.reading` knows by itself.
Layouts as of nvflare 2.9 (apis/dxo.py, app_common/abstract/fl_model.py, app_opt/pt).  The classes that such
files name are replaced by inert ones of our own; nothing of NVIDIA FLARE is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leakaudit.errors import InputError
from leakaudit.formats.phrases import limit, listing, quoted

SUFFIX = ".fobs"
FOBS_MARK = b"__fobs_type__"

_STEPS = "NUM_STEPS_CURRENT_ROUND"
_ENCRYPTED = "PROCESSED_ALGORITHM"
_FILTERS = "filter_history"
_FULL, _DIFF = ("FULL", "WEIGHTS"), ("DIFF", "WEIGHT_DIFF")
_OTHERS = ("FL_MODEL", "METRICS", "ANALYTIC", "COLLECTION", "STATISTICS", "PSI", "APP_DEFINED")


class Text(str):
    """In place of DataKind and ParamsType, whose members are strings."""

    __slots__ = ()


class Fields:
    """In place of DXO and FLModel: attributes, and nothing else."""


STAND_INS: list[Any] = [
    (Text, "nvflare.apis.dxo.DataKind"),
    (Text, "nvflare.app_common.abstract.fl_model.ParamsType"),
    (Fields, "nvflare.apis.dxo.DXO"),
    (Fields, "nvflare.app_common.abstract.fl_model.FLModel"),
]
"""For `torch.serialization.safe_globals`."""


@dataclass(frozen=True)
class Dump:
    """Attributes:
    params: what holds the tensors.
    fields: of the manifest, as far as the dump says.
    differs: whether `params` is a difference, not whole weights.
    notes: how it was understood, in sentences.
    """

    params: Mapping[str, Any]
    differs: bool
    fields: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def recognise(found: object, path: Path) -> Dump | None:
    """The dump that `found` is; None for anything else.

    Raises `InputError` for a dump that holds no update (metrics, statistics, collections), no tensors, or
    ciphertexts.
    """
    entries = vars(found) if isinstance(found, Fields) else found
    if not isinstance(entries, Mapping):
        return None
    if isinstance(entries.get("DXO"), Mapping):
        entries = entries["DXO"]
    kind = next((entries[name] for name in ("kind", "data_kind") if isinstance(entries.get(name), str)), None)
    if kind in (*_FULL, *_DIFF, *_OTHERS) and "data" in entries:
        return _dump("a DXO", str(kind), entries["data"], entries, path)
    if entries.get("params_type") in ("FULL", "DIFF") and "params" in entries:
        return _dump("an FLModel", str(entries["params_type"]), entries["params"], entries, path)
    return None


def refuse_fobs(path: Path) -> None:
    """Raise `InputError` that says how to export what FOBS serialised."""
    raise InputError(
        f"{path} is serialised by NVFlare's FOBS, which needs NVFlare's own decomposers; accepted, saved where"
        " NVFlare is installed: torch.save({'kind': str(dxo.data_kind.value), 'data': {name: torch.as_tensor(value)"
        " for name, value in dxo.data.items()}, 'meta': dxo.meta}, 'update.pt'), or"
        " numpy.savez('update.npz', **dxo.data)"
    )


def _dump(what: str, kind: str, params: object, entries: Mapping[str, Any], path: Path) -> Dump:
    if kind in _OTHERS:
        raise InputError(
            f"{path} is {what} of kind {quoted(str(kind))}; accepted: {', '.join((*_FULL, *_DIFF))}"
        )
    stated = entries.get("meta")
    meta = stated if isinstance(stated, Mapping) else {}
    if meta.get(_ENCRYPTED):
        raise InputError(
            f"{path} is {what} encrypted with {limit(str(meta[_ENCRYPTED]))}: nothing to reconstruct from it alone;"
            " accepted: the update before encryption, or the decrypted sum"
        )
    if not isinstance(params, Mapping):
        raise InputError(
            f"{path} is {what} that holds a {type(params).__name__}; accepted: a dict of tensors"
        )
    differs = kind in _DIFF
    steps, notes = _steps(meta)
    fields = {
        "kind": "delta" if differs else "weights",
        "sign": "after-minus-before" if differs else None,
        "local_steps": steps,
        "message": _message(entries, meta),
    }
    return Dump(params, differs, fields, (f"Read as {what} of NVFlare, {kind}.", *notes, *_filters(meta)))


def _steps(meta: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    count = meta.get(_STEPS)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        return None, ()
    note = (
        f"It states {count:,} steps in this round ({_STEPS}), taken as local steps; some clients put their number of"
        " examples there: state --local-steps then."
    )
    return count, (note,)


def _filters(meta: Mapping[str, Any]) -> tuple[str, ...]:
    names = meta.get(_FILTERS)
    if not isinstance(names, (list, tuple)) or not names:
        return ()
    return (f"Filters of NVFlare changed it before it was sent: {listing(str(name) for name in names)}.",)


def _message(entries: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What it carries besides parameters; a DXO has in its meta what an FLModel has fields for."""
    known = {**meta, **entries}
    number, sender = known.get("current_round"), meta.get("site_name")
    metrics = next(
        (m for m in (entries.get("metrics"), meta.get("initial_metrics")) if isinstance(m, Mapping)), {}
    )
    return {
        "software": "nvflare",
        "sender": sender if isinstance(sender, str) else None,
        "round": number if isinstance(number, int) and number >= 0 else None,
        "metrics": {str(name): limit(str(value)) for name, value in metrics.items()},
        "config": {
            str(k): limit(str(v)) for k, v in meta.items() if isinstance(v, (int, float, str)) and k != _STEPS
        },
        "records": ("optimizer_params",) if entries.get("optimizer_params") else (),
    }
