"""Checkpoint files: every container, every way they can be wrong."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import (
    load_checkpoint,
    parameters_sha256,
    read_state_dict,
    save_checkpoint,
)

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin")


def make_model(seed: int = 0, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(conv=nn.Conv2d(1, 2, 3), bn=nn.BatchNorm2d(2), fc=nn.Linear(2, classes))
        )


def states_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write(path: Path, model: nn.Module) -> None:
    if path.suffix == ".safetensors":
        save_checkpoint(model, path)
    else:
        torch.save(model.state_dict(), path)


@pytest.mark.parametrize("suffix", [".safetensors", *TORCH_SUFFIXES])
def test_every_container_restores_parameters_and_buffers(tmp_path: Path, suffix: str) -> None:
    saved, loaded = make_model(1), make_model(2)
    saved.bn.running_mean.fill_(0.25)
    write(tmp_path / f"m{suffix}", saved)
    sha = load_checkpoint(loaded, tmp_path / f"m{suffix}")
    assert states_equal(saved.state_dict(), loaded.state_dict())
    assert sha == parameters_sha256(saved)


def test_the_old_torch_format_is_read(tmp_path: Path) -> None:
    torch.save(make_model().state_dict(), tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    assert states_equal(read_state_dict(tmp_path / "m.pth"), make_model().state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_module.", "_orig_mod.module."])
def test_nesting_and_prefixes_are_removed(tmp_path: Path, key: str, prefix: str) -> None:
    state = make_model().state_dict()
    renamed = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({key: renamed, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "m.pt")
    assert states_equal(read_state_dict(tmp_path / "m.pt"), dict(state))


def test_num_batches_tracked_may_be_missing(tmp_path: Path) -> None:
    state = make_model(1).state_dict()
    del state["bn.num_batches_tracked"]
    torch.save(state, tmp_path / "m.pt")
    load_checkpoint(make_model(2), tmp_path / "m.pt")


def test_half_precision_is_converted_to_the_models(tmp_path: Path) -> None:
    torch.save(
        {n: t.half() if t.is_floating_point() else t for n, t in make_model(1).state_dict().items()},
        tmp_path / "m.pt",
    )
    model = make_model(2)
    load_checkpoint(model, tmp_path / "m.pt")
    assert torch.equal(model.fc.weight, make_model(1).fc.weight.half().float())


def test_the_differences_are_listed_and_the_module_is_untouched(tmp_path: Path) -> None:
    state = dict(make_model(1, classes=5).state_dict())
    del state["conv.weight"]
    state |= {f"extra{index}": torch.zeros(1) for index in range(5)}
    torch.save(state, tmp_path / "m.pt")
    model = make_model(2)
    with pytest.raises(InputError) as caught:
        load_checkpoint(model, tmp_path / "m.pt")
    message = str(caught.value)
    assert "1 missing (conv.weight)" in message
    assert "5 unexpected (extra0, extra1, extra2 and 2 more)" in message
    assert "2 of another shape (fc.weight is 5x2 where the model has 3x2, fc.bias is 5 where" in message
    assert states_equal(model.state_dict(), make_model(2).state_dict())


def test_integers_are_no_parameters(tmp_path: Path) -> None:
    state = dict(make_model().state_dict()) | {"fc.bias": torch.tensor([1, 2, 3])}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"1 of another type \(fc.bias is torch.int64"):
        load_checkpoint(make_model(), tmp_path / "m.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    model = make_model()
    model.fc.bias.data[1] = bad
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"fc\.bias.* holds 1 "):
        load_checkpoint(make_model(), tmp_path / "m.pt")


class Trap:
    """Unpickling it would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, suffix: str, nested: bool) -> None:
    trap = Trap(tmp_path / "sprung")
    content = {"state_dict": {"fc.weight": torch.zeros(1)}, "args": trap} if nested else trap
    torch.save(content, tmp_path / f"m{suffix}")
    with pytest.raises(InputError):
        read_state_dict(tmp_path / f"m{suffix}")
    (tmp_path / f"p{suffix}").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError):
        read_state_dict(tmp_path / f"p{suffix}")
    assert not (tmp_path / "sprung").exists()


def test_a_whole_module_is_refused_with_a_hint(tmp_path: Path) -> None:
    torch.save(make_model(), tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"state_dict\(\)"):
        read_state_dict(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "without names"),
        (torch.zeros(2), "without names"),
        ({}, "no tensors"),
        ({"state_dict": {}}, "no tensors"),
        ({"epoch": 3}, "no tensors"),
        (3, "holds a int"),
        ({"gradients": {"fc.weight": torch.zeros(2)}}, "holds an update"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(InputError, match=message):
        read_state_dict(tmp_path / "m.pt")


@pytest.mark.parametrize("suffix", [".safetensors", *TORCH_SUFFIXES])
def test_missing_empty_and_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    with pytest.raises(InputError):
        read_state_dict(path)
    path.touch()
    with pytest.raises(InputError, match="empty"):
        read_state_dict(path)
    path.unlink()
    write(path, make_model())
    whole = path.read_bytes()
    for length in (1, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError) as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)


def test_folders_and_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.pt").mkdir()
    with pytest.raises(InputError, match="not a file"):
        read_state_dict(tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"accepted: \.safetensors"):
        read_state_dict(tmp_path / "m.onnx")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_input_error_or_still_a_state_dict(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    suffix = data.draw(st.sampled_from([".safetensors", ".pt"]))
    path = tmp_path_factory.mktemp("fuzz") / f"m{suffix}"
    write(path, make_model())
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged))
    model = make_model(2)
    try:
        load_checkpoint(model, path)
    except InputError:
        assert states_equal(model.state_dict(), make_model(2).state_dict())


@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".safetensors", ".pt", ".th"]))
def test_any_bytes_are_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"m{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_state_dict(path)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(make_model(1), path)
    first = path.read_bytes()
    with pytest.raises(InputError, match=r"written as \.safetensors"):
        save_checkpoint(make_model(2), tmp_path / "m.pt")
    with pytest.raises(InputError, match="no folder"):
        save_checkpoint(make_model(2), tmp_path / "absent" / "m.safetensors")
    save_checkpoint(make_model(1).state_dict(), path)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_tied_weights_are_saved_twice_and_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    save_checkpoint(model, tmp_path / "m.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "m.safetensors")["1.weight"], model[0].weight)


def test_the_hash_is_of_names_shapes_and_values_only(tmp_path: Path) -> None:
    model = make_model(1)
    sha = parameters_sha256(model)
    assert sha == parameters_sha256(dict(reversed(list(model.named_parameters()))))
    model.bn.running_mean.fill_(9.0)
    assert sha == parameters_sha256(model)
    model.fc.bias.data[0] += 1e-6
    assert sha != parameters_sha256(model)
    assert parameters_sha256({"a": torch.zeros(2, 3)}) != parameters_sha256({"a": torch.zeros(3, 2)})
    assert parameters_sha256({"a": torch.zeros(1)}) != parameters_sha256({"b": torch.zeros(1)})
