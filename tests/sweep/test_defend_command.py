"""`leakaudit defend`: the command of the documentation, exit codes, and one line for bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from tiny_audits import FACTORIES, Runner, runner, words

from leakaudit.data import photo_folder
from leakaudit.errors import InputError
from leakaudit.gate import read_sweep
from leakaudit.sweep.plan import SweepPlan, plan_sweep

SWEEP = (
    "defend", "--model", "models.py:mlp", "--data", photo_folder(), "--input-shape", "3,8,8", "--num-classes", "5",
    "--attack", "linear", "--metric", "psnr", "--fail-on", "psnr>20", "--images", "1", "--workers", "0",
    "--device", "cpu", "--no-utility", "--no-bounds", "--out", "out",
)  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    (tmp_path / "models.py").write_text(FACTORIES)
    return runner(monkeypatch, capsys, tmp_path)


def test_a_sweep_from_the_command_line(run: Runner, tmp_path: Path) -> None:
    done = run(*SWEEP, "--defense", "gaussian-noise:std=1e-4,10")
    assert done.code == 1, done.err
    text = words(done.out)
    assert "! LEAKS 2 of 5 cells leak beyond the policy" in text
    assert "fedsgd | gaussian-noise:std=0.0001 | linear | adaptive" in text
    result = read_sweep(tmp_path / "out")
    assert result.command.startswith("leakaudit defend --model models.py:mlp")
    assert (tmp_path / "out" / "report.html").is_file()
    report = run("report", "out", "--html", "page.html")
    assert report.code == 0, report.err
    assert "gaussian-noise" in (tmp_path / "page.html").read_text()


def test_a_policy_that_holds_is_green(run: Runner) -> None:
    done = run(*SWEEP, "--defense", "gaussian-noise:std=10")
    assert (done.code, "LEAKS" in done.out) == (0, False)
    assert run(*SWEEP, "--defense", "gaussian-noise:std=10").code == 0, "the same sweep, complete"


def test_inconclusive_is_never_green(run: Runner) -> None:
    done = run(*SWEEP, "--defense", "clip", "--fail-on", "psnr<-500")
    assert (done.code, "? INCONCLUSIVE" in done.out) == (3, True)


def test_never_reports_only(run: Runner) -> None:
    assert run(*SWEEP, "--fail-on", "never").code == 0


def test_options_win_over_the_file(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "audit.toml").write_text('images = 4\ndefense = ["clip"]\nmodle = 1')
    refused = run(*SWEEP, "--config", "audit.toml")
    assert (refused.code, refused.out) == (2, "")
    assert "audit.toml has an unknown key 'modle'" in refused.err
    (tmp_path / "audit.toml").write_text('images = 4\ndefense = ["clip"]')
    run(*SWEEP, "--config", "audit.toml")
    result = read_sweep(tmp_path / "out")
    assert result.examples == 1
    assert {cell.family for cell in result.cells} == {"none", "clip"}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--defense", "gausian-noise"), "did you mean 'gaussian-noise'?"),
        (("--defense", "top-k:keep=0.1,2"), "keep must be in (0, 1], got 2.0"),
        (("--fail-on", "ssim!0.5"), "is not METRIC>NUMBER"),
        (("--images", "99"), "holds 4 images, 99 from 0 on were asked for"),
        (("--adversary", "blind"), "adversaries.0='blind'"),
        (("--protocol", "fedprox"), "unknown protocol 'fedprox'"),
        (("--engine", "slurm"), "engine='slurm'"),
        (("--baseline", "nowhere.json"), "nowhere.json"),
        (("--config", "nowhere.toml"), "nowhere.toml"),
        (("--quantile", "0"), "quantile=0"),
        (("--text", "notes.txt"), "given; accepted: one of data (images) and text (sentences)"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    options: tuple[str, ...], part: str, run: Runner, tmp_path: Path
) -> None:
    done = run(*SWEEP, *options)
    assert (done.code, done.out) == (2, "")
    assert part in done.err
    assert done.err.startswith("leakaudit: ")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_sweep_needs_force(run: Runner, tmp_path: Path) -> None:
    assert run(*SWEEP).code == 1
    for options in ((), ("--resume",)):
        refused = run(*SWEEP, "--defense", "clip", *options)
        assert (refused.code, "out holds another sweep" in refused.err) == (2, True)
    assert run(*SWEEP, "--defense", "clip", "--force").code == 1
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["runs"] == 3


DOCUMENTED = """
leakaudit defend --model resnet20 --checkpoint {weights} --data {photos}
    --defense gaussian-noise:std=1e-4,1e-3,1e-2,1e-1 --defense top-k:keep=0.3,0.1,0.01
    --protocol fedsgd --protocol fedavg:steps=5 --attack auto --images 16 --seeds 3 --out runs/sweep --resume
"""


def test_the_documented_command(
    run: Runner, shared_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Planned as documented, on a real CIFAR ResNet: 2 x 8 targets, 2 x (1 + 7 x 2) cells of 48 runs."""
    plans = []

    def opened(plan: SweepPlan, **options: bool) -> Path:
        plans.append((plan, options))
        raise InputError("planned only")

    monkeypatch.setattr("leakaudit.sweep.run.open_folder", opened)
    (weights,) = (shared_data / "models" / "cifar10_resnet").glob("resnet20-*.th")
    photos = shared_data / "images" / "cifar10" / "png"
    command = shlex.split(DOCUMENTED.format(weights=weights, photos=photos))
    run(*command[1:], "--no-utility", "--device", "cpu")
    ((plan, options),) = plans
    assert options == {"resume": True, "force": False}
    assert (len(plan.targets), len(plan.cells)) == (16, 30)
    assert {len(cell.jobs) for cell in plan.cells} == {48}
    assert plan_sweep(plan.config).identity == plan.identity
