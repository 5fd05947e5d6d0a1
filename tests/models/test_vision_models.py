"""The architectures: published sizes, names, numbers, and every activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from leakaudit.errors import InputError
from leakaudit.models import vision
from leakaudit.models.zoo import MODELS, build_model

ACTIVATION_FUNCTIONS = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "softplus": F.softplus,
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        ("lenet", 85_036),  # 912 + 2 * 3,612 + 76,900, from the DLG code
        ("convnet", 2_904_970),  # as Geiping et al.'s code counts it
        ("resnet20", 269_722),  # akamaster's 0.27 M, 0.46 M, 0.85 M
        ("resnet32", 464_154),
        ("resnet56", 853_018),
        ("resnet18", 11_220_132),  # kuangliu/pytorch-cifar's ResNet18 with 100 classes
    ],
)
def test_number_of_parameters_is_the_published_one(spec: str, parameters: int) -> None:
    assert count(build_model(spec)) == parameters


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation", vision.ACTIVATIONS)
def test_every_model_runs_and_has_gradients_with_every_activation(name: str, activation: str) -> None:
    small = {"convnet": ",width=4", "mlp": ",width=16"}.get(name, "")
    shape = (1, 12, 16)
    module = build_model(f"{name}:activation={activation}{small}", num_classes=7, input_shape=shape)
    logits = module(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7)
    gradients = torch.autograd.grad(logits.sum(), list(module.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    types = {type(child) for child in module.modules()}
    others = {type(make()) for key, make in vision.ACTIVATIONS.items() if key != activation}
    assert type(vision.ACTIVATIONS[activation]()) in types
    assert not types & others


@pytest.mark.parametrize("activation", vision.ACTIVATIONS)
def test_lenet_is_the_composition_in_the_dlg_code(activation: str) -> None:
    module = build_model(f"lenet:activation={activation}")
    act = ACTIVATION_FUNCTIONS[activation]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    p = dict(module.named_parameters())
    h = act(F.conv2d(x, p["body.0.weight"], p["body.0.bias"], stride=2, padding=2))
    h = act(F.conv2d(h, p["body.2.weight"], p["body.2.bias"], stride=2, padding=2))
    h = act(F.conv2d(h, p["body.4.weight"], p["body.4.bias"], stride=1, padding=2))
    assert h.flatten(1).shape == (2, 768)
    expected = F.linear(h.flatten(1), p["fc.0.weight"], p["fc.0.bias"])
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (32, 32), (33, 30), (64, 48)])
def test_lenet_takes_any_size(size: tuple[int, int]) -> None:
    assert build_model("lenet", input_shape=(2, *size))(torch.zeros(1, 2, *size)).shape == (1, 100)


def test_uniform_initialisation_draws_the_numbers_of_the_dlg_code() -> None:
    """`torch.manual_seed(1234); net.apply(weights_init)` visits modules depth first, weight before bias."""
    module = build_model("lenet:init=uniform", seed=1234)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        for layer in (module.body[0], module.body[2], module.body[4], module.fc[0]):
            assert torch.equal(layer.weight, torch.empty_like(layer.weight).uniform_(-0.5, 0.5))
            assert torch.equal(layer.bias, torch.empty_like(layer.bias).uniform_(-0.5, 0.5))


def test_convnet_is_the_composition_in_geipings_code() -> None:
    module = build_model("convnet:width=4").eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    state = module.state_dict()
    h = x
    for i in range(8):
        h = F.conv2d(h, state[f"model.conv{i}.weight"], state[f"model.conv{i}.bias"], padding=1)
        h = F.batch_norm(
            h,
            state[f"model.bn{i}.running_mean"],
            state[f"model.bn{i}.running_var"],
            state[f"model.bn{i}.weight"],
            state[f"model.bn{i}.bias"],
        ).relu()
        if i in (5, 7):
            h = F.max_pool2d(h, 3)
    assert h.flatten(1).shape[1] == 36 * 4
    expected = F.linear(h.flatten(1), state["model.linear.weight"], state["model.linear.bias"])
    torch.testing.assert_close(module(x), expected)


def test_option_a_shortcut_subsamples_and_pads_with_zeros() -> None:
    x = torch.rand(1, 16, 8, 8)
    out = vision.PadShortcut(16, 32, 2)(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize(("spec", "last"), [("resnet20", "layer3"), ("resnet18", "layer4")])
def test_removed_strides_keep_the_resolution_and_the_parameters(spec: str, last: str) -> None:
    sides = {}
    for strides in ("true", "false"):
        module = build_model(f"{spec}:strides={strides}", input_shape=(3, 16, 16))
        module.get_submodule(last).register_forward_hook(
            lambda _, __, out, strides=strides: sides.update({strides: out.shape[-1]})
        )
        module(torch.rand(2, 3, 16, 16))
    assert sides["false"] == 16
    assert sides["true"] == {"resnet20": 4, "resnet18": 2}[spec]
    plain, full = build_model(spec), build_model(f"{spec}:strides=false")
    for one, other in zip(plain.parameters(), full.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resnet18_has_torchvisions_names() -> None:
    ours = build_model("resnet18", num_classes=1000).state_dict()
    theirs = build_model("torchvision:resnet18").state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in ours if ours[name].shape != theirs[name].shape] == ["conv1.weight"]


def test_mlp_layers_are_an_option() -> None:
    module = build_model("mlp:width=8,layers=1", num_classes=3, input_shape=(1, 2, 2))
    assert [tuple(p.shape) for p in module.parameters()] == [(8, 4), (8,), (3, 8), (3,)]


def test_convnet_refuses_inputs_that_pooling_would_empty() -> None:
    with pytest.raises(InputError, match=r"at least 9x9 pixels, got 8x32"):
        build_model("convnet", input_shape=(3, 8, 32))
