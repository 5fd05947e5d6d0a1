"""What each command may import: nobody waits for packages that the command does not use.

One process runs them one after the other, from the lightest on, and says after each which heavy packages it holds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from leakaudit.data import photo_folder

HEAVY = {"torch", "torch._dynamo", "torchvision", "transformers", "torchmetrics", "lpips", "opacus", "scipy.stats",
         "simpy", "ray", "matplotlib"}  # fmt: skip
SCRIPT = """
import contextlib, io, json, sys
from leakaudit.cli import app

heavy, commands = json.loads(sys.argv[1])
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        app(command, standalone_mode=False)
    print(json.dumps([name for name in heavy if name in sys.modules]), flush=True)
"""


def after_each(commands: list[list[str]]) -> list[set[str]]:
    """The heavy packages that a process holds after each of the commands."""
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([sorted(HEAVY), commands])],
        capture_output=True,
        text=True,
        check=True,
    )
    return [set(json.loads(line)) for line in process.stdout.splitlines()]


@pytest.mark.slow
def test_image_commands_import_what_they_use(tmp_path: Path) -> None:
    """Help and `list systems` none of it, work on images torch alone, an optimiser what torch's own imports."""
    update, model, run = (str(tmp_path / name) for name in ("update.safetensors", "model.safetensors", "run"))
    attack = [
        "attack",
        update,
        "--model",
        "lenet",
        "--checkpoint",
        model,
        "--no-controls",
        "--force",
        "--out",
        run,
    ]
    light = [
        ["--help"],
        ["attack", "--help"],
        ["defend", "--help"],
        ["simulate", "--help"],
        ["list", "systems"],
    ]
    plain = [
        *(["list", what] for what in ("models", "defenses", "inferences", "attacks", "metrics", "protocols")),
        ["capture", "--model", "lenet:init=uniform", "--data", str(photo_folder()), "--out", update,
         "--save-model", model],
        ["inspect", update, "--model", "lenet", "--checkpoint", model],
        [*attack, "--attack", "linear"],
    ]  # fmt: skip
    last = [*attack, "--attack", "idlg:iterations=1,restarts=1"]
    held = after_each([*light, *plain, last])
    assert (tmp_path / "run" / "result.json").exists()
    assert held[: len(light)] == [set()] * len(light)
    assert held[len(light) : -1] == [{"torch"}] * len(plain)
    assert held[-1] <= {"torch", "torch._dynamo", "scipy.stats"}


def test_a_report_is_written_without_torch() -> None:
    script = "import sys, leakaudit.report.finished, leakaudit.gate; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert not HEAVY & set(modules.split())
