"""The files of examples/ci: valid for their services, and running the very commands they hold."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import typer
import yaml
from typer.testing import CliRunner

import leakaudit
from leakaudit.cli import app
from leakaudit.gate import read_baseline, read_sweep
from leakaudit.policy import parse_policy

EXAMPLES = Path(__file__).parents[1] / "examples"
CI = EXAMPLES / "ci"
SERVICES = {"github-actions.yml": "vendor.github-workflows", "gitlab-ci.yml": "vendor.gitlab-ci"}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
needs_defend = pytest.mark.skipif("defend" not in COMMANDS, reason="this leakaudit has no defend")


def scripts(name: str) -> list[str]:
    """The shell lines that the service runs."""
    content = yaml.safe_load((CI / name).read_text())
    if name == "gitlab-ci.yml":
        return list(content["leakaudit"]["script"])
    return [step["run"] for step in content["jobs"]["leakaudit"]["steps"] if "run" in step]


def audit_command(name: str) -> str:
    (found,) = [script for script in scripts(name) if script.startswith("leakaudit")]
    return found


@pytest.mark.parametrize(("name", "schema"), SERVICES.items())
def test_the_services_would_accept_the_files(name: str, schema: str) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(CI / name)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_is_published_even_when_the_gate_fails() -> None:
    gitlab = yaml.safe_load((CI / "gitlab-ci.yml").read_text())["leakaudit"]["artifacts"]
    assert gitlab["when"] == "always"
    assert "leakaudit.html" in gitlab["paths"]
    assert gitlab["reports"] == {"junit": "leakaudit.xml"}
    steps = yaml.safe_load((CI / "github-actions.yml").read_text())["jobs"]["leakaudit"]["steps"]
    published = [step for step in steps if "upload" in step.get("uses", "")]
    assert [step["if"].startswith("always()") for step in published] == [True, True]
    assert "leakaudit.html" in published[0]["with"]["path"].split()
    assert published[1]["with"]["sarif_file"] == "leakaudit.sarif"


@needs_defend
@pytest.mark.parametrize("name", SERVICES)
def test_every_option_in_the_files_exists(name: str) -> None:
    program, command, *rest = shlex.split(audit_command(name).replace("\\\n", " "))
    assert (program, command) == ("leakaudit", "defend")
    known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    used = {word for word in rest if word.startswith("--")}
    assert used <= known
    assert used >= {"--config", "--fail-on", "--baseline", "--html", "--junit", "--sarif", "--summary"}


def test_the_example_baseline_is_one_and_fits_the_policy_of_the_files() -> None:
    baseline = read_baseline(CI / "baseline.json")
    for name in SERVICES:
        words = shlex.split(audit_command(name).replace("\\\n", " "))
        assert parse_policy(words[words.index("--fail-on") + 1]) == parse_policy(baseline.policy)


def run_script(script: str, folder: Path) -> int:
    """The lines as the service's shell runs them, with this leakaudit under its name."""
    shim = f'leakaudit() {{ {shlex.quote(sys.executable)} -m leakaudit "$@"; }}\n'
    package = str(Path(leakaudit.__file__).parents[1])
    environment = {
        **os.environ,
        "GITHUB_STEP_SUMMARY": str(folder / "leakaudit.md"),
        "PYTHONPATH": package,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", shim + script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr)
    return done.returncode


@needs_defend
@pytest.mark.slow
def test_the_commands_of_the_files_run_pass_and_fail_as_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GitHub's lines pass with the baseline; GitLab's, taking up the same sweep, fail without one of its entries.

    GitHub's run in a shell as there; GitLab's, words without quotes or variables, in this process.
    """
    shutil.copytree(EXAMPLES / "photos", tmp_path / "photos")
    shutil.copytree(CI, tmp_path / "ci", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "ci"
    assert run_script(audit_command("github-actions.yml"), folder) == 0
    sweep = read_sweep(folder / "sweep")
    assert len(sweep.gate.accepted) == 2
    assert sweep.gate.broken == sweep.gate.inconclusive == []
    assert len(list(ET.parse(folder / "leakaudit.xml").iter("testcase"))) == len(sweep.cells)
    log = json.loads((folder / "leakaudit.sarif").read_text())
    assert [len(item["suppressions"]) for item in log["runs"][0]["results"]] == [1, 1]
    assert "Within the policy" in (folder / "leakaudit.md").read_text()
    if "html" in sweep.config:
        assert (folder / "leakaudit.html").stat().st_size > 1000

    empty = json.loads((folder / "baseline.json").read_text())
    empty["entries"].pop()
    (folder / "baseline.json").write_text(json.dumps(empty))
    monkeypatch.chdir(folder)
    words = shlex.split(audit_command("gitlab-ci.yml"))
    assert CliRunner().invoke(app, words[1:]).exit_code == 1
    assert len(read_sweep(folder / "sweep").gate.broken) == 1
    assert "1 cell above the policy" in (folder / "leakaudit.md").read_text()
