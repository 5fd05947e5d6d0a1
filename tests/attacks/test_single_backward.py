"""Gradients without a second backward pass are those of double backward, and serve models that have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_transformers import labels_for, random_sentences, small_model
from tiny_audits import CLASSES, SPACE, build, private_batch, victim_of, view_of
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.compiling import EAGER, Compiler
from leakaudit.attacks.embedding_matching import EmbeddingMatching
from leakaudit.attacks.gradient_matching import InvertingGradients, WithVariation
from leakaudit.attacks.graphs import record
from leakaudit.attacks.matching import cosine
from leakaudit.attacks.optimise import (
    Matching,
    differentiable,
    value_and_gradient,
    value_and_gradients,
)
from leakaudit.attacks.sentences import labelled, laid_out
from leakaudit.attacks.single_backward import (
    OfUpdate,
    central_difference,
    forward_over_reverse,
    sees_updates,
    unsuitable,
)
from leakaudit.models.language import language_victim
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update, from_own_bases
from leakaudit.threat import View, known

ROUNDS = {
    "batch": Round(3),
    "first of the examples": Round(3, local_batch_size=2),
    "clients": Round(3, clients=3),
    "weighted clients": Round(4, clients=2, sizes=(1, 3), weights=(0.25, 1.5)),
}


def double(model: str = "smooth", mode: Any = "eval", round: Round = ROUNDS["batch"], **facts: Any) -> View:
    """In float64."""
    return view_of(victim_of(model, mode), round, **facts).to(dtype=torch.float64)


def start(view: View, free: bool) -> tuple[Tensor, Tensor]:
    count = view.round.num_examples
    x = torch.randn(count, *SPACE.shape, generator=fork(0, "x"), dtype=torch.float64)
    if free:
        return x, torch.randn(count, CLASSES, generator=fork(0, "y"), dtype=torch.float64)
    return x, torch.arange(count) % CLASSES


def plain(objective: OfUpdate, free: bool) -> Any:
    return value_and_gradients(objective) if free else value_and_gradient(objective)


def agree(objective: OfUpdate, point: tuple[Tensor, ...], free: bool, difference: bool = True) -> None:
    """Both ways give double backward's value and gradients."""
    expected = plain(objective, free)(*point)
    for make in (forward_over_reverse, central_difference) if difference else (forward_over_reverse,):
        tolerance = 1e-8 if make is forward_over_reverse else 1e-5
        found = make(objective, free)(*point)
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            assert mine.dtype == other.dtype
            assert float((mine - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("distance", ["squared", "cosine", "relative"])
@pytest.mark.parametrize(("model", "mode"), [("smooth", "eval"), ("norm", "eval"), ("norm", "train")])
def test_every_distance_labels_and_batch_norm(model: str, mode: str, distance: Any, free: bool) -> None:
    """A bias before a BatchNorm of the batch's own statistics has no gradient but rounding, which "relative" takes
    for all there is: a difference then steps along nothing else."""
    view = double(model, mode)
    rounding = mode == "train" and distance == "relative"
    agree(Matching(view, distance, tv=0.1, scale=3.0), start(view, free), free, difference=not rounding)


@pytest.mark.parametrize("round", ROUNDS.values(), ids=ROUNDS)
def test_every_round_of_one_step(round: Round) -> None:
    view = double(round=round)
    assert unsuitable(view) is None
    agree(Matching(view, "relative"), start(view, True), True)


def test_priors_and_what_is_known_of_disturbances() -> None:
    x, _ = private_batch(3)
    victim = victim_of("norm", "train")
    target = victim.to(dtype=torch.float64).batch_statistics(
        victim.to(dtype=torch.float64).params, x.double()
    )
    view = double("norm", "train", statistics=known(target, "t"), noise_std=known(1e-3, "t"))
    agree(Matching(view, "relative", tv=0.1, statistics=0.5), start(view, False), False)
    agree(WithVariation(Matching(view, "squared"), 1e-2), start(view, False), False)
    scaleless = double(scale=known(False, "t"))
    agree(Matching(scaleless, "squared"), start(scaleless, False), False)


def test_a_part_of_the_tensors_and_frozen_ones() -> None:
    view = double()
    agree(Matching(view.only(list(view.observed)[1:3]), "cosine"), start(view, False), False)


def test_kinks_seldom_matter() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, CLASSES)
    )
    victim = Victim.of(module, SPACE, CLASSES).to(dtype=torch.float64)
    x, y = private_batch(2)
    view = View(victim, Round(2), client_update(victim, victim.params, Round(2), x.double(), y).detach())
    agree(Matching(view, "cosine"), start(view, False), False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_transformers_by_any_attention(family: str, attention: str) -> None:
    """Fused attention has no double backward; candidates are given another kernel."""
    task: Any = "classification"
    module = small_model(family, task)
    module.set_attn_implementation(attention)
    victim = language_victim(module, None, task, name=family)
    tokens = random_sentences(6, 6)
    labels = labels_for(task, tokens)
    round = Round(2)
    update = client_update(victim, victim.params, round, tokens, labels).detach()
    view = View(victim, round, update).to(dtype=torch.float64)
    sentences = laid_out(view, "6+6")
    labelling = labelled(view, sentences, True)
    matched = view.only(
        [name for name in view.observed if not name.endswith(("wte.weight", "word_embeddings.weight"))]
    )
    objective = EmbeddingMatching(matched, sentences, labelling, cosine, norm=0.1)
    candidate = labelling.candidate(sentences.start(fork(0, "start")).double(), fork(0, "labels"))
    free = candidate.logits is not None
    second = candidate.logits if free else candidate.labels
    assert second is not None
    point = (candidate.x.detach(), second.detach().double() if free else second)
    agree(objective, point, free, difference=False)
    exact, near = plain(objective, free)(*point), central_difference(objective, free)(*point)
    for found, expected in zip(near, exact, strict=True):
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


def test_a_recorded_one_is_the_same() -> None:
    view = double()
    point = start(view, False)
    function = forward_over_reverse(Matching(view, "cosine", tv=0.1), False)
    recorded = record(function, point)
    moved = (point[0] + 0.3, point[1])
    for found, expected in zip(recorded.graph(*moved, *recorded.constants), function(*moved), strict=True):
        torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------ models without double backward


class Once(torch.autograd.Function):
    """tanh, whose backward pass cannot be differentiated by autograd, but in forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return gradient * (1 - output.square())


class OnceForward(Once):
    """The same with a forward-mode derivative; its backward pass is written for one derivative only."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return tangent * (1 - output.square())


class Layer(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def without_double_backward(function: Any) -> tuple[View, View]:
    """A view whose model has the function in place of its activations, and one with tanh."""
    views = []
    for activation in (Layer(function), nn.Tanh()):
        module = build("smooth")
        module[1], module[3] = activation, activation
        victim = Victim.of(module, SPACE, CLASSES).to(dtype=torch.float64)
        x, y = private_batch()
        update = client_update(victim, victim.params, Round(1), x.double(), y).detach()
        views.append(View(victim, Round(1), update))
    return views[0], views[1]


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(
    ("function", "name", "digits"),
    [(Once, "central differences", 5), (OnceForward, "forward over reverse", 12)],
)
def test_a_model_without_double_backward_is_differentiated_otherwise_and_says_so(
    function: Any, name: str, digits: int, free: bool
) -> None:
    view, reference = without_double_backward(function)
    point = start(view, free)
    used, how = differentiable(Matching(view, "cosine"), point, free)
    assert how == f"{name}, for double backward is not to be had (" + (
        "one of its backward passes is marked once_differentiable)"
    )
    right = plain(Matching(reference, "cosine"), free)(*point)
    silent = plain(Matching(view, "cosine"), free)(*point)
    assert float((silent[1] - right[1]).norm()) > 1e-2 * float(right[1].norm())  # and torch says nothing
    for found, expected in zip(used(*point), right, strict=True):
        assert float((found - expected).norm()) <= 10**-digits * float(expected.norm())


def test_double_backward_comes_first() -> None:
    view = double()
    function, how = differentiable(Matching(view, "cosine"), start(view, False), False)
    assert how == ""
    assert "value_and_gradient" in function.__qualname__  # type: ignore[attr-defined]


def test_an_attack_on_such_a_model_runs_and_reports_it() -> None:
    view, reference = without_double_backward(Once)
    found = []
    for one in (view, reference):
        single = one.to(dtype=torch.float32)
        monitor = Monitor(compiler=Compiler("never"))
        attack = InvertingGradients(iterations=20, signed=False)
        found.append(attack.run(single, fork(0, "attack"), monitor))
        expected = EAGER if one is reference else "eager, central differences, for double backward"
        assert monitor.compiler.step.startswith(expected)
    assert float((found[0].x - found[1].x).norm()) <= 1e-3 * float(found[1].x.norm())


def test_other_failures_are_not_hidden() -> None:
    view = double()
    x, y = start(view, False)
    with pytest.raises(RuntimeError, match=r"shape|size|channels"):
        differentiable(Matching(view, "cosine"), (x[:, :2], y), False)


def test_what_is_no_gradient_of_one_function_is_refused() -> None:
    steps = double(round=Round(2, local_steps=2, learning_rate=0.1))
    assert unsuitable(steps) == "2 local steps"
    other = View(steps.victim, Round(1), steps.observed, client=from_own_bases(client_update, []))
    assert unsuitable(other) is not None
    assert sees_updates(Matching(steps, "cosine"))
    assert not sees_updates(lambda x, y: x.sum())
