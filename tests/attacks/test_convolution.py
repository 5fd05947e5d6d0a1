"""The equations of a convolution in closed form are those of its matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev

from leakaudit.attacks.chain import links, tensors_of
from leakaudit.attacks.convolution import Convolution, ConvolutionEquations
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim


def first_of(layer: nn.Module, side: int = 6) -> Convolution | None:
    """The convolution that `layer` is, as the first link of a network of 2 x side x side inputs."""
    features = layer(torch.zeros(1, 2, side, side)).flatten(1).shape[1]
    module = nn.Sequential(layer, nn.Flatten(), nn.Linear(features, 3)).double()
    victim = Victim.of(module, Pixels((2, side, side)), 3)
    return Convolution.of(links(victim)[0], tensors_of(victim))


def equations(convolution: Convolution, count: int, seed: int, shared: bool) -> ConvolutionEquations:
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    output = convolution(torch.zeros(count, *convolution.incoming, dtype=torch.float64))
    known = torch.rand(output.shape, generator=generator) < 0.7
    values = torch.where(known, normal(output), torch.nan)  # an infinite interval has no middle
    weight = torch.where(known, normal(output).exp(), 0.0)
    gradient = normal(convolution.kernel) if shared else None
    return ConvolutionEquations(convolution, values, weight, normal(output), gradient, 3.0)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 3)]),
    stride=st.sampled_from([1, 2]),
    padding=st.integers(0, 2),
    dilation=st.sampled_from([1, 2]),
    count=st.integers(1, 2),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_normal_matrix_and_pull_are_those_of_the_jacobian(
    kernel: tuple[int, int], stride: int, padding: int, dilation: int, count: int, shared: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(2, 3, kernel, stride, padding, dilation)
    side = max(6, dilation * (max(kernel) - 1) + 1)
    convolution = first_of(layer, side)
    assert convolution is not None
    found = equations(convolution, count, seed, shared)

    def weighted(a: Tensor) -> Tensor:
        a = a.reshape(count, *convolution.incoming)
        output = convolution(a)
        parts = [(output * found.weight).flatten()]
        if shared:
            kernel_of = jacrev(lambda k: (nn.functional.conv2d(a, k, None, *strides) * found.delta).sum())
            parts.append(3.0 * kernel_of(convolution.kernel.detach()).flatten())
        return torch.cat(parts)

    strides = (stride, padding, dilation)
    a = torch.randn(count * convolution.incoming.numel(), dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(weighted, a)
    target = [torch.where(found.weight > 0, found.output * found.weight, 0.0).flatten()]
    if found.gradient is not None:
        target.append(3.0 * found.gradient.flatten())
    gram = torch.zeros(len(a), len(a), dtype=torch.float64)
    found.add_to(gram)
    torch.testing.assert_close(gram, matrix.T @ matrix)
    torch.testing.assert_close(found.pull(a), matrix.T @ (torch.cat(target) - matrix @ a))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(2, 4, 3),
        nn.AvgPool2d(2),
    ],
)
def test_everything_else_is_left_to_dense_equations(layer: nn.Module) -> None:
    assert first_of(layer) is None
