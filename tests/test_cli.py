"""The command line on real tiny runs: help, exit codes, bad input, and the way from capture to report."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import stat
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load, save_file
from tiny_audits import FACTORIES, Ran, Runner, runner, words

from leakaudit import __version__, cli
from leakaudit.cli import app
from leakaudit.data import photo_folder
from leakaudit.errors import InputError
from leakaudit.formats.reading import read_file
from leakaudit.report.folder import read_run
from leakaudit.subject import pick_device

SHAPED = ("--input-shape", "3,8,8", "--num-classes", "5")
GENTLE = ("--attack", "inverting-gradients:iterations=150", "--metric", "psnr")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    (tmp_path / "models.py").write_text(FACTORIES)
    return runner(monkeypatch, capsys, tmp_path)


def capture(run: Runner, model: str = "smooth", *options: object) -> Ran:
    """shared, truth and model.safetensors in the current folder."""
    done = run(
        "capture", "--model", f"models.py:{model}", "--data", photo_folder(), "--out", "shared.safetensors",
        "--truth", "truth.safetensors", *SHAPED, *options,
    )  # fmt: skip
    assert done.code == 0, done.err
    return done


def attack(run: Runner, model: str = "smooth", *options: object) -> Ran:
    return run(
        "attack", "shared.safetensors", "--model", f"models.py:{model}", "--checkpoint", "model.safetensors",
        "--device", "cpu", "--out", "out", *options,
    )  # fmt: skip


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """Not mapped into memory: these tests overwrite the files they read."""
    return load(path.read_bytes())


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


# ------------------------------------------------------------------ help


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_every_command_is_there() -> None:
    assert {"demo", "capture", "inspect", "attack", "report", "list"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_documents_every_option(name: str, run: Runner) -> None:
    done = run(name, "--help")
    assert done.code == 0
    text = words(done.out)
    assert (COMMANDS[name].help or "").split("\n")[0].rstrip(".") in text
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name}: {parameter.name} has no help"
        if parameter.name != "help":
            assert max(parameter.opts, key=len).lstrip("-").upper() in text.upper()
            assert words(parameter.help)[:30] in text


def test_every_help_text_is_written_once() -> None:
    calls = [
        node for node in ast.walk(ast.parse(Path(cli.__file__).read_text())) if isinstance(node, ast.Call)
    ]
    texts = [
        ast.unparse(keyword.value) for call in calls for keyword in call.keywords if keyword.arg == "help"
    ]
    assert len(texts) > 30
    assert [text for text, count in Counter(texts).items() if count > 1] == []


def test_root_help_names_the_exit_codes(run: Runner) -> None:
    text = words(run("--help").out)
    assert "0 within policy, 1 leakage above the policy, 2 usage or input error, 3 inconclusive" in text
    for name, command in COMMANDS.items():
        assert name in text
        assert command.help
    assert run("--version").out.strip() == f"leakaudit {__version__}"


def test_usage_errors_have_code_2(run: Runner) -> None:
    assert run("atack").code == 2
    assert run("attack", "x.safetensors", "--restarts", "0").code == 2
    assert run("capture").code == 2
    assert "--budgett" in run("attack", "x.safetensors", "--budgett", "3").err


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("attacks", "idlg"),
        ("defenses", "top-k"),
        ("protocols", "fedavg"),
        ("systems", "ssgd"),
        ("models", "resnet20"),
        ("metrics", "lpips"),
    ],
)
def test_list(run: Runner, what: str, name: str) -> None:
    done = run("list", what)
    assert done.code == 0
    assert name in done.out


def test_list_of_something_else(run: Runner) -> None:
    done = run("list", "atacks")
    assert (done.code, done.out) == (2, "")
    known = "attacks, defenses, protocols, systems, inferences, models, metrics"
    assert done.err == f"leakaudit: cannot list 'atacks'; accepted: {known}\n"


# ------------------------------------------------------------------ from capture to report


def test_a_truth_of_another_number_of_images(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp", "--batch-size", "2")
    (tmp_path / "truth.safetensors").rename(tmp_path / "two.safetensors")
    (tmp_path / "shared.safetensors").unlink()
    (tmp_path / "model.safetensors").unlink()
    capture(run, "mlp", "--batch-size", "1")
    done = attack(run, "mlp", "--truth", "two.safetensors")
    assert done.code == 2
    assert "two.safetensors holds 2 images, the update is of 1 example" in words(done.err)
    assert not (tmp_path / "out").exists()


def test_the_page_is_written_although_nobody_reads_the_terminal(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`leakaudit attack ... | head` ends at the first write to a closed pipe."""

    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("leakaudit.report.terminal.print_result", closed)
    capture(run, "mlp", "--batch-size", "2")
    with contextlib.suppress(BrokenPipeError):
        attack(run, "mlp", "--html", "own.html", "--metric", "mse")
    assert (tmp_path / "own.html").is_file()


def test_capture_inspect_attack_report(run: Runner, tmp_path: Path) -> None:
    assert "Truth: truth.safetensors" in capture(run, "mlp", "--batch-size", "2").out
    assert files(tmp_path) == {"models.py", "shared.safetensors", "truth.safetensors", "model.safetensors"}

    looked = run(
        "inspect", "shared.safetensors", "--model", "models.py:mlp", "--checkpoint", "model.safetensors"
    )
    assert looked.code == 0
    assert "labels" in looked.out
    as_json = run(
        "inspect",
        "shared.safetensors",
        "--model",
        "models.py:mlp",
        "--checkpoint",
        "model.safetensors",
        "--json",
    )
    assert {"name", "severity", "text", "data"} == set(json.loads(as_json.out)[0])

    done = attack(run, "mlp", "--truth", "truth.safetensors", "--html", "page/own.html", "--metric", "mse")
    assert done.code == 1, done.err
    assert "Private images were reconstructed." in words(done.out)
    result = read_run(tmp_path / "out")
    assert result.verdict.status == "leaks"
    assert result.command.startswith("leakaudit attack shared.safetensors --model models.py:mlp")
    assert set(result.files) == {"shared.safetensors", "model.safetensors"}
    best = result.best_trial
    assert best is not None
    assert {"mse", "psnr", "ssim"} <= {score.metric for score in best.scores}, "the policy's are measured too"
    assert {e.true_label for e in best.examples} == {e.recovered_label for e in best.examples}
    kept = load_file(tmp_path / "out" / "reconstruction.safetensors")
    truth = load_file(tmp_path / "truth.safetensors")
    order = [example.matched for example in best.examples]
    assert float((kept["pixels"][order] - truth["pixels"]).abs().max()) < 0.05
    assert torch.equal(kept["labels"][order], truth["labels"])

    page = (tmp_path / "page" / "own.html").read_text()
    assert "<html" in page
    assert (tmp_path / "out" / "report.html").is_file()
    done = run("report", "out", "--html", "again.html")
    assert done.code == 0
    assert "Report: again.html" in done.out
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_attack_without_truth_goes_by_verification(run: Runner, tmp_path: Path) -> None:
    capture(run)
    done = attack(run, "smooth", "--attack", "levenberg-marquardt")
    assert done.code == 1
    result = read_run(tmp_path / "out")
    assert not result.truth_known
    assert result.best_trial is not None
    assert result.best_trial.verification is not None
    assert result.best_trial.verification.status == "verified"
    assert "originals" not in " ".join(files(tmp_path / "out"))


def test_fedavg_with_shared_buffers(run: Runner, tmp_path: Path) -> None:
    """The buffers give the number of steps and train mode away; the statistics of the batch are known."""
    capture(
        run, "norm", "--mode", "train", "--buffers", "--local-steps", "2", "--lr", "0.05", "--batch-size", "2"
    )
    shared = read_file(tmp_path / "shared.safetensors")
    assert "1.running_mean" in shared.tensors
    stripped = {"kind": "delta", "sign": "before-minus-after", "learning_rate": 0.05, "num_examples": 2}
    stripped |= {"input_shape": [3, 8, 8], "num_classes": 5, "buffers": list(shared.manifest.buffers or ())}
    save_file(dict(load_file(tmp_path / "shared.safetensors")), tmp_path / "shared.safetensors")
    (tmp_path / "shared.manifest.json").write_text(json.dumps(stripped))
    done = attack(
        run, "norm", "--truth", "truth.safetensors", "--normalisation", "none",
        "--attack", "inverting-gradients:iterations=60", "--no-controls", "--metric", "mse",
    )  # fmt: skip
    assert done.code in (1, 3), done.err
    result = read_run(tmp_path / "out")
    facts = {row.name: row for row in result.knowledge}
    assert (facts["local_steps"].text, facts["local_steps"].status) == ("2", "inferred")
    assert (facts["mode"].text, facts["mode"].status) == ("train", "inferred")
    assert result.round.local_steps == 2
    assert result.model.mode == "train"
    assert result.best_trial is not None
    assert result.best_trial.residual is not None
    assert result.best_trial.residual < 0.5


# ------------------------------------------------------------------ exit codes


def test_code_0_when_nothing_is_recovered_and_the_control_is(run: Runner, tmp_path: Path) -> None:
    capture(run, "smooth", "--defense", "gaussian-noise:std=0.05")
    done = attack(run, "smooth", "--truth", "truth.safetensors", *GENTLE)
    assert done.code == 0, done.out
    result = read_run(tmp_path / "out")
    assert result.verdict.status == "not-recovered"
    positive = {control.name: control for control in result.controls}["positive"]
    assert positive.passed
    assert not re.search(r"\bsafe\b", words(done.out), re.IGNORECASE)


def test_code_0_for_leakage_under_the_policy_never(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    options = ("--truth", "truth.safetensors", "--attack", "linear", "--metric", "psnr")
    assert attack(run, "mlp", *options, "--fail-on", "never").code == 0
    assert read_run(tmp_path / "out").verdict.status == "leaks"
    assert attack(run, "mlp", *options, "--fail-on", "psnr>20").code == 1


def test_code_3_when_the_control_fails_too(run: Runner, tmp_path: Path) -> None:
    capture(run)
    done = attack(
        run, "smooth", "--truth", "truth.safetensors", "--attack", "inverting-gradients:iterations=1",
        "--metric", "psnr",
    )  # fmt: skip
    assert done.code == 3
    result = read_run(tmp_path / "out")
    assert result.verdict.status == "inconclusive"
    assert {control.name: control.passed for control in result.controls}["positive"] is False


def test_code_3_without_truth_and_without_a_match(run: Runner) -> None:
    capture(run, "narrow")
    done = attack(run, "narrow", "--attack", "inverting-gradients:iterations=3", "--no-controls")
    assert done.code == 3
    assert "Without the originals a failed attack says nothing about safety." in words(done.out)


# ------------------------------------------------------------------ redaction, strangers, resuming


def test_redact_leaves_no_originals(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    options = ("--truth", "truth.safetensors", "--attack", "linear", "--metric", "psnr", "--labels", "0")
    attack(run, "mlp", *options)
    shown = {name for name in files(tmp_path / "out") if "original" in name or "difference" in name}
    assert shown == {"images/original-000.png", "images/linear-difference-000.png"}
    # the same folder again, redacted: what the first run showed goes too
    assert attack(run, "mlp", *options, "--redact").code == 1
    assert not shown & files(tmp_path / "out")
    text = (tmp_path / "out" / "result.json").read_text()
    assert "original-000" not in text
    result = read_run(tmp_path / "out")
    assert result.redacted
    assert "--labels withheld" in result.command
    assert all(example.true_label is None for trial in result.trials for example in trial.examples)


def test_redacting_a_report_later(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    attack(run, "mlp", "--truth", "truth.safetensors", "--attack", "linear", "--metric", "psnr")
    run("report", "out", "--html", "open.html")
    run("report", "out", "--html", "closed.html", "--redact")
    pages = [(tmp_path / name).read_text() for name in ("open.html", "closed.html")]
    assert pages[0].count("data:image/png") > pages[1].count("data:image/png")


def test_report_of_a_strangers_folder(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    attack(run, "mlp", "--truth", "truth.safetensors", "--attack", "linear", "--metric", "psnr")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    result["title"] = "<script>alert(1)</script>"
    (tmp_path / "out" / "result.json").write_text(json.dumps(result))
    assert run("report", "out", "--html", "page.html").code == 0
    assert "<script>alert" not in (tmp_path / "page.html").read_text()
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(32))
    result["trials"][0]["strip"][0]["image"] = "../secret.png"
    (tmp_path / "out" / "result.json").write_text(json.dumps(result))
    refuses(run("report", "out", "--html", "evil.html"), "must stay inside the run folder")
    assert not (tmp_path / "evil.html").exists()


def test_a_finished_run_is_not_overwritten_by_another(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    attack(run, "mlp", "--attack", "linear")
    before = (tmp_path / "out" / "result.json").read_bytes()
    refuses(
        run("capture", "--model", "models.py:mlp", "--data", photo_folder(), "--out", "shared.safetensors"),
        "--force",
    )
    capture(run, "mlp", "--force", "--start", "1")
    refuses(attack(run, "mlp", "--attack", "linear"), "holds the run of another update")
    assert (tmp_path / "out" / "result.json").read_bytes() == before
    assert attack(run, "mlp", "--attack", "linear", "--force").code == 1


# ------------------------------------------------------------------ bad input


def refuses(done: Ran, *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds the parts."""
    assert done.code == 2, done.err or done.out
    assert done.err.startswith("leakaudit: ")
    assert len(done.err.splitlines()) == 1, done.err
    for part in parts:
        assert part in done.err, done.err


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pwned",)


def test_bad_updates(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    shared = tmp_path / "shared.safetensors"
    good, tensors = shared.read_bytes(), load_file(shared)
    before = files(tmp_path)

    def refused(*parts: str, path: str = "shared.safetensors") -> None:
        options = ("--model", "models.py:mlp", "--checkpoint", "model.safetensors", *SHAPED)
        for command in (("inspect", path, *options), ("attack", path, *options, "--out", "out")):
            refuses(run(*command), *parts)
        assert not (tmp_path / "out").exists()

    shared.write_bytes(b"")
    refused("shared.safetensors")
    shared.write_bytes(good[: len(good) // 2])
    refused("shared.safetensors")
    for bad, name in ((float("nan"), "NaN"), (float("inf"), "Inf")):
        save_file({**tensors, "1.bias": torch.full_like(tensors["1.bias"], bad)}, shared)
        refused("1.bias", name)
    save_file({"other.weight": torch.ones(7, 7)}, shared)
    refused("other.weight")
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, shared)
    (tmp_path / "shared.manifest.json").write_text('{"kind": "gradient", "num_classes": 5}')
    refused("zero everywhere")
    (tmp_path / "shared.manifest.json").write_text('{"kind": "gradient", "local_steps": 0}')
    refused("local_steps=0")
    (tmp_path / "shared.manifest.json").unlink()
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    refused("evil.pt", path="evil.pt")
    assert not (tmp_path / "pwned").exists()
    refused("missing.npz", path="missing.npz")
    (tmp_path / "evil.pt").unlink()
    assert files(tmp_path) == before


def test_bad_checkpoints(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    wrong = dict(load_file(tmp_path / "model.safetensors"))
    model = tmp_path / "model.safetensors"
    save_file({**wrong, "1.weight": wrong["1.weight"] + 1}, model)
    refuses(attack(run, "mlp"), "was made with checkpoint")
    save_file({**wrong, "1.weight": torch.ones(3, 3)}, model)
    refuses(attack(run, "mlp"), "of another shape", "1.weight is 3x3 where the model has 24x192")
    save_file({"conv.weight": torch.ones(3)}, model)
    refuses(attack(run, "mlp"), "missing", "conv.weight")
    refuses(attack(run, "smooth"), "missing")
    model.unlink()
    refuses(attack(run, "mlp"), "model.safetensors")
    refuses(attack(run, "nothing"), "no factory 'nothing'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--local-steps", "0"), "local_steps"),
        (("--epochs", "0"), "epochs=0"),
        (("--batch-size", "0"), "num_examples"),
        (("--examples", "0"), "num_examples must be at least 1, got 0"),
        (("--examples", "900"), "holds 4 images"),
        (("--examples", "4"), "1 local step of 1 example would use only 1 of the 4 examples"),
        (("--local-steps", "3"), "3 local steps need a learning rate"),
        (("--local-steps", "3", "--epochs", "2"), "accepted is one of them"),
        (("--mode", "trian"), "did you mean 'train'"),
        (("--normalisation", "cifar"), "unknown normalisation"),
        (("--input-shape", "3,8"), "is not C,H,W"),
        (("--input-shape", "a,b,c"), "not whole numbers"),
        (("--defense", "top-k:keep=2"), "keep must be in (0, 1]"),
        (("--defense", "topk"), "did you mean 'top-k'"),
        (("--model", "lent"), "did you mean 'lenet'"),
        (("--data", "nowhere"), "nowhere"),
        (("--data", "empty"), "no images"),
        (("--checkpoint", "nowhere.pt"), "nowhere.pt"),
        (("--out", "shared.pt"), "saved as .safetensors"),
        (("--out", "missing/shared.safetensors"), "no folder"),
        (("--truth", "truth.txt"), "saved as .safetensors"),
        (("--truth", "x.safetensors"), "two different things"),
        (("--out", "model.safetensors"), "two different things"),
        (("--reduction", "average"), "average"),
    ],
)
def test_bad_captures_write_nothing(options: tuple[str, ...], part: str, run: Runner, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    before = files(tmp_path)
    done = run(
        "capture",
        "--model",
        "models.py:mlp",
        "--data",
        photo_folder(),
        "--out",
        "x.safetensors",
        *SHAPED,
        *options,
    )
    refuses(done, part)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--attack", "dgl"), "did you mean 'dlg'"),
        (("--attack", "dlg:iterations=0"), "iterations must be positive"),
        (("--attack", "dlg:labels=guess"), "accepted: joint, inferred"),
        (("--fail-on", "psnr"), "not METRIC>NUMBER"),
        (("--metric", "psrn"), "did you mean 'psnr'"),
        (("--budget", "0"), "budget 0 is not positive"),
        (("--labels", "9"), "label 9 is not a class; accepted: 0 to 4"),
        (("--labels", "1,2"), "2 labels given for an update of 1 examples"),
        (("--labels", "cat"), "not whole numbers"),
        (("--kind", "logits"), "kind='logits'"),
        (("--examples", "0"), "num_examples=0"),
        (("--device", "tpu9"), "device 'tpu9' cannot be used"),
        (("--device", "meta"), "device 'meta' cannot be used"),
        (("--truth", "model.safetensors"), "is not a truth file"),
        (("--truth", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--truth", "truth.safetensors", "--pool", "nowhere"), "nowhere"),
        (("--before", "nowhere.pt"), "holds a gradient, so there is no checkpoint before it"),
        (("--out", "model.safetensors"), "model.safetensors"),
        (("--reduction", "max"), "reduction='max'"),
    ],
)
def test_bad_attacks_write_nothing(options: tuple[str, ...], part: str, run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    before = files(tmp_path)
    refuses(attack(run, "mlp", *options), part)
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_device_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(torch, "zeros", silent)
    with pytest.raises(InputError, match="device 'cuda' cannot be used: AssertionError"):
        pick_device("cuda")


def test_bad_reports(run: Runner, tmp_path: Path) -> None:
    refuses(run("report", "nowhere"), "nowhere is not a run folder")
    (tmp_path / "broken").mkdir()
    for text in ("", "{", "[]", '{"schema_version": 99}', '{"schema_version": 1}'):
        (tmp_path / "broken" / "result.json").write_text(text)
        refuses(run("report", "broken"), "result.json")
    assert not (tmp_path / "report.html").exists()


def test_a_stranger_cannot_name_code_to_run(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    done = run("attack", "shared.safetensors", "--checkpoint", "model.safetensors", "--out", "out")
    refuses(done, "names its model 'models.py:mlp'; code is loaded only when you pass it as --model")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folders(run: Runner, tmp_path: Path) -> None:
    capture(run, "mlp")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        refuses(attack(run, "mlp", "--out", "locked/out"), "cannot write")
        refuses(attack(run, "mlp", "--out", "locked"), "cannot write")
    finally:
        locked.chmod(stat.S_IRWXU)
    assert not list(locked.iterdir())


def test_an_output_folder_that_cannot_be(run: Runner, tmp_path: Path) -> None:
    """Also for root: a file stands where the folder should."""
    capture(run, "mlp")
    (tmp_path / "file").write_text("mine")
    refuses(attack(run, "mlp", "--out", "file/out"), "cannot write to the folder file/out")
    refuses(attack(run, "mlp", "--out", "file"), "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_files_of_other_kinds(run: Runner, tmp_path: Path) -> None:
    """The same gradient as .npz without a manifest: the options say what the file does not."""
    capture(run, "mlp")
    tensors = load_file(tmp_path / "shared.safetensors")
    np.savez(tmp_path / "bare.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "weights.safetensors")
    done = run(
        "attack", "bare.npz", "--model", "models.py:mlp", "--checkpoint", "weights.safetensors",
        "--kind", "gradient", "--batch-size", "1", "--mode", "eval", "--normalisation", "none", *SHAPED,
        "--truth", "truth.safetensors", "--attack", "linear", "--metric", "psnr", "--out", "out",
    )  # fmt: skip
    assert done.code == 1, done.err
    result = read_run(tmp_path / "out")
    assert {row.name: row.status for row in result.knowledge}["defense"] == "unknown"


def test_errors_and_results_are_printed_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich takes `:factory:` for a picture and `[bold]` for a style."""
    monkeypatch.setattr(sys, "argv", ["leakaudit", "attack", "model.py:factory:[bold]:x.safetensors"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "model.py:factory:[bold]:x.safetensors" in capsys.readouterr().err
