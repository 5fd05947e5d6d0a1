from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leakaudit.attacks import separation
from leakaudit.attacks.head import head_gradient
from leakaudit.attacks.labels import infer_labels, probe_features
from leakaudit.attacks.separation import separate
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round
from leakaudit.threat import View
from leakaudit.update import Update

SPACE = Pixels((3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def photos(photo_crops: Tensor) -> Tensor:
    """64 crops of the bundled photos as model inputs, (64, 3, 32, 32)."""
    return SPACE.encode(photo_crops)


def sure_of_itself(seed: int, sharpness: float, classes: int = 10) -> nn.Sequential:
    """A ReLU convnet whose class scores differ by about `sharpness`, as a trained one's do."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(3, 12, 5, padding=2, stride=2),
        nn.ReLU(),
        nn.Conv2d(12, 16, 5, padding=2, stride=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, classes),
    )
    nn.init.normal_(module[5].weight, std=sharpness)
    return module


def make_view(module: nn.Module, x: Tensor, y: Tensor, classes: int = 10) -> View:
    victim = Victim.of(module, SPACE, classes)
    view = View(victim, Round(len(x)), Update(victim.params))
    return replace(view, observed=view.simulate(x, y))


@pytest.mark.parametrize("size", [2, 4, 6])
@pytest.mark.parametrize("sharpness", [0.05, 1.0])
def test_labels_and_features_of_a_batch_are_proven(photos: Tensor, size: int, sharpness: float) -> None:
    proven = 0
    for seed in range(4):
        generator = fork(seed, "batch")
        x = photos[torch.randperm(64, generator=generator)[:size]]
        y = torch.randint(4, (size,), generator=generator)
        view = make_view(sure_of_itself(seed, sharpness), x, y)
        found = infer_labels(view, fork(seed, "labels"))
        if not found.exact:
            continue
        proven += 1
        assert found.labels.tolist() == y.sort().values.tolist()
        assert found.features is not None
        truth = view.victim.features(x).detach().double()
        distance = torch.cdist(truth, found.features) / truth.norm(dim=1, keepdim=True)
        nearest = distance.min(1)
        assert float(nearest.values.max()) < 0.05
        assert found.labels[nearest.indices].tolist() == y.tolist()
    assert proven >= (3 if size < 6 else 1)


def test_wrong_labels_are_never_proven(photos: Tensor) -> None:
    for seed in range(4):
        x, y = photos[seed * 5 : seed * 5 + 3], torch.tensor([1, 4, 4])
        view = make_view(sure_of_itself(seed, 1.0), x, y)
        head = head_gradient(view)
        assert head is not None
        typical = probe_features(view, fork(seed, "probe"))
        other = replace(head, bias_gradient=head.bias_gradient[torch.arange(10).roll(1)])
        for gradient in (other, replace(head, weight_gradient=head.weight_gradient * 1.05)):
            found = separate(gradient, [y], typical, fork(seed, "starts"))
            assert found is None or not found.proven


def test_wrong_guesses_are_corrected(photos: Tensor) -> None:
    for seed in range(4):
        x, y = photos[seed * 5 : seed * 5 + 3], torch.tensor([1, 4, 4])
        view = make_view(sure_of_itself(seed, 1.0), x, y)
        head = head_gradient(view)
        assert head is not None
        typical = probe_features(view, fork(seed, "probe"))
        found = separate(head, [torch.tensor([1, 1, 4])], typical, fork(seed, "starts"))
        assert found is not None
        assert found.proven
        assert found.labels.tolist() == y.tolist()


def test_batches_it_cannot_tell_apart_are_declined(photos: Tensor) -> None:
    view = make_view(sure_of_itself(0, 0.05), photos[:12], torch.arange(12) % 10)
    head = head_gradient(view)
    assert head is not None
    assert separate(head, [torch.arange(12) % 10], torch.ones(2, 256).double(), fork(0, "s")) is None
    noisy = replace(head, weight_gradient=head.weight_gradient + 1e-3 * torch.randn(10, 256).double())
    assert separate(noisy, [torch.arange(4)], torch.ones(2, 256).double(), fork(0, "s")) is None


def test_a_sum_taken_for_a_mean_is_declined_before_the_search(
    photos: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr(separation._Problem, "solve", never)
    view = make_view(sure_of_itself(0, 0.05), photos[:4], torch.tensor([1, 4, 4, 2]))
    head = head_gradient(view)
    assert head is not None
    assert head.weight_gradient is not None
    assert head.bias_gradient is not None
    summed = replace(head, weight_gradient=4 * head.weight_gradient, bias_gradient=4 * head.bias_gradient)
    guess, typical = [torch.tensor([1, 4, 4, 2])], probe_features(view, fork(0, "probe"))
    assert separate(summed, guess, typical, fork(0, "s")) is None
    with pytest.raises(AssertionError, match="searched"):
        separate(head, guess, typical, fork(0, "s"))


def test_a_trained_resnet_gives_the_labels_of_small_batches() -> None:
    data = Path(__file__).parents[2].parent / "shared" / "data"
    checkpoint = data / "models" / "cifar10_resnet" / "resnet20-12fca82f.th"
    if not checkpoint.exists():
        pytest.skip("the trained ResNet-20 is not here")
    import numpy as np

    from leakaudit.models.zoo import load_victim

    with np.load(data / "images" / "cifar10" / "cifar10_test_first2000.npz") as archive:
        pixels, labels = archive["images"][:40], torch.from_numpy(archive["labels"][:40]).long()
    exact = 0
    for mode in ("eval", "train"):
        victim = load_victim("resnet20", checkpoint=checkpoint, mode=mode)
        images = victim.space.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
        for seed in range(3):
            rows = torch.randperm(40, generator=fork(seed, "rows"))[:3]
            view = View(victim, Round(3), Update(victim.params))
            view = replace(view, observed=view.simulate(images[rows], labels[rows]))
            found = infer_labels(view, fork(seed, "labels"))
            assert not found.exact or found.labels.tolist() == labels[rows].sort().values.tolist()
            exact += found.exact
    assert exact >= 3
