"""Round corners: smooth where the network is not, and the network itself in the limit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leakaudit.attacks.smoothing import RoundCorners, smooth_max_pool2d


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d((2, 3), stride=1, dilation=2),
        lambda x: x.relu(),
        lambda x: torch.relu(x) + F.relu(x),
        lambda x: F.max_pool2d(x, 2, stride=1),
        lambda x: F.max_pool2d(x, kernel_size=2),
    ],
)
def test_sharp_corners_are_those_of_the_network(layer: nn.Module) -> None:
    x = numbers(2, 3, 9, 8)
    expected = layer(x.clone())
    for sharpness, distance in ((1e6, 1e-4), (3.0, 1.0)):
        corners = RoundCorners(sharpness)
        with corners:
            found = layer(x.clone())
        assert corners.met >= 1
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < distance
    assert float((found - expected).abs().max()) > 1e-3, "a blunt corner differs"
    assert torch.equal(layer(x.clone()), expected), "and nothing is left of it outside"


def test_other_layers_are_left_alone() -> None:
    body = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Sigmoid(), nn.AvgPool2d(2), nn.MaxPool2d(2, ceil_mode=True))
    corners = RoundCorners(3.0)
    x = numbers(1, 3, 9, 9).float()
    with corners:
        found = body(x)
    assert corners.met == 0
    assert torch.equal(found, body(x))


def test_smooth_pooling_has_right_derivatives() -> None:
    x = numbers(1, 2, 5, 4).requires_grad_()
    pool = lambda x: smooth_max_pool2d(x, 2, stride=1, padding=1, slope=3.0)  # noqa: E731
    assert torch.autograd.gradcheck(pool, (x,))
    assert torch.autograd.gradgradcheck(pool, (x,))


def test_all_zeros_have_a_gradient() -> None:
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    with RoundCorners(5.0):
        (gradient,) = torch.autograd.grad(F.max_pool2d(F.relu(x), 2).sum(), x)
    assert bool(gradient.isfinite().all())
