#!/usr/bin/env python3
"""Set-up on a machine with Python and nothing else.

    python3 dev.py demo     create .venv, install leakaudit, reconstruct the bundled photos
    python3 dev.py test     create .venv, install leakaudit with its developers' tools, run all checks

Only the standard library is used here.  What follows the command is passed on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = Path(os.environ.get("LEAKAUDIT_VENV", ROOT / ".venv"))
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    code = subprocess.call([str(part) for part in command], cwd=ROOT)
    if code:
        sys.exit(code)


def install(what: str) -> None:
    """Install into .venv unless the same pyproject.toml was installed before."""
    stamp = ENVIRONMENT / f"installed-{'dev' if 'dev' in what else 'plain'}"
    wanted = (ROOT / "pyproject.toml").read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if not PYTHON.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", what)
    stamp.write_text(wanted)


def demo(arguments: list[str]) -> None:
    install(".")
    run(PYTHON, "-m", "leakaudit", "demo", *arguments)


def test(arguments: list[str]) -> None:
    install(".[dev]")
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(PYTHON, "-m", "mypy")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core, a thread for each process
    run(PYTHON, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", *arguments)


if __name__ == "__main__":
    commands = {"demo": demo, "test": test}
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever has an older one finds out here
        sys.exit(f"leakaudit needs Python 3.10 or later, this is {sys.version.split()[0]}")
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python3 dev.py {'|'.join(commands)} [arguments]")
    commands[sys.argv[1]](sys.argv[2:])
