"""What the first attention layer says of words and places, beside the embeddings."""

from __future__ import annotations

import pytest
import torch
from small_transformers import labels_for, random_sentences, small_victim
from text_rounds import view_of
from torch import Tensor

from leakaudit.attacks.attention_rows import attention_rows, joint_rows
from leakaudit.attacks.rows import read_rows
from leakaudit.models.language import LanguageVictim
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.threat import View

NORM_OF_A_SUM = ["bert", "roberta", "distilbert", "gpt2"]


def exact(family: str) -> LanguageVictim:
    victim = small_victim(family, "classification").to(dtype=torch.float64)
    assert isinstance(victim, LanguageVictim)
    return victim


def seen(victim: LanguageVictim, x: Tensor) -> View:
    return view_of(victim, x, labels_for("classification", x))


@pytest.mark.parametrize("family", NORM_OF_A_SUM)
def test_where_no_token_repeats_its_row_is_that_of_its_place(family: str) -> None:
    victim = exact(family)
    x = torch.randperm(victim.space.vocabulary - 5)[None, :7] + 5
    found = attention_rows(victim, x[0], 7, seen(victim, x).observed)
    assert len(found) == len(victim.projections(0))
    for words, places in found:
        assert words.norm() > 0
        torch.testing.assert_close(words, places, rtol=1e-6, atol=1e-9 * float(words.abs().max()))


@pytest.mark.parametrize("family", NORM_OF_A_SUM)
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_are_sums_over_the_places_of_a_batch(family: str, seed: int) -> None:
    """The rows of a batch are those of its sentences added up, and words and places sum up alike."""
    victim = exact(family)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randperm(victim.space.vocabulary - 5, generator=generator)[:9] + 5
    x = pool[torch.randint(len(pool), (3, 6), generator=generator)]
    y = labels_for("classification", x)
    whole = attention_rows(victim, pool, 6, view_of(victim, x, y).observed)
    parts = [attention_rows(victim, pool, 6, view_of(victim, x[[i]], y[[i]]).observed) for i in range(3)]
    for i, (words, places) in enumerate(whole):
        near = 1e-8 * float(words.abs().max())
        torch.testing.assert_close(words, sum(part[i][0] for part in parts) / 3, rtol=1e-6, atol=near)
        torch.testing.assert_close(places, sum(part[i][1] for part in parts) / 3, rtol=1e-6, atol=near)
        torch.testing.assert_close(words.sum(dim=0), places.sum(dim=0), rtol=1e-6, atol=near)


def test_nothing_is_read_where_it_cannot_be() -> None:
    """Another form, a bias that was not shared, tokens that are not those of the batch, and too many."""
    victim = exact("bert")
    x = random_sentences(6)
    view, tokens = seen(victim, x), x[x != NO_TOKEN].unique()
    assert attention_rows(victim, tokens, 6, view.observed)
    biased = [name for name in view.observed if not name.endswith("query.bias")]
    assert attention_rows(victim, tokens, 6, view.observed.select(biased)) == []
    assert attention_rows(victim, tokens[1:], 6, view.observed) == []
    assert attention_rows(victim, torch.arange(victim.hidden), 6, view.observed) == []
    electra = exact("electra")
    assert attention_rows(electra, tokens, 6, seen(electra, x).observed) == []


def test_the_embeddings_rows_come_first() -> None:
    victim = exact("bert")
    view = seen(victim, random_sentences(6))
    rows = read_rows(view)
    assert rows is not None
    words, places = joint_rows(victim, rows, view.observed)
    assert words.shape == (len(rows.tokens), 4 * victim.hidden)
    assert places.shape == (rows.length, 4 * victim.hidden)
    size = torch.cat([rows.word, rows.position]).norm()
    torch.testing.assert_close(words[:, : victim.hidden] * size, rows.word)
    torch.testing.assert_close(places[:, : victim.hidden] * size, rows.position)
