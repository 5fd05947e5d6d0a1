from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from leakaudit.inspection import Inspection, inspect_update
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.results import Finding
from leakaudit.rounds import Round, trained_buffers
from leakaudit.threat import Knowledge, View, known
from leakaudit.update import Update

SPACE = Pixels((3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
KNOWN_ONE_STEP = Knowledge(local_steps=known(1, "test"))


@pytest.fixture(scope="module")
def photos(photo_crops: Tensor) -> Tensor:
    """64 crops of the bundled photos as model inputs, (64, 3, 32, 32)."""
    return SPACE.encode(photo_crops)


def lenet(activation: type[nn.Module] = nn.Sigmoid, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, padding=2, stride=2),
        activation(),
        nn.Conv2d(12, 12, 5, padding=2, stride=2),
        activation(),
        nn.Flatten(),
        nn.Linear(768, classes),
    )


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)
    )


def normalised(momentum: float | None = 0.1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 32),
        nn.BatchNorm1d(32, momentum=momentum),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


MODELS = {"lenet": lenet, "relu": lambda: lenet(nn.ReLU), "mlp": mlp}


def make_view(
    module: nn.Module, x: Tensor, y: Tensor, *, mode: str = "eval", classes: int = 10, **fields: float
) -> View:
    victim = Victim.of(module, SPACE, classes, mode=mode)
    view = View(victim, Round(num_examples=len(x), **fields), Update(victim.params), KNOWN_ONE_STEP)
    return replace(view, observed=view.simulate(x, y))


def look(view: View, **more: object) -> Inspection:
    return inspect_update(view, generator=fork(0, "inspection"), **more)


def named(inspection: Inspection, name: str) -> list[Finding]:
    return [finding for finding in inspection.findings if finding.name == name]


def only(inspection: Inspection, name: str) -> Finding:
    (finding,) = named(inspection, name)
    return finding


def noisy(update: Update, std: float, seed: int = 0) -> Update:
    generator = fork(seed, "noise")
    return update.map(lambda g: g + std * torch.randn(g.shape, generator=generator))


ALARMS = ("quantisation", "precision", "pruning", "noise", "clipping", "missing parameters", "loss reduction")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_an_undefended_gradient_raises_no_alarm(photos: Tensor, model: str, size: int) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = photos[torch.randperm(64)[:size]], torch.randint(10, (size,))
        found = look(make_view(MODELS[model](), x, y))
        assert not [finding.text for finding in found.findings if finding.name in ALARMS]
        assert not [finding.text for finding in found.findings if finding.severity == "warning"]
        assert found.noise_std is None


@pytest.mark.parametrize("model", MODELS)
def test_one_example_is_proven(photos: Tensor, model: str) -> None:
    torch.manual_seed(0)
    found = look(make_view(MODELS[model](), photos[:1], torch.tensor([7])))
    assert found.labels is not None
    assert found.labels.labels.tolist() == [7]
    assert found.labels.exact
    assert found.batch_size_hint == 1
    assert found.consistency is not None
    assert found.consistency.unscaled
    assert "unscaled gradient of one example" in only(found, "checkpoint").text
    assert only(found, "labels").severity == "leak"
    assert found.unknowns == 3072


@pytest.mark.parametrize("size", [2, 4, 8])
def test_batch_size_and_label_counts(photos: Tensor, size: int) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = photos[torch.randperm(64)[:size]], torch.randint(5, (size,))
        view = make_view(lenet(nn.ReLU, 100), x, y, classes=100)
        unknown = replace(view, round=Round(1), knowledge=KNOWN_ONE_STEP)
        found = look(unknown)
        assert found.batch_size_hint == size
        assert found.labels is not None
        assert found.labels.labels.tolist() == y.sort().values.tolist()
        assert found.labels.exact == ("fits to rounding" in only(found, "labels").text)


def test_a_rank_above_the_stated_batch_size_is_a_warning(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(lenet(nn.ReLU), photos[:5], torch.arange(5))
    stated = replace(view, knowledge=replace(KNOWN_ONE_STEP, batch_size=known(2, "manifest")))
    assert only(look(stated), "batch size").severity == "warning"


def test_another_checkpoint_is_refuted(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(lenet(), photos[:1], torch.tensor([7]))
    one = replace(view, knowledge=replace(KNOWN_ONE_STEP, batch_size=known(1, "manifest")))
    for seed in range(1, 5):
        torch.manual_seed(seed)
        found = look(replace(one, victim=Victim.of(lenet(), SPACE, 10)))
        assert only(found, "checkpoint").severity == "warning"
        assert "not under this checkpoint" in only(found, "checkpoint").text


@pytest.mark.parametrize("factor", [-1.0, 0.05])
def test_a_factor_is_found(photos: Tensor, factor: float) -> None:
    torch.manual_seed(0)
    view = make_view(lenet(), photos[:1], torch.tensor([7]))
    finding = only(look(replace(view, observed=factor * view.observed)), "checkpoint")
    assert finding.data["factor"] == pytest.approx(factor, rel=1e-3)
    assert finding.severity == ("warning" if factor < 0 else "info")


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.9, None])
@pytest.mark.parametrize("size", [2, 8])
def test_batch_statistics_are_exact_after_one_step(photos: Tensor, momentum: float | None, size: int) -> None:
    torch.manual_seed(0)
    x, y = photos[10 : 10 + size], torch.arange(size)
    view = make_view(normalised(momentum), x, y, mode="train")
    after = trained_buffers(view.victim, view.round, x, y)
    found = look(view, buffers_after=after)
    truth = view.victim.batch_statistics(view.victim.params, x)
    assert found.local_steps == 1
    assert found.mode == "train"
    assert found.statistics.keys() == truth.keys()
    for name, (mean, variance) in truth.items():
        assert torch.allclose(found.statistics[name][0], mean, atol=1e-5, rtol=1e-5)
        assert torch.allclose(found.statistics[name][1], variance, atol=1e-5, rtol=1e-4)
    assert only(found, "batch statistics").severity == "leak"
    assert only(found, "buffers shared").severity == "hint"


@pytest.mark.parametrize("steps", [2, 5])
def test_local_steps_are_counted(photos: Tensor, steps: int) -> None:
    torch.manual_seed(0)
    x, y = photos[:4], torch.arange(4)
    view = make_view(normalised(), x, y, mode="train", local_steps=steps, learning_rate=0.01)
    found = look(view, buffers_after=trained_buffers(view.victim, view.round, x, y))
    assert found.local_steps == steps
    assert found.statistics == {}


def test_untouched_buffers_mean_eval_mode(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(normalised(), photos[:4], torch.arange(4))
    found = look(view, buffers_after=view.victim.buffers)
    assert found.mode == "eval"
    assert found.local_steps is None
    assert found.statistics == {}


def test_buffers_of_another_checkpoint_are_a_warning(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(normalised(), photos[:4], torch.arange(4), mode="train")
    after = trained_buffers(view.victim, view.round, photos[:4], torch.arange(4))
    after["1.num_batches_tracked"] += 3
    found = look(view, buffers_after=after)
    assert found.local_steps is None
    assert only(found, "local steps").severity == "warning"


def top_k(share: float):
    def prune(tensor: Tensor) -> Tensor:
        threshold = tensor.abs().flatten().kthvalue(max(1, int((1 - share) * tensor.numel()))).values
        return tensor * (tensor.abs() > threshold)

    return prune


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 4])
def test_a_top_k_mask_is_seen(photos: Tensor, model: str, share: float, size: int) -> None:
    torch.manual_seed(0)
    view = make_view(MODELS[model](), photos[5 : 5 + size], torch.arange(size))
    pruned = view.observed.map(top_k(share))
    found = look(replace(view, observed=pruned))
    untouched = all(
        torch.equal(pruned[name], tensor) for name, tensor in view.observed.items() if tensor.dim() > 1
    )
    assert len(named(found, "pruning")) == (0 if untouched else 1)
    assert not named(found, "quantisation")
    assert found.noise_std is None


def test_a_random_mask_is_seen(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(lenet(), photos[:1], torch.tensor([3]))
    generator = fork(0, "mask")
    masked = view.observed.map(lambda g: g * (torch.rand(g.shape, generator=generator) < 0.7))
    assert "pruning mask" in only(look(replace(view, observed=masked)), "pruning").text


def int8(tensor: Tensor) -> Tensor:
    step = tensor.abs().max() / 127
    return (tensor / step).round() * step


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 4])
def test_quantisation_is_seen(photos: Tensor, model: str, size: int) -> None:
    torch.manual_seed(0)
    view = make_view(MODELS[model](), photos[5 : 5 + size], torch.arange(size))
    for change, words in (
        (int8, "levels"),
        (torch.sign, "signs"),
        (lambda g: g.sign() * g.abs().mean(), "signs"),
    ):
        found = look(replace(view, observed=view.observed.map(change)))
        assert words in only(found, "quantisation").text
        assert not named(found, "pruning")
        assert found.noise_std is None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
@pytest.mark.parametrize("size", [1, 4])
def test_short_floats_are_seen_and_nothing_else(
    photos: Tensor, model: str, dtype: torch.dtype, name: str, size: int
) -> None:
    torch.manual_seed(0)
    view = make_view(MODELS[model](), photos[5 : 5 + size], torch.arange(size))
    found = look(replace(view, observed=view.observed.map(lambda g: g.to(dtype).float())))
    assert only(found, "precision").data["dtype"] == name
    assert not [f.text for f in found.findings if f.name in ALARMS and f.name != "precision"]
    assert found.noise_std is None
    assert not [f.text for f in found.findings if f.severity == "warning"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("std", [1e-4, 1e-3, 1e-2])
def test_noise_is_measured(photos: Tensor, model: str, size: int, std: float) -> None:
    torch.manual_seed(0)
    view = make_view(MODELS[model](), photos[5 : 5 + size], torch.arange(size) % 10)
    found = look(replace(view, observed=noisy(view.observed, std)))
    assert found.noise_std == pytest.approx(std, rel=0.4)
    assert found.batch_size_hint is None
    assert found.labels is not None
    assert not found.labels.exact


def test_clipping_to_a_round_length_is_seen(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(mlp(), photos[:1], torch.tensor([3]))
    clipped = replace(view, observed=view.observed * (0.5 / float(view.observed.norm())))
    assert "clipped to 0.5" in only(look(clipped), "clipping").text


def test_a_summed_loss_is_seen(photos: Tensor) -> None:
    torch.manual_seed(0)
    view = make_view(mlp(), photos[:6], torch.arange(6))
    found = look(replace(view, observed=6 * view.observed))
    assert only(found, "loss reduction").data["negative"] > 2
    assert only(found, "loss reduction").severity == "warning"


def test_closed_forms_are_announced(photos: Tensor) -> None:
    torch.manual_seed(0)
    found = look(make_view(mlp(), photos[:1], torch.tensor([3])))
    assert "exactly" in only(found, "input in closed form").text
    assert only(found, "features in closed form").data["layers"] == ["1", "3", "5"]
    transformer = VisionTransformer(32, 8, 1, 2, 32, 32, num_classes=10)
    nn.init.normal_(transformer.heads.head.weight, std=0.1)
    found = look(make_view(transformer, photos[:1], torch.tensor([3])))
    assert "position embedding" in only(found, "input in closed form").text
    assert not named(look(make_view(lenet(), photos[:1], torch.tensor([3]))), "input in closed form")


def test_equations_are_an_upper_bound_of_the_jacobian_rank(photos: Tensor) -> None:
    torch.manual_seed(0)
    small = Pixels((1, 6, 6), (0.5,), (0.25,))
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)
    )
    victim = Victim.of(module, small, 4).to(dtype=torch.float64)
    for size in (1, 2, 3):
        view = View(victim, Round(size), Update(victim.params), KNOWN_ONE_STEP)
        x, y = small.sample(size, fork(size, "x"), torch.float64), torch.arange(size)
        view = replace(view, observed=view.simulate(x, y))
        found = look(view)
        jacobian = torch.func.jacfwd(lambda x, view=view, y=y: view.simulate(x, y).flat())(x)
        rank = int(torch.linalg.matrix_rank(jacobian.reshape(len(jacobian), -1), rtol=1e-10))
        assert rank <= found.equations <= view.observed.numel()
        assert found.unknowns == 36 * size


def test_missing_parameters_are_listed(photos: Tensor) -> None:
    view = make_view(mlp(), photos[:1], torch.tensor([3]))
    partial = replace(view, observed=view.observed.select(["1.weight", "1.bias"]))
    found = look(partial)
    assert len(only(found, "missing parameters").data["names"]) == 4
    assert found.labels is None
    assert found.consistency is None


def test_findings_are_plain_data(photos: Tensor) -> None:
    torch.manual_seed(0)
    x, y = photos[:2], torch.tensor([1, 1])
    view = make_view(normalised(), x, y, mode="train")
    found = look(view, buffers_after=trained_buffers(view.victim, view.round, x, y))
    for finding in found.findings:
        assert Finding.model_validate_json(finding.model_dump_json()) == finding
        assert finding.text.endswith(".")


def test_a_step_of_adam_is_a_warning(photos: Tensor) -> None:
    torch.manual_seed(0)
    model = lenet()
    view = make_view(model, photos[:1], torch.tensor([3]))
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = view.observed[name].clone()
    torch.optim.Adam(model.parameters(), lr=1e-3).step()
    moved = Update({name: (before[name] - p.detach()) / 1e-3 for name, p in model.named_parameters()})
    assert "plain SGD" in only(look(replace(view, observed=moved)), "optimiser").text
    assert named(look(view), "optimiser") == []
