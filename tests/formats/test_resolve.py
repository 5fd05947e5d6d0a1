from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from small_transformers import small_victim
from small_victims import CLASSES, assert_same, gradient_of, network, plain_network, victim_of
from torch import Tensor, nn

from leakaudit.errors import AmbiguityError, InputError
from leakaudit.formats.loading import load_update
from leakaudit.formats.manifest import Manifest
from leakaudit.formats.reading import read_file
from leakaudit.formats.resolve import Resolved, resolve
from leakaudit.models.victim import Victim
from leakaudit.update import Update

VICTIM = victim_of(network())
PLAIN = victim_of(plain_network())


def from_file(path: Path, value: object, victim: Victim = VICTIM) -> Resolved:
    torch.save(value, path / "shared.pt")
    return resolve(read_file(path / "shared.pt"), victim)


def renamed(update: Update) -> dict[str, Tensor]:
    return {f"tensor{i:02}": tensor for i, tensor in enumerate(update.values())}


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "_module.", "module._orig_mod.", "_orig_mod._module."]
)
def test_names_with_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    update = gradient_of(VICTIM)
    found = from_file(tmp_path, {prefix + name: tensor for name, tensor in reversed(list(update.items()))})
    assert_same(Update(found.params), update)
    assert bool(found.notes) == bool(prefix)
    assert found.sources["0.weight"] == f"{prefix}0.weight"


def test_a_victim_that_is_itself_wrapped(tmp_path: Path) -> None:
    wrapped = victim_of(_Wrapper(network()))
    update = gradient_of(VICTIM)
    found = from_file(tmp_path, dict(update), wrapped)
    assert list(found.params) == [f"module.{name}" for name in update]


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize("container", [list, tuple])
def test_a_list_in_parameter_order_equals_the_dict(tmp_path: Path, container: type) -> None:
    update = gradient_of(VICTIM)
    found = from_file(tmp_path, container(update.values()))
    assert_same(Update(found.params), update)
    assert found.notes == (
        "Tensors were matched by position to parameters(), because the file has no names.",
    )


def test_a_list_in_state_dict_order_carries_buffers(tmp_path: Path) -> None:
    """What Flower sends: np.savez of state_dict().values()."""
    state = network(3).state_dict()
    np.savez(tmp_path / "a.npz", *[tensor.numpy() for tensor in state.values()])
    found = resolve(read_file(tmp_path / "a.npz"), VICTIM)
    assert {**found.params, **found.buffers}.keys() == state.keys()
    for name, tensor in {**found.params, **found.buffers}.items():
        assert torch.equal(tensor, state[name])


def test_state_dict_order_without_counters(tmp_path: Path) -> None:
    state = {n: t for n, t in network(3).state_dict().items() if not n.endswith("num_batches_tracked")}
    found = from_file(tmp_path, list(state.values()))
    assert {**found.params, **found.buffers}.keys() == state.keys()


def test_other_names_in_the_models_order(tmp_path: Path) -> None:
    update = gradient_of(VICTIM)
    found = from_file(tmp_path, renamed(update))
    assert_same(Update(found.params), update)
    assert "the file's names are not the model's" in found.notes[0]
    assert found.sources["0.bias"] == "tensor01"


def test_gaps_in_a_list_are_missing_parameters(tmp_path: Path) -> None:
    update = gradient_of(VICTIM)
    values: list[Tensor | None] = list(update.values())
    values[0] = values[4] = None
    found = from_file(tmp_path, values)
    assert found.missing == ("0.weight", "3.weight")
    assert list(found.params) == [name for name in update if name not in found.missing]


def test_one_long_vector(tmp_path: Path) -> None:
    update = gradient_of(VICTIM)
    found = from_file(tmp_path, update.flat())
    assert_same(Update(found.params), update)
    assert "was cut into parameters()" in found.notes[0]


def test_parameter_order_of_the_manifest_restores_what_safetensors_sorts(tmp_path: Path) -> None:
    update = gradient_of(VICTIM)
    names = [f"{chr(122 - i)}" for i in range(len(update))]  # z, y, x, ...: reversed by sorting
    named = dict(zip(names, update.values(), strict=True))
    manifest = Manifest(parameter_order=tuple(names))
    safetensors.torch.save_file(named, tmp_path / "a.safetensors", {"leakaudit": manifest.to_json()})
    assert_same(Update(resolve(read_file(tmp_path / "a.safetensors"), VICTIM).params), update)


def test_unique_shapes_when_the_order_is_unknown(tmp_path: Path) -> None:
    update = gradient_of(PLAIN)
    shuffled = {name[::-1] + "?": tensor for name, tensor in sorted(update.items(), reverse=True)}
    safetensors.torch.save_file(shuffled, tmp_path / "a.safetensors")
    found = resolve(read_file(tmp_path / "a.safetensors"), PLAIN)
    assert_same(Update(found.params), update)
    assert "by their shapes" in found.notes[0]


def test_unique_shapes_of_a_partial_list(tmp_path: Path) -> None:
    update = gradient_of(PLAIN)
    found = from_file(tmp_path, list(update.values())[2:], PLAIN)
    assert_same(Update(found.params), update.select(list(update)[2:]))
    assert found.missing == ("0.weight", "0.bias")


def test_several_parameters_of_one_shape_are_ambiguous(tmp_path: Path) -> None:
    safetensors.torch.save_file(renamed(gradient_of(VICTIM)), tmp_path / "a.safetensors")
    with pytest.raises(
        AmbiguityError, match=r"'tensor01', .* of shape \(4\) could be any of 0.bias, 1.weight, 1.bias"
    ):
        resolve(read_file(tmp_path / "a.safetensors"), VICTIM)


def test_two_entries_for_one_parameter_are_ambiguous(tmp_path: Path) -> None:
    value = {"a": torch.ones(CLASSES), "b": torch.ones(CLASSES)}
    with pytest.raises(AmbiguityError, match=r"'a', 'b' of shape \(5\) could be any of 5.bias"):
        from_file(tmp_path, value, PLAIN)


class _Tied(nn.Module):
    """`first` and `second` share their weight; order and shapes allow two readings of four tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.first = nn.Linear(72, 72, bias=False)
        self.second = nn.Linear(72, 72, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(self.flat(x)))))


def test_tied_parameters_may_come_once_or_twice(tmp_path: Path) -> None:
    victim = victim_of(_Tied())
    update = gradient_of(victim)
    assert_same(Update(from_file(tmp_path, dict(update), victim).params), update)
    twice = {**update, "second.weight": update["first.weight"]}
    assert_same(Update(from_file(tmp_path, twice, victim).params), update)
    listed = [twice[name] for name in victim.module.state_dict()]
    assert_same(Update(from_file(tmp_path, listed, victim).params), update)
    with pytest.raises(InputError, match=r"first.weight is tied, and the file has two different tensors"):
        from_file(tmp_path, {**twice, "second.weight": twice["second.weight"] + 1}, victim)


def test_no_overlap(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"nothing in common with model small: it holds fc1 \(10, 3\).*model has 0.weight"
    ):
        from_file(tmp_path, {"fc1": torch.ones(10, 3), "fc2": torch.ones(9)})


def test_wrong_shape_by_name(tmp_path: Path) -> None:
    value = {**gradient_of(VICTIM), "7.weight": torch.ones(10, 144)}
    with pytest.raises(
        InputError,
        match=r"'7.weight' has shape \(10, 144\), but 7.weight of model small has shape \(5, 144\)",
    ):
        from_file(tmp_path, value)


def test_wrong_shape_by_position(tmp_path: Path) -> None:
    values = list(gradient_of(VICTIM).values())
    values[-2] = torch.ones(10, 144)
    with pytest.raises(
        InputError, match=r"'entry 8' has shape \(10, 144\) where parameters\(\) .*7.weight \(5, 144\)"
    ):
        from_file(tmp_path, values)


def test_tensors_of_another_model_are_listed(tmp_path: Path) -> None:
    value = {**gradient_of(VICTIM), "8.weight": torch.ones(5, 5), "9.weight": torch.ones(5, 5)}
    with pytest.raises(InputError, match=r"2 tensors that model small does not have \(8.weight, 9.weight\)"):
        from_file(tmp_path, value)


def test_counters_of_other_tools_are_left_out(tmp_path: Path) -> None:
    value = {**gradient_of(VICTIM), "total_ops": torch.zeros(1), "step": torch.tensor(3)}
    found = from_file(tmp_path, value)
    assert found.notes == ("2 entries that the model does not have: total_ops, step; left out.",)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_integers_are_no_parameters(tmp_path: Path, dtype: torch.dtype) -> None:
    value = {**gradient_of(VICTIM), "0.bias": torch.ones(4, dtype=dtype)}
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        InputError, match=f"'0.bias' is of type {kind}; accepted for a parameter: floating point"
    ):
        from_file(tmp_path, value)


def test_frozen_parameters_are_known_but_not_missing(tmp_path: Path) -> None:
    module = network()
    for parameter in module[0].parameters():
        parameter.requires_grad_(False)
    victim = victim_of(module)
    whole = gradient_of(VICTIM)
    found = from_file(tmp_path, dict(whole), victim)
    assert "0.weight" in found.params
    assert found.missing == ()
    torch.save([whole[name] for name in victim.trainable()], tmp_path / "list.pt")
    assert_same(load_update(tmp_path / "list.pt", victim).update, whole.select(victim.trainable()))


def test_names_of_a_transformers_model_without_its_head(tmp_path: Path) -> None:
    victim = small_victim("bert", "classification")
    base = {name.removeprefix("bert."): t for name, t in victim.params.items() if name.startswith("bert.")}
    found = from_file(tmp_path, {name: torch.ones_like(tensor) for name, tensor in base.items()}, victim)
    assert list(found.params) == [f"bert.{name}" for name in base]
    assert found.missing == ("classifier.weight", "classifier.bias")


def test_adapters_without_lora_are_told_what_to_pass(tmp_path: Path) -> None:
    victim = small_victim("bert", "classification")
    name = "bert.encoder.layer.0.attention.self.query"
    shared = {
        "classifier.bias": torch.ones(victim.num_classes),
        f"{name}.lora_A.default.weight": torch.ones(2, 3),
    }
    with pytest.raises(InputError, match="pass its adapters as --lora"):
        from_file(tmp_path, shared, victim)
