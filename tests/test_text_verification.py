"""Re-simulation of text: the true tokens are proven, one wrong token is not."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from tiny_text import CASES, batch_of, text_victim, text_view
from torch import Tensor

from leakaudit.models.language import IGNORED
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.text_data import fill_masks
from leakaudit.text_verification import PROBES, alternatives, verify_text
from leakaudit.threat import View, known
from leakaudit.update import Update

cases = pytest.mark.parametrize(("model", "task"), CASES)


@cases
@pytest.mark.parametrize("count", [1, 2])
def test_the_private_text_is_verified_exact(model: str, task: str, count: int) -> None:
    view, batch = text_view(text_victim(model, task), count)
    found = verify_text(view, batch.tokens, batch.labels)
    assert found.status == "verified", found.text
    assert found.text.startswith("verified exact: ")
    assert found.residual <= found.floor < 1e-5
    assert found.unknowns == int((batch.tokens != NO_TOKEN).sum())


@cases
def test_one_wrong_token_is_not_matched(model: str, task: str) -> None:
    view, batch = text_view(text_victim(model, task))
    tokens = batch.tokens.clone()
    tokens[0, 2] = 500
    assert tokens[0, 2] != batch.tokens[0, 2]
    labels = batch.labels.clone()
    if task == "causal-lm":
        labels[0, 2] = 500
    found = verify_text(view, tokens, labels)
    assert found.status == "not-matched"
    assert found.residual > 100 * found.floor
    assert "differs from the observed one by" in found.text


def test_a_wrong_label_is_not_matched() -> None:
    view, batch = text_view(text_victim())
    assert verify_text(view, batch.tokens, 1 - batch.labels).status == "not-matched"


def test_a_wrong_answer_behind_a_mask_is_not_matched() -> None:
    view, batch = text_view(text_victim("bert", "mlm"))
    labels = batch.labels.clone()
    labels[labels != IGNORED] = 9
    assert verify_text(view, batch.tokens, labels).status == "not-matched"


def test_a_direction_without_a_scale_verifies_too() -> None:
    view, batch = text_view(text_victim(), scale=known(False, "test"))
    view = replace(view, observed=view.observed * 17.0)
    assert verify_text(view, batch.tokens, batch.labels).status == "verified"


def test_several_local_steps() -> None:
    victim = text_victim("gpt2", "causal-lm")
    batch, round = batch_of(victim, 2), Round(2, local_steps=3, local_batch_size=1, learning_rate=0.01)
    observed = client_update(victim, victim.params, round, batch.tokens, batch.labels).detach()
    view = View(victim, round, observed, text_view(victim)[0].knowledge)
    assert verify_text(view, batch.tokens, batch.labels).status == "verified"
    assert verify_text(view, batch.tokens.flip(0), batch.labels.flip(0)).status == "not-matched"


def noisy(view: View, std: float) -> View:
    generator = fork(0, "noise")
    observed = Update(
        {n: t + std * torch.randn(t.shape, generator=generator) for n, t in view.observed.items()}
    )
    return replace(view, observed=observed, knowledge=replace(view.knowledge, noise_std=known(std, "test")))


def test_known_noise_below_the_differences_of_texts_still_verifies() -> None:
    view, batch = text_view(text_victim())
    assert verify_text(noisy(view, 1e-8), batch.tokens, batch.labels).status == "verified"


def test_loud_noise_leaves_other_texts_possible_and_names_one() -> None:
    view, batch = text_view(text_victim())
    found = verify_text(noisy(view, 1e-3), batch.tokens, batch.labels)
    assert found.status == "consistent"
    assert "other texts may share it: with '" in found.text
    assert "(sentence 1, token" in found.reason


def test_unknown_noise_is_not_matched() -> None:
    view, batch = text_view(text_victim())
    view = replace(noisy(view, 1e-3), knowledge=view.knowledge)
    assert verify_text(view, batch.tokens, batch.labels).status == "not-matched"


@pytest.mark.parametrize(("dtype", "status"), [(torch.float16, "verified"), (torch.bfloat16, "consistent")])
def test_short_numbers_have_their_own_floor(dtype: torch.dtype, status: str) -> None:
    """With bfloat16's three digits the nearest other text is within three times what rounding explains."""
    view, batch = text_view(text_victim())
    view = replace(view, observed=view.observed.to(dtype).to(torch.float32))
    found = verify_text(view, batch.tokens, batch.labels)
    assert found.status == status
    assert 1e-4 < found.floor < 1e-1


def test_an_update_that_shows_no_word_leaves_every_text_possible() -> None:
    """Only the classifier's bias: it depends on the words, but hardly."""
    view, batch = text_view(text_victim())
    view = replace(view, observed=(view.observed.select(["classifier.bias"])))
    coarse = replace(view, observed=view.observed.to(torch.bfloat16).to(torch.float32))
    found = verify_text(coarse, batch.tokens, batch.labels)
    assert found.status == "consistent"


def test_no_time_for_other_texts_says_so() -> None:
    view, batch = text_view(text_victim())
    began = time.monotonic()
    found = verify_text(view, batch.tokens, batch.labels, seconds=1e-6)
    assert time.monotonic() - began < 5
    assert (found.status, "so no other text was tried" in found.reason) == ("consistent", True)


# ------------------------------------------------------------------ the texts near it


def differences(left: Tensor, right: Tensor) -> int:
    return int((left != right).sum())


@cases
def test_alternatives_are_few_near_and_all_different(model: str, task: str) -> None:
    victim = text_victim(model, task)
    batch = batch_of(victim, 2)
    found = list(alternatives(victim, batch.tokens, batch.labels, PROBES))
    assert len(found) == PROBES
    sentences = [fill_masks(other.x, other.y) for other in found]
    changed = [differences(sentence, batch.sentences) for sentence in sentences]
    assert set(changed) == {1, 2}
    assert {i for s in sentences for i in (s != batch.sentences).nonzero()[:, 0].tolist()} == {0, 1}
    for left in range(len(found)):
        for right in range(left):
            assert not torch.equal(sentences[left], sentences[right])
    again = list(alternatives(victim, batch.tokens, batch.labels, PROBES))
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(found, again, strict=True))


@cases
def test_alternatives_keep_masks_filling_and_special_tokens(model: str, task: str) -> None:
    victim = text_victim(model, task)
    batch = batch_of(victim, 2)
    tokenizer = victim.space.tokenizer
    assert tokenizer is not None
    special = torch.tensor([NO_TOKEN, *tokenizer.all_special_ids])
    fixed = torch.isin(batch.tokens, special)
    for other in alternatives(victim, batch.tokens, batch.labels, PROBES):
        assert torch.equal(other.x[fixed], batch.tokens[fixed])
        assert not bool(torch.isin(other.x[~fixed], special).any())
        if other.y.dim() == 2:
            assert torch.equal(other.y == IGNORED, batch.labels == IGNORED)
        if task == "causal-lm":
            there = other.x != NO_TOKEN
            assert torch.equal(other.x[there], other.y[there])


def test_the_replacement_is_the_nearest_word_row() -> None:
    victim = text_victim()
    batch = batch_of(victim)
    other = next(alternatives(victim, batch.tokens, batch.labels, 1))
    place = tuple((other.x != batch.tokens).nonzero()[0].tolist())
    rows = victim.word_rows
    old, new = int(batch.tokens[place]), int(other.x[place])
    apart = torch.tensor([float((row - rows[old]).norm()) for row in rows])
    apart[[old, *victim.space.special]] = torch.inf
    assert new == int(apart.argmin())
