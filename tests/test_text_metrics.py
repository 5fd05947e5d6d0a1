"""Scores of sentences against counting by hand and independent implementations, matching, chance levels."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from leakaudit import text_metrics
from leakaudit.errors import InputError
from leakaudit.models.spaces import NO_TOKEN, Tokens, stack_sentences
from leakaudit.results import Token
from leakaudit.text_metrics import DEFAULT_TEXT_METRICS, TEXT_METRICS, marks, match_sentences, score_sentences

MINILM = Path(__file__).parents[1].parent / "shared" / "data" / "hf_home" / "hub"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "dog",
    "##s",
    "ran",
    "a",
    "child",
    "care",
    ",",
    ".",
    "open",
    "week",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP = 2, 3


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over twenty pieces, with BERT's special tokens."""
    pieces = {piece: number for number, piece in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


SPACE = Tokens(vocabulary=len(SPECIAL) + len(WORDS), max_length=16, tokenizer=bert_tokenizer())
NUMBERS = Tokens(vocabulary=50, max_length=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sentence(text: str) -> list[int]:
    """Pieces by name, with [CLS] and [SEP] around them."""
    return [CLS, *((SPECIAL + WORDS).index(piece) for piece in text.split()), SEP]


def one(recovered: list[int], truth: list[int], space: Tokens = SPACE) -> dict[str, float | None]:
    scored = score_sentences(
        stack_sentences([recovered]), stack_sentences([truth]), space, generator=generator()
    )
    return scored.per_example[0]


tokens = st.integers(len(SPECIAL), SPACE.vocabulary - 1)
contents = st.lists(tokens, max_size=8)
sentences = contents.map(lambda row: [CLS, *row, SEP])
batches = st.lists(sentences, min_size=1, max_size=4)


# ------------------------------------------------------------------ golden values


def test_scores_counted_by_hand() -> None:
    """Truth: the cat sat on the mat .  Recovered: the cat on sat the the dog"""
    scores = one(sentence("the cat on sat the the dog"), sentence("the cat sat on the mat ."))
    assert scores == {
        "token-accuracy": pytest.approx(3 / 7),  # the, cat, the
        "special-accuracy": 1.0,
        "bag-precision": pytest.approx(5 / 7),  # the the cat on sat of seven
        "bag-recall": pytest.approx(5 / 7),
        "bag-f1": pytest.approx(5 / 7),
        "words-f1": pytest.approx(2 * 4 / (5 + 6)),  # the cat on sat, of five and of six
        "exact-match": 0.0,
        "rouge-1": pytest.approx(2 * (5 / 7) * (5 / 6) / (5 / 7 + 5 / 6)),  # the stop is no word
        "rouge-2": pytest.approx(2 * (1 / 6) * (1 / 5) / (1 / 6 + 1 / 5)),  # "the cat" only
        "rouge-l": pytest.approx(2 * (4 / 7) * (4 / 6) / (4 / 7 + 4 / 6)),  # the cat sat the
    }


def test_words_are_counted_over_the_whole_batch() -> None:
    """A bag that was cut into sentences anyhow is a whole bag."""
    truth = stack_sentences([sentence("the cat sat"), sentence("dog ran")])
    found = stack_sentences([sentence("the dog"), sentence("ran cat sat")])
    scores = score_sentences(found, truth, SPACE, generator=generator()).per_example
    assert [example["words-f1"] for example in scores] == [1.0, 1.0]
    assert max(example["bag-f1"] or 0 for example in scores) < 1


def test_special_tokens_are_counted_apart() -> None:
    """All words wrong and one sentence end at a wrong place: half of the special tokens, no other."""
    scores = one(sentence("dog ran a"), sentence("the cat"))
    assert (scores["special-accuracy"], scores["token-accuracy"], scores["bag-f1"]) == (0.5, 0.0, 0.0)


def test_a_token_too_many_is_no_exact_match() -> None:
    truth = sentence("the cat")
    scores = one([*truth, SEP], truth)
    assert (scores["exact-match"], scores["token-accuracy"], scores["special-accuracy"]) == (0, 1, 1)
    assert one(truth, truth)["exact-match"] == 1


def test_pieces_of_words_are_scored_as_pieces_and_read_as_words() -> None:
    scores = one(sentence("the dog"), sentence("the dog ##s"))
    assert scores["token-accuracy"] == pytest.approx(2 / 3)
    assert scores["rouge-1"] == pytest.approx(1 / 2)  # dogs is another word than dog


def test_a_gap_shifts_nothing() -> None:
    truth = sentence("the cat sat")
    found = [*truth]
    found[2] = NO_TOKEN
    scores = one(found, truth)
    assert scores["token-accuracy"] == pytest.approx(2 / 3)
    assert (scores["bag-precision"], scores["bag-recall"]) == (1, pytest.approx(2 / 3))


# ------------------------------------------------------------------ what cannot be measured


def test_what_makes_no_sense_is_not_measured_with_the_reason() -> None:
    scored = score_sentences(
        stack_sentences([sentence("cat")]), stack_sentences([sentence("cat")]), SPACE, generator=generator()
    )
    score = {score.metric: score for score in scored.scores}
    assert score["rouge-1"].value == 1
    assert (score["rouge-2"].value, score["rouge-2"].chance) == (None, None)
    assert score["rouge-2"].reason == "the private sentence has fewer than 2 words"
    assert scored.per_example[0]["rouge-2"] is None
    bare = one(sentence(""), sentence(""))
    assert {name for name, value in bare.items() if value is not None} == {"special-accuracy", "exact-match"}
    assert one(sentence(". ,"), sentence(". ,"))["rouge-l"] is None


def test_without_a_tokenizer_numbers_are_words() -> None:
    scores = one([1, 2, 3, 4], [1, 2, 3, 5], NUMBERS)
    assert scores["special-accuracy"] is None
    assert scores["rouge-1"] == pytest.approx(3 / 4)
    assert scores["rouge-2"] == pytest.approx(2 / 3)


def test_part_of_a_batch_not_measured_is_said() -> None:
    truth = stack_sentences([sentence("cat"), sentence("the cat")])
    scored = score_sentences(truth, truth, SPACE, [TEXT_METRICS["rouge-2"]], generator=generator())
    assert scored.scores[0].value == 1
    assert scored.scores[0].reason == "1 of 2 sentences: the private sentence has fewer than 2 words"


# ------------------------------------------------------------------ properties


@settings(max_examples=60, deadline=None)
@given(batch=batches)
def test_the_truth_scores_one_wherever_it_is_measured(batch: list[list[int]]) -> None:
    truth = stack_sentences(batch)
    scored = score_sentences(truth, truth, SPACE, generator=generator())
    for example in scored.per_example:
        assert list(example) == list(DEFAULT_TEXT_METRICS)
        assert {value for value in example.values() if value is not None} == {1.0}
        assert example["exact-match"] == 1


@settings(max_examples=30, deadline=None)
@given(found=st.lists(sentences, min_size=1, max_size=4), batch=batches, data=st.data())
def test_scores_are_in_range_and_do_not_depend_on_the_order(
    found: list[list[int]], batch: list[list[int]], data: st.DataObject
) -> None:
    plain = score_sentences(stack_sentences(found), stack_sentences(batch), SPACE, generator=generator())
    for example in plain.per_example:
        assert all(value is None or 0 <= value <= 1 for value in example.values())
    for score in plain.scores:
        assert score.chance is None or 0 <= score.chance <= 1
        assert score.higher_is_better

    def contents(scored: list[dict[str, float | None]], rows: list[list[int]]) -> list[str]:
        return sorted(str((row, scores)) for row, scores in zip(rows, scored, strict=True))

    order = data.draw(st.permutations(range(len(found))))
    shuffled = stack_sentences([found[i] for i in order])
    again = score_sentences(shuffled, stack_sentences(batch), SPACE, generator=generator())
    if len(found) >= len(batch) and len({*map(tuple, batch)}) == len(batch):
        assert again.per_example == plain.per_example
    assert contents(again.per_example, batch) == contents(plain.per_example, batch)
    truths = data.draw(st.permutations(batch))
    again = score_sentences(stack_sentences(found), stack_sentences(truths), SPACE, generator=generator())
    assert contents(again.per_example, truths) == contents(plain.per_example, batch)


@settings(max_examples=80, deadline=None)
@given(found=sentences, truth=contents.filter(bool).map(lambda row: [CLS, *row, SEP]))
def test_bags_are_overlaps_of_multisets(found: list[int], truth: list[int]) -> None:
    bag, private = (Counter(row[1:-1]) for row in (found, truth))
    common = sum((bag & private).values())
    precision, recall = common / max(1, sum(bag.values())), common / sum(private.values())
    scores = one(found, truth)
    assert scores["bag-precision"] == pytest.approx(precision)
    assert scores["bag-recall"] == pytest.approx(recall)
    expected = 2 * precision * recall / (precision + recall) if common else 0
    assert scores["bag-f1"] == pytest.approx(expected)
    in_place = sum(a == b for a, b in zip(found[1:-1], truth[1:-1], strict=False))
    assert scores["token-accuracy"] == pytest.approx(in_place / len(truth[1:-1]))


def rouge(found: str, truth: str) -> dict[str, float]:
    """Lin 2004, by recursion and by pairing off n-grams: nothing in common with torchmetrics' tables."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (found, truth))

    def longest(i: int, j: int) -> int:
        return max(
            (
                1 + longest(k + 1, m + 1)
                for k in range(i, len(a))
                for m in range(j, len(b))
                if a[k] == b[m] and a[k] not in a[i:k]
            ),
            default=0,
        )

    def pairs(n: int) -> tuple[int, int, int]:
        one = [tuple(a[i : i + n]) for i in range(len(a) - n + 1)]
        other = [tuple(b[i : i + n]) for i in range(len(b) - n + 1)]
        left, hits = list(other), 0
        for gram in one:
            if gram in left:
                left.remove(gram)
                hits += 1
        return hits, len(one), len(other)

    def measure(hits: int, first: int, second: int) -> float:
        return 2 * hits / (first + second) if hits else 0.0

    return {
        "rouge-1": measure(*pairs(1)),
        "rouge-2": measure(*pairs(2)),
        "rouge-l": measure(longest(0, 0), len(a), len(b)),
    }


@settings(max_examples=80, deadline=None)
@given(found=st.lists(tokens, max_size=6), truth=st.lists(tokens, min_size=1, max_size=6))
def test_rouge_equals_an_independent_implementation(found: list[int], truth: list[int]) -> None:
    scores = one([CLS, *found, SEP], [CLS, *truth, SEP])
    texts = SPACE.decode(stack_sentences([found or [CLS], truth]))
    for name, expected in rouge(*texts).items():
        if scores[name] is not None:
            assert scores[name] == pytest.approx(expected, abs=1e-6), (name, texts)
    words = len(re.findall(r"[a-z0-9]+", texts[1].lower()))
    assert (scores["rouge-1"] is None, scores["rouge-2"] is None) == (words < 1, words < 2)


def test_words_of_every_script_are_words() -> None:
    """torchmetrics by itself finds none here, and would score the truth 0."""
    assert text_metrics._plain_words("Größe: 12_000 мир, 中文!").split() == [
        "größe",
        "12",
        "000",
        "мир",
        "中文",
    ]


# ------------------------------------------------------------------ matching


@settings(max_examples=60, deadline=None)
@given(found=st.lists(sentences, min_size=1, max_size=4), batch=batches)
def test_matching_is_the_best_of_all_assignments(found: list[list[int]], batch: list[list[int]]) -> None:
    def likeness(a: list[int], b: list[int]) -> float:
        right = sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b))
        bag, private = Counter(a[1:-1]), Counter(b[1:-1])
        both = bag.total() + private.total()
        return right + (2 * (bag & private).total() / both if both else 0)

    def total(pairs: list[tuple[int, int]]) -> float:
        return sum(likeness(found[j], batch[i]) for i, j in pairs)

    size = min(len(found), len(batch))
    best = max(
        total(list(zip(rows, columns, strict=True)))
        for rows in itertools.combinations(range(len(batch)), size)
        for columns in itertools.permutations(range(len(found)), size)
    )
    matched = match_sentences(stack_sentences(found), stack_sentences(batch), SPACE)
    pairs = [(i, j) for i, j in enumerate(matched) if j >= 0]
    assert len(pairs) == size
    assert len({j for _, j in pairs}) == size
    assert total(pairs) == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(batch=batches, data=st.data())
def test_exact_sentences_find_their_own(batch: list[list[int]], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(batch))))
    matched = match_sentences(stack_sentences([batch[i] for i in order]), stack_sentences(batch), SPACE)
    assert [batch[order[j]] for j in matched] == batch


def test_a_bag_without_order_is_matched_by_its_tokens_and_not_by_one_chance_hit() -> None:
    truth = stack_sentences([sentence("the cat sat on mat"), sentence("the dog ##s ran open")])
    bags = stack_sentences([sentence("open ran dog ##s the"), sentence("the on mat sat cat")])
    assert match_sentences(bags, truth, SPACE) == (1, 0)


def test_a_tie_is_not_broken_by_the_order() -> None:
    """Both reconstructions fit both sentences alike, one better than the other."""
    found, batch = [sentence("the"), sentence("the cat")], [sentence("the cat sat"), sentence("the cat ran")]
    truth, guesses = stack_sentences(batch), stack_sentences(found)
    matched = match_sentences(guesses, truth, SPACE)
    assert match_sentences(guesses.flip(0), truth, SPACE) == tuple(1 - index for index in matched)
    assert match_sentences(guesses, truth.flip(0), SPACE) == matched[::-1]


def test_too_few_reconstructions_leave_sentences_unmatched() -> None:
    truth = stack_sentences([sentence("the cat"), sentence("dog ##s ran"), sentence("open week")])
    scored = score_sentences(truth[[2]], truth, SPACE, generator=generator())
    assert scored.matched == (-1, -1, 0)
    assert [example["exact-match"] for example in scored.per_example] == [None, None, 1.0]
    assert scored.scores[0].reason == "2 of 3 sentences: there is no reconstruction of it"
    none = score_sentences(truth[:0], truth, SPACE, generator=generator())
    assert none.matched == (-1, -1, -1)
    assert {score.value for score in none.scores} == {None}


# ------------------------------------------------------------------ chance


def test_chance_is_the_score_of_sentences_from_the_pool() -> None:
    """Every sentence of the pool shares "the" at its place: one token of two, one of three in the bag."""
    truth = stack_sentences([sentence("the cat")])
    pool = ["the dog", "the mat", "the cat", "the week"]
    scored = score_sentences(truth, truth, SPACE, pool=pool, generator=generator())
    chance = {score.metric: score.chance for score in scored.scores}
    assert chance["token-accuracy"] == pytest.approx(0.5)
    assert chance["bag-f1"] == pytest.approx(0.5)
    assert chance["special-accuracy"] == 1
    assert chance["exact-match"] == 0  # the sentence itself was left out of the pool
    assert scored.chance_source == "sentences of a pool of 4"


def test_a_pool_smaller_than_the_batch_is_drawn_with_replacement() -> None:
    truth = stack_sentences([sentence("the cat"), sentence("a dog"), sentence("open week")])
    scored = score_sentences(truth, truth, SPACE, pool=["the mat"], generator=generator())
    assert all(score.chance is not None for score in scored.scores)


@pytest.mark.parametrize("pool", [None, ["the cat"]], ids=["no pool", "a pool of the truth"])
def test_chance_without_a_pool_is_that_of_random_tokens(pool: list[str] | None) -> None:
    row = sentence("the cat")
    truth = stack_sentences([row] * 1)
    draws = [
        {
            s.metric: s.chance
            for s in score_sentences(truth, truth, SPACE, pool=pool, generator=generator(i)).scores
        }
        for i in range(60)
    ]
    mean = sum(draw["token-accuracy"] or 0 for draw in draws) / len(draws)
    assert mean == pytest.approx(1 / len(WORDS), abs=0.025)
    assert {draw["special-accuracy"] for draw in draws} == {1.0}


def test_random_tokens_without_a_tokenizer() -> None:
    truth = stack_sentences([[1, 2, 3], [4, 5]])
    scored = score_sentences(truth, truth, NUMBERS, pool=["ignored"], generator=generator())
    assert scored.chance_source == "random tokens"
    again = score_sentences(truth, truth, NUMBERS, generator=generator())
    assert again.scores == scored.scores


# ------------------------------------------------------------------ marks


def test_marks_say_what_stands_where_the_truth_has_it() -> None:
    truth = torch.tensor(sentence("the cat ##s"))
    found = torch.tensor([CLS, 5, NO_TOKEN, 11, 11, SEP, NO_TOKEN])
    assert marks(found, truth, SPACE) == [
        Token(text="[CLS]", right=True, special=True),
        Token(text="the", right=True),
        Token(text="", right=False),
        Token(text="##s", right=True),
        Token(text="##s", right=False),
        Token(text="[SEP]", right=False, special=True),
    ]
    assert [token.right for token in marks(found, None, SPACE)] == [None] * 6
    assert marks(torch.tensor([7]), None, NUMBERS) == [Token(text="#7")]
    assert marks(torch.tensor([NO_TOKEN]), None, SPACE) == []


@settings(max_examples=60, deadline=None)
@given(found=sentences, truth=sentences)
def test_marks_and_accuracy_count_alike(found: list[int], truth: list[int]) -> None:
    shown = marks(torch.tensor(found), torch.tensor(truth), SPACE)
    scores = one(found, truth)
    if scores["token-accuracy"] is not None:
        right = sum(token.right is True and not token.special for token in shown)
        assert right == pytest.approx(scores["token-accuracy"] * len(truth[1:-1]))
    assert (scores["exact-match"] == 1) == (len(found) == len(truth) and all(token.right for token in shown))


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("recovered", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"recovered sentences are .* got shape \(3,\), int64"),
        (torch.zeros(1, 3), r"recovered sentences are .* got shape \(1, 3\), float32"),
        (torch.tensor([[1, 20]]), "recovered token number 20 is not in the vocabulary, which ends at 19"),
        (torch.tensor([[-2]]), "recovered token number -2 is not in the vocabulary"),
    ],
)
def test_other_tensors_are_refused_in_one_line(recovered: torch.Tensor, message: str) -> None:
    truth = stack_sentences([sentence("the cat")])
    with pytest.raises(InputError, match=message) as caught:
        score_sentences(recovered, truth, SPACE, generator=generator())
    assert "\n" not in str(caught.value)


def test_with_the_tokenizer_of_minilm() -> None:
    folder = MINILM / "models--sentence-transformers--all-MiniLM-L6-v2" / "snapshots"
    if not folder.is_dir():
        pytest.skip("shared data are absent")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(next(folder.iterdir()))
    space = Tokens(vocabulary=30522, max_length=64, tokenizer=tokenizer)
    text = "Registration, volunteer applications, and student travel application open the first week of September."
    truth, cut = space.encode([text])
    assert cut == []
    found = truth.clone()
    found[0, 1] = truth[0, 3]
    scored = score_sentences(
        found, truth, space, pool=["Child care will be available."], generator=generator()
    )
    scores = scored.per_example[0]
    length = truth.shape[1] - 2
    assert scores["token-accuracy"] == pytest.approx((length - 1) / length)
    assert scores["special-accuracy"] == 1
    assert scores["rouge-1"] == pytest.approx(12 / 13)
    assert [token.text for token in marks(truth[0], None, space)][:4] == [
        "[CLS]",
        "registration",
        ",",
        "volunteer",
    ]
