"""The command: exit codes, files, and a --help without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import typer
from picture_worlds import task
from test_recording import recorded
from typer.testing import CliRunner

from leakaudit.leakage_cli import leakage

app = typer.Typer()
app.command()(leakage)


def test_a_leaking_run_prints_the_table_and_exits_with_1(tmp_path: Path) -> None:
    recorded(tmp_path / "pair", "all-reduce", task(clients=2), steps=1)
    options = ["--attack", "linear", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [str(tmp_path / "pair"), *options], env={"COLUMNS": "120"})
    assert done.exit_code == 1, done.output
    assert "! LEAKS" in done.output
    assert "peer" in done.output
    assert "Theory:" in done.output
    assert (tmp_path / "out" / "report.html").is_file()
    assert json.loads((tmp_path / "out" / "leakage.json").read_text())["rows"][0]["verdict"] == "leaks"
    again = CliRunner().invoke(app, [str(tmp_path / "pair"), *options, "--fail-on", "never", "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.output)["policy"] == "never"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, typer; from leakaudit.leakage_cli import leakage\n"
        "app = typer.Typer(); app.command()(leakage)\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
