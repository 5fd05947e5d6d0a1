"""leakaudit: what do the updates of federated learning give away?

Public functions and types, each imported only when it is first used:

    save_update, load_update      a shared-update file, written from and read into Python
    capture_update                the client's side of a round on real images
    attack, audit                 reconstruct from a file; capture and reconstruct in one go
    defend                        sweep defenses, and what each stops and costs
    simulate, compare, Scenario   train with whole systems on a virtual clock, and record what each party sees
    AuditResult, read_run         what audits return, and how to read it back from a run folder
    Manifest, Update, Victim, load_victim
    InputError                    what every function raises for input it cannot use
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AuditResult": "leakaudit.results",
    "InputError": "leakaudit.errors",
    "Manifest": "leakaudit.formats.manifest",
    "Scenario": "leakaudit.scenario",
    "Update": "leakaudit.update",
    "Victim": "leakaudit.models.victim",
    "attack": "leakaudit.api",
    "audit": "leakaudit.api",
    "capture_update": "leakaudit.api",
    "compare": "leakaudit.api",
    "defend": "leakaudit.api",
    "load_update": "leakaudit.formats.loading",
    "load_victim": "leakaudit.models.zoo",
    "read_run": "leakaudit.report.folder",
    "save_update": "leakaudit.formats.writing",
    "simulate": "leakaudit.api",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from leakaudit.api import attack, audit, capture_update, compare, defend, simulate
    from leakaudit.errors import InputError
    from leakaudit.formats.loading import load_update
    from leakaudit.formats.manifest import Manifest
    from leakaudit.formats.writing import save_update
    from leakaudit.models.victim import Victim
    from leakaudit.models.zoo import load_victim
    from leakaudit.report.folder import read_run
    from leakaudit.results import AuditResult
    from leakaudit.scenario import Scenario
    from leakaudit.update import Update


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'leakaudit' has no attribute {name!r}")
