"""Defenses that change the round, the inputs or the model, and the adversary who knows them."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from text_rounds import labels_of, tiny_victim, tokens_of
from tiny_audits import (
    CLASSES,
    FACTORIES,
    SPACE,
    Ran,
    Runner,
    build,
    private_batch,
    runner,
    victim_of,
    view_of,
    words,
)
from torch import Tensor, nn

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.gradient_matching import TotalVariationPath
from leakaudit.capture import capture, write_captured
from leakaudit.data import PrivateBatch, control_photos, load_truth, photo_folder
from leakaudit.defenses import (
    DEFENSES,
    Clip,
    Defense,
    Freeze,
    GaussianNoise,
    InputNoise,
    LargerBatch,
    LocalSteps,
    MixUp,
    SecureAggregation,
    Soteria,
    adapt,
    apply,
)
from leakaudit.defenses.input_noise import denoised
from leakaudit.defenses.mixup import capped, mixed
from leakaudit.defenses.soteria import most_telling
from leakaudit.defenses.unmixing import solved, unmix
from leakaudit.errors import InputError
from leakaudit.formats.checkpoint import parameters_sha256
from leakaudit.formats.loading import load_update
from leakaudit.formats.reading import read_file
from leakaudit.models.spaces import Pixels
from leakaudit.models.victim import Params, Victim
from leakaudit.randomness import fork
from leakaudit.report.folder import read_run
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known, see
from leakaudit.update import Update

PHOTOS = Pixels((3, 32, 32), (0.5,) * 3, (0.25,) * 3)


def shared(
    chain: list[Defense], round: Round, victim: Victim | None = None, seed: int = 0
) -> tuple[View, Tensor, Tensor]:
    """What a server sees of `private_batch` under the defenses, before it adapts, and what the client trained on."""
    victim = victim or victim_of("smooth")
    for defense in chain:
        round = defense.round(round)
    trained = victim
    for defense in chain:
        trained = defense.victim(trained)
    used: list[tuple[Tensor, Tensor]] = []

    def client(victim: Victim, params: Params, own: Round, x: Tensor, y: Tensor) -> Update:
        used.append((x.detach(), y.detach()))
        return client_update(victim, params, own, x, y)

    x, y = private_batch(round.num_examples)
    client_of_all = apply(client, chain, fork(seed, "defenses"))
    observed = client_of_all(trained, trained.params, round, x, y).detach()
    view = View(victim, round, observed, view_of(victim, round).knowledge)
    return view, torch.cat([x for x, _ in used]), torch.cat([y for _, y in used])


def gradient(victim: Victim, x: Tensor, y: Tensor) -> Update:
    return client_update(victim, victim.params, Round(len(x)), x, y).detach()


def close(left: Update, right: Update, tolerance: float = 1e-5) -> bool:
    return list(left) == list(right) and float((left - right).norm() / right.norm()) < tolerance


def crops(count: int) -> Tensor:
    """(count, 3, 32, 32) bundled photographs as pixels."""
    return control_photos(PHOTOS.shape).pixels[:count]


def best_psnr(found: Tensor, truth: Tensor) -> float:
    """Mean over the batch, of pixels, in the best order."""
    errors = (found[:, None] - truth).square().flatten(2).mean(2).clamp_min(1e-12)
    return max(
        float((-10 * errors[list(order), range(len(truth))].log10()).mean())
        for order in permutations(range(len(truth)))
    )


# ------------------------------------------------------------------ the adversary who knows them


@pytest.mark.parametrize(
    ("chain", "round", "tolerance"),
    [
        ([LargerBatch(size=3)], Round(1), 1e-6),
        ([LocalSteps(steps=4, learning_rate=0.5)], Round(2), 1e-6),
        ([SecureAggregation(clients=3, bits=30)], Round(2), 1e-5),
        ([Clip(max_grad_norm=0.05), SecureAggregation(clients=2, bits=30)], Round(1), None),
        ([SecureAggregation(clients=2, bits=30), LocalSteps(steps=3)], Round(2), 1e-5),
        ([Freeze(layers="first")], Round(2, 3, learning_rate=0.5), 1e-6),
        ([MixUp()], Round(3), 1e-6),
        ([MixUp(k=3, largest=0.65), SecureAggregation(clients=2, bits=30)], Round(3), 1e-5),
        ([InputNoise(std=0.2)], Round(2), 1e-6),
        ([Soteria(prune=0.3)], Round(1), 1e-6),
        ([Soteria(prune=0.3)], Round(3), 1e-6),
        ([Soteria(prune=0.3), GaussianNoise(std=0.0)], Round(1), 1e-6),
    ],
    ids=lambda value: "+".join(type(d).__name__ for d in value) if isinstance(value, list) else None,
)
def test_the_adapted_adversary_explains_the_update(
    chain: list[Defense], round: Round, tolerance: float | None
) -> None:
    """The residual of what the client trained on is that of rounding; clipping's adversary is not ours."""
    view, x, y = shared(chain, round)
    adapted = adapt(view, chain)
    if tolerance is None:  # clipping by itself is not simulated yet, so here it is, for every client
        clipped = apply(client_update, chain[:1], fork(0, "x"))
        adapted = chain[1].adapt(View(view.victim, view.round, view.observed, view.knowledge, clipped))
        assert view.residual(x, y) > 0.1
        tolerance = 1e-5
    assert adapted.residual(x, y) < tolerance
    assert adapted.observed.numel() > 50


def test_freezing_and_soteria_are_why_the_oblivious_adversary_fails() -> None:
    for defense, round in ((Freeze(), Round(2, 3, learning_rate=0.5)), (Soteria(prune=0.3), Round(1))):
        view, x, y = shared([defense], round)
        assert view.residual(x, y) > 10 * defense.adapt(view).residual(x, y) + 1e-3


# ------------------------------------------------------------------ rounds


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_defenses_of_the_round_change_what_they_say(size: int, clients: int, count: int, steps: int) -> None:
    before = Round(count * 2, 2, 1, 0.3)
    larger = LargerBatch(size=size).round(before)
    assert (larger.num_examples, larger.batch_size, larger.local_steps) == (size, size, 2)
    longer = LocalSteps(steps=steps, learning_rate=0.7).round(before)
    assert longer == Round(count * 2, steps, 1, 0.7)
    summed = SecureAggregation(clients=clients).round(before)
    assert summed == Round(count * 2 * clients, 2, 1, 0.3, clients)
    both = LargerBatch(size=size).round(summed)
    assert (both.num_examples, both.own_examples, both.clients) == (size * clients, size, clients)
    assert both == SecureAggregation(clients=clients).round(larger)


@settings(max_examples=6, deadline=None)
@given(st.integers(2, 5), st.floats(0.01, 0.5))
def test_local_steps_are_those_of_plain_sgd(steps: int, rate: float) -> None:
    module, (x, y) = build("smooth"), private_batch(2)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimiser = torch.optim.SGD(module.parameters(), lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimiser.step()
    expected = Update({name: (before[name] - p.detach()) / rate for name, p in module.named_parameters()})
    view, _, _ = shared([LocalSteps(steps=steps, learning_rate=rate)], Round(2))
    assert close(view.observed, expected, 1e-3)


# ------------------------------------------------------------------ secure aggregation


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.integers(1, 2), st.integers(8, 24))
def test_the_sum_is_the_gradient_of_the_large_batch_up_to_the_step(clients: int, own: int, bits: int) -> None:
    defense = SecureAggregation(clients=clients, bits=bits, limit=2.0)
    view, x, y = shared([defense], Round(own))
    difference = (view.observed - gradient(view.victim, x, y)).flat()
    assert len(x) == clients * own
    assert float(difference.abs().max()) <= defense.step / 2 + 1e-6
    if clients == 1:
        levels = view.observed.flat().double() / defense.step
        torch.testing.assert_close(levels, levels.round(), atol=1e-6, rtol=0)


def test_numbers_beyond_the_limit_are_clamped() -> None:
    view, x, y = shared([SecureAggregation(clients=1, limit=0.01)], Round(1))
    plain = gradient(view.victim, x, y).flat()
    torch.testing.assert_close(view.observed.flat(), plain.clamp(-0.01, 0.01), atol=1e-5, rtol=0)
    assert float(plain.abs().max()) > 0.02


def test_what_is_left_of_it_acts_on_clients_and_what_is_right_of_it_on_the_mean() -> None:
    clip, secure = Clip(max_grad_norm=0.05), SecureAggregation(clients=3, bits=30)
    each, x, y = shared([clip, secure], Round(1))
    parts = [gradient(each.victim, x[i : i + 1], y[i : i + 1]) for i in range(3)]
    clipped = [part * (0.05 / float(part.norm())) for part in parts]
    assert close(each.observed, (clipped[0] + clipped[1] + clipped[2]) / 3)
    mean, x, y = shared([secure, clip], Round(1))
    assert float(mean.observed.norm()) == pytest.approx(0.05, rel=1e-4)
    assert not close(mean.observed, each.observed, 0.1)


def test_noise_of_each_client_shrinks_with_their_number() -> None:
    std, defense = 0.3, SecureAggregation(clients=9, bits=12, limit=8.0)
    view, x, y = shared([GaussianNoise(std=std), defense], Round(1))
    known_noise = View(
        view.victim, view.round, view.observed, spread=dict.fromkeys(view.observed, std), slack=view.observed
    )
    adapted = defense.adapt(known_noise)
    noise = (view.observed - gradient(view.victim, x, y)).flat()
    for spread in adapted.spread.values():
        assert spread == pytest.approx(math.sqrt((std**2 + defense.step**2 / 12) / 9), rel=1e-6)
        assert float(noise.std()) == pytest.approx(spread, rel=0.05)
    alone, x, y = shared([coarse := SecureAggregation(clients=4, bits=12, limit=2.0)], Round(1))
    rounding = (alone.observed - gradient(alone.victim, x, y)).flat()
    (spread,) = set(coarse.adapt(alone).spread.values())
    assert float(rounding.std()) == pytest.approx(spread, rel=0.1)


# ------------------------------------------------------------------ frozen layers


@pytest.mark.parametrize(
    ("layers", "gone"),
    [("first", {"0.weight", "0.bias"}), ("2.*|*.bias", {"2.weight", "0.bias", "2.bias", "5.bias"})],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_freezing_trains_and_shares_the_rest(layers: str, gone: set[str], steps: int) -> None:
    module, (x, y) = build("smooth"), private_batch(2)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in gone)
    expected = client_update(
        plain := Victim.of(module, SPACE, CLASSES),
        plain.params,
        round := Round(2, steps, learning_rate=0.5),
        x,
        y,
    )
    view, _, _ = shared([Freeze(layers=layers)], round)
    assert close(view.observed, expected.detach(), 1e-6)
    assert set(view.observed) == set(view.victim.params) - gone
    adapted = Freeze(layers=layers).adapt(view).victim
    assert set(adapted.frozen) == gone
    x = victim_of("smooth").probe()
    assert torch.equal(adapted.logits(adapted.params, x), view.victim.logits(view.victim.params, x))


@pytest.mark.parametrize("layers", ["nowhere.*", "*", "embeddings"])
def test_freezing_nothing_or_everything_is_refused(layers: str) -> None:
    with pytest.raises(
        InputError, match=r"freezes (none|all) of the 6 parameters.*accepted: first, embeddings"
    ):
        Freeze(layers=layers).victim(victim_of("smooth"))


def test_the_first_layers_of_a_branching_model_are_all_that_see_the_input() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
            self.head = nn.Linear(128, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.left(x).sigmoid() * self.right(x).sigmoid()).flatten(1))

    frozen = Freeze(layers="first").victim(Victim.of(Branches(), SPACE, CLASSES))
    assert set(frozen.frozen) == {"left.weight", "left.bias", "right.weight", "right.bias"}


@pytest.mark.parametrize(
    ("model", "task", "tables"),
    [("bert", "classification", 3), ("bert", "mlm", 3), ("gpt2", "causal-lm", 2)],
)
def test_tables_of_a_language_model(model: Any, task: Any, tables: int) -> None:
    """With tied weights the word embedding is the layer that scores tokens, which is frozen with it."""
    victim = tiny_victim(model, task)
    x = tokens_of(victim, 0, 1)
    y = labels_of(victim, x)
    frozen = Freeze(layers="embeddings").victim(victim)
    assert frozen == Freeze(layers="first").victim(victim)
    assert len(frozen.frozen) == tables
    assert victim.word in frozen.frozen
    assert victim.position in frozen.frozen
    assert frozen.tied == victim.tied  # type: ignore[attr-defined]
    whole = client_update(victim, victim.params, Round(2), x, y).detach()
    part = client_update(frozen, frozen.params, Round(2), x, y).detach()
    assert close(part, whole.select(frozen.params), 1e-6)


def test_a_frozen_capture_belongs_to_the_whole_model(tmp_path: Path) -> None:
    victim, path = victim_of("smooth"), tmp_path / "shared.safetensors"
    x, y = private_batch(2)
    batch = PrivateBatch(SPACE.decode(x), y, ("a", "b"))
    for round in (Round(2), Round(2, 3, learning_rate=0.5)):
        captured = capture(victim, batch, round, defenses=[("freeze:layers=first", Freeze())])
        assert captured.manifest.checkpoint_sha256 == parameters_sha256(victim.module)
        write_captured(path, captured)
        read = load_update(path, victim)
        assert read.missing == ("0.weight", "0.bias")
        view = see(victim, read)
        assert Freeze().adapt(view).residual(x, y) < 1e-4
        assert view.residual(x, y) < (1e-5 if round.local_steps == 1 else 1.0)


# ------------------------------------------------------------------ mixup


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(0, 4), st.floats(0.2, 5.0), st.floats(0.01, 1.0), st.integers(0, 99))
def test_a_mixture_is_of_k_different_examples(
    k: int, more: int, alpha: float, room: float, seed: int
) -> None:
    largest = 1 / k + (1 - 1 / k) * room
    weights = MixUp(k, alpha, largest).mixture(k + more, fork(seed, "mixture"))
    torch.testing.assert_close(weights.sum(1), torch.ones(k + more, dtype=torch.float64))
    assert float(weights.max()) <= largest + 1e-9
    assert float(weights.min()) >= 0
    assert int((weights > 0).sum(1).max()) <= k
    if room < 0.9:
        assert bool(((weights > 0).sum(0) == k).all())


def test_coefficients_keep_their_sum_and_order_when_capped() -> None:
    shares = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    expected = torch.tensor([[0.65, 0.35], [0.5, 0.5], [0.35, 0.65]], dtype=torch.float64)
    torch.testing.assert_close(capped(shares, 0.65), expected)


def test_the_update_is_the_gradient_of_the_mixed_batch() -> None:
    defense = MixUp(k=3)
    view, x, y = shared([defense], Round(4))
    weights = defense.mixture(4, fork(0, "defenses"))
    images, labels = private_batch(4)
    torch.testing.assert_close(x, mixed(weights.float(), images))
    torch.testing.assert_close(y, (weights @ F.one_hot(labels, CLASSES).double()).float())
    victim = view.victim
    leaves = {name: p.clone().requires_grad_() for name, p in victim.params.items()}
    loss = -(y * victim.logits(leaves, x).log_softmax(-1)).sum(1).mean()
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert close(view.observed, Update(expected))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(0, 99))
def test_a_known_mixture_is_inverted(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = MixUp(largest=0.9).mixture(count, generator)
    x = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    if float(torch.linalg.cond(weights)) < 100:
        torch.testing.assert_close(solved(weights, mixed(weights, x)), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [2, 3])
def test_labels_of_their_own_give_the_mixture_away(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = MixUp(k=k, largest=0.9).mixture(3, generator)
    labels, truth = torch.randperm(10, generator=generator)[:3], crops(3)
    y = weights @ F.one_hot(labels, 10).double()
    found, classes = unmix(mixed(weights.float(), PHOTOS.encode(truth)), y, PHOTOS, k)
    order = labels.argsort()
    assert torch.equal(classes, labels[order])
    torch.testing.assert_close(PHOTOS.decode(found), truth[order], atol=1e-3, rtol=0)


def test_mixtures_that_were_not_recovered_stay_as_they_are() -> None:
    """The inverse would make their errors larger."""
    weights = MixUp().mixture(3, fork(1, "mixture"))
    y = weights @ F.one_hot(torch.tensor([1, 2, 3]), 10).double()
    noise = 0.2 * torch.randn(3, 3, 32, 32, generator=fork(0, "noise"))
    x = PHOTOS.encode((mixed(weights.float(), crops(3)) + noise).clamp(0, 1))
    found, labels = unmix(x, y, PHOTOS, 2)
    assert found is x
    assert labels is y


@pytest.mark.parametrize(("labels", "least"), [([1, 1], 30.0), ([1, 1, 2], 30.0)])
def test_mixtures_of_one_label_come_apart_because_photographs_are_likelier(
    labels: list[int], least: float
) -> None:
    truth = crops(len(labels))
    weights = MixUp().mixture(len(labels), torch.Generator().manual_seed(2))
    x = mixed(weights.float(), PHOTOS.encode(truth))
    y = weights @ F.one_hot(torch.tensor(labels), 10).double()
    found, classes = unmix(x, y, PHOTOS, 2)
    assert best_psnr(PHOTOS.decode(x), truth) < least - 5
    assert best_psnr(PHOTOS.decode(found), truth) > least
    assert sorted(classes.tolist()) == labels


def test_what_cannot_be_unmixed_stays_as_it_is() -> None:
    x = PHOTOS.encode(torch.rand(2, 3, 32, 32))
    even = torch.full((2, 2), 0.5) @ F.one_hot(torch.tensor([3, 4]), 10).float()
    single = torch.full((2, 2), 0.5) @ F.one_hot(torch.tensor([3, 3]), 10).float()
    assert unmix(x, even, PHOTOS, 2)[0] is x
    assert unmix(x, single, PHOTOS, 3)[0] is x
    assert unmix(x, torch.tensor([3, 4]), PHOTOS, 2)[0] is x
    assert unmix(first := x[:1], even[:1], PHOTOS, 2)[0] is first


def test_the_adversary_of_mixup_forgets_labels_and_decodes() -> None:
    view, x, y = shared([MixUp()], Round(3))
    images, labels = private_batch(3)
    told = View(view.victim, view.round, view.observed, Knowledge(labels=known(labels, "told")))
    adapted = MixUp().adapt(told)
    assert adapted.knowledge.labels.value is None
    assert adapted.soft is not None
    assert adapted.soft.nonzero().flatten().tolist() == sorted(set(labels.tolist()))
    found, classes = adapted.decode(x, y)
    assert torch.equal(classes, labels)
    torch.testing.assert_close(found, images, atol=1e-3, rtol=0)


def test_coefficients_are_found_jointly_with_the_images() -> None:
    """The prior stands on mixtures; without it the same attack knows nothing of the soft labels."""
    view, _, y = shared([defense := MixUp(largest=0.8)], Round(2))
    images, labels = private_batch(2)
    told = View(view.victim, view.round, view.observed, Knowledge(labels=known(labels, "told")))
    attack = TotalVariationPath(first=1e-3, last=1e-9, stages=4, iterations=30)
    errors = []
    for seen in (told, defense.adapt(told)):
        found = attack.run(seen, fork(0, "attack"), Monitor())
        decoded, classes = seen.decode(found.x, found.y)
        order = labels.argsort()
        errors.append(float((decoded - images[order]).square().mean()))
    assert torch.equal(classes, labels[order])
    mine, theirs = (shares[shares[:, labels[0]].argsort()] for shares in (found.y, y))
    torch.testing.assert_close(mine, theirs, atol=5e-3, rtol=0)
    assert errors[1] < 1e-3 < 1e-2 < errors[0]


# ------------------------------------------------------------------ input noise


def test_input_noise_has_the_size_stated_in_pixels() -> None:
    _, x, _ = shared([InputNoise(std=0.1)], Round(8))
    noise = SPACE.decode(x) - SPACE.decode(private_batch(8)[0])
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
    assert abs(float(noise.mean())) < 0.01


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1])
def test_the_adversary_of_input_noise_denoises(std: float) -> None:
    truth = control_photos(PHOTOS.shape).pixels
    noise = std * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    victim = victim_of("smooth")
    view = View(victim, Round(1), gradient(victim, *private_batch()))
    found = denoised(PHOTOS.encode(truth + noise), PHOTOS, std)
    before = best_psnr((truth + noise).clamp(0, 1), truth)
    assert best_psnr(PHOTOS.decode(found), truth) > before + 1
    x, y = SPACE.encode(torch.rand(1, 3, 8, 8)), torch.tensor([1])
    decoded, labels = InputNoise(std=std).adapt(view).decode(x, y)
    torch.testing.assert_close(decoded, denoised(x, SPACE, std))
    assert labels is y
    assert denoised(x, SPACE, 0.0) is x


def test_what_was_done_first_to_the_inputs_is_undone_last() -> None:
    """The last defense of a chain changes the inputs first."""
    chain: list[Defense] = [InputNoise(std=0.01), MixUp()]
    view, x, y = shared(chain, Round(3))
    images, _ = private_batch(3)
    weights = MixUp().mixture(3, fork(0, "defenses"))
    assert float((x - mixed(weights.float(), images)).std()) == pytest.approx(0.01 / 0.25, rel=0.15)
    found, _ = adapt(view, chain).decode(x, y)
    assert best_psnr(SPACE.decode(found), SPACE.decode(images)) > 30


# ------------------------------------------------------------------ Soteria


def by_hand(module: nn.Sequential, x: Tensor, share: float) -> Tensor:
    """The rule of Sun et al. 2021, one feature and one backward pass after the other; (1, F) bool."""
    x = x.clone().requires_grad_()
    features = module[:-1](x)[0]
    scores = [
        float(r.detach().abs() / torch.autograd.grad(r, x, retain_graph=True)[0].norm()) for r in features
    ]
    least = sorted(scores)[-max(1, round(share * len(scores)))]
    return torch.tensor([[score >= least for score in scores]])


@pytest.mark.parametrize("name", ["smooth", "mlp"])
@settings(max_examples=6, deadline=None)
@given(share=st.floats(0.05, 0.9))
def test_soteria_leaves_out_the_features_that_tell_most(name: str, share: float) -> None:
    view, x, y = shared([Soteria(prune=share)], Round(1), victim_of(name))
    plain = gradient(view.victim, x, y)
    weight = [key for key in plain if key.endswith("weight")][-1]
    expected = by_hand(build(name), x, share)
    for key, tensor in plain.items():
        kept = tensor.masked_fill(expected, 0.0) if key == weight else tensor
        torch.testing.assert_close(view.observed[key], kept)
    assert int((~view.observed[weight].any(0)).sum()) == max(1, round(share * plain[weight].shape[1]))


def test_soteria_of_a_batch_is_the_mean_of_its_examples() -> None:
    view, x, y = shared([Soteria(prune=0.3)], Round(3))
    parts = []
    for i in range(3):
        victim, one = view.victim, (x[i : i + 1], y[i : i + 1])
        client = apply(client_update, [Soteria(prune=0.3)], fork(0, "x"))
        parts.append(client(victim, victim.params, Round(1), *one).detach())
    assert close(view.observed, (parts[0] + parts[1] + parts[2]) / 3)


def test_soteria_of_another_layer() -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, CLASSES)
    )
    victim, (x, y) = Victim.of(module, SPACE, CLASSES), private_batch(1)
    defense = Soteria(layer="3", prune=0.25)
    client = apply(client_update, [defense], fork(0, "x"))
    found, plain = client(victim, victim.params, Round(1), x, y).detach(), gradient(victim, x, y)
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == ["3.weight"]
    telling = most_telling(victim, victim.params, x, "3", 6)
    silent = module[:3](x).detach()[0] == 0
    assert bool(silent.any())
    assert not telling[0, silent].any()


def test_soteria_of_a_client_that_takes_gradients_example_by_example() -> None:
    def client(victim: Victim, params: Params, round: Round, x: Tensor, y: Tensor) -> Update:
        one = torch.func.grad(victim.loss)
        each = torch.func.vmap(one, in_dims=(None, 0, 0))(dict(params), x[:, None], y[:, None])
        return Update({name: tensor.mean(0) for name, tensor in each.items()})

    view, x, y = shared([Soteria(prune=0.3)], Round(3))
    found = apply(client, [Soteria(prune=0.3)], fork(0, "x"))(view.victim, view.victim.params, Round(3), x, y)
    assert close(found, view.observed)


def test_soteria_over_several_steps() -> None:
    """Of one example the columns that never train show, and the adversary follows; of a batch they do not."""
    view, x, y = shared([Soteria(prune=0.3)], Round(1, 3, learning_rate=0.1))
    assert Soteria(prune=0.3).adapt(view).residual(x, y) < 1e-5
    assert view.residual(x, y) > 0.3
    view, x, y = shared([Soteria(prune=0.5)], Round(1, 3, learning_rate=0.3))  # the features change
    adapted = Soteria(prune=0.5).adapt(view)
    assert "5.weight" not in adapted.observed
    assert adapted.residual(x, y) < 0.2 * view.residual(x, y)
    view, x, y = shared([Soteria(prune=0.3)], Round(2, 3, learning_rate=0.01))
    assert Soteria(prune=0.3).adapt(view).residual(x, y) < 0.1 * view.residual(x, y)


def test_soteria_that_does_not_show_takes_the_whole_weight_away() -> None:
    for round, chain in ((Round(2), [Soteria()]), (Round(1), [Soteria(), GaussianNoise(std=1e-3)])):
        view, _, _ = shared(chain, round)
        assert set(view.observed) - set(Soteria().adapt(view).observed) == {"5.weight"}
    view, _, _ = shared([Soteria()], Round(1))
    assert set(Soteria().adapt(view).observed) == set(view.observed)


def test_a_layer_that_soteria_cannot_defend() -> None:
    for layer in ("0", "nowhere"):
        with pytest.raises(InputError, match=rf"soteria:layer={layer} is no fully connected.*accepted: '5'"):
            shared([Soteria(layer=layer)], Round(1))


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "make",
    [
        lambda: LargerBatch(size=0),
        lambda: LocalSteps(steps=0),
        lambda: LocalSteps(learning_rate=0.0),
        lambda: SecureAggregation(clients=0),
        lambda: SecureAggregation(bits=1),
        lambda: SecureAggregation(limit=math.inf),
        lambda: Freeze(layers=" "),
        lambda: MixUp(k=1),
        lambda: MixUp(alpha=0.0),
        lambda: MixUp(k=4, largest=0.25),
        lambda: InputNoise(std=-0.1),
        lambda: Soteria(prune=0.0),
        lambda: Soteria(prune=1.0),
    ],
)
def test_values_that_cannot_be(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="got"):
        make()


def test_mixup_of_one_example() -> None:
    with pytest.raises(
        InputError, match="mixes 2 examples of one client, which has 1; accepted: a batch of at"
    ):
        shared([MixUp()], Round(1))


@pytest.mark.parametrize("name", ["mixup", "input-noise", "soteria"])
def test_text_has_no_pixels(name: str) -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 0, 1)
    y = labels_of(victim, x)
    client = apply(client_update, [DEFENSES[name]], fork(0, "x"))
    with pytest.raises(InputError, match=f"{name} is for images.*takes text"):
        client(victim, victim.params, Round(2), x, y)
    with pytest.raises(InputError, match=f"{name} is for images"):
        DEFENSES[name].adapt(View(victim, Round(2), Update(victim.params)))


# ------------------------------------------------------------------ through the files, as the commands do it


MLP = "toy.py:mlp"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    (tmp_path / "toy.py").write_text(FACTORIES)
    return runner(monkeypatch, capsys, tmp_path)


def captured(command: Runner, *options: object) -> Ran:
    data = ("--data", photo_folder(), "--input-shape", "3,8,8", "--num-classes", 5)
    saved = (
        "--out",
        "shared.safetensors",
        "--truth",
        "truth.safetensors",
        "--save-model",
        "model.safetensors",
    )
    return command("capture", "--model", MLP, *data, *saved, *options)


def test_a_capture_loads_what_the_defenses_make_of_the_round(command: Runner, tmp_path: Path) -> None:
    chain = ("--defense", "secure-aggregation:clients=3", "--defense", "local-steps:steps=2")
    done = captured(command, *chain)
    assert done.code == 0, done.err
    expected = "Round: the defenses make it 3 examples, 2 local steps, 3 clients of 1 example each"
    assert expected in words(done.out)
    manifest = read_file(tmp_path / "shared.safetensors").manifest
    assert (manifest.num_examples, manifest.clients, manifest.local_steps) == (3, 3, 2)
    assert manifest.defenses == ("secure-aggregation:clients=3", "local-steps:steps=2")
    assert len(load_truth(tmp_path / "truth.safetensors")) == 3
    assert "Round:" not in captured(command).out


def test_an_adversary_who_is_not_told_attacks_what_a_frozen_client_shares(
    command: Runner, tmp_path: Path
) -> None:
    assert captured(command, "--defense", "freeze:layers=*.bias").code == 0
    attack = ("attack", "shared.safetensors", "--model", MLP, "--checkpoint", "model.safetensors")
    done = command(*attack, "--truth", "truth.safetensors", "--attack", "idlg", "--out", "run")
    assert done.code == 1, done.out + done.err
    trial = read_run(tmp_path / "run").best_trial
    assert trial is not None
    assert trial.residual is not None
    assert trial.residual < 1e-2


@pytest.mark.parametrize(
    ("defense", "line"),
    [
        ("mixup", "mixes 2 examples of one client, which has 1"),
        ("freeze:layers=conv*", "freezes none of the 4 parameters"),
        ("soteria:layer=4", "is no fully connected layer"),
        ("secure-aggregation:clients=1000", "1000"),
        ("batch:size=0", "size must be at least 1, got 0"),
    ],
)
def test_a_capture_that_cannot_be_is_one_line(
    command: Runner, tmp_path: Path, defense: str, line: str
) -> None:
    done = captured(command, "--defense", defense)
    assert done.code == 2
    assert line in words(done.err)
    assert not (tmp_path / "shared.safetensors").exists()
