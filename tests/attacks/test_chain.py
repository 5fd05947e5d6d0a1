"""Networks cut into links: the pieces make up the whole, and each is what it is said to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leakaudit.attacks.chain import links, tensors_of
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Mode, Victim
from leakaudit.models.zoo import load_victim


class ByHand(nn.Module):
    """As people write it: sizes asked of tensors, functions beside modules, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.randn(4, 1, 1))
        self.fc = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.conv(x) * self.gain)
        out = nn.functional.dropout(out, training=self.training)
        return self.fc(out.view(out.size(0), -1))


class Skipping(nn.Module):
    """The input reaches the last layer past the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x).relu() + x).flatten(1))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1) if x.sum() > 0 else -x.flatten(1))


def victim(module: nn.Module, mode: Mode = "eval") -> Victim:
    return Victim.of(module, Pixels((3, 8, 8)), 5, mode).to(dtype=torch.float64)


def kinds(victim: Victim) -> list[str]:
    return [link.kind for link in links(victim)]


@pytest.mark.parametrize(
    "name", ["lenet", "lenet:activation=relu", "mlp:width=16", "convnet:width=4,activation=silu", "resnet20"]
)
def test_the_links_make_up_the_features(name: str) -> None:
    model = load_victim(name, input_shape=(3, 16, 16)).to(dtype=torch.float64)
    x = model.probe(3)
    value = x
    for link in links(model):
        assert value.shape[1:] == link.incoming
        value = link(tensors_of(model), value)
        assert value.shape[1:] == link.outgoing
    torch.testing.assert_close(value, model.features(x))


def test_what_links_are() -> None:
    assert kinds(load_victim("lenet")) == ["affine", "elementwise"] * 3 + ["affine"]
    pooled = kinds(load_victim("convnet:width=4", input_shape=(3, 16, 16)))
    assert pooled.count("neither") == 2, "max-pooling, twice"
    blocks = kinds(load_victim("resnet20", input_shape=(3, 16, 16)))
    assert blocks[:3] == ["affine", "affine", "elementwise"], "convolution, BatchNorm, ReLU"
    assert blocks.count("neither") == 9, "a block each, its last activation apart or not"


def test_batchnorm_in_train_mode_is_not_affine() -> None:
    body = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 5))
    assert kinds(victim(body)) == ["affine", "affine"]
    assert kinds(victim(body, "train")) == ["neither", "affine"]


def test_a_forward_written_by_hand() -> None:
    model = victim(ByHand())
    found = links(model)
    assert [link.kind for link in found] == ["affine", "affine", "elementwise", "affine", "affine"]
    assert [link.parameters(model.params) for link in found] == [
        ["conv.weight", "conv.bias"],
        ["gain"],
        [],
        [],
        [],
    ]


def test_an_input_that_runs_past_the_layers_stays_in_one_link() -> None:
    assert kinds(victim(Skipping())) == ["neither", "affine"]


def test_parameters_given_replace_the_models_own() -> None:
    model = victim(ByHand())
    first = links(model)[0]
    doubled = {name: 2 * tensor for name, tensor in tensors_of(model).items()}
    torch.testing.assert_close(first(doubled, model.probe()), 2 * first(tensors_of(model), model.probe()))


def test_reasons_for_models_that_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="cannot be traced"):
        links(victim(Branching()))
    with pytest.raises(ValueError, match="does not end in a fully connected layer"):
        links(victim(nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten())))
