"""The sweep's folder: whose it is, what lies in it, and when it may be written to.

.lock             held while a sweep writes here
plan.json         which sweep it holds, written first
runs/KEY/         one run: result.json, report.html, pictures, and run.json when it is finished
targets/KEY.json  utility and bounds of a target
sweep.json        the result
report.html       the page
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from leakaudit.atomic import writable_folder, write_atomically
from leakaudit.errors import InputError
from leakaudit.report.folder import REPORT_NAME
from leakaudit.report.folder import RESULT_NAME as AUDIT_NAME
from leakaudit.sweep.plan import SweepPlan
from leakaudit.sweep.target_jobs import TARGETS
from leakaudit.sweep_results import RUNS, SWEEP_NAME

PLAN_NAME = "plan.json"
SCHEMA_VERSION = 1

_KEY = re.compile(r"[0-9a-f]{32}")


LOCK_NAME = ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other sweeps out of the folder; `InputError` where one is at work in it, of whatever machine shares it.

    The system gives the lock back when its process ends, however it ends.
    """
    writable_folder(folder)
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another sweep is at work in {folder}; accepted: wait for it, or another folder"
        ) from error
    try:
        yield
    finally:
        if not (folder / PLAN_NAME).exists():  # refused: nothing of ours stays
            (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()


def open_folder(plan: SweepPlan, *, resume: bool, force: bool) -> Path:
    """The sweep's folder, ready to be written to.

    `force` removes what an earlier sweep left, and nothing else.  Without it, a folder of the same sweep is taken
    up where it is complete, or to `resume` it.

    Raises `InputError`, with nothing changed, where it holds an unfinished sweep, another one, or an audit.
    """
    folder = plan.config.out
    if force:
        forget(folder)
    elif (folder / PLAN_NAME).exists():
        if _identity(folder) != plan.identity:
            raise InputError(
                f"{folder} holds another sweep; accepted: --force to start anew, or another folder"
            )
        if not resume and any(job.stored(folder) is None for job in plan.jobs):
            raise InputError(
                f"{folder} holds this sweep, unfinished; accepted: --resume to finish it, --force to start anew"
            )
    else:
        for name in (SWEEP_NAME, AUDIT_NAME):
            if (folder / name).exists():
                raise InputError(f"{folder} holds another run ({name}); accepted: --force, or another folder")
    writable_folder(folder)
    content = {"schema_version": SCHEMA_VERSION, "sweep": plan.identity, "runs": len(plan.runs)}
    write_atomically(folder / PLAN_NAME, (json.dumps(content, indent=1) + "\n").encode())
    return folder


def forget(folder: Path) -> None:
    """Remove what sweeps write: files of our names, and folders of keys."""
    for name in (PLAN_NAME, SWEEP_NAME, REPORT_NAME):
        (folder / name).unlink(missing_ok=True)
    for path in sorted((folder / RUNS).glob("*")):
        if path.is_dir() and not path.is_symlink() and _KEY.fullmatch(path.name):
            shutil.rmtree(path)
    for path in sorted((folder / TARGETS).glob("*")):
        if path.is_file() and _KEY.fullmatch(path.name.partition(".")[0]):
            path.unlink()
    for name in (RUNS, TARGETS):
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()


def _identity(folder: Path) -> str | None:
    try:
        content = json.loads((folder / PLAN_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    known = isinstance(content, dict) and content.get("schema_version") == SCHEMA_VERSION
    return content.get("sweep") if known else None
