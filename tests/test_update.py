from __future__ import annotations

import math

import pytest
import torch

from leakaudit import update as update_module
from leakaudit.update import Update


def example() -> Update:
    return Update({"w": torch.arange(4.0).view(2, 2), "b": torch.tensor([-1.0, 2.0])})


def test_arithmetic_goes_tensor_by_tensor() -> None:
    here = example()
    flat = here.flat()
    for found, expected in (
        (here + here, 2 * flat),
        (here - here * 3, -2 * flat),
        (2 * here, 2 * flat),
        (here / 4, flat / 4),
        (here.map(torch.neg), -flat),
    ):
        assert torch.equal(found.flat(), expected)
        assert list(found) == ["w", "b"]
    assert float(here.dot(here)) == float(flat @ flat)
    assert float(here.norm()) == pytest.approx(float(flat.norm()))
    assert here.numel() == 6
    assert repr(here) == "Update(2 tensors, 6 numbers)"


def test_updates_of_other_names_do_not_mix() -> None:
    with pytest.raises(KeyError, match="b"):
        example() + example().select(["w"])
    with pytest.raises(KeyError):
        example().select(["missing"])


def test_an_update_does_not_follow_the_map_it_was_made_of() -> None:
    tensors = {"w": torch.ones(1)}
    update = Update(tensors)
    tensors["b"] = torch.ones(1)
    assert list(update) == ["w"]
    assert not hasattr(update, "__setitem__")


def test_select_orders_and_to_converts() -> None:
    assert list(example().select(["b", "w"])) == ["b", "w"]
    assert {t.dtype for t in example().to(torch.float64).values()} == {torch.float64}
    tracked = example().map(lambda t: t.requires_grad_())
    assert not any(t.requires_grad for t in tracked.detach().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite(bad: float) -> None:
    assert example().is_finite()
    assert not Update({"w": torch.tensor([1.0, bad])}).is_finite()


def test_distance_and_fit_are_those_of_the_whole_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block at a time, the last one shorter; of any shape, layout and precision."""
    monkeypatch.setattr(update_module, "BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (3, 5), "b": (1,), "none": (0,), "scalar": ()}
    ours, theirs = (
        Update({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}).map(
            lambda tensor: tensor.T if tensor.dim() == 2 else tensor
        )
        for _ in range(2)
    )
    a, b = ours.flat().double(), theirs.flat().double()
    assert ours.distance(theirs) == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-14)
    assert ours.distance(theirs, 0.3) == pytest.approx(float((0.3 * a - b).norm() / b.norm()), rel=1e-14)
    assert ours.fit(theirs) == pytest.approx(float(a @ b / (a @ a)), rel=1e-14)
    assert ours.distance(ours) == 0.0
    assert math.isnan((ours * 0.0).fit(theirs))
    assert math.isinf(ours.distance(theirs * 0.0))
