"""Scans by products of matrices against the pairs themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_transformers import FAMILIES, labels_for, random_sentences, small_model, small_victim
from text_rounds import labels_of, tiny_victim, tokens_of, victim_in, view_of
from torch import Tensor

from leakaudit.attacks import scans
from leakaudit.attacks.base import Monitor
from leakaudit.attacks.scans import additive, every_pair, scan
from leakaudit.attacks.spans import Span, attention_span
from leakaudit.attacks.text_recovery import SpanCheck
from leakaudit.bundled import TinyModel
from leakaudit.models.language import LanguageVictim, Task
from leakaudit.randomness import fork

NORM_OF_A_SUM = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "gpt2", "gpt_neo", "opt"]
POSITIONS = 6


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way for small vocabularies too, in several blocks, and alone responsible for all it can do."""
    monkeypatch.setattr(scans, "FEW", 0)
    monkeypatch.setattr(scans, "NEAR", 0.0)
    monkeypatch.setattr(scans, "CHUNK", 32 * 25)


def exact(family: str) -> LanguageVictim:
    victim = small_victim(family, "classification").to(dtype=torch.float64)
    assert isinstance(victim, LanguageVictim)
    return victim


def span_of(victim: LanguageVictim, x: Tensor) -> Span:
    view = view_of(victim, x, labels_for("classification", x))
    span = attention_span(victim, view.observed, 0)
    assert span is not None
    assert span.tests
    return span


def vocabulary(victim: LanguageVictim) -> Tensor:
    return torch.arange(victim.space.vocabulary)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scanned_as_its_pairs_are(family: str) -> None:
    """With the padding token, by which RoBERTa counts positions, among the rest."""
    victim = exact(family)
    span, tokens = span_of(victim, random_sentences(POSITIONS)), vocabulary(victim)
    count = POSITIONS if victim.position is not None else 1
    expected = every_pair(victim, span, tokens, count).expand(POSITIONS, -1)
    found = scan(victim, span, tokens, POSITIONS)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7)  # the root of float64's rounding
    assert torch.equal(found.argmin(dim=1), expected.argmin(dim=1))


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.position])
def test_the_form_is_seen_where_it_is(family: str) -> None:
    """ELECTRA's small embeddings are projected after their norm."""
    victim = exact(family)
    assert (additive(victim, vocabulary(victim), POSITIONS) is not None) == (family in NORM_OF_A_SUM)


def test_another_form_under_a_known_name_is_seen_too() -> None:
    """Positions that stretch words instead of only being added to them."""
    victim = exact("bert")
    tokens = vocabulary(victim)
    assert additive(victim, tokens, POSITIONS) is not None

    def stretch(_: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0] * (1 + 0.01 * torch.arange(inputs[0].shape[1])[:, None])

    victim.module.get_submodule("bert.embeddings.LayerNorm").register_forward_pre_hook(stretch)  # type: ignore[arg-type]
    assert additive(victim, tokens, POSITIONS) is None


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("trained", [False, True])
def test_adapters_are_scanned_as_their_pairs_are(tmp_path: Path, trained: bool) -> None:
    """The gradient of B measures distances after A."""
    small_model("bert", "classification").save_pretrained(tmp_path)
    victim = victim_in(tmp_path, "classification", "rank=12,targets=query+value")
    if trained:
        generator = torch.Generator().manual_seed(0)
        params = {
            name: torch.randn(p.shape, generator=generator) / 8 if "lora_B" in name else p
            for name, p in victim.params.items()
        }
        victim = replace(victim, params=params)
    found = victim.to(dtype=torch.float64)
    assert isinstance(found, LanguageVictim)
    span = span_of(found, random_sentences(POSITIONS))
    assert any(test.mapping is not None for test in span.tests)
    expected = every_pair(found, span, vocabulary(found), POSITIONS)
    torch.testing.assert_close(
        scan(found, span, vocabulary(found), POSITIONS), expected, rtol=1e-9, atol=1e-7
    )


def test_what_is_near_is_what_the_model_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 distances of true pairs are the model's rounding, from which thresholds follow."""
    monkeypatch.setattr(scans, "FEW", 0)
    victim = small_victim("bert", "classification")
    span, tokens = span_of(victim, random_sentences(POSITIONS)), vocabulary(victim)
    expected, found = every_pair(victim, span, tokens, POSITIONS), scan(victim, span, tokens, POSITIONS)
    assert found.dtype == torch.float32
    near = (expected < scans.NEAR).any(dim=0)
    assert 0 < int(near.sum()) <= POSITIONS
    torch.testing.assert_close(found[:, near], expected[:, near], rtol=0, atol=1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_few_pairs_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search for a form where there is nothing to win."""

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(scans, "additive", never)
    victim = small_victim("bert", "classification")
    span = span_of(victim, random_sentences(POSITIONS))
    assert scan(victim, span, vocabulary(victim), POSITIONS).shape == (POSITIONS, victim.space.vocabulary)


@pytest.mark.parametrize(
    ("name", "task"), [("bert", "classification"), ("gpt2", "classification"), ("gpt2", "causal-lm")]
)
def test_recovered_text_is_the_same_either_way(
    name: TinyModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word and position embeddings frozen, so that the whole vocabulary is scanned."""
    victim = tiny_victim(name, task)
    x = tokens_of(victim, 3)
    view = view_of(victim, x, labels_of(victim, x))
    embeddings = {victim.word, victim.position}
    view = replace(view, observed=view.observed.select([n for n in view.observed if n not in embeddings]))

    def recovered(few: int) -> Tensor:
        monkeypatch.setattr(scans, "FEW", few)
        return SpanCheck().run(view, fork(0, "test"), Monitor()).x

    fast, slow = recovered(0), recovered(1 << 40)
    assert torch.equal(fast, slow)
    assert (fast[:, : x.shape[1]] == x).double().mean() > 0.5
