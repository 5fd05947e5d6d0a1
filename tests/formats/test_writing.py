from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_victims import CLASSES, assert_same, backward, gradient_of, network, private_batch, victim_of
from torch import Tensor, nn

from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import parameters_sha256
from leakaudit.formats.loading import load_update
from leakaudit.formats.manifest import Manifest
from leakaudit.formats.reading import read_file, read_safetensors
from leakaudit.formats.writing import save_tensors, save_update
from leakaudit.update import Update

VICTIM = victim_of(network())


def after_backward() -> nn.Sequential:
    module = network().train()
    backward(module)
    return module


def test_one_line_after_backward(tmp_path: Path) -> None:
    path = save_update(tmp_path / "shared.safetensors", after_backward(), batch_size=3)
    shared = load_update(path, VICTIM)
    assert_same(shared.update, gradient_of(VICTIM), tolerance=1e-6)
    assert shared.has_scale
    assert shared.notes == ()
    assert shared.buffers == {}
    manifest = shared.manifest
    assert (manifest.kind, manifest.mode, manifest.num_examples, manifest.local_steps) == (
        "gradient",
        "train",
        3,
        1,
    )
    assert manifest.parameter_order == tuple(VICTIM.params)
    assert manifest.created_by is not None
    assert manifest.created_by.startswith("leakaudit ")
    unsaid = ("reduction", "loss", "normalisation", "defenses", "model", "checkpoint_sha256", "learning_rate")
    assert all(getattr(manifest, name) is None for name in unsaid)


def test_everything_that_is_said_arrives(tmp_path: Path) -> None:
    path = save_update(
        tmp_path / "a.safetensors",
        after_backward().eval(),
        num_examples=3,
        loss="cross-entropy",
        reduction="sum",
        normalisation=([0.5, 0.5], [0.25, 0.25]),
        input_shape=(2, 6, 6),
        num_classes=CLASSES,
        model_name="small",
        checkpoint_sha256="ab",
        defenses=["clip:norm=1"],
        noise_std=0.01,
    )
    manifest = read_file(path).manifest
    assert manifest.mode == "eval"
    assert manifest.normalisation is not None
    assert manifest.normalisation.std == (0.25, 0.25)
    assert manifest.defenses == ("clip:norm=1",)
    assert (manifest.reduction, manifest.noise_std, manifest.input_shape) == ("sum", 0.01, (2, 6, 6))


@settings(max_examples=10, deadline=None)
@given(steps=st.integers(1, 3), rate=st.floats(0.01, 1))
def test_a_delta_of_real_training(tmp_path_factory: pytest.TempPathFactory, steps: int, rate: float) -> None:
    module = network().train()
    before = copy.deepcopy(module.state_dict())
    optimiser = torch.optim.SGD(module.parameters(), lr=rate)
    total: Update | None = None
    for _ in range(steps):
        optimiser.zero_grad()
        backward(module)
        gradient = Update({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
        total = gradient if total is None else total + gradient
        optimiser.step()
    path = tmp_path_factory.mktemp("delta") / "a.safetensors"
    save_update(path, module, before=before, learning_rate=rate, local_steps=steps, buffers=True)
    shared = load_update(path, VICTIM)
    assert total is not None
    assert float((shared.update - total).norm() / total.norm()) < 1e-4
    assert shared.manifest.kind == "delta"
    assert int(shared.buffers["1.num_batches_tracked"]) == steps
    assert torch.equal(shared.buffers["4.running_mean"], module[4].running_mean)
    assert shared.manifest.checkpoint_sha256 == parameters_sha256(network())


def test_before_may_be_a_module(tmp_path: Path) -> None:
    module, before = after_backward(), network()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    path = save_update(tmp_path / "a.safetensors", module, before=before, learning_rate=1.0)
    assert_same(load_update(path, VICTIM).update, gradient_of(VICTIM), tolerance=1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("wrap", ["DataParallel", "compile", "Opacus"])
def test_wrapped_models_have_the_names_of_the_model_inside(tmp_path: Path, wrap: str) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES))
    victim = victim_of(module)
    if wrap == "DataParallel":
        wrapped: nn.Module = nn.DataParallel(module)
    elif wrap == "compile":
        wrapped = torch.compile(module, backend="eager")  # type: ignore[assignment]
    else:
        from opacus import GradSampleModule

        wrapped = GradSampleModule(module)
    backward(wrapped)
    path = save_update(tmp_path / "a.safetensors", wrapped)
    assert list(read_safetensors(path)[0]) == ["1.bias", "1.weight"]
    assert read_file(path).manifest.parameter_order == ("1.weight", "1.bias")
    assert_same(load_update(path, victim).update, gradient_of(victim), tolerance=1e-6)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(72, 72, bias=False)
        self.second = nn.Linear(72, 72, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(72, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x.flatten(1)))))


def test_tied_parameters_are_saved_once(tmp_path: Path) -> None:
    module = _Tied()
    backward(module)
    path = save_update(tmp_path / "a.safetensors", module)
    assert sorted(read_safetensors(path)[0]) == ["first.weight", "head.bias", "head.weight"]
    assert_same(load_update(path, victim_of(module)).update, gradient_of(victim_of(module)), tolerance=1e-6)


def test_shared_storage_strides_and_sparse_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    value = {
        "base": base,
        "view": base[1:],
        "transposed": base.T,
        "sparse": base.to_sparse(),
        "one": torch.tensor(1),
    }
    save_tensors(tmp_path / "a.safetensors", value, {"key": "value"})
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"key": "value"}
    for name, tensor in value.items():
        assert torch.equal(tensors[name], tensor.to_dense() if name == "sparse" else tensor)


def test_sparse_gradients_of_embeddings(tmp_path: Path) -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([2, 2, 7])).sum().backward()
    save_update(tmp_path / "a.safetensors", embedding)
    [gradient] = read_safetensors(tmp_path / "a.safetensors")[0].values()
    assert gradient.any(dim=1).nonzero().flatten().tolist() == [2, 7]


def test_precision_is_kept(tmp_path: Path) -> None:
    module = after_backward().half()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    path = save_update(tmp_path / "a.safetensors", module)
    assert set(load_update(path, VICTIM).dtypes.values()) == {"float16"}


def test_parameters_without_a_gradient_are_left_out(tmp_path: Path) -> None:
    module = network()
    module[0].requires_grad_(False)
    backward(module)
    shared = load_update(save_update(tmp_path / "a.safetensors", module), VICTIM)
    assert shared.missing == ("0.weight", "0.bias")


@pytest.mark.parametrize(
    ("norms", "mode"), [((True, True), "train"), ((False, False), "eval"), ((True, False), None)]
)
def test_the_mode_is_that_of_batch_normalisation(
    tmp_path: Path, norms: tuple[bool, bool], mode: str | None
) -> None:
    module = after_backward()
    module[1].train(norms[0])
    module[4].train(norms[1])
    assert read_file(save_update(tmp_path / "a.safetensors", module)).manifest.mode == mode


def refused(path: Path, module: nn.Module, message: str, **kwargs: object) -> None:
    with pytest.raises(InputError, match=message):
        save_update(path, module, **kwargs)  # type: ignore[arg-type]
    assert not path.exists()


def test_mistakes_in_a_training_loop(tmp_path: Path) -> None:
    path, module = tmp_path / "a.safetensors", after_backward()
    refused(path, network(), "no parameter of the model has a gradient; call save_update after loss.backward")
    refused(path, module, "`before` is the model's own live weights", before=module.state_dict())
    refused(path, module, "`before` lacks 8 trainable parameters: 1.weight", before=network()[:1])
    refused(
        path,
        module,
        r"`before` has 0.bias of shape \(7,\)",
        before={**network().state_dict(), "0.bias": torch.ones(7)},
    )
    refused(path, module, "one step, got local_steps=3; pass before=", local_steps=3)
    refused(path, module, "noise_std=-1", noise_std=-1)
    refused(path, module, "local_batch_size 5 exceeds num_examples 2", batch_size=5, num_examples=2)
    refused(tmp_path / "a.pt", module, "saved as .safetensors, got 'a.pt'")
    refused(tmp_path / "none" / "a.safetensors", module, "there is no folder")
    module[7].bias.grad[1] = float("nan")
    refused(path, module, "'7.bias' holds 1 NaN or infinite numbers; nothing was saved")


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    path = save_update(tmp_path / "a.safetensors", after_backward())
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(VICTIM.params)
        assert Manifest.model_validate_json(file.metadata()["leakaudit"]).kind == "gradient"


def test_saving_changes_nothing(tmp_path: Path) -> None:
    module = after_backward()
    state = copy.deepcopy(module.state_dict())
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    save_update(tmp_path / "a.safetensors", module, buffers=True)
    assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))  # type: ignore[arg-type]
    x, _ = private_batch()
    assert module.training
    assert module(x).shape == (3, CLASSES)
