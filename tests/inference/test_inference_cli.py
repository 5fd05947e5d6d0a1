"""`leakaudit infer` as its Typer function, its file, its exit codes, and its policy."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_audits import FACTORIES, private_batch
from typer.testing import CliRunner, Result

from leakaudit.errors import InputError
from leakaudit.inference_cli import infer
from leakaudit.inference_results import (
    RATES,
    InferenceOutcome,
    InferenceResult,
    Rate,
    broken_limits,
    parse_limits,
    read_inference,
)
from leakaudit.report.inference_terminal import print_inference

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(infer)

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("--trials", 2)`: infer on 60 pictures with a small model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "models.py").write_text(FACTORIES)
    x, y = private_batch(60)
    pixels = ((x * 0.25 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "pictures.npz", images=pixels, labels=y.numpy())

    def call(*options: object) -> Result:
        fixed = ["--model", "models.py:smooth", "--input-shape", "3,8,8", "--num-classes", "5"]
        fixed += ["--data", "pictures.npz", "--batch-size", "2", "--device", "cpu"]
        return CliRunner().invoke(app, [*fixed, *map(str, options)])

    return call


def test_it_prints_the_rates_beside_chance_and_writes_them(run: Run, tmp_path: Path) -> None:
    found = run("--trials", 3, "--attack", "membership-likelihood", "--attack", "property:updates=8")
    assert found.exit_code == 0, found.output
    assert "chance" in found.stdout
    assert "0.5" in found.stdout
    assert "property:updates=8 (bright)" in found.stdout
    assert "TPR at 0.1 % FPR needs at least 1000 non-members, got 84" in found.stdout
    result = read_inference(tmp_path / "runs" / "infer")
    assert [outcome.attack for outcome in result.outcomes] == ["membership-likelihood", "property"]
    assert (result.candidates, result.reference, result.trials) == (30, 30, 3)
    assert (result.outcomes[0].positives, result.outcomes[0].negatives) == (6, 84)
    assert result.model.name == "models.py:smooth"
    rate = result.outcomes[0].rate("auc")
    assert rate is not None
    assert rate.value is not None
    assert rate.value > 0.95


def test_it_refuses_to_overwrite_without_force(run: Run, tmp_path: Path) -> None:
    options = ("--trials", 1, "--attack", "membership-gradient:calibration=0", "--out", "here")
    assert run(*options).exit_code == 0
    before = (tmp_path / "here" / "inference.json").read_bytes()
    again = run(*options)
    assert isinstance(again.exception, InputError)
    assert "pass --force" in str(again.exception)
    assert (tmp_path / "here" / "inference.json").read_bytes() == before
    assert run(*options, "--force").exit_code == 0


@pytest.mark.parametrize(("policy", "code"), [("auc>0.6", 1), ("auc>0.999999", 0), ("tpr001>0.5", 3)])
def test_the_policy_decides_the_exit_code(run: Run, policy: str, code: int) -> None:
    attack = "membership-gradient" if code != 1 else "membership-likelihood"
    found = run("--trials", 2, "--attack", attack, "--fail-on", policy)
    assert found.exit_code == code, found.output
    assert ("Above the policy" in found.stdout) == (code == 1)


def test_nothing_measured_is_inconclusive(run: Run) -> None:
    found = run("--trials", 1, "--attack", "membership-words")
    assert found.exit_code == 3
    assert "not run: it reads words" in found.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--attack", "membership-gradiant"), "did you mean 'membership-gradient'"),
        (("--fail-on", "auk>0.6"), "did you mean 'auc'"),
        (("--defense", "dp-sdg"), "did you mean 'dp-sgd'"),
        (("--candidates", "50", "--reference", "50"), "holds 60 images, 100 from 0 on were asked for"),
        (("--candidates", "2", "--reference", "20"), "2 candidates for batches of 2"),
        (("--local-steps", "3"), "need a learning rate"),
        (("--trials", "0"), "trials must be at least 1"),
        (("--mode", "trian"), "did you mean 'train'"),
        (("--property", "brigth", "--attack", "property"), "did you mean 'bright'"),
        (("--text", "words.txt"), "accepted: one of data"),
        (("--input-shape", "3,8"), "C,H,W"),
    ],
)
def test_bad_input_is_one_line(run: Run, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    found = run("--trials", 1, *options)
    assert isinstance(found.exception, InputError), found.output
    assert message in str(found.exception)
    assert found.exception.exit_code == 2
    assert not (tmp_path / "runs" / "infer" / "inference.json").exists()


def test_help_loads_no_torch() -> None:
    script = (
        "import sys, typer\n"
        "from leakaudit.inference_cli import infer\n"
        "app = typer.Typer()\n"
        "app.command()(infer)\n"
        "sys.argv = ['infer', '--help']\n"
        "try:\n    app()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "heavy = {'torch', 'torchvision', 'transformers', 'scipy', 'torchmetrics'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--property" in done.stdout


# ------------------------------------------------------------------------------ results and policy


def outcome(auc: float | None) -> InferenceOutcome:
    rate = Rate(name="auc", value=auc, chance=0.5)
    return InferenceOutcome(attack="a", spec="a:b=1", question="membership", rates=[rate])


@given(st.floats(0, 1), st.floats(0, 0.999))
def test_a_limit_is_broken_above_it(auc: float, most: float) -> None:
    broken = broken_limits(parse_limits(f"auc>{most!r}"), [outcome(auc), outcome(None)])
    assert len(broken) == (auc > most)


def test_a_factorys_name_is_no_picture(run: Run, tmp_path: Path) -> None:
    run("--trials", 1, "--attack", "membership-gradient:calibration=0")
    found = read_inference(tmp_path / "runs" / "infer")
    found = found.model_copy(update={"model": found.model.model_copy(update={"name": "model.py:factory"})})
    file = io.StringIO()
    print_inference(found, Console(file=file, width=80))
    assert file.getvalue().startswith("model.py:factory: 1 update")


@pytest.mark.parametrize(("high", "code"), [(0.59, 0), (0.6, 0), (0.61, 3)])
def test_an_interval_that_reaches_above_the_policy_shows_nothing(
    run: Run, tmp_path: Path, high: float, code: int
) -> None:
    run("--trials", 1, "--attack", "membership-gradient:calibration=0")
    measured = read_inference(tmp_path / "runs" / "infer")
    rate = Rate(name="auc", value=0.55, low=0.4, high=high, chance=0.5)
    found = measured.model_copy(
        update={"policy": "auc>0.6", "outcomes": [outcome(None).model_copy(update={"rates": [rate]})]}
    )
    assert found.exit_code == code
    assert bool(found.undecided) == (code == 3)
    console = Console(file=io.StringIO(), width=80)
    print_inference(found, console)
    assert isinstance(console.file, io.StringIO)
    assert ("Not shown to be within the policy" in console.file.getvalue()) == (code == 3)


@pytest.mark.parametrize("text", ["", "auc", "auc<0.6", "auc>1", "auc>-1", "auc>nan", "auc>inf", "auc>0.6,"])
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="policy"):
        parse_limits(text)


def test_limits_name_every_rate() -> None:
    text = ",".join(f"{name}>{chance:g}" for name, chance in RATES.items())
    assert ",".join(map(str, parse_limits(text))) == text


def test_another_schema_is_refused(run: Run, tmp_path: Path) -> None:
    run("--trials", 1, "--attack", "membership-gradient:calibration=0")
    path = tmp_path / "runs" / "infer" / "inference.json"
    result = read_inference(path.parent)
    assert InferenceResult.model_validate_json(result.to_json()) == result
    content = json.loads(path.read_text())
    for change, message in (({"schema_version": 9}, "schema_version 9"), ({"secret": 1}, "secret")):
        path.write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=message):
            read_inference(path.parent)
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_inference(path.parent)
    path.unlink()
    with pytest.raises(InputError, match="cannot read"):
        read_inference(path.parent)
