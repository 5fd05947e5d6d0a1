from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_audits import SHAPE, timeless, victim_of, view_of

import leakaudit
from leakaudit.formats.reading import read_safetensors
from leakaudit.randomness import fork

SPECS = ("idlg:iterations=4,restarts=2", "levenberg-marquardt:iterations=3,warm_start=0,restarts=1")


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    from tiny_audits import FACTORIES

    (tmp_path / "models.py").write_text(FACTORIES)
    return f"{tmp_path}/models.py:smooth"


def captured(folder: Path, model_file: str, seed: int = 0) -> None:
    folder.mkdir()
    leakaudit.capture_update(
        model_file,
        leakaudit_photos(),
        folder / "shared.safetensors",
        truth=folder / "truth.safetensors",
        save_model=folder / "model.safetensors",
        input_shape=SHAPE,
        num_classes=5,
        batch_size=2,
        defenses=["gaussian-noise:std=1e-4"],
        seed=seed,
    )


def leakaudit_photos() -> Path:
    from leakaudit.data import photo_folder

    return photo_folder()


def audited(folder: Path, model_file: str, out: Path, seed: int = 0) -> leakaudit.AuditResult:
    return leakaudit.attack(
        folder / "shared.safetensors",
        model_file,
        checkpoint=folder / "model.safetensors",
        truth=folder / "truth.safetensors",
        attacks=SPECS,
        metrics=["mse"],
        seed=seed,
        device="cpu",
        out=out,
    )


def test_the_same_seed_writes_the_same_result(tmp_path: Path, model_file: str) -> None:
    captured(tmp_path / "files", model_file)
    results = [audited(tmp_path / "files", model_file, tmp_path / out) for out in ("one", "two")]
    assert timeless(results[0]) == timeless(results[1])
    written = [timeless(leakaudit.read_run(tmp_path / out)) for out in ("one", "two")]
    assert written[0] == written[1] == timeless(results[0])
    assert json.loads((tmp_path / "one" / "result.json").read_text())["seed"] == 0
    left, right = (
        read_safetensors(tmp_path / out / "reconstruction.safetensors")[0] for out in ("one", "two")
    )
    assert left.keys() == right.keys() == {"pixels", "inputs", "labels"}
    assert all(torch.equal(left[name], right[name]) for name in left)
    pictures = [sorted((tmp_path / out / "images").glob("*.png")) for out in ("one", "two")]
    assert [p.name for p in pictures[0]] == [p.name for p in pictures[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*pictures, strict=True))
    other = audited(tmp_path / "files", model_file, tmp_path / "three", seed=1)
    assert timeless(other)["trials"] != timeless(results[0])["trials"]


def test_the_same_seed_captures_the_same_file(tmp_path: Path, model_file: str) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        captured(tmp_path / name, model_file, seed)
    files = {name: (tmp_path / name / "shared.safetensors").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]


def test_forked_streams_are_independent_and_repeat() -> None:
    def draw(seed: int, name: str) -> list[float]:
        return torch.rand(4, generator=fork(seed, name)).tolist()

    assert draw(0, "a") == draw(0, "a")
    assert len({tuple(draw(seed, name)) for seed in range(3) for name in ("a", "b", "a/1")}) == 9


def test_a_fresh_start_for_every_restart() -> None:
    view = view_of(victim_of("smooth"))
    first, second = (view.victim.space.sample(1, fork(0, f"idlg/{restart}")) for restart in (0, 1))
    assert not torch.equal(first, second)
