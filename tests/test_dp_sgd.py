"""Clipped examples and DP-SGD: Opacus against our simulation, the noise, text models, and the accountants."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from small_transformers import labels_for, random_sentences, small_victim
from tiny_audits import private_batch, victim_of, view_of
from torch import Tensor, nn
from torch.func import jacfwd, jvp

from leakaudit.defenses import DEFENSES, DPSGD, ClipExamples, Defense, TopK, adapt, apply
from leakaudit.defenses.accounting import epsilon_spent
from leakaudit.defenses.dp_sgd import clipping_client
from leakaudit.errors import InputError
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.spec import parse
from leakaudit.update import Update


def made(defense: Defense, round: Round, victim: Victim | None = None, seed: int = 0, **batch: Any) -> Update:
    victim = victim or victim_of("smooth")
    x, y = batch["batch"] if batch else private_batch(round.num_examples)
    return defense.wrap(client_update, fork(seed, "dp"))(victim, victim.params, round, x, y)


def relative(found: Update, expected: Update) -> float:
    return float((found - expected).norm() / expected.norm())


ROUNDS = [
    Round(1),
    Round(4),
    Round(4, local_steps=3, local_batch_size=2, learning_rate=0.1),
    Round(4, local_steps=2, learning_rate=0.05, clients=2),
    Round(3, local_steps=2, local_batch_size=2, learning_rate=0.1),
]


@pytest.mark.parametrize("round", ROUNDS, ids=str)
@pytest.mark.parametrize("bound", [0.3, 0.9, 1e6])
def test_opacus_clips_as_the_adversary_simulates(round: Round, bound: float) -> None:
    victim = victim_of("smooth")
    x, y = private_batch(round.num_examples)
    simulated = clipping_client(bound)(victim, victim.params, round, x, y)
    assert relative(made(ClipExamples(max_grad_norm=bound), round), simulated) < 1e-6
    assert relative(made(DPSGD(noise_multiplier=0.0, max_grad_norm=bound), round), simulated) < 1e-6


@pytest.mark.parametrize("round", ROUNDS[:4], ids=str)
def test_a_bound_that_nothing_reaches_changes_nothing(round: Round) -> None:
    victim = victim_of("smooth")
    x, y = private_batch(round.num_examples)
    plain = client_update(victim, victim.params, round, x, y)
    assert relative(made(ClipExamples(max_grad_norm=1e6), round), plain) < 1e-5


def test_each_example_counts_at_most_the_bound() -> None:
    """Against the definition: the mean of gradients scaled one by one."""
    victim, (x, y) = victim_of("mlp"), private_batch(4)
    gradients = [client_update(victim, victim.params, Round(1), x[i : i + 1], y[i : i + 1]) for i in range(4)]
    lengths = sorted(float(g.norm()) for g in gradients)
    bound = (lengths[1] + lengths[2]) / 2  # two are clipped
    expected = sum((g.flat() * min(1.0, bound / float(g.norm())) for g in gradients), torch.tensor(0.0)) / 4
    found = made(ClipExamples(max_grad_norm=bound), Round(4), victim).flat()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_loss_that_sums_is_clipped_and_summed() -> None:
    victim = victim_of("smooth")
    summing = Victim.of(victim.module, victim.space, 5, reduction="sum")
    mean, total = (made(ClipExamples(max_grad_norm=0.3), Round(4), v) for v in (victim, summing))
    assert relative(total, mean * 4) < 1e-6
    assert DPSGD().noise_std(Round(4), summing) == 4 * DPSGD().noise_std(Round(4), victim)


@pytest.mark.parametrize(
    "round", [Round(1), Round(4), Round(4, local_steps=4, learning_rate=1e-6, clients=2)], ids=str
)
def test_the_noise_has_the_size_stated(round: Round) -> None:
    victim = victim_of("mlp")
    defense = DPSGD(noise_multiplier=0.7, max_grad_norm=0.4)
    noise = made(defense, round, victim) - made(replace(defense, noise_multiplier=0.0), round, victim)
    stated = defense.noise_std(round, victim)
    if round.local_steps == 1:
        assert stated == pytest.approx(0.7 * 0.4 / round.num_examples)
    flat = noise.flat()
    assert float(flat.std()) == pytest.approx(stated, rel=5 / math.sqrt(2 * len(flat)))
    assert abs(float(flat.mean())) < 4 * stated / math.sqrt(len(flat))


def test_the_generator_decides_the_noise() -> None:
    one, again, other = (made(DPSGD(), Round(2), seed=seed).flat() for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_module_is_kept_between_rounds_and_follows_the_parameters() -> None:
    victim, (x, y) = victim_of("smooth"), private_batch(4)
    client = ClipExamples(max_grad_norm=0.3).training(client_update, fork(0, "dp"))
    params = dict(victim.params)
    for _ in range(3):
        found = client(victim, params, Round(4), x, y)
        assert relative(found, clipping_client(0.3)(victim, params, Round(4), x, y)) < 1e-6
        params = {name: params[name] - 0.5 * found[name] for name in params}
    assert relative(client(victim, victim.params, Round(4), x, y), found) > 1e-3


def test_frozen_parameters_stay_out() -> None:
    victim = victim_of("smooth")
    names = list(victim.params)
    kept = replace(
        victim,
        params={name: victim.params[name] for name in names[2:]},
        frozen={name: victim.params[name] for name in names[:2]},
    )
    found = made(ClipExamples(max_grad_norm=0.3), Round(4), kept)
    x, y = private_batch(4)
    assert list(found) == names[2:]
    assert relative(found, clipping_client(0.3)(kept, kept.params, Round(4), x, y)) < 1e-6


# ------------------------------------------------------------------ Poisson sampling


def test_poisson_sampling_takes_every_example_at_its_rate() -> None:
    """The mean over many draws is the update of all; single draws are means over subsets of them."""
    victim, (x, y) = victim_of("mlp"), private_batch(4)
    defense = DPSGD(noise_multiplier=0.0, max_grad_norm=0.3, poisson=True, sample_rate=0.5)
    single = [
        clipping_client(0.3)(victim, victim.params, Round(1), x[i : i + 1], y[i : i + 1]) for i in range(4)
    ]
    basis = torch.stack([update.flat() for update in single]) / 2  # 0.5 * 4 examples are expected
    client = defense.wrap(client_update, fork(0, "dp"))
    draws = torch.stack([client(victim, victim.params, Round(4), x, y).flat() for _ in range(200)])
    parts = torch.linalg.lstsq(basis.T, draws.T).solution
    torch.testing.assert_close(parts, parts.round(), atol=1e-3, rtol=0)
    assert set(parts.round().unique().tolist()) == {0.0, 1.0}
    assert float((parts.mean(1) - 0.5).abs().max()) < 4 * 0.5 / math.sqrt(200)
    assert bool((parts.sum(0).round() == 0).any())  # an empty batch came, and was survived


def test_the_rate_of_a_cohort_is_that_of_the_client_with_fewest_examples() -> None:
    """Batches of 10: of 10 examples each takes part for certain, and no bound may count on a rate of 0.1."""
    defense = DPSGD(noise_multiplier=1.0, poisson=True)
    assert defense.rate(Round(110, 1, 10, clients=2, sizes=(100, 10))) == 1.0
    assert defense.rate(Round(200, 1, 10, clients=2)) == 0.1


def test_an_empty_batch_is_noise_only() -> None:
    defense = DPSGD(noise_multiplier=0.5, max_grad_norm=0.4, poisson=True, sample_rate=1e-9)
    found = made(defense, Round(4), victim_of("mlp")).flat()
    assert float(found.std()) == pytest.approx(0.5 * 0.4 / 4e-9, rel=0.05)
    text, x = small_victim("bert", "classification"), random_sentences(5, 7)
    y = labels_for("classification", x)
    assert made(replace(defense, noise_multiplier=0.0), Round(2), text, batch=(x, y)).norm() == 0


# ------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *((family, "classification") for family in ("bert", "distilbert", "gpt2", "llama")),
        *((family, "causal-lm") for family in ("gpt2", "llama")),
        ("distilbert", "mlm"),
    ],
)
def test_language_models(family: str, task: Any) -> None:
    """Embeddings, learnt positions, GPT-2's Conv1D, tied embeddings and sentences of several lengths."""
    victim, x = small_victim(family, task), random_sentences(5, 9, 7)
    y = labels_for(task, x)
    simulated = clipping_client(0.5)(victim, victim.params, Round(3), x, y)
    assert relative(made(ClipExamples(max_grad_norm=0.5), Round(3), victim, batch=(x, y)), simulated) < 1e-5


@pytest.mark.parametrize(("family", "task"), [("bert", "mlm"), ("opt", "causal-lm")])
def test_language_models_that_opacus_does_not_take(family: str, task: Any) -> None:
    """A bias shared by a module and its child; a position embedding that is told where to begin."""
    victim, x = small_victim(family, task), random_sentences(5, 9)
    with pytest.raises(InputError, match="Opacus cannot clip"):
        made(DPSGD(), Round(2), victim, batch=(x, labels_for(task, x)))


def test_batch_norm_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"BatchNorm.*layer 1.*GroupNorm"):
        made(DPSGD(), Round(2), victim_of("norm"))


class Mixing(nn.Module):
    """Subtracts the mean over the batch, which no per-example gradient can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(192))
        self.head = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(self.scale * (x - x.mean(0)))


def test_a_layer_that_opacus_does_not_follow_is_refused() -> None:
    victim = Victim.of(Mixing(), Pixels((3, 8, 8)), 5)
    with pytest.raises(InputError, match="Opacus"):
        made(DPSGD(), Round(3), victim)


@pytest.mark.parametrize("name", ["dp-sgd", "clip-examples"])
def test_it_must_come_first(name: str) -> None:
    defense = DEFENSES[name]
    with pytest.raises(InputError, match="must be the first"):
        apply(client_update, [TopK(), defense], fork(0, "dp"))
    apply(client_update, [defense, TopK()], fork(0, "dp"))


@pytest.mark.parametrize(
    "spec",
    [
        "dp-sgd:noise_multiplier=-1",
        "dp-sgd:max_grad_norm=0",
        "dp-sgd:sample_rate=0.5",
        "dp-sgd:poisson=true,sample_rate=2",
        "clip-examples:max_grad_norm=nan",
    ],
)
def test_values_that_cannot_be(spec: str) -> None:
    with pytest.raises(InputError, match="got"):
        parse(spec, DEFENSES, "defense")


# ------------------------------------------------------------------ the adaptive adversary


def test_the_simulation_is_differentiable_both_ways() -> None:
    victim, (x, y) = victim_of("smooth").to(dtype=torch.float64), private_batch(2)
    x = x.double()
    client = clipping_client(0.5)

    def flat(point: Tensor) -> Tensor:
        return client(victim, victim.params, Round(2), point, y).flat()

    direction = torch.randn(x.shape, generator=fork(0, "direction"), dtype=torch.float64)
    step = 1e-6
    expected = (flat(x + step * direction) - flat(x - step * direction)) / (2 * step)
    torch.testing.assert_close(jvp(flat, (x,), (direction,))[1], expected, rtol=1e-5, atol=1e-8)
    probe = torch.randn(expected.shape, generator=fork(0, "probe"), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (reverse,) = torch.autograd.grad(flat(leaf) @ probe, leaf)
    assert float((reverse * direction).sum()) == pytest.approx(float(expected @ probe), rel=1e-5)
    small = jacfwd(lambda s: flat(x + s * direction))(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(small, expected, rtol=1e-5, atol=1e-8)


def test_the_adversary_knows_clipping_and_noise() -> None:
    defense = DPSGD(noise_multiplier=0.5, max_grad_norm=0.2)
    view = view_of(victim_of("smooth"), Round(4))
    x, y = private_batch(4)
    adapted = adapt(view, [defense])
    assert adapted.knowledge.noise_std.value == pytest.approx(0.5 * 0.2 / 4)
    assert adapted.spread == dict.fromkeys(view.observed, adapted.knowledge.noise_std.value)
    assert relative(adapted.simulate(x, y), made(replace(defense, noise_multiplier=0.0), Round(4))) < 1e-6
    assert not adapted.scale_free


def test_one_clipped_example_has_no_scale() -> None:
    view = view_of(victim_of("smooth"), Round(1))
    x, y = private_batch(1)
    bound = 0.5 * float(view.observed.norm())
    clipped = replace(view, observed=made(ClipExamples(max_grad_norm=bound), Round(1)))
    adapted = adapt(clipped, [ClipExamples(max_grad_norm=bound)])
    assert adapted.scale_free
    assert adapted.residual(x, y) < 1e-6
    assert not adapt(view, [ClipExamples(max_grad_norm=4 * bound)]).scale_free


# ------------------------------------------------------------------ accounting


def gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Exact at sample rate 1: `steps` Gaussians are one (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        far = stats.norm.logcdf(-mu / 2 - epsilon / mu) + epsilon
        return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(far)) - delta

    return float(optimize.brentq(excess, 0, 1000))


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 10), (0.5, 1), (1.0, 100)])
def test_epsilon_without_sampling_is_the_gaussian_one(noise: float, steps: int) -> None:
    epsilon, accountant = epsilon_spent(noise, 1.0, steps, 1e-5)
    exact = gaussian_epsilon(noise, steps, 1e-5)
    assert accountant == "prv"
    assert exact <= epsilon <= exact + max(0.03, 0.02 * exact)


def renyi(noise: float, rate: float, order: float) -> float:
    """Divergence of the sampled Gaussian by quadrature (Mironov, Talwar and Zhang 2019, section 3)."""

    def integrand(z: float) -> float:
        ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * noise**2))
        return math.exp(-(z**2) / (2 * noise**2) + order * ratio) / (noise * math.sqrt(2 * math.pi))

    moment, _ = integrate.quad(integrand, -12 * noise, 12 * noise + order, limit=200)
    return math.log(moment) / (order - 1)


def test_epsilon_with_sampling_against_quadrature_and_a_published_value() -> None:
    """TensorFlow Privacy's tutorial setting: 60,000 examples, batches of 256, noise 1.1, 60 epochs: 3.0 by RDP."""
    rate, steps, delta = 256 / 60_000, 60 * 60_000 // 256, 1e-5
    orders = [2 + 0.5 * i for i in range(60)]
    by_quadrature = min(
        steps * renyi(1.1, rate, a) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in orders
    )
    epsilon, accountant = epsilon_spent(1.1, rate, steps, delta)
    assert accountant == "prv"
    assert 0.8 * by_quadrature < epsilon < by_quadrature
    assert by_quadrature == pytest.approx(2.6, abs=0.4)


def test_little_noise_falls_back_on_rdp() -> None:
    """PRV reports 738 where the exact value is 5426."""
    epsilon, accountant = epsilon_spent(0.01, 1.0, 1, 1e-5)
    assert accountant == "rdp"
    assert epsilon > 5400
    assert epsilon_spent(0.1, 0.01, 1000, 1e-5)[1] == "rdp"


@settings(max_examples=5, deadline=None)
@given(st.floats(0.3, 4.0), st.floats(1.05, 2.0), st.sampled_from([0.01, 0.1, 1.0]), st.integers(1, 300))
def test_more_noise_less_epsilon(noise: float, factor: float, rate: float, steps: int) -> None:
    less, more = (epsilon_spent(sigma, rate, steps, 1e-5)[0] for sigma in (noise, noise * factor))
    assert more < less + 0.02


def test_epsilon_of_the_defense() -> None:
    assert DPSGD(noise_multiplier=0.0).epsilon(sample_rate=0.1, steps=10, delta=1e-5) is None
    assert ClipExamples().epsilon(sample_rate=0.1, steps=10, delta=1e-5) is None
    found = DPSGD(noise_multiplier=1.1).epsilon(sample_rate=0.1, steps=10, delta=1e-5)
    assert found == epsilon_spent(1.1, 0.1, 10, 1e-5)[0]


@pytest.mark.parametrize(
    ("name", "values"),
    [("sample_rate", (1, 0, 1, 1e-5)), ("steps", (1, 0.1, 0, 1e-5)), ("delta", (1, 0.1, 1, 1.0))],
)
def test_accounting_of_impossible_values(name: str, values: tuple[float, float, int, float]) -> None:
    with pytest.raises(InputError, match=name):
        epsilon_spent(*values)
