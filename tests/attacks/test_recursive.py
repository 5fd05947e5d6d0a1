"""Layer by layer: exact where the equations suffice, a photograph where a prior must help."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logit
from torch import Tensor, nn

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.chain import links, tensors_of
from leakaudit.attacks.recursive import (
    Cut,
    DenseEquations,
    Layers,
    Recursive,
    _inverse_diagonal,
    _least_squares,
    features,
    invert,
)
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.models.vision import Activation, LeNet, initialise_uniform
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known

CLASSES = 10
ATTACK = Recursive()


def capture(
    pixels: Tensor,
    module: nn.Module | None = None,
    activation: Activation = "sigmoid",
    labels: Tensor | None = None,
) -> View:
    """The update of one step on `pixels` by DLG's LeNet; sigmoid with its own initialisation."""
    shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
    if module is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = LeNet(CLASSES, shape, activation)
        if activation == "sigmoid":
            initialise_uniform(module, fork(0, "model"))
    victim = Victim.of(module, Pixels(shape, (0.5,) * 3, (0.25,) * 3), CLASSES)
    y = torch.arange(len(pixels)) + 3 if labels is None else labels
    round = Round(len(pixels))
    observed = client_update(victim, victim.params, round, victim.space.encode(pixels), y).detach()
    return View(victim, round, observed, Knowledge())


@pytest.fixture
def small_photos(photo_crops: Tensor) -> Tensor:
    """(64, 3, 16, 16)"""
    return nn.functional.avg_pool2d(photo_crops, 2)


def psnr(view: View, found: Tensor, pixels: Tensor) -> list[float]:
    errors = (view.victim.space.decode(found).clamp(0, 1) - pixels).square().mean((1, 2, 3))
    return [float(-10 * error.log10()) for error in errors]


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "softplus"])
def test_one_example_behind_rising_activations_is_exact(small_photos: Tensor, activation: Activation) -> None:
    pixels = small_photos[5:6]
    view = capture(pixels, activation=activation)
    found = ATTACK.run(view, fork(0, "a"), Monitor())
    assert min(psnr(view, found.x, pixels)) > 80
    assert view.residual(found.x, found.y) < 1e-4
    assert found.y.tolist() == [3]
    assert found.details["solved"] == found.details["links"] == 7


def test_batches_are_exact_where_their_equations_suffice(small_photos: Tensor) -> None:
    """16x16 pixels leave 1,536 unknowns for two images, and the second layer alone has 3,612 + 384 equations."""
    pixels = small_photos[[5, 20]]
    view = capture(pixels)
    found = ATTACK.run(view, fork(0, "a"), Monitor())
    assert min(psnr(view, found.x, pixels)) > 60
    assert found.details["prior"] is False


def test_an_update_of_unknown_length_and_its_precision(small_photos: Tensor) -> None:
    pixels = small_photos[5:6]
    view = capture(pixels)
    scaled = replace(view, observed=view.observed * 7.3, knowledge=Knowledge(scale=known(False, "test")))
    assert min(psnr(view, ATTACK.run(scaled, fork(0, "a"), Monitor()).x, pixels)) > 80
    halves = replace(view, observed=view.observed.to(torch.float16).to(torch.float32))
    coarse = min(psnr(view, ATTACK.run(halves, fork(0, "a"), Monitor()).x, pixels))
    assert 40 < coarse < 100


def test_one_example_behind_a_relu_is_exact_while_the_active_units_suffice(photo_crops: Tensor) -> None:
    pixels = photo_crops[5:6, :, 4:28, 4:28]
    view = capture(pixels, activation="relu")
    found = ATTACK.run(view, fork(0, "a"), Monitor())
    assert found.details["prior"] is False
    assert min(psnr(view, found.x, pixels)) > 60


def test_a_batch_behind_a_relu_is_finished_by_the_prior(photo_crops: Tensor) -> None:
    pixels = photo_crops[[5, 20], :, 4:28, 4:28]
    view = capture(pixels, activation="relu")
    found = ATTACK.run(view, fork(0, "a"), Monitor())
    assert found.details["prior"] is True
    assert found.details["solved"] == 6, "all but the first convolution"
    assert min(psnr(view, found.x, pixels)) > 30


class Quickstart(nn.Module):
    """The CNN of PyTorch's CIFAR-10 tutorial, which Flower's quickstart uses, for 20x20 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 120), nn.Linear(120, 84), nn.Linear(84, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu()).view(-1, 64)
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def test_max_pooling_and_relus_with_round_corners_first(photo_crops: Tensor) -> None:
    pixels = nn.functional.interpolate(photo_crops[5:6], size=20, mode="area")
    view = capture(pixels, Quickstart())
    found = replace(ATTACK, iterations=5).run(view, fork(0, "a"), Monitor())
    assert found.details["solved"] == 5, "the fully connected layers, their ReLUs and the reshape"
    assert min(psnr(view, found.x, pixels)) > 20


def test_an_average_before_the_last_layer_leaves_the_rest_to_the_prior(small_photos: Tensor) -> None:
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )
    pixels = small_photos[5:6]
    view = capture(pixels, body)
    found = replace(ATTACK, iterations=10).run(view, fork(0, "a"), Monitor())
    assert found.details["solved"] == 0, "pooling and reshape together lose what they average"
    assert found.details["prior"] is True
    assert min(psnr(view, found.x, pixels)) > 20


def test_what_is_known_at_each_cut_holds_the_truth(small_photos: Tensor) -> None:
    """Bounds contain the network's own values, and gradients are those of autograd."""
    pixels = small_photos[[5, 20, 40]]
    view = capture(pixels, activation="relu").to(dtype=torch.float64)
    chain = links(view.victim)
    cut, labels, factor = features(view, fork(0, "f"))
    assert factor == 1
    x = view.victim.space.encode(pixels.double())
    layers = Layers(view, chain, factor, 8192, fork(0, "l"))
    values = [x.requires_grad_()]
    for link in chain:
        values.append(link(tensors_of(view.victim), values[-1]))
    head = view.victim.params["fc.0.weight"], view.victim.params["fc.0.bias"]
    loss = nn.functional.cross_entropy(nn.functional.linear(values[-1], *head), labels)
    left, lower = len(chain), cut
    while lower is not None:
        cut = lower
        (gradient,) = torch.autograd.grad(loss, values[left], retain_graph=True)
        inside = (cut.low <= values[left]) & (values[left] <= cut.high)
        assert float(inside.double().mean()) > 0.99, "bounds are of several standard errors"
        torch.testing.assert_close(cut.gradient, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
        lower, left = layers.step(left, cut), layers.below(left)
    assert left <= 2, "down to the second convolution at least"


def test_least_squares_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    part = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    first, second = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (12, 4))
    systems = [DenseEquations(whole, first, slice(None)), DenseEquations(part, second, slice(3, 5))]
    solution = _least_squares(systems, torch.zeros(5, dtype=torch.float64))
    assert solution is not None
    matrix = torch.cat([whole, torch.cat([torch.zeros(4, 3, dtype=torch.float64), part], 1)]).numpy()
    wanted = np.linalg.lstsq(matrix, torch.cat([first, second]).numpy(), rcond=None)[0]
    np.testing.assert_allclose(solution[0].numpy(), wanted)
    np.testing.assert_allclose(solution[1].numpy() ** 2, np.diag(np.linalg.inv(matrix.T @ matrix)))
    alone = [DenseEquations(part, second, slice(0, 2))]
    assert _least_squares(alone, torch.zeros(5, dtype=torch.float64)) is None, "three numbers in no equation"


def test_standard_errors_of_many_unknowns_are_estimated() -> None:
    rows = torch.randn(1400, 1100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = torch.linalg.cholesky(rows.T @ rows)
    ratio = _inverse_diagonal(factor) / torch.cholesky_inverse(factor).diagonal()
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)
    assert 0.05 < float(ratio.std()) < 0.15, "a share of about sqrt(2 / 256)"


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_a_convolution_in_closed_form_gives_the_same_values_as_its_matrix(
    activation: str, small_photos: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = capture(small_photos[:1], activation=activation).to(dtype=torch.float64)
    chain = links(view.victim)

    def solved() -> Cut:
        cut, _, factor = features(view, fork(0, "f"))
        return Layers(view, chain, factor, 8192, fork(0, "l")).descend(cut).cut

    quick = solved()
    monkeypatch.setattr(Layers, "_convolved", lambda *_: [])
    plain = solved()
    known = plain.low.isfinite() & plain.high.isfinite()
    half = ((plain.high - plain.low) / 2)[known]
    apart = (quick.low + quick.high - plain.low - plain.high)[known] / 2
    assert float((apart / half).square().mean()) < 0.25, "both within their standard errors"
    ratio = (quick.high - quick.low)[known] / half / 2
    assert 0.5 < float(ratio.min()) <= float(ratio.max()) < 1.5
    torch.testing.assert_close(quick.gradient, plain.gradient, rtol=1e-4, atol=1e-8)


def test_inverses_of_activations() -> None:
    value = torch.tensor([[1e-6, 0.1, 0.5, 0.9]], dtype=torch.float64)
    cut = invert(torch.sigmoid, Cut.around(value, 0.0, torch.ones_like(value)))
    assert cut is not None
    np.testing.assert_allclose(cut.low.numpy(), logit(value.numpy()), atol=1e-9)
    np.testing.assert_allclose(cut.high.numpy(), logit(value.numpy()), atol=1e-9)
    np.testing.assert_allclose(cut.gradient.numpy(), (value * (1 - value)).numpy(), rtol=1e-6)
    value = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    cut = invert(torch.relu, Cut.around(value, 1e-6, torch.ones_like(value)))
    assert cut is not None
    assert cut.low.tolist() == [[-torch.inf, pytest.approx(2 - 1e-6)]]
    assert cut.high.tolist() == [[pytest.approx(1e-6), pytest.approx(2 + 1e-6)]]
    assert cut.gradient.tolist() == [[0.0, 1.0]]
    assert invert(nn.functional.gelu, Cut.around(value, 0.0, value)) is None


def test_values_outside_an_activations_range_are_read_as_its_ends() -> None:
    value = torch.tensor([[-0.2, 1.3]], dtype=torch.float64)
    cut = invert(torch.sigmoid, Cut.around(value, 0.01, torch.ones_like(value)))
    assert cut is not None
    assert cut.low[0, 0] == -torch.inf
    assert cut.high[0, 0] < -30
    assert cut.low[0, 1] > 30


def test_it_refuses_what_is_not_of_this_checkpoint(small_photos: Tensor) -> None:
    view = capture(small_photos[5:6])
    other = replace(view, observed=view.observed.map(lambda tensor: tensor.flip(0)))
    with pytest.raises(RuntimeError, match="not exactly that of one example and this checkpoint"):
        ATTACK.run(other, fork(0, "a"), Monitor())


def test_reasons_not_to_apply(small_photos: Tensor) -> None:
    view = capture(small_photos[:2])
    assert "local step" in str(ATTACK.applies(replace(view, round=Round(2, 2))))
    without = view.observed.select(name for name in view.observed if not name.startswith("fc"))
    assert "fully connected" in str(ATTACK.applies(replace(view, observed=without)))
    assert "scale" in str(ATTACK.applies(replace(view, knowledge=Knowledge(scale=known(False, "test")))))
    with pytest.raises(ValueError, match="weights must be positive and fall"):
        Recursive(first=1e-8, last=1e-2)
    with pytest.raises(ValueError, match="at least 1"):
        Recursive(stages=0)
