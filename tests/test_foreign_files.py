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
