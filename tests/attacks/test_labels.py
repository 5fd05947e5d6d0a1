from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leakaudit.attacks.head import head_consistency, storage_precision
from leakaudit.attacks.labels import infer_labels, nearest_counts
from leakaudit.errors import InputError
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round
from leakaudit.threat import Knowledge, View, known
from leakaudit.update import Update

SPACE = Pixels((3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def photos(photo_crops: Tensor) -> Tensor:
    """64 crops of the bundled photos as model inputs, (64, 3, 32, 32)."""
    return SPACE.encode(photo_crops)


def convnet(classes: int, bias: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, padding=2, stride=2),
        activation(),
        nn.Conv2d(12, 12, 5, padding=2, stride=2),
        activation(),
        nn.Flatten(),
        nn.Linear(768, classes, bias=bias),
    )


def fully_convolutional(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(12, classes, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def make_view(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    classes: int,
    reduction: str = "mean",
    scale: float | None = None,
    **round_fields: float,
) -> View:
    victim = Victim.of(module, SPACE, classes, reduction=reduction)
    round = Round(num_examples=len(x), **round_fields)
    view = View(victim, round, Update(victim.params))
    observed = view.simulate(x, y)
    if scale is None:
        return replace(view, observed=observed)
    return replace(view, observed=scale * observed, knowledge=Knowledge(scale=known(False, "test")))


def batch(photos: Tensor, size: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = fork(seed, "test batch")
    crops = photos[torch.randint(len(photos), (size,), generator=generator)]
    few = torch.randint(classes, (max(1, size // 2),), generator=generator)
    return crops, few[torch.randint(len(few), (size,), generator=generator)]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [None, 3e-4])
def test_one_example_is_exact(photos: Tensor, activation, bias: bool, scale: float | None) -> None:
    torch.manual_seed(0)
    module = convnet(10, bias=bias, activation=activation)
    for seed in range(5):
        x, y = batch(photos, 1, 10, seed)
        found = infer_labels(make_view(module, x, y, 10, scale=scale), fork(seed, "labels"))
        assert found.exact
        assert found.labels.tolist() == y.tolist()


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("classes", [10, 100])
def test_counts_of_untrained_models(photos: Tensor, size: int, reduction: str, classes: int) -> None:
    for seed in range(2 if size == 8 else 5):
        torch.manual_seed(seed)
        x, y = batch(photos, size, classes, seed)
        view = make_view(convnet(classes), x, y, classes, reduction=reduction)
        found = infer_labels(view, fork(seed, "labels"))
        assert found.labels.tolist() == y.sort().values.tolist()
        assert found.counts.sum() == size


@pytest.mark.parametrize("size", [4, 8])
def test_counts_without_a_scale(photos: Tensor, size: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x, y = batch(photos, size, 100, seed)
        found = infer_labels(make_view(convnet(100), x, y, 100, scale=17.0), fork(seed, "labels"))
        assert found.labels.tolist() == y.sort().values.tolist()


def test_counts_of_a_fedavg_delta(photos: Tensor) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x, y = batch(photos, 8, 10, seed)
        view = make_view(convnet(10), x, y, 10, local_steps=8, local_batch_size=2, learning_rate=1e-3)
        found = infer_labels(view, fork(seed, "labels"))
        assert found.labels.tolist() == y.sort().values.tolist()


@pytest.mark.parametrize(("reduction", "weights"), [("sum", None), ("mean", (0.4,) * 4)])
def test_counts_of_a_sum_over_clients(
    photos: Tensor, reduction: str, weights: tuple[float, ...] | None
) -> None:
    """Of a summed loss a client's own examples count, and weights need not come to one."""
    torch.manual_seed(0)
    x, y = batch(photos, 8, 10, 0)
    view = make_view(convnet(10), x, y, 10, reduction=reduction, clients=4, weights=weights)  # type: ignore[arg-type]
    found = infer_labels(view, fork(0, "labels"))
    assert found.labels.tolist() == y.sort().values.tolist()


def test_a_convolutional_head_gives_one_label(photos: Tensor) -> None:
    torch.manual_seed(0)
    module = fully_convolutional(10)
    for seed in range(5):
        x, y = batch(photos, 1, 10, seed)
        assert infer_labels(make_view(module, x, y, 10), fork(seed, "labels")).labels.tolist() == y.tolist()


def test_no_head_is_an_input_error(photos: Tensor) -> None:
    view = make_view(convnet(10), *batch(photos, 1, 10, 0), 10)
    partial = replace(view, observed=view.observed.select(["0.weight", "0.bias"]))
    with pytest.raises(InputError, match="no layer next to the class scores"):
        infer_labels(partial, fork(0, "labels"))


def test_pruning_that_leaves_only_the_classes_in_the_batch(photos: Tensor) -> None:
    """Without a scale, which the absent classes would tell."""
    x, y = photos[:2], torch.tensor([1, 3])
    view = make_view(convnet(5), x, y, 5, scale=17.0)
    name = view.victim.classifier().bias
    pruned = {key: tensor.clamp(max=0.0) if key == name else tensor for key, tensor in view.observed.items()}
    found = infer_labels(replace(view, observed=Update(pruned)), fork(0, "labels"))
    assert sorted(found.labels.tolist()) == [1, 3]


def test_consistency_proves_the_checkpoint_the_scale_and_the_features(photos: Tensor) -> None:
    torch.manual_seed(0)
    module = convnet(10)
    x, y = batch(photos, 1, 10, 1)
    view = make_view(module, x, y, 10)
    found = head_consistency(view)
    assert found is not None
    assert found.belongs is True
    assert found.unscaled
    assert found.label == int(y)
    features = view.victim.features(x)[0].double()
    assert (found.features - features).norm() / features.norm() < 1e-5
    for factor in (-1.0, 0.01):
        scaled = head_consistency(replace(view, observed=factor * view.observed))
        assert scaled is not None
        assert scaled.belongs is True
        assert not scaled.unscaled
        assert scaled.factor == pytest.approx(factor, rel=1e-4)
        assert scaled.label == int(y)


def test_consistency_refutes_another_checkpoint(photos: Tensor) -> None:
    torch.manual_seed(0)
    x, y = batch(photos, 1, 10, 1)
    view = make_view(convnet(10), x, y, 10)
    for seed in range(1, 6):
        torch.manual_seed(seed)
        found = head_consistency(replace(view, victim=Victim.of(convnet(10), SPACE, 10)))
        assert found is not None
        assert found.single_example
        assert found.belongs is False


def test_consistency_refutes_one_example_for_a_batch(photos: Tensor) -> None:
    torch.manual_seed(0)
    for seed in range(5):
        x, y = photos[seed : seed + 2], torch.tensor([seed, (seed + 1) % 10])
        found = head_consistency(make_view(convnet(10), x, y, 10))
        assert found is not None
        assert not found.single_example
        assert found.belongs is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_consistency_allows_for_the_precision_of_the_file(photos: Tensor, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    view = make_view(convnet(10), *batch(photos, 1, 10, 1), 10)
    found = head_consistency(replace(view, observed=view.observed.to(dtype).to(torch.float32)))
    assert found is not None
    assert found.belongs is True


@pytest.mark.parametrize(
    ("estimate", "total", "counts"),
    [
        ([1.2, 0.9, -0.1], 2, [1, 1, 0]),
        ([0.5, 0.6, 0.4], 1, [0, 1, 0]),
        ([-3.0, 0.2, 0.1], 4, [0, 2, 2]),
        ([2.0, 2.0, 2.0], 5, None),
    ],
)
def test_nearest_counts(estimate: list[float], total: int, counts: list[int] | None) -> None:
    found = nearest_counts(torch.tensor(estimate), total)
    assert found.sum() == total
    assert (found >= 0).all()
    if counts is not None:
        assert found.tolist() == counts


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-40, 40), min_size=1, max_size=4), st.integers(1, 7))
def test_nearest_counts_from_far_away(estimate: list[float], total: int) -> None:
    """None of all counts that sum to the total is nearer."""
    values = torch.tensor(estimate, dtype=torch.float64)
    found = nearest_counts(values, total)
    assert found.sum() == total
    others = product(range(total + 1), repeat=len(estimate) - 1)
    best = min(
        float((torch.tensor([*counts, total - sum(counts)]) - values).square().sum())
        for counts in others
        if sum(counts) <= total
    )
    assert float((found - values).square().sum()) <= best * (1 + 1e-12) + 1e-9


def test_nearest_counts_of_an_update_of_another_scale() -> None:
    """One at a time this took as many passes as the estimate is large."""
    assert nearest_counts(torch.tensor([3e9, -1e9, 2e9, 3e9]), 8).tolist() == [4, 0, 0, 4]


def test_storage_precision() -> None:
    values = torch.randn(100, generator=fork(0, "values"))
    assert storage_precision(values) == torch.finfo(torch.float32).eps
    assert storage_precision(values.half().float()) == torch.finfo(torch.float16).eps
    assert storage_precision(values.bfloat16().float()) == torch.finfo(torch.bfloat16).eps
    assert storage_precision(values.double() + 1e-12) == torch.finfo(torch.float64).eps
