"""Updates that plain torch and NumPy wrote, with only the options their owner has to give."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_audits import Ran, Runner, runner, words
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

NET = """
from torch import nn


def small_lenet():
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, padding=2, stride=2), nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(12 * 4 * 4, 10),
    )
"""
RATE = 0.1
LABEL = 3


@pytest.fixture
def photo() -> Tensor:
    """(1, 3, 8, 8) in [0, 1], smooth."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return interpolate(coarse, size=(8, 8), mode="bilinear")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, photo: Tensor
) -> Runner:
    """The files of several ways of sharing one photo, without leakaudit's writers."""
    (tmp_path / "net.py").write_text(NET)
    namespace: dict[str, object] = {}
    exec(NET, namespace)
    torch.manual_seed(0)
    model: nn.Sequential = namespace["small_lenet"]()  # type: ignore[operator]
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    label = torch.tensor([LABEL])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(wrapped(model), tmp_path / "before.pth")
    cross_entropy(model(photo), label).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save(gradients, tmp_path / "grads.pt")
    torch.save(list(gradients.values()), tmp_path / "list.pt")
    np.savez(tmp_path / "grads.npz", **{name: g.numpy() for name, g in gradients.items() if g is not None})
    np.savez(tmp_path / "arrays.npz", *[g.numpy() for g in gradients.values() if g is not None])
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(2):
        optimiser.zero_grad()
        cross_entropy(model(photo), label).backward()
        optimiser.step()
    torch.save(wrapped(model), tmp_path / "after.pth")
    return runner(monkeypatch, capsys, tmp_path)


def wrapped(model: nn.Module) -> dict[str, object]:
    """As a training script with DataParallel saves it."""
    return {"epoch": 3, "state_dict": {f"module.{name}": t for name, t in model.state_dict().items()}}


GRADIENT = ("--model", "net.py:small_lenet", "--checkpoint", "model.pt", "--input-shape", "3,8,8")
PAIR = (
    "--model", "net.py:small_lenet", "--before", "before.pth", "--input-shape", "3,8,8",
    "--lr", RATE, "--local-steps", 2,
)  # fmt: skip


def psnr(folder: Path, photo: Tensor) -> float:
    found = load_file(folder / "reconstruction.safetensors")
    assert found["labels"].tolist() == [LABEL]
    return -10 * math.log10(float((found["pixels"].double() - photo).square().mean()))


@pytest.mark.parametrize(
    ("update", "options"),
    [
        ("grads.pt", GRADIENT),
        ("list.pt", GRADIENT),
        ("grads.npz", GRADIENT),
        ("arrays.npz", GRADIENT),
        ("after.pth", PAIR),
    ],
)
def test_the_photo_comes_back(
    update: str, options: tuple[object, ...], run: Runner, tmp_path: Path, photo: Tensor
) -> None:
    looked = run("inspect", update, *options)
    assert looked.code == 0, looked.err
    assert f"gives away the labels of 1 example: class {LABEL}" in words(looked.out)
    done = run("attack", update, *options, "--attack", "levenberg-marquardt", "--out", "out")
    assert done.code == 1, done.err or done.out
    assert psnr(tmp_path / "out", photo) > 40
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["verdict"]["status"] == "leaks"
    facts = {row["name"]: (row["status"], row["text"]) for row in result["knowledge"]}
    steps = ("known", "2") if update == "after.pth" else ("inferred", "1")
    assert (facts["local_steps"], facts["scale"][1]) == (steps, "yes")
    assert result["model"]["checkpoint"] == ("before.pth" if update == "after.pth" else "model.pt")


def refused(done: Ran, *parts: str) -> None:
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    for part in parts:
        assert part in done.err


def test_what_is_missing_is_named(run: Runner, tmp_path: Path) -> None:
    refused(run("inspect", "grads.pt"), "pass --model")
    refused(run("inspect", "grads.pt", *GRADIENT[:2]), "pass --checkpoint")
    refused(run("inspect", "grads.pt", *GRADIENT[:4]), "shape (3, 32, 32)", "--input-shape")
    refused(run("inspect", "grads.pt", *GRADIENT[:4], "--input-shape", "1,8,8"), "shape (1, 8, 8)")


def test_a_rank_may_come_from_steps(run: Runner) -> None:
    """One example in two steps: nobody said how many of either."""
    text = words(run("inspect", "after.pth", *PAIR[:8]).out)
    assert "rank 2 of at most 9: 2 examples, unless some have the same features, or fewer in several" in text


def test_wrappers_and_neighbours_are_noted(run: Runner) -> None:
    text = words(run("inspect", "after.pth", *PAIR).out)
    assert "Read from 'state_dict' in the file; left out beside it: epoch." in text
    assert "wrapper prefixes such as 'module.'" in text


def file_findings(text: str) -> list[tuple[str, str]]:
    return [(row["severity"], row["text"]) for row in json.loads(text) if row["name"] == "file"]


def test_a_guess_at_what_the_file_is_is_a_warning_unless_proven(run: Runner, tmp_path: Path) -> None:
    """A delta after - before, taken for a gradient, makes every attack fail: that must not look like safety."""
    before, after = (torch.load(tmp_path / f"{name}.pth")["state_dict"] for name in ("before", "after"))
    delta = {name.removeprefix("module."): after[name] - before[name] for name in before}
    torch.save(delta, tmp_path / "delta.pt")
    for name, warnings in (("grads.pt", 0), ("delta.pt", 1)):
        found = file_findings(run("inspect", name, *GRADIENT, "--json").out)
        assert [text for severity, text in found if "read as a gradient" in text and severity == "info"]
        doubts = [text for severity, text in found if severity == "warning"]
        assert len(doubts) == warnings
        assert all("not a delta after - before" in text for text in doubts)
    assert file_findings(run("inspect", "grads.pt", *GRADIENT, "--kind", "gradient", "--json").out) == []


def test_an_unstated_reduction_is_a_warning_for_a_batch(run: Runner) -> None:
    def warned(*options: object) -> bool:
        done = run("inspect", "grads.pt", *GRADIENT, "--kind", "gradient", *options, "--json")
        return "mean or the sum" in done.out

    assert warned("--batch-size", 2)
    assert not warned("--batch-size", 1)
    assert not warned("--batch-size", 2, "--reduction", "mean")


def test_the_reduction_stated_is_the_one_shown(run: Runner, tmp_path: Path) -> None:
    run(
        "attack",
        "grads.pt",
        *GRADIENT,
        "--attack",
        "levenberg-marquardt",
        "--reduction",
        "sum",
        "--out",
        "out",
    )
    knowledge = json.loads((tmp_path / "out" / "result.json").read_text())["knowledge"]
    assert [row["source"] for row in knowledge if row["name"] == "loss"] == ["assumed cross-entropy, sum"]


def test_files_of_one_name_are_told_apart(run: Runner, tmp_path: Path) -> None:
    """global/model.pt and client/model.pt: the run of another client's must not be overwritten."""
    for folder, source in (("global", "before.pth"), ("client", "after.pth"), ("other", "after.pth")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.pt").write_bytes((tmp_path / source).read_bytes())
    other = torch.load(tmp_path / "other" / "model.pt")
    other["state_dict"] = {name: tensor * 1.01 for name, tensor in other["state_dict"].items()}
    torch.save(other, tmp_path / "other" / "model.pt")
    options = [*PAIR[:2], "--before", "global/model.pt", *PAIR[4:], "--budget", 2, "--no-controls"]
    options += ["--attack", "inverting-gradients:iterations=2", "--out", "out"]
    run("attack", "client/model.pt", *options)
    files = json.loads((tmp_path / "out" / "result.json").read_text())["files"]
    assert len(set(files.values())) == 2
    refused(run("attack", "other/model.pt", *options), "holds the run of another update")


def test_a_page_that_cannot_be_written_is_said_before_the_attack(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(
        run("attack", "grads.pt", *GRADIENT, "--out", "out", "--html", "file/page.html"),
        "cannot write",
        "file",
    )
    assert not (tmp_path / "out").exists()


def test_a_pool_without_a_truth_is_refused(run: Runner) -> None:
    refused(
        run("attack", "grads.pt", *GRADIENT, "--out", "out", "--pool", "nowhere"), "pool nowhere", "truth"
    )
