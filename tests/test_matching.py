from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leakaudit.attacks.matching import (
    JOINED,
    cosine,
    relative,
    squared,
    statistics_distance,
    total_variation,
    variation,
)
from leakaudit.update import Update

NUMBERS = st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6)


def update(numbers: list[float]) -> Update:
    values = torch.tensor(numbers, dtype=torch.float64)
    return Update({"w": values[:4].view(2, 2), "b": values[4:]})


@settings(max_examples=60, deadline=None)
@given(NUMBERS, NUMBERS)
def test_distances_against_numpy(left: list[float], right: list[float]) -> None:
    a, b = np.array(left), np.array(right)
    assert float(squared(update(left), update(right))) == pytest.approx(((a - b) ** 2).sum())
    if np.linalg.norm(a) > 1e-3 and np.linalg.norm(b) > 1e-3:
        expected = 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        assert float(cosine(update(left), update(right))) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(NUMBERS, st.floats(0.1, 10))
def test_cosine_has_no_scale(numbers: list[float], factor: float) -> None:
    here = update(numbers)
    if float(here.norm()) > 1e-3:
        assert float(cosine(here * factor, here)) == pytest.approx(0, abs=1e-9)
        assert float(cosine(here * -factor, here)) == pytest.approx(2, abs=1e-9)


def by_tensor(simulated: Update, observed: Update) -> Tensor:
    """The cosine distance, one tensor after the other."""
    product = torch.stack([(g * observed[name]).sum() for name, g in simulated.items()]).sum()
    return 1 - product / (simulated.norm() * observed.norm())


@pytest.mark.parametrize("sizes", [(3,), (JOINED,), (3, JOINED + 1, 5, JOINED, 1)])
def test_cosine_joins_small_tensors_whatever_their_order(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = (
        {f"t{i}": torch.randn(n, generator=generator, dtype=torch.float64) for i, n in enumerate(sizes)}
        for _ in range(2)
    )
    for tensor in here.values():
        tensor.requires_grad_()
    observed = Update(
        {name: there[name] for name in reversed(there)} | {"not simulated": torch.ones(1).double()}
    )
    expected = by_tensor(Update(here), Update(there))
    found = cosine(Update(here), observed)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for mine, other in zip(
        torch.autograd.grad(found, list(here.values())),
        torch.autograd.grad(expected, list(here.values())),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_cosine_of_numbers_whose_squares_no_float32_holds(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = (Update({"w": torch.randn(40, generator=generator)}) for _ in range(2))
    torch.testing.assert_close(cosine(here * factor, there), cosine(here, there), rtol=1e-5, atol=1e-6)


def test_only_what_was_simulated_is_compared() -> None:
    """A restricted view simulates some tensors; the order of names does not matter."""
    simulated = Update({"b": torch.tensor([1.0]), "a": torch.tensor([2.0])})
    assert float(squared(simulated, Update({"a": torch.tensor([0.0]), "b": torch.tensor([0.0])}))) == 5.0


def loop_variation(x: np.ndarray) -> float:
    across, down = [], []
    for n, c, i, j in np.ndindex(*x.shape):
        if j:
            across.append(abs(x[n, c, i, j] - x[n, c, i, j - 1]))
        if i:
            down.append(abs(x[n, c, i, j] - x[n, c, i - 1, j]))
    return float(np.mean(across) + np.mean(down))


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 4, 5)])
def test_total_variation_against_a_loop(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    assert float(total_variation(x)) == pytest.approx(loop_variation(x.numpy()))
    assert float(total_variation(torch.ones(shape))) == 0


def test_statistics_distance_is_relative_and_zero_at_the_target() -> None:
    target = {"n": (torch.tensor([1.0, 2.0]), torch.tensor([4.0, 4.0]))}
    assert float(statistics_distance(target, target)) == 0
    found = {"n": (torch.tensor([3.0, 2.0]), torch.tensor([4.0, 8.0]))}
    # means differ by (2, 0): mean square 2 over variance 4; variances by (0, 4): 8 over 16; their mean
    assert float(statistics_distance(found, target)) == pytest.approx((2 / 4 + 8 / 16) / 2)


@pytest.mark.parametrize("distance", [squared, cosine])
def test_gradients_of_distances(distance) -> None:  # type: ignore[no-untyped-def]
    target = update([0.3, -1.0, 0.2, 0.9, -0.4, 1.1])
    numbers = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def of(values: Tensor) -> Tensor:
        return distance(Update({"w": values[:4].view(2, 2), "b": values[4:]}), target)

    assert torch.autograd.gradcheck(of, (numbers,))


def test_gradients_of_priors() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total_variation, (x,))
    target = {"n": (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))}

    def statistics(x: Tensor) -> Tensor:
        return statistics_distance({"n": (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))}, target)

    assert torch.autograd.gradcheck(statistics, (x,))


def test_relative_counts_every_layer_alike() -> None:
    simulated = Update({"small": torch.tensor([1e-3, 0.0]), "large": torch.tensor([[2e3, 1e3]])})
    observed = Update({"small": torch.tensor([2e-3, 0.0]), "large": torch.tensor([[1e3, 1e3]])})
    assert relative(simulated, observed).item() == pytest.approx((0.25 + 0.5) / 2)


def by_hand(image: np.ndarray, colour: float, curvature: float, power: float, width: float) -> float:
    """`variation` of one (C, H, W) image, pixel by pixel."""
    if len(image) == 3:
        turn = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
        image = np.tensordot(turn, image, 1)
    _, height, length = image.shape
    total = 0.0
    for weight, channels in ((1 - colour, image[:1]), (colour, image[1:])):
        if not len(channels):
            continue
        for h, w in itertools.product(range(height), range(length)):
            slope = bend = 0.0
            for c in channels:
                if w + 1 < length:
                    slope += (c[h, w + 1] - c[h, w]) ** 2
                if h + 1 < height:
                    slope += (c[h + 1, w] - c[h, w]) ** 2
                if w + 2 < length:
                    bend += (c[h, w + 2] - 2 * c[h, w + 1] + c[h, w]) ** 2
                if h + 2 < height:
                    bend += (c[h + 2, w] - 2 * c[h + 1, w] + c[h, w]) ** 2
                if w + 1 < length and h + 1 < height:
                    bend += 2 * (c[h + 1, w + 1] - c[h + 1, w] - c[h, w + 1] + c[h, w]) ** 2
            total += weight * (slope + width**2) ** (power / 2)
            total += weight * curvature * (bend + width**2) ** (power / 2)
    return total


@pytest.mark.parametrize("channels", [1, 3])
def test_variation_against_a_loop_over_pixels(channels: int) -> None:
    images = torch.rand(2, channels, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = sum(by_hand(image.numpy(), 0.75, 2.0, 0.8, 1e-2) for image in images)
    assert float(variation(images)) == pytest.approx(expected)


def test_variation_prefers_photographs_and_has_a_gradient_everywhere(photo_crops: Tensor) -> None:
    shuffled = photo_crops.flatten(2)[..., torch.randperm(1024)].reshape(photo_crops.shape)
    grey = photo_crops.mean(1, keepdim=True).expand_as(photo_crops)
    assert float(variation(grey)) < float(variation(photo_crops)) < float(variation(shuffled))
    flat = torch.zeros(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(variation, (flat,))
