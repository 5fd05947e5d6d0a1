"""What every registered attack, defense, model and metric must do."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch
from tiny_audits import CLASSES, SHAPE, private_batch, victim_of, view_of
from tiny_text import text_victim, text_view
from torch import Tensor, nn

from leakaudit.attacks.base import Attack, Monitor, Reconstruction
from leakaudit.attacks.embedding_matching import TextDeepLeakage
from leakaudit.attacks.registry import (
    ATTACKS,
    AUTO,
    DESCRIPTIONS,
    EXACT,
    IMAGE_ATTACKS,
    TEXT_ATTACKS,
    TEXT_AUTO,
    medium_of_attack,
)
from leakaudit.attacks.tiger import Tiger
from leakaudit.defenses import DEFENSES
from leakaudit.errors import Unmeasurable
from leakaudit.formats.manifest import Normalisation
from leakaudit.metrics import METRICS, Metric, score_batch
from leakaudit.models.spaces import NO_TOKEN, Pixels
from leakaudit.models.victim import Victim
from leakaudit.models.zoo import MODELS, load_victim, model_info
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.spec import format_spec, parse
from leakaudit.threat import Fact, View, known

attacks = pytest.mark.parametrize("name", ATTACKS)
image_attacks = pytest.mark.parametrize("name", IMAGE_ATTACKS)
text_attacks = pytest.mark.parametrize("name", TEXT_ATTACKS)
defenses = pytest.mark.parametrize("name", DEFENSES)
models = pytest.mark.parametrize("name", MODELS)
metrics = pytest.mark.parametrize("name", METRICS)

PLAIN = (bool, int, float, str, list, dict, type(None))
SHORT = {"iterations": 12, "tuning": 4, "warm_start": 10, "samples": 200, "restarts": 1}
SHORT |= {"starts": 3, "proposals": 3, "polish": 3, "every": 6}
SHORTER = SHORT | {"iterations": 2, "every": 1}
"""Of attacks on text whose iteration is twenty steps of L-BFGS."""


def shortened(attack: Attack) -> Attack:
    options = {f.name for f in dataclasses.fields(attack) if f.init}  # type: ignore[arg-type]
    short = SHORTER if isinstance(attack, (TextDeepLeakage, Tiger)) else SHORT
    changes = {name: value for name, value in short.items() if name in options}
    return dataclasses.replace(attack, **changes)  # type: ignore[type-var]


class Transformer(nn.Module):
    """The smallest patch embedding with learnt positions, for `patch-embedding`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, 64) * 0.1)
        self.mix = nn.Linear(64, 64)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(torch.tanh(self.mix(tokens)).flatten(1))


def transformer() -> Victim:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Victim.of(Transformer(), Pixels(SHAPE, (0.5,) * 3, (0.25,) * 3), CLASSES)


def suitable(name: str) -> View:
    """A small view to which the attack applies."""
    if medium_of_attack(name) == "text":
        view = text_view(text_victim())[0]
        assert ATTACKS[name].applies(view) is None
        return view
    view = view_of({"patch-embedding": transformer}.get(name, lambda: victim_of("mlp"))())
    assert ATTACKS[name].applies(view) is None
    return view


def test_the_tables_agree() -> None:
    assert set(DESCRIPTIONS) == set(ATTACKS)
    assert set(AUTO) <= set(IMAGE_ATTACKS)
    assert set(TEXT_AUTO) <= set(TEXT_ATTACKS)
    assert not set(IMAGE_ATTACKS) & set(TEXT_ATTACKS)
    assert set(EXACT) <= set(ATTACKS)
    assert set(TEXT_ATTACKS) <= set(EXACT)


# ------------------------------------------------------------------ attacks


@attacks
def test_an_attack_is_a_frozen_dataclass_with_a_spec(name: str) -> None:
    preset = ATTACKS[name]
    assert dataclasses.is_dataclass(preset)
    assert preset.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert preset.restarts >= 1
    assert parse(name, ATTACKS) == preset
    changed = shortened(preset)
    assert parse(format_spec(name, changed, preset), ATTACKS) == changed
    assert type(preset).__doc__


@attacks
def test_applies_gives_none_or_a_reason(name: str) -> None:
    for view in (
        view_of(victim_of("smooth")),
        view_of(victim_of("norm", "train"), Round(2, 3, learning_rate=0.1)),
        dataclasses.replace(
            suitable(name), knowledge=view_of(victim_of("mlp"), scale=known(False, "t")).knowledge
        ),
        dataclasses.replace(suitable(name), observed=suitable(name).observed.map(torch.zeros_like)),
    ):
        reason = ATTACKS[name].applies(view)
        assert reason is None or (isinstance(reason, str) and reason), reason


def run(name: str, view: View, monitor: Monitor | None = None, seed: int = 0) -> Reconstruction:
    return shortened(ATTACKS[name]).run(view, fork(seed, name), monitor or Monitor())


@image_attacks
@pytest.mark.parametrize("labels", ["known", "inferred"])
def test_a_run_obeys_its_contract(name: str, labels: str) -> None:
    view = suitable(name)
    if labels == "known":
        knowledge = dataclasses.replace(view.knowledge, labels=known(private_batch()[1], "t"))
        view = dataclasses.replace(view, knowledge=knowledge)
    steps: list[tuple[int, int, float]] = []
    found = run(name, view, Monitor(lambda *step: steps.append(step)))
    assert found.x.shape == (1, *SHAPE)
    assert found.x.dtype in (torch.float32, torch.float64)
    assert bool(found.x.isfinite().all())
    assert not found.x.requires_grad
    assert not found.y.requires_grad
    assert found.y.shape == ((1, CLASSES) if found.y.is_floating_point() else (1,))
    if found.y.is_floating_point():
        torch.testing.assert_close(found.y.sum(1), torch.ones(1, dtype=found.y.dtype))
    else:
        assert torch.equal(found.y.cpu(), private_batch()[1])
    assert math.isfinite(found.loss)
    assert found.loss == min(loss for _, loss in [*found.history, (0, found.loss)])
    assert steps
    assert all(0 <= iteration <= total for iteration, total, _ in steps)
    assert 1 <= len(found.strip) <= 40
    assert all(frame.shape == found.x.shape for _, _, frame in found.strip)
    assert [iteration for iteration, _, _ in found.strip] == sorted(i for i, _, _ in found.strip)
    residual = view.residual(found.x, found.y)
    assert math.isfinite(residual)
    assert residual < 1.5
    assert all(isinstance(value, PLAIN) for value in found.details.values()), found.details


@text_attacks
@pytest.mark.parametrize("labels", ["known", "inferred"])
def test_a_run_on_text_obeys_its_contract(name: str, labels: str) -> None:
    view, batch = text_view(text_victim())
    if labels == "known":
        knowledge = dataclasses.replace(view.knowledge, labels=known(batch.labels, "t"))
        view = dataclasses.replace(view, knowledge=knowledge)
    found = run(name, view)
    assert found.x.dtype == torch.int64
    assert found.x.shape[0] == 1
    assert bool(((found.x >= NO_TOKEN) & (found.x < view.victim.space.vocabulary)).all())
    assert torch.equal(found.y.cpu(), batch.labels)
    assert math.isfinite(found.loss)
    assert 1 <= len(found.strip) <= 40
    assert [iteration for iteration, _, _ in found.strip] == sorted(i for i, _, _ in found.strip)
    assert math.isfinite(view.residual(found.x, found.y))
    assert all(isinstance(value, PLAIN) for value in found.details.values()), found.details


@attacks
def test_the_same_generator_gives_the_same_result(name: str) -> None:
    view = suitable(name)
    first, second = run(name, view), run(name, view)
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.y, second.y)
    assert (first.loss, first.history) == (second.loss, second.history)


@attacks
def test_a_deadline_in_the_past_ends_an_attack_at_once(name: str) -> None:
    view = suitable(name)
    began = time.monotonic()
    found = dataclasses.replace(ATTACKS[name]).run(
        view, fork(0, name), Monitor(deadline=time.monotonic() - 1)
    )
    assert time.monotonic() - began < 10
    assert found.iterations <= 3
    assert math.isfinite(found.loss)


@attacks
def test_an_attack_changes_nothing_it_is_given(name: str) -> None:
    view = suitable(name)
    before = {**view.victim.params, **{f"*{n}": t for n, t in view.observed.items()}}
    before = {key: tensor.clone() for key, tensor in before.items()}
    state = torch.random.get_rng_state()
    run(name, view)
    after = {**view.victim.params, **{f"*{n}": t for n, t in view.observed.items()}}
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert torch.equal(state, torch.random.get_rng_state()), "randomness comes from the generator only"


def test_box_constrained_attacks_stay_in_the_box() -> None:
    view = suitable("inverting-gradients")
    found = run("inverting-gradients", view)
    pixels = view.victim.space.decode(found.x)
    assert float(pixels.min()) >= -1e-6
    assert float(pixels.max()) <= 1 + 1e-6


@pytest.mark.parametrize("name", ["linear", "patch-embedding", "levenberg-marquardt", "idlg"])
def test_exact_attacks_recover_the_image(name: str) -> None:
    view = suitable(name)
    found = ATTACKS[name].run(view, fork(0, name), Monitor())
    assert view.residual(found.x, found.y) < 1e-4
    assert float((found.x - private_batch()[0]).abs().max()) < 1e-2


# ------------------------------------------------------------------ defenses


@defenses
def test_a_defense_is_a_frozen_dataclass_with_a_spec(name: str) -> None:
    preset = DEFENSES[name]
    assert dataclasses.is_dataclass(preset)
    assert preset.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert parse(name, DEFENSES) == preset
    assert format_spec(name, preset, preset) == name
    assert type(preset).__doc__


# ------------------------------------------------------------------ models


def small(name: str) -> Victim:
    width = {"convnet": ":width=4", "mlp": ":width=16"}.get(name, "")
    return load_victim(
        name + width,
        num_classes=4,
        input_shape=(3, 16, 16),
        normalisation=Normalisation(mean=(0.5,), std=(0.25,)),
    )


@models
def test_a_model_has_a_description_and_a_spec(name: str) -> None:
    entry, info = MODELS[name], model_info(name)
    assert info.name == name
    assert info.description
    assert info.citation
    presets = {name: entry.options}
    changed = dataclasses.replace(entry.options, activation="tanh", init="uniform")
    assert parse(format_spec(name, changed, entry.options), presets) == changed


@models
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients_reach_every_parameter(name: str, mode: str) -> None:
    victim = small(name).with_mode(mode)  # type: ignore[arg-type]
    x = victim.probe(3)
    update = client_update(victim, victim.params, Round(3), x, torch.tensor([0, 1, 3]))
    assert list(update) == victim.trainable()
    assert update.is_finite()
    dead = [key for key, tensor in update.items() if not bool(tensor.any())]
    assert not dead
    assert victim.classifier() is not None


@models
def test_a_models_update_can_be_differentiated_again(name: str) -> None:
    victim = small(name)
    x = victim.probe(2).requires_grad_()
    length = client_update(victim, victim.params, Round(2), x, torch.tensor([0, 1])).norm()
    (gradient,) = torch.autograd.grad(length, x)
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


# ------------------------------------------------------------------ metrics


def measure(metric: Metric, reconstruction: Tensor, truth: Tensor) -> Tensor:
    try:
        return metric.function(reconstruction, truth)
    except Unmeasurable as reason:
        pytest.skip(str(reason))


@metrics
def test_a_metric_scores_each_example_by_itself(name: str) -> None:
    metric = METRICS[name]
    assert metric.name == name
    assert metric.description
    truth, other = torch.rand(2, 3, 3, 32, 32)
    scores = measure(metric, other, truth)
    assert scores.shape == (3,)
    for i in range(3):
        alone = measure(metric, other[i : i + 1], truth[i : i + 1])
        torch.testing.assert_close(alone, scores[i : i + 1], rtol=1e-4, atol=1e-5)


@metrics
def test_identical_images_score_best_and_chance_is_worse(name: str) -> None:
    metric = METRICS[name]
    truth = torch.rand(4, 3, 32, 32)
    perfect = measure(metric, truth, truth)
    near = measure(metric, (truth + 0.02 * torch.randn_like(truth)).clamp(0, 1), truth)
    better = perfect > near if metric.higher_is_better else perfect < near
    assert bool(better.all())
    (score,) = (
        s for s in score_batch(truth, truth, [metric], generator=fork(0, "chance")).scores if s.metric == name
    )
    assert score.value is not None
    assert score.chance is not None
    assert score.higher_is_better == metric.higher_is_better
    assert score.value > score.chance if metric.higher_is_better else score.value < score.chance


def test_facts_are_unknown_exactly_when_they_have_no_value() -> None:
    with pytest.raises(ValueError, match="unknown exactly when"):
        Fact(3)
    with pytest.raises(ValueError, match="unknown exactly when"):
        Fact(None, "known")
    assert view_of(victim_of("mlp")).knowledge.setting == "realistic"
    told = view_of(victim_of("mlp"), labels=known(torch.tensor([1]), "told", upper_bound=True))
    assert told.knowledge.setting == "upper bound"
