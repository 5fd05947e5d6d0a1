"""The folders of simulations and comparisons: whose they are, and when they may be written to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

from leakaudit.atomic import writable_folder, write_atomically
from leakaudit.errors import InputError
from leakaudit.federated.network import NETWORK_NAME
from leakaudit.formats.run_models import MODELS, TRUTH, VIEWS
from leakaudit.report.folder import REPORT_NAME
from leakaudit.simulation_results import COMPARISON_NAME, SIMULATION_NAME

PLAN_NAME = "plan.json"
CURVE_NAME = "curve.csv"
SCHEMA_VERSION = 1

Kind = Literal["simulation", "comparison"]


def open_folder(folder: Path, kind: Kind, identity: str, *, force: bool) -> Path:
    """The folder, ready to be written to, with its plan in it.

    One of the same run is written anew.  `force` removes what another run left, and nothing else.

    Raises `InputError`, with nothing changed, where it holds something else.
    """
    if not force:
        _refuse_strangers(folder, kind, identity)
    if force or kind == "simulation" or not same_plan(folder, kind, identity):
        forget(folder)
    writable_folder(folder)
    plan = {"schema_version": SCHEMA_VERSION, "kind": kind, "identity": identity}
    write_atomically(folder / PLAN_NAME, (json.dumps(plan, indent=1) + "\n").encode())
    return folder


def same_plan(folder: Path, kind: Kind, identity: str) -> bool:
    """Whether the folder holds this very run, finished or not."""
    return _plan(folder) == {"schema_version": SCHEMA_VERSION, "kind": kind, "identity": identity}


def forget(folder: Path) -> None:
    """Remove what runs write: files of our names, their models and views, and runs of a comparison below; then the
    folder, where nothing else is in it."""
    if not folder.is_dir():
        return
    names = (PLAN_NAME, SIMULATION_NAME, COMPARISON_NAME, CURVE_NAME, NETWORK_NAME, REPORT_NAME)
    plan = _plan(folder)
    if plan is not None and plan.get("kind") == "comparison":
        for below in sorted(folder.iterdir()):
            inside = _plan(below)
            if not below.is_symlink() and inside is not None and inside.get("kind") == "simulation":
                forget(below)
    if plan is not None:  # else these folders may be somebody's own
        for name in (MODELS, VIEWS, TRUTH):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                shutil.rmtree(folder / name)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _refuse_strangers(folder: Path, kind: Kind, identity: str) -> None:
    if not folder.exists() or same_plan(folder, kind, identity):
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; accepted: a folder")
    if _plan(folder) is not None:
        raise InputError(f"{folder} holds another run; accepted: --force to start anew, or another folder")
    there = sorted(path.name for path in folder.iterdir())
    if there:
        raise InputError(f"{folder} is not empty ({there[0]} is there); accepted: --force, or another folder")


def _plan(folder: Path) -> dict[str, object] | None:
    try:
        content = json.loads((folder / PLAN_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "kind" in content else None
