from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from leakaudit.errors import AmbiguityError, InputError
from leakaudit.formats.manifest import Manifest
from leakaudit.formats.reading import read_file

W, B = torch.arange(6.0).reshape(2, 3), torch.tensor([-1.0, 2.0])
NAMED = {"conv.weight": W, "conv.bias": B}


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def assert_named(found: dict[str, Tensor] | None, expected: dict[str, Tensor] = NAMED) -> None:
    assert found is not None
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "value",
    [
        NAMED,
        OrderedDict(NAMED),
        {name: nn.Parameter(t) for name, t in NAMED.items()},
        {"gradients": NAMED, "epoch": 3},
        {"state_dict": {"model": NAMED}},
        {"grads": NAMED, "state_dict": {"conv.weight": W + 1}},
        {"conv": {"weight": W, "bias": B}},
        list(NAMED.items()),
        {**NAMED, "frozen.weight": None, "epoch": 3, "loss": 0.25},
    ],
    ids=[
        "dict",
        "ordered",
        "parameters",
        "gradients",
        "nested",
        "prefer-grads",
        "modules",
        "pairs",
        "extras",
    ],
)
def test_dicts_in_every_nesting(tmp_path: Path, value: object) -> None:
    for suffix in ("pt", "pth", "th", "bin"):
        raw = read_file(saved(tmp_path / f"a.{suffix}", value))
        assert raw.ordered is None
        assert raw.in_order
        assert_named(raw.tensors)


def test_what_was_left_out_beside_a_nested_dict_is_noted(tmp_path: Path) -> None:
    raw = read_file(saved(tmp_path / "a.pt", {"gradients": NAMED, "epoch": 3, "optimizer": {}}))
    assert raw.nested_under == "gradients"
    assert raw.notes == ("Read from 'gradients' in the file; left out beside it: epoch, optimizer.",)


@pytest.mark.parametrize(
    "value", [[W, None, B], (W, None, B), {0: W, 1: None, 2: B}, {"update": [W, None, B]}]
)
def test_lists_keep_their_order_and_gaps(tmp_path: Path, value: object) -> None:
    raw = read_file(saved(tmp_path / "a.pt", value))
    assert raw.tensors is None
    assert raw.ordered is not None
    assert raw.ordered[1] is None
    assert list(raw.entries) == ["entry 0", "entry 1", "entry 2"]
    assert torch.equal(raw.ordered[0], W)  # type: ignore[arg-type]
    assert torch.equal(raw.ordered[2], B)  # type: ignore[arg-type]


def test_npz_with_names_and_by_position(tmp_path: Path) -> None:
    np.savez(tmp_path / "named.npz", **{name: t.numpy() for name, t in NAMED.items()})
    assert_named(read_file(tmp_path / "named.npz").tensors)
    many = [np.full((1,), i, dtype=np.float32) for i in range(12)]  # arr_10 sorts before arr_2
    np.savez_compressed(tmp_path / "list.npz", *many)
    ordered = read_file(tmp_path / "list.npz").ordered
    assert ordered is not None
    assert [float(t) for t in ordered if t is not None] == list(range(12))


def test_npz_types(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        half=np.float16([0.1]),
        double=np.float64([0.1]),
        big_endian=np.array([1.5], dtype=">f4"),
        fortran=np.asfortranarray(W.numpy()),
        count=np.int64(7),
        scalar=np.float32(2.5),
    )
    raw = read_file(tmp_path / "a.npz")
    assert raw.tensors is not None
    assert {name: t.dtype for name, t in raw.tensors.items()} == {
        **dict.fromkeys(["half", "double", "big_endian", "fortran", "scalar"], torch.float32),
        "count": torch.int64,
    }
    assert raw.dtypes["half"] == "float16"
    assert raw.dtypes["double"] == "float64"
    assert torch.equal(raw.tensors["fortran"], W)
    assert raw.tensors["scalar"].shape == ()
    assert float(raw.tensors["big_endian"]) == 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_other_precisions_become_float32_and_are_remembered(
    tmp_path: Path, dtype: torch.dtype, suffix: str
) -> None:
    path, value = tmp_path / f"a.{suffix}", {"w": torch.linspace(0, 1, 5).to(dtype)}
    torch.save(value, path) if suffix == "pt" else safetensors.torch.save_file(value, path)
    raw = read_file(path)
    assert raw.tensors is not None
    assert raw.tensors["w"].dtype == torch.float32
    assert torch.equal(raw.tensors["w"], value["w"].float())
    assert raw.dtypes == {"w": str(dtype).removeprefix("torch.")}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_sparse_quantised_and_expanded_tensors_become_dense(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(W, 0.5, 0, torch.qint8)
    value = {"sparse": W.to_sparse(), "quantised": quantised, "expanded": torch.ones(1).expand(4)}
    raw = read_file(saved(tmp_path / "a.pt", value))
    assert raw.tensors is not None
    assert torch.equal(raw.tensors["sparse"], W)
    assert torch.equal(raw.tensors["quantised"], quantised.dequantize())
    assert raw.dtypes["quantised"] == "qint8"
    assert raw.tensors["expanded"].stride() == (1,)


def test_manifest_inside_and_beside(tmp_path: Path) -> None:
    path = tmp_path / "shared.safetensors"
    inside = Manifest(kind="delta", learning_rate=0.1, parameter_order=("conv.weight", "conv.bias"))
    safetensors.torch.save_file(NAMED, path, {"leakaudit": inside.to_json()})
    assert_named(read_file(path).tensors)  # safetensors itself sorts the names
    assert read_file(path).manifest == inside
    (tmp_path / "shared.safetensors.manifest.json").write_text('{"learning_rate": 0.5}')
    assert read_file(path).manifest == inside.merged(Manifest(learning_rate=0.5))


@pytest.mark.parametrize("name", ["shared.pt.manifest.json", "shared.manifest.json"])
def test_manifest_beside_other_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"kind": "gradient"}')
    assert read_file(saved(tmp_path / "shared.pt", NAMED)).manifest.kind == "gradient"


def test_order_of_safetensors_is_unknown_without_a_manifest(tmp_path: Path) -> None:
    safetensors.torch.save_file(NAMED, tmp_path / "a.safetensors")
    assert not read_file(tmp_path / "a.safetensors").in_order
    assert read_file(tmp_path / "a.safetensors").manifest == Manifest()


class Exploit:
    """What a malicious checkpoint looks like: unpickling it would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"w": W, "x": e}], ids=["bare", "in-a-dict"])
@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, wrap: Any, writer: str) -> None:
    path, marker = tmp_path / "a.pt", tmp_path / "ran"
    value = wrap(Exploit(marker))
    if writer == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(
        InputError, match=r"\(.*system\), which are never loaded|plain pickle, which is never"
    ):
        read_file(path)
    assert not marker.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"torch.nn.modules.linear.Linear.*model.state_dict\(\)"):
        read_file(saved(tmp_path / "a.pt", nn.Linear(2, 2)))


def test_object_arrays_are_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    np.savez(tmp_path / "a.npz", w=np.array([Exploit(marker)], dtype=object))
    with pytest.raises(InputError, match="Python objects, which are never unpickled"):
        read_file(tmp_path / "a.npz")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt", "pth", "th", "bin"])
def test_empty_truncated_and_foreign_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        read_file(path)
    for foreign in (b"\x89PNG\r\n\x1a\n" + bytes(100), b"hello", json.dumps({"w": [1.0]}).encode()):
        path.write_bytes(foreign)
        with pytest.raises(InputError, match="is truncated or"):
            read_file(path)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        read_file(path)
    path.mkdir()
    with pytest.raises(InputError, match="is not a file"):
        read_file(path)


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.onnx is of no known format; accepted: .safetensors, .npz"):
        read_file(tmp_path / "a.onnx")


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt"])
@pytest.mark.parametrize(
    ("bad", "count"),
    [
        ([float("nan"), 1.0], "1 NaN of 2"),
        ([float("inf"), -float("inf"), float("nan")], "1 NaN and 2 Inf of 3"),
    ],
)
def test_numbers_that_are_not_finite_are_named_and_counted(
    tmp_path: Path, suffix: str, bad: list[float], count: str
) -> None:
    path, value = tmp_path / f"a.{suffix}", {"fine": W, "fc.bias": torch.tensor(bad)}
    if suffix == "npz":
        np.savez(path, **{name: t.numpy() for name, t in value.items()})
    else:
        torch.save(value, path) if suffix == "pt" else safetensors.torch.save_file(value, path)
    with pytest.raises(InputError, match=f"'fc.bias' holds {count} numbers"):
        read_file(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"w": torch.tensor([1e300], dtype=torch.float64)}, "1 beyond float32 of 1"),
        ({"w": torch.tensor([1j])}, "complex64"),
        ({"w": torch.empty(2, device="meta")}, "cannot be read|real numbers"),
        ([W, "text"], "a list that holds a str"),
        ("text", "holds a str"),
        (3, "holds a int"),
        ({}, "holds no tensors"),
        ([], "holds no tensors"),
        ({"w": None}, "holds no tensors"),
        ({"epoch": 3}, "holds no tensors"),
        ({(1, 2): W}, r"the key \(1, 2\) is not a name"),
        ({"w": torch.zeros(1).expand(1 << 40)}, "unpacks to"),
    ],
)
def test_contents_that_cannot_be_an_update(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_file(saved(tmp_path / "a.pt", value))


def test_npz_of_text_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.array(["a"]))
    with pytest.raises(InputError, match="'w' is of type <U1; accepted: arrays of numbers"):
        read_file(tmp_path / "a.npz")


def test_two_updates_in_one_file_are_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(AmbiguityError, match="several keys \\(gradients, delta\\)"):
        read_file(saved(tmp_path / "a.pt", {"gradients": NAMED, "delta": NAMED}))
