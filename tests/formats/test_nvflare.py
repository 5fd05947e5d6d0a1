"""Dumps of NVIDIA FLARE: files that nvflare 2.9.0 itself wrote (tests/data/nvflare), and what is refused."""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import load_checkpoint, read_state_dict
from leakaudit.formats.loading import load_update
from leakaudit.formats.nvflare import Fields, Text, recognise
from leakaudit.formats.reading import read_file
from leakaudit.messages import message_findings
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim

FILES = Path(__file__).parents[1] / "data" / "nvflare"
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(3, 2) / 10, "a.bias": torch.arange(3.0) / 10}


def victim(weights: dict[str, Tensor] | None = None) -> Victim:
    module = nn.Sequential(OrderedDict(flat=nn.Flatten(), a=nn.Linear(2, 3)))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
    module.load_state_dict(weights or zeros)
    return Victim.of(module, Pixels((1, 1, 2), (0.0,), (1.0,)), 3, name="small")


@pytest.mark.parametrize(
    ("name", "kind", "steps"),
    [
        ("dxo.pt", "weights", 5),
        ("dxo_dict.pt", "delta", 5),
        ("flmodel.pt", "delta", 7),
        ("flmodel_vars.pt", "delta", 7),
        ("shareable.pt", "delta", 7),
    ],
)
def test_what_nvflare_wrote_is_read_without_it(name: str, kind: str, steps: int) -> None:
    assert "nvflare" not in sys.modules
    shared = load_update(FILES / name, victim())
    assert (shared.manifest.kind, shared.manifest.local_steps) == (kind, steps)
    factor = -1.0 if kind == "weights" else -0.01  # an update points where the gradient does: before - after
    for parameter, tensor in WEIGHTS.items():
        torch.testing.assert_close(shared.update[parameter], factor * tensor)
    assert any("NUM_STEPS_CURRENT_ROUND" in note for note in shared.notes)


def test_what_a_dump_carries_besides() -> None:
    manifest = read_file(FILES / "flmodel.pt").manifest
    assert manifest.message is not None
    assert (manifest.message.round, manifest.message.metrics) == (3, {"accuracy": "0.5"})
    assert "accuracy=0.5" in {f.name: f.text for f in message_findings(manifest)}["metrics in clear"]
    assert read_file(FILES / "shareable.pt").manifest.message.metrics == {"accuracy": "0.5"}  # type: ignore[union-attr]
    dxo = read_file(FILES / "dxo_dict.pt")
    assert dxo.manifest.message is not None
    assert (dxo.manifest.message.sender, dxo.manifest.message.round) == ("hospital-2", 3)
    assert any("PercentilePrivacy" in note for note in dxo.notes)


def test_the_global_model_is_a_checkpoint() -> None:
    module = victim().module
    load_checkpoint(module, FILES / "FL_global_model.pt")
    assert torch.equal(module.state_dict()["a.weight"], WEIGHTS["a.weight"])
    assert set(read_state_dict(FILES / "dxo.pt")) == set(WEIGHTS)
    with pytest.raises(InputError, match="holds an update"):
        read_state_dict(FILES / "flmodel.pt")


def test_fobs_says_how_to_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"FOBS.*torch\.save"):
        read_file(FILES / "dxo.fobs")
    renamed = tmp_path / "dxo.bin"
    renamed.write_bytes((FILES / "dxo.fobs").read_bytes())
    with pytest.raises(InputError, match=r"FOBS.*torch\.save"):
        read_file(renamed)


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "dump.pt")
    return folder / "dump.pt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "METRICS", "data": {"loss": 1.0}, "meta": {}}, "of kind 'METRICS'; accepted: FULL"),
        ({"kind": "COLLECTION", "data": {"one": {}}, "meta": {}}, "of kind 'COLLECTION'"),
        ({"kind": "WEIGHTS", "data": [1, 2], "meta": {}}, "that holds a list"),
        ({"kind": "WEIGHTS", "data": {}, "meta": {}}, "holds no tensors"),
        (
            {"kind": "WEIGHT_DIFF", "data": {"a": b"\0"}, "meta": {"PROCESSED_ALGORITHM": "CKKS"}},
            "encrypted with CKKS: nothing to reconstruct",
        ),
        ({"kind": "WEIGHTS", "data": {"a.bias": np.zeros(3)}, "meta": {}}, r"NumPy arrays.*numpy\.savez"),
    ],
)
def test_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_file(saved(tmp_path, content))


@pytest.mark.parametrize("steps", [0, -3, True, "12", 2.5, None])
def test_steps_that_are_none_stay_unknown(tmp_path: Path, steps: object) -> None:
    content = {"params": WEIGHTS, "params_type": "FULL", "meta": {"NUM_STEPS_CURRENT_ROUND": steps}}
    assert read_file(saved(tmp_path, content)).manifest.local_steps is None


def test_a_manifest_beside_wins(tmp_path: Path) -> None:
    path = saved(tmp_path, {"params": WEIGHTS, "params_type": "DIFF", "meta": {"NUM_STEPS_CURRENT_ROUND": 9}})
    (tmp_path / "dump.pt.manifest.json").write_text('{"local_steps": 4, "learning_rate": 0.5}')
    manifest = read_file(path).manifest
    assert (manifest.local_steps, manifest.learning_rate, manifest.sign) == (4, 0.5, "after-minus-before")


def test_other_dictionaries_are_none_of_it(tmp_path: Path) -> None:
    assert recognise({"kind": "gradient", "data": WEIGHTS}, tmp_path) is None
    assert recognise({"params": WEIGHTS}, tmp_path) is None
    assert recognise([WEIGHTS], tmp_path) is None


def test_simple_weights_under_the_names_people_use(tmp_path: Path) -> None:
    raw = read_file(saved(tmp_path, {"model_weights": WEIGHTS, "train_conf": {"lr": 0.1}}))
    assert raw.nested_under == "model_weights"


def test_the_stand_ins_do_nothing(tmp_path: Path) -> None:
    """Code is still refused, also beside a dump and by a class of the same module."""
    path = tmp_path / "dump.pt"
    torch.save({"kind": Text("WEIGHTS"), "data": WEIGHTS, "meta": {"hook": print}}, path)
    with pytest.raises(InputError, match="holds code"):
        read_file(path)
    assert not {name for name in vars(Fields) if callable(getattr(Fields, name))} - set(dir(object))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(FILES / "dxo.pt", weights_only=True)  # the permission ends with the reading
