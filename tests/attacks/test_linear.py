from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from leakaudit.attacks.base import Monitor, Reconstruction
from leakaudit.attacks.linear import Linear, PatchEmbeddingInverse, input_layer, patch_embedding
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round
from leakaudit.threat import Knowledge, View, known
from leakaudit.update import Update

SPACE = Pixels((3, 32, 32), mean=(0.5, 0.45, 0.4), std=(0.25, 0.25, 0.2))


@pytest.fixture(scope="module")
def photos(photo_crops: Tensor) -> Tensor:
    """64 crops of the bundled photos as model inputs, (64, 3, 32, 32)."""
    return SPACE.encode(photo_crops)


class ChannelsLast(nn.Module):
    """An MLP that reads its pixels channels last, and only the upper half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 32 * 16, 20)
        self.second = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x[:, :, :16].permute(0, 2, 3, 1).flatten(1))))


def mlp(activation: type[nn.Module] = nn.ReLU, hidden: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, hidden), activation(), nn.Linear(hidden, 10))


def vit(patch: int = 8, width: int = 32) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=32,
        patch_size=patch,
        num_layers=2,
        num_heads=2,
        hidden_dim=width,
        mlp_dim=48,
        num_classes=10,
    )
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def make_view(module: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32, **fields) -> View:
    victim = Victim.of(module, SPACE, 10).to(dtype=dtype)
    view = View(victim, Round(num_examples=len(x), **fields), Update(victim.params))
    return replace(view, observed=view.simulate(x.to(dtype), y))


def run(attack: Linear | PatchEmbeddingInverse, view: View) -> Reconstruction:
    assert attack.applies(view) is None
    return attack.run(view, fork(0, "attack"), Monitor())


def worst(found: Tensor, truth: Tensor) -> float:
    """Largest distance, over the true images, to the nearest recovered one: RMS per number."""
    return (
        float(torch.cdist(truth.flatten(1), found.flatten(1)).min(1).values.max()) / truth[0].numel() ** 0.5
    )


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.GELU])
@pytest.mark.parametrize("fields", [{}, {"local_steps": 4, "learning_rate": 0.01}])
def test_one_example_is_exact_after_any_number_of_steps(photos: Tensor, activation, fields: dict) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = photos[seed : seed + 1], torch.tensor([seed])
        found = run(Linear(), make_view(mlp(activation), x, y, **fields))
        assert worst(found.x, x) < 1e-6
        assert found.y.tolist() == y.tolist()
        assert found.loss < 1e-5


def test_a_factor_changes_nothing(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(mlp(), photos[:1], torch.tensor([3]))
    scaled = replace(view, observed=1e-4 * view.observed, knowledge=Knowledge(scale=known(False, "test")))
    found = run(Linear(), scaled)
    assert worst(found.x, photos[:1]) < 1e-6
    assert found.loss < 1e-3


def test_pruned_entries_do_not_bias_the_result(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(mlp(), photos[:1], torch.tensor([3]))
    threshold = view.observed.flat().abs().quantile(0.7)
    pruned = replace(view, observed=view.observed.map(lambda g: g * (g.abs() > threshold)))
    found = run(Linear(), pruned)
    seen = pruned.observed["1.weight"].any(0).reshape(1, 3, 32, 32)
    assert seen.float().mean() > 0.5
    assert (found.x - photos[:1])[seen].abs().max() < 1e-5


def test_rearranged_inputs_are_found_by_value(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(ChannelsLast(), photos[:1], torch.tensor([3]))
    found = run(Linear(), view)
    assert worst(found.x[:, :, :16], photos[:1, :, :16]) < 1e-6
    assert found.x[:, :, 16:].abs().max() == 0
    assert found.details["pixels_seen"] == 0.5


@pytest.mark.parametrize("size", [2, 4, 8])
def test_batches_behind_a_relu_are_exact(photos: Tensor, size: int) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        picks = torch.randperm(len(photos))[:size]
        x, y = photos[picks], torch.randint(10, (size,))
        found = run(Linear(), make_view(mlp(hidden=200), x, y))
        assert found.details["recovered"] == size
        assert worst(found.x, x) < 1e-3
        assert found.loss < 1e-3
        nearest = torch.cdist(found.x.flatten(1), x.flatten(1)).argmin(1)
        assert found.y.tolist() == y[nearest].tolist()


def test_a_neuron_with_one_example_gives_it(photos: Tensor) -> None:
    """A hidden layer of which most neurons fire for one example only, as planted by Boenisch et al. 2021."""
    torch.manual_seed(0)
    module, x = mlp(hidden=60), photos[[3, 17, 30, 44]]
    with torch.no_grad():
        centred = x.flatten(1) - x.flatten(1).mean(0)
        centred = centred / centred.norm(dim=1, keepdim=True) ** 2
        for i in range(48):
            module[1].weight[i] = centred[i % 3] * (1 + i / 50)
            module[1].bias[i] = -(module[1].weight[i] @ x.flatten(1).T).sort().values[-2:].mean()
        module[1].weight[48:] = 0.01
        module[1].bias[48:] = 5.0
    found = run(Linear(samples=0), make_view(module, x, torch.tensor([0, 1, 2, 3])))
    assert found.details["recovered"] == 3
    assert worst(found.x, x[:3]) < 1e-6


def test_no_input_layer_is_a_reason(photos: Tensor) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10))
    view = make_view(module, photos[:1], torch.tensor([1]))
    assert input_layer(view.victim) is None
    assert "no fully connected layer" in str(Linear().applies(view))
    assert "no patch projection" in str(PatchEmbeddingInverse().applies(view))
    without_bias = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8, bias=False), nn.ReLU(), nn.Linear(8, 10))
    assert "no bias" in str(Linear().applies(make_view(without_bias, photos[:1], torch.tensor([1]))))


@pytest.mark.parametrize("fields", [{}, {"local_steps": 3, "learning_rate": 0.01}])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 5e-3)])
def test_a_vision_transformer_gives_the_image(
    photos: Tensor, fields: dict, dtype: torch.dtype, bound: float
) -> None:
    for seed in range(3):
        x, y = photos[seed * 7 : seed * 7 + 1], torch.tensor([seed])
        found = run(PatchEmbeddingInverse(), make_view(vit(), x, y, dtype, **fields))
        assert found.details["rank"] == 16
        assert worst(found.x.float(), x) < bound
        assert found.y.tolist() == y.tolist()


def test_the_position_embedding_is_found_by_its_gradient() -> None:
    found = patch_embedding(Victim.of(vit(), SPACE, 10))
    assert found is not None
    assert found.position == "encoder.pos_embedding"
    assert found.weight == "conv_proj.weight"
    assert found.rows.tolist() == list(range(1, 17))
    assert found.grid == (4, 4)


def test_vision_transformer_reasons(photos: Tensor) -> None:
    model = vit()
    batch = make_view(model, photos[:2], torch.tensor([1, 2]))
    assert "in a batch" in str(PatchEmbeddingInverse().applies(batch))
    nn.init.zeros_(model.heads.head.weight)
    assert PatchEmbeddingInverse().applies(make_view(model, photos[:1], torch.tensor([1]))) is not None
