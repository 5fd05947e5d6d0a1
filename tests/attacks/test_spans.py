"""Spans of attention gradients: what lies in them, with and without noise and adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_transformers import labels_for, random_sentences, small_model, small_victim
from text_rounds import labels_of, noisy, random_tokens, tiny_victim, tokens_of, victim_in, view_of
from torch import Tensor

from leakaudit.attacks.scans import scan
from leakaudit.attacks.spans import Span, attention_span
from leakaudit.attacks.text_recovery import SpanCheck
from leakaudit.bundled import TinyModel
from leakaudit.models.language import LanguageVictim, Task
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.threat import View

TASKS: list[tuple[TinyModel, Task]] = [
    ("bert", "classification"),
    ("bert", "mlm"),
    ("gpt2", "classification"),
    ("gpt2", "causal-lm"),
]


def span_of(view: View, layer: int, noise: float = 0.0) -> Span:
    assert isinstance(view.victim, LanguageVictim)
    span = attention_span(view.victim, view.observed, layer, noise)
    assert span is not None
    return span


def inputs_of(victim: LanguageVictim, x: Tensor, layer: int) -> Tensor:
    """(places, H) true inputs; of a causal-lm without the last token, which nothing scored has seen."""
    there = x != NO_TOKEN
    if victim.task == "causal-lm":
        there = there.roll(-1, dims=1)
        there[:, -1] = False
    return victim.attention_inputs(x, layer)[there]


# ---------------------------------------------------------------------------------------- membership


@pytest.mark.parametrize(("name", "task"), TASKS)
@pytest.mark.parametrize("layer", [0, 1])
def test_true_inputs_lie_in_the_span_and_others_do_not(name: TinyModel, task: Task, layer: int) -> None:
    victim = tiny_victim(name, task)
    x = tokens_of(victim, 3, 4)
    view = view_of(victim, x, labels_of(victim, x))
    span = span_of(view, layer)
    true = inputs_of(victim, x, layer)
    assert span.distance(true).max() < 1e-4
    assert span.rank <= len(true)
    others = torch.randn(200, true.shape[1])
    away = span.distance(others)
    typical = (1 - span.rank / span.width) ** 0.5  # of a random direction
    assert away.max() <= 1.0
    assert away.mean() == pytest.approx(typical, abs=0.05)
    assert away.min() > 100 * span.distance(true).max()
    elsewhere = inputs_of(victim, tokens_of(victim, 50), 1 if layer else 0)
    if layer:  # hidden states of another sentence are no members either, though they are no noise
        assert span.distance(elsewhere[1:]).median() > 0.05


@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "roberta", "gpt2", "gpt_neo", "gpt_neox", "opt", "llama", "gemma"]
)
@pytest.mark.parametrize("layer", [0, 1])
def test_every_orientation_of_projections_is_read(name: str, layer: int) -> None:
    """Linear and Conv1D, apart and in one: five random tokens span five dimensions of 32."""
    victim = small_victim(name, "classification").to(dtype=torch.float64)
    x = random_sentences(5)
    view = view_of(victim, x, labels_for("classification", x))
    span = span_of(replace(view, observed=view.observed), layer)
    assert span.width == 32
    assert span.rank == 5
    assert span.distance(victim.attention_inputs(x, layer)).max() < 1e-5
    assert span.distance(torch.randn(50, 32, dtype=torch.float64)).min() > 0.3


def test_a_full_span_excludes_nothing_and_is_said_to() -> None:
    victim = tiny_victim("bert", "classification")
    x = random_tokens(victim, 60, 60)  # 120 pairs for 96 dimensions
    view = view_of(victim, x, labels_of(victim, x))
    span = span_of(view, 0)
    assert span.tests == ()
    assert span.rank == span.width == 96
    reason = SpanCheck().applies(view)
    assert reason is not None
    assert "fills its 96 dimensions" in reason
    assert "not identifiable" in reason


def test_frozen_attention_has_no_span() -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 0)
    view = view_of(victim, x, labels_of(victim, x))
    kept = [name for name in view.observed if ".attention." not in name]
    view = replace(view, observed=view.observed.select(kept))
    assert attention_span(victim, view.observed, 0) is None
    reason = SpanCheck().applies(view)
    assert reason is not None
    assert "not shared" in reason


def test_part_of_the_projections_is_enough() -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 0)
    view = view_of(victim, x, labels_of(victim, x))
    value = "bert.encoder.layer.0.attention.self.value.weight"
    span = span_of(replace(view, observed=view.observed.select([value])), 0)
    assert span.distance(inputs_of(victim, x, 0)).max() < 1e-4


@pytest.mark.parametrize(("name", "positions"), [("bert", 6), ("llama", 1)])
def test_scan_is_the_distance_of_every_pair(name: str, positions: int) -> None:
    """Rotary models see no position before the first attention: one row for all places."""
    victim = small_victim(name, "classification")
    x = random_sentences(6)
    span = span_of(view_of(victim, x, labels_for("classification", x)), 0)
    tokens = torch.arange(5, 59)
    found = scan(victim, span, tokens, 6)
    assert found.shape == (6, 54)
    assert (len(found.unique(dim=0)) == 1) == (positions == 1)
    for place in range(6):
        sentence = x.clone().repeat(54, 1)
        sentence[:, place] = tokens
        expected = span.distance(victim.attention_inputs(sentence, 0)[:, place])
        torch.testing.assert_close(found[place], expected, rtol=1e-3, atol=1e-5)
        assert found[place, x[0, place] - 5] < 1e-4


# --------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("known", [True, False])
def test_noise_leaves_the_strong_directions(known: bool) -> None:
    """Marchenko-Pastur where the level is known, Gavish-Donoho where it is not."""
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 3)
    view = view_of(victim, x, labels_of(victim, x))
    clean = span_of(view, 0)
    stack = torch.cat(
        [
            view.observed[f"bert.encoder.layer.0.attention.self.{part}.weight"]
            for part in ("query", "key", "value")
        ]
    )
    level = 1e-3 * float(stack.square().mean().sqrt())
    noised = replace(view, observed=noisy(view.observed, level))
    span = span_of(noised, 0, level if known else 0.0)
    assert 3 <= span.rank <= clean.rank
    singular = torch.linalg.svdvals(stack)
    edge = level * (stack.shape[0] ** 0.5 + stack.shape[1] ** 0.5)
    assert span.rank == pytest.approx(int((singular > edge).sum()), abs=2)
    true = span.distance(inputs_of(victim, x, 0))
    assert true.median() < 0.5 * span.distance(torch.randn(200, 96)).median()
    assert span.tolerance > clean.tolerance


def test_noise_alone_has_no_span() -> None:
    """Nothing stands above the edge, so that no candidate is passed on noise."""
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 3)
    view = view_of(victim, x, labels_of(victim, x))
    noise = noisy(view.observed * 0.0, 1e-3)
    for level in (1e-3, 0.0):
        span = attention_span(victim, noise, 0, level)
        assert span is not None
        assert span.rank <= 1
        assert span.tests == () or span.rank == 1


def test_half_precision_widens_the_tolerance() -> None:
    victim = tiny_victim("bert", "classification")
    x = tokens_of(victim, 3)
    view = view_of(victim, x, labels_of(victim, x))
    half = replace(view, observed=view.observed.map(lambda tensor: tensor.half().float()))
    clean, rough = span_of(view, 0), span_of(half, 0)
    assert rough.tolerance > clean.tolerance
    assert 0 < rough.rank <= clean.rank
    assert rough.distance(inputs_of(victim, x, 0)).median() < 0.1


# ---------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    small_model("bert", "classification").save_pretrained(folder)
    return folder


def lora_view(folder: Path, rank: int, x: Tensor, trained: bool = False) -> View:
    """Adapters on query and value; `trained`: with a B that is not zero, else only B has a gradient."""
    victim = victim_in(folder, "classification", f"rank={rank},targets=query+value")
    if trained:
        generator = torch.Generator().manual_seed(0)
        params = {
            name: torch.randn(p.shape, generator=generator) / 8 if "lora_B" in name else p
            for name, p in victim.params.items()
        }
        victim = replace(victim, params=params)
    return view_of(victim, x, torch.zeros(len(x), dtype=torch.int64))


@pytest.mark.parametrize("trained", [False, True])
def test_a_rank_above_the_number_of_pairs_identifies(bert: Path, trained: bool) -> None:
    x = random_sentences(6)
    view = lora_view(bert, 12, x, trained)
    victim = view.victim
    assert isinstance(victim, LanguageVictim)
    span = span_of(view, 0)
    assert len(span.tests) >= 1
    assert span.distance(inputs_of(victim, x, 0)).max() < 1e-3
    others = torch.randn(200, 32)
    assert span.distance(others).min() > 0.05
    assert SpanCheck().applies(view) is None
    tokens = torch.arange(5, 59)
    distance = scan(victim, span, tokens, 6)
    assert tokens[distance.argmin(dim=1)].tolist() == x[0].tolist()


def test_a_rank_below_the_number_of_pairs_does_not_identify(bert: Path) -> None:
    x = random_sentences(9, 9)  # 18 pairs
    view = lora_view(bert, 4, x)
    span = span_of(view, 0)
    assert span.tests == ()
    assert span.width == 4
    reason = SpanCheck().applies(view)
    assert reason is not None
    assert "4 dimensions" in reason
    assert "not identifiable" in reason


def test_the_down_projections_of_few_sentences_identify_too(bert: Path) -> None:
    """The gradients of A span the inputs when their summed ranks reach the number of pairs."""
    x = random_sentences(6)
    view = lora_view(bert, 4, x, trained=True)  # 4 of query and 4 of value for 6 pairs
    names = [name for name in view.observed if "lora_A" in name]
    view = replace(view, observed=view.observed.select(names))
    victim = view.victim
    assert isinstance(victim, LanguageVictim)
    span = span_of(view, 0)
    assert span.rank == 6
    assert span.distance(inputs_of(victim, x, 0)).max() < 1e-3


@pytest.mark.parametrize("rank", [2, 4])
def test_down_projections_of_low_rank_exclude_nothing(bert: Path, rank: int) -> None:
    """Their span holds only part of the inputs, so that a distance from it says nothing."""
    x = random_sentences(9, 9)
    view = lora_view(bert, rank, x, trained=True)
    span = span_of(view, 0)
    assert span.tests == ()
    assert span.width == 2 * rank  # of query and value together
    reason = SpanCheck().applies(view)
    assert reason is not None
    assert f"fills its {2 * rank} dimensions" in reason
    assert "not identifiable" in reason
