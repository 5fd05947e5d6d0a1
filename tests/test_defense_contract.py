"""What every registered defense must do, and what knowing it must be worth to the adversary."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch
from tiny_audits import private_batch, victim_of, view_of
from torch import Tensor

from leakaudit.defenses import DEFENSES, adapt, apply
from leakaudit.defenses.naming import adapted, parse_defense
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.threat import View, as_it_is

SPECS = (
    *DEFENSES,
    "gaussian-noise:relative=0.1",
    "laplace-noise:relative=0.1",
    "top-k:keep=0.3",
    "top-k:keep=0.05,scope=global",
    "random-k:keep=0.3,scope=global",
    "random-k:keep=0.3,unbiased=true",
    "random-k:keep=0.3,unbiased=true,scope=global",
    "dgc:keep=0.1,rounds=3",
    "dgc:keep=0.2,rounds=2,clip=0.1,nodes=4",
    "quantise:to=fp16",
    "quantise:to=bf16",
    "quantise:to=sign",
    "quantise:to=sign,scope=row",
    "quantise:bits=4",
    "quantise:bits=3,rounding=stochastic,scope=row",
    "clip:max_grad_norm=0.01",
    "clip:max_grad_norm=0.01+gaussian-noise:std=1e-4",
    "clip:max_grad_norm=0.01+top-k:keep=0.2",
    "top-k:keep=0.2+clip:max_grad_norm=0.01",
    "top-k:keep=0.2+quantise:bits=4",
    "top-k:keep=0.2+gaussian-noise:std=1e-4",
    "random-k:keep=0.5+clip:max_grad_norm=0.01+quantise",
    "gaussian-noise:std=1e-3+clip:max_grad_norm=0.01",
    "quantise+gaussian-noise:std=1e-3",
)
defenses = pytest.mark.parametrize("spec", SPECS)
registered = pytest.mark.parametrize("name", DEFENSES)


class Captured:
    """One update of `private_batch` behind a defense, and both adversaries' views of it."""

    def __init__(self, spec: str, round: Round | None = None, model: str = "smooth") -> None:
        chain = [defense for _, defense in parse_defense(spec)]
        victim, round = victim_of(model), round or Round(2)
        trained = victim
        for defense in chain:
            trained, round = defense.victim(trained), defense.round(round)
        self.x, self.y = private_batch(round.num_examples)
        self.victim: Victim = victim
        client = apply(client_update, chain, fork(0, "defense"))
        self.observed = client(trained, trained.params, round, self.x, self.y).detach()
        self.plain = client_update(victim, victim.params, round, self.x, self.y).detach()
        self.oblivious = dataclasses.replace(view_of(victim, round), observed=self.observed)
        self.adaptive = adapted(self.oblivious, parse_defense(spec))


def mismatch(view: View, x: Tensor, y: Tensor, names: list[str], *, scaled: bool = False) -> float:
    """|simulated - observed| / |observed| over the named tensors; `scaled`: the simulated one first, to fit best."""
    simulated, observed = view.simulate(x, y).select(names), view.observed.select(names)
    if scaled:
        simulated = simulated * float(simulated.dot(observed) / simulated.dot(simulated))
    return float((simulated - observed).norm() / observed.norm())


@registered
def test_a_defense_is_documented_with_a_source(name: str) -> None:
    documented = inspect.getdoc(type(DEFENSES[name])) or ""
    assert re.search(r"\b(19|20)\d\d\b", documented), "author and year"
    for field in dataclasses.fields(DEFENSES[name]):  # type: ignore[arg-type]
        texts = [inspect.getdoc(parent) or "" for parent in type(DEFENSES[name]).__mro__]
        assert any(re.search(rf"\b{field.name}\b", text) for text in texts), field.name


@defenses
@pytest.mark.parametrize("steps", [1, 3])
def test_a_defended_update_is_a_part_of_the_plain_ones_names_and_shapes(spec: str, steps: int) -> None:
    captured = Captured(spec, Round(2, steps, learning_rate=0.1))
    assert list(captured.observed) == [name for name in captured.plain if name in captured.observed]
    for name, tensor in captured.observed.items():
        assert (tensor.shape, tensor.dtype) == (captured.plain[name].shape, captured.plain[name].dtype)
        assert bool(tensor.isfinite().all())
    again = Captured(spec, Round(2, steps, learning_rate=0.1)).observed
    assert all(torch.equal(tensor, again[name]) for name, tensor in captured.observed.items())


@defenses
@pytest.mark.parametrize("model", ["smooth", "mlp"])
def test_knowing_the_defense_brings_the_truth_nearer_to_what_was_observed(spec: str, model: str) -> None:
    captured = Captured(spec, model=model)
    oblivious, adaptive = captured.oblivious, captured.adaptive
    if adaptive.decode is not as_it_is:
        pytest.skip("the client trained on something else than the private examples")
    names = list(adaptive.observed)
    assert set(names) <= set(oblivious.observed)
    scaled = adaptive.scale_free
    known, unknown = (
        mismatch(view, captured.x, captured.y, names, scaled=scaled) for view in (adaptive, oblivious)
    )
    assert known <= 1.001 * unknown
    assert not scaled or known < mismatch(oblivious, captured.x, captured.y, names)


@defenses
def test_an_adapted_view_can_be_simulated_in_any_precision_and_differentiated(spec: str) -> None:
    captured = Captured(spec)
    view = captured.adaptive.to(dtype=torch.float64)
    x = captured.x.double().requires_grad_()
    simulated = view.simulate(x, captured.y)
    assert list(simulated) == list(view.observed)
    (gradient,) = torch.autograd.grad((simulated - view.observed).flat().square().sum(), x)
    assert bool(gradient.isfinite().all())
    assert all(std > 0 for std in view.spread.values())
    if view.slack is not None:
        assert list(view.slack) == list(view.observed)
        assert all(view.slack[name].shape == t.shape for name, t in view.observed.items())
        assert all(bool((width >= 0).all()) for width in view.slack.values())
    assert view.knowledge.defense.value == tuple(part for part, _ in parse_defense(spec))


def test_knowing_of_no_defense_changes_nothing() -> None:
    view = view_of(victim_of("mlp"))
    assert adapted(view, ()) is view
    assert adapt(view, []) is view


@pytest.mark.parametrize("spec", ["top-k:keep=0.2", "random-k:keep=0.2", "dgc:keep=0.1,rounds=2"])
def test_a_known_mask_makes_the_simulation_exact(spec: str) -> None:
    captured = Captured(spec)
    names = list(captured.adaptive.observed)
    assert mismatch(captured.adaptive, captured.x, captured.y, names) < 1e-6
    assert mismatch(captured.oblivious, captured.x, captured.y, names) > 0.05


def test_one_example_of_many_rounds_can_be_simulated_by_itself() -> None:
    """As an attack does to find out whether the examples of a batch add up."""
    captured = Captured("dgc:keep=0.3,rounds=2")
    view = dataclasses.replace(captured.adaptive, round=Round(1))
    assert list(view.simulate(captured.x[:1], captured.y[:1])) == list(view.observed)


# ------------------------------------------------------------------ what the adversary gets to know


@pytest.mark.parametrize("family", ["gaussian-noise", "laplace-noise"])
def test_the_size_of_noise_is_known_or_estimated(family: str) -> None:
    exact = Captured(f"{family}:std=0.02").adaptive
    assert exact.knowledge.noise_std.value == pytest.approx(0.02)
    assert exact.knowledge.noise_std.status == "known"
    assert exact.spread == dict.fromkeys(exact.observed, pytest.approx(0.02))
    estimate = Captured(f"{family}:relative=0.5")
    truth = 0.5 * float(estimate.plain.flat().square().mean().sqrt())
    assert estimate.adaptive.knowledge.noise_std.value == pytest.approx(truth, rel=0.05)
    assert estimate.adaptive.knowledge.noise_std.status == "inferred"


def test_noise_of_two_defenses_adds_up() -> None:
    view = Captured("gaussian-noise:std=0.03+laplace-noise:std=0.04").adaptive
    assert view.knowledge.noise_std.value == pytest.approx(0.05)


def test_no_noise_is_none() -> None:
    view = Captured("gaussian-noise:std=0").adaptive
    assert view.knowledge.noise_std.value is None
    assert view.spread == {}


@pytest.mark.parametrize(
    "spec",
    [
        "quantise",
        "quantise:scope=row",
        "quantise:bits=3",
        "quantise:bits=4,rounding=stochastic",
        "quantise:bits=2,rounding=stochastic,scope=row",
        "quantise:to=fp16",
        "quantise:to=bf16",
    ],
)
def test_the_undisturbed_update_lies_in_the_interval(spec: str) -> None:
    captured = Captured(spec)
    slack = captured.adaptive.slack
    assert slack is not None
    for name, plain in captured.plain.items():
        off = (captured.observed[name] - plain).abs()
        assert bool((off <= slack[name] * 1.001 + 1e-9).all()), name
        assert plain.numel() < 50 or float(off.max()) > 0.3 * float(slack[name].max()), (
            "no wider than it must be"
        )


@pytest.mark.parametrize("bits", [2, 8, 12])
def test_the_spread_of_rounding_is_that_of_the_errors(bits: int) -> None:
    """Even numbers, for which the share of a step that rounding takes is uniform."""
    ((_, defense),) = parse_defense(f"quantise:bits={bits},rounding=stochastic")
    plain = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    view = view_of(victim_of("mlp"))
    from leakaudit.update import Update

    client = defense.wrap(lambda *_: Update({"w": plain}), fork(0, "q"))
    observed = client(view.victim, {}, Round(1), plain, plain)
    spread = defense.adapt(dataclasses.replace(view, observed=observed)).spread["w"]
    assert float((observed["w"] - plain).square().mean().sqrt()) == pytest.approx(spread, rel=0.1)


def test_noise_after_rounding_ends_the_interval_and_keeps_the_error() -> None:
    rounded = Captured("quantise:bits=4").adaptive
    noisy = Captured("quantise:bits=4+gaussian-noise:std=1e-3").adaptive
    assert rounded.slack is not None
    assert noisy.slack is None
    for name, std in noisy.spread.items():
        assert std**2 == pytest.approx(rounded.spread[name] ** 2 + 1e-6, rel=0.2)


def test_a_clipped_update_has_no_length_and_an_unclipped_one_is_as_it_was() -> None:
    length = float(Captured("none").plain.norm())
    clipped = Captured(f"clip:max_grad_norm={length / 2}").adaptive
    assert clipped.scale_free
    assert Captured(f"clip:max_grad_norm={length / 2}+top-k").adaptive.client is not client_update
    untouched = Captured(f"clip:max_grad_norm={length * 2}").adaptive
    assert not untouched.scale_free
    assert untouched.client is client_update


def test_a_clipped_and_pruned_update_is_shorter_than_the_bound_and_clipped_all_the_same() -> None:
    captured = Captured("clip:max_grad_norm=0.01+top-k:keep=0.2")
    assert float(captured.observed.norm()) < 0.0099
    assert mismatch(captured.adaptive, captured.x, captured.y, list(captured.adaptive.observed)) < 1e-5


def test_noise_before_clipping_has_no_known_size() -> None:
    view = Captured("gaussian-noise:std=1e-3+clip:max_grad_norm=0.01").adaptive
    assert view.knowledge.noise_std.value is None
    assert view.spread == {}


def test_tensors_of_which_nothing_was_kept_are_left_out() -> None:
    captured = Captured("top-k:keep=0.001,scope=global")
    kept = [name for name, tensor in captured.observed.items() if bool(tensor.any())]
    assert 0 < len(kept) < len(captured.observed)
    assert list(captured.adaptive.observed) == kept


def test_a_mask_under_noise_is_not_taken_for_one() -> None:
    captured = Captured("top-k:keep=0.2+gaussian-noise:std=1e-4")
    assert captured.adaptive.client is client_update
    assert list(captured.adaptive.observed) == list(captured.observed)
