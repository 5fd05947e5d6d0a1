"""Targets, cells, runs and their keys."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_sweeps import config

from leakaudit.bundled import labelled_sentences, tiny_model
from leakaudit.data import photo_folder
from leakaudit.errors import InputError
from leakaudit.formats.manifest import build_manifest
from leakaudit.formats.writing import write_update
from leakaudit.rounds import Round
from leakaudit.sweep import setup as loaded
from leakaudit.sweep.config import build_config
from leakaudit.sweep.plan import SweepPlan, plan_sweep
from leakaudit.sweep.protocols import canonical, round_of


def planned(folder: Path, **changes: Any) -> SweepPlan:
    return plan_sweep(config(folder, **changes))


def keys(plan: SweepPlan) -> set[str]:
    return {job.key for job in plan.runs}


def test_cells_are_targets_by_attacks_by_adversaries(tmp_path: Path) -> None:
    plan = planned(
        tmp_path, protocols=["fedsgd", "fedsgd:batch_size=2"], defenses=["top-k:keep=0.3,0.1", "clip"],
        attacks=["linear", "auto"], images=4, seeds=2,
    )  # fmt: skip
    assert len(plan.targets) == 2 * (1 + 3)
    assert len(plan.cells) == 2 * 2 * (1 + 3 * 2)
    runs = {cell.target.protocol: len(cell.jobs) for cell in plan.cells}
    assert runs == {"fedsgd": 4 * 2, "fedsgd:batch_size=2": 2 * 2}
    assert len(plan.runs) == 2 * 7 * (8 + 4)
    assert [cell.adversary for cell in plan.cells if cell.target.defense == "none"] == ["oblivious"] * 4
    assert {(job.first, job.count) for job in plan.cells[-1].jobs} == {(0, 2), (2, 2)}


def test_the_control_is_the_undefended_cell_where_there_is_one(tmp_path: Path) -> None:
    plan = planned(tmp_path, seeds=2)
    undefended = next(cell for cell in plan.cells if cell.target.defense == "none")
    assert all(set(cell.control) == set(undefended.jobs) for cell in plan.cells)


def test_the_control_runs_besides_where_there_is_none(tmp_path: Path) -> None:
    plan = planned(tmp_path, protocols=["fedavg:steps=2,examples=2"], images=2, seeds=2)
    (control,) = {cell.control for cell in plan.cells}
    assert [(job.protocol, job.defense, job.first, job.count, job.seed) for job in control] == [
        ("fedsgd", "none", 0, 1, 0),
        ("fedsgd", "none", 1, 1, 0),
    ]
    assert not any(set(control) & set(cell.jobs) for cell in plan.cells)
    assert len(plan.runs) == 5 * 2 + 2


def test_one_group_at_least(tmp_path: Path) -> None:
    plan = planned(tmp_path, protocols=["fedsgd:batch_size=3"], images=2)
    assert [(job.first, job.count) for job in plan.cells[0].jobs] == [(0, 3)]
    assert plan.setup.count == 3


def test_the_control_row_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    for defenses, counts in ((["clip"], False), (["none", "clip"], True), ([], True)):
        (row,) = [
            cell for cell in planned(tmp_path, defenses=defenses).cells if cell.target.defense == "none"
        ]
        assert row.counts is counts


def test_keys_are_those_of_what_matters(tmp_path: Path) -> None:
    base = planned(tmp_path)
    for same in ({"workers": 2}, {"quantile": 0.5}, {"total_budget": 9}, {"out": str(tmp_path / "b")}):
        assert planned(tmp_path, **same).identity == base.identity
    for other in (
        {"seed": 1},
        {"budget": 5},
        {"labels": True},
        {"fail_on": "psnr>21"},
        {"metrics": ["ssim"]},
        {"redact": True},
        {"mode": "train"},
        {"start": 1},
        {"normalisation": "cifar10"},
        {"attacks": ["auto"]},
    ):
        assert not keys(planned(tmp_path, **other)) & keys(base), other


def test_a_key_knows_the_weights_and_the_pixels(tmp_path: Path) -> None:
    """Other weights under the same name, and one other photo under the same name."""
    shutil.copytree(photo_folder(), tmp_path / "photos")
    base = planned(tmp_path, data=str(tmp_path / "photos"))
    assert keys(base) == keys(planned(tmp_path)), "where the photos lie does not matter"
    first = sorted((tmp_path / "photos").glob("*.png"))[0]
    Image.new("RGB", (32, 32), (9, 90, 200)).save(first)
    loaded.load_examples.cache_clear()
    after = planned(tmp_path, data=str(tmp_path / "photos"))
    changed = {job.key for job in base.runs if job.first == 0}
    assert keys(base) - keys(after) == changed
    text = (tmp_path / "models.py").read_text()
    for name, code in (("same", text), ("other", text.replace("nn.Sigmoid()", "nn.Tanh()"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "models.py").write_text(code)
        moved = planned(tmp_path, model=f"{tmp_path}/{name}/models.py:mlp")
        assert (moved.identity == planned(tmp_path).identity) is (name == "same")


def test_runs_are_plain_values(tmp_path: Path) -> None:
    """What goes to another process holds no tensors and no objects of ours but the setup."""
    job = planned(tmp_path).runs[0]
    flat = dataclasses.asdict(job)
    plain = (str, int, float, bool, type(None))
    assert all(
        isinstance(value, plain) for value in flat.pop("setup").values() if not isinstance(value, tuple)
    )
    assert all(isinstance(value, plain) for value in flat.values() if not isinstance(value, tuple))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"defenses": ["gausian-noise"]}, "unknown defense 'gausian-noise', did you mean 'gaussian-noise'?"),
        ({"defenses": ["top-k:kept=0.1"]}, "has no option 'kept', did you mean 'keep'?"),
        ({"defenses": ["top-k:keep=0.1,1.5"]}, "keep must be in (0, 1], got 1.5"),
        ({"attacks": ["liner"]}, "unknown attack 'liner', did you mean 'linear'?"),
        ({"attacks": ["lamp"]}, "attack lamp reconstructs text, the model takes images"),
        ({"attacks": []}, "no attack"),
        ({"adversaries": []}, "no adversary"),
        ({"protocols": []}, "no protocol"),
        ({"fail_on": "ssim=0.5"}, "is not METRIC>NUMBER"),
        ({"fail_on": "rouge-l>0.5"}, "does not measure images"),
        ({"metrics": ["rouge-l"]}, "does not measure images"),
        ({"images": 9}, "holds 4 images, 9 from 0 on were asked for"),
        ({"protocols": ["fedsgd:batch_size=8"]}, "holds 4 images, 8 from 0 on were asked for"),
        ({"model": "lennet"}, "unknown model 'lennet', did you mean 'lenet'?"),
        ({"checkpoint": "nowhere.pt"}, "nowhere.pt"),
        ({"data": None}, "no private data given"),
        ({"text": "notes.txt"}, "given; accepted: one of data (images) and text (sentences)"),
        ({"max_length": 9}, "max length 9 is of sentences"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
    ],
)
def test_what_cannot_be_planned(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        planned(tmp_path, **change)
    assert part in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_text_is_planned_alike() -> None:
    plan = plan_sweep(
        build_config(
            {
                "model": f"hf:{tiny_model('bert')}",
                "task": "classification",
                "text": str(labelled_sentences()),
                "images": 3,
                "defenses": ["top-k:keep=0.1"],
                "utility": False,
            }
        )
    )
    assert (plan.medium, len(plan.cells), len(plan.runs)) == ("text", 3, 9)
    assert plan.policy.metrics == ("token-accuracy", "words-f1", "rouge-l")
    assert len({job.key for job in plan.runs}) == 9


# ------------------------------------------------------------------ protocols


def test_a_view_in_place_of_a_protocol_states_its_round(tmp_path: Path) -> None:
    stated = {
        "num_examples": 7,
        "clients": 3,
        "sizes": (2, 2, 3),
        "weights": (0.25, 0.25, 0.5),
        "local_steps": 5,
    }
    manifest = build_manifest({**stated, "kind": "delta", "learning_rate": 0.1, "local_batch_size": 2})
    write_update(tmp_path / "view.safetensors", {"weight": torch.zeros(2)}, manifest)
    spec = canonical(str(tmp_path / "view.safetensors"))
    assert spec.startswith("cohort:examples=7,clients=3,steps=5,batch_size=2")
    assert canonical(spec) == spec
    expected = Round(7, 5, 2, 0.1, 3, (2, 2, 3), (0.25, 0.25, 0.5))
    assert round_of(spec) == expected


def test_a_view_that_does_not_state_its_round(tmp_path: Path) -> None:
    write_update(tmp_path / "view.safetensors", {"weight": torch.zeros(2)}, build_manifest({}))
    with pytest.raises(InputError, match="does not state its round: num_examples is missing"):
        canonical(str(tmp_path / "view.safetensors"))
    with pytest.raises(InputError, match="cannot read"):
        canonical(str(tmp_path / "nowhere.safetensors"))
