"""Sentences from files, masks, and truth files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_text import CASES, TEXTS, batch_of, space_of, text_victim

from leakaudit.bundled import labelled_sentences
from leakaudit.errors import InputError
from leakaudit.models.language import IGNORED
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.text_data import (
    TRUTH_KEY,
    PrivateText,
    fill_masks,
    load_text,
    load_truth,
    private_text,
    save_truth,
)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(
    path: Path, task: str = "classification", count: int | None = None, **options: object
) -> PrivateText:
    return load_text(path, space_of(), task, count, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------ kinds of files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "The cat slept.\r\n\r\n   \nOur nurse stayed calm.\n"),
        ("a.txt", "\ufeffThe cat slept.\nOur nurse stayed calm."),
        ("a.tsv", "sentence\tlabel\nThe cat slept.\t1\nOur nurse stayed calm.\t0\n"),
        ("a.csv", 'Label,TEXT\n1,"The cat slept."\n0,Our nurse stayed calm.\n'),
        (
            "a.jsonl",
            '{"text": "The cat slept.", "label": 1}\n\n{"sentence": "Our nurse stayed calm.", "label": 0}',
        ),
    ],
)
def test_every_kind_of_file_gives_the_same_sentences(tmp_path: Path, name: str, content: str) -> None:
    batch = load(write(tmp_path, name, content), num_classes=2)
    assert batch.texts == ("The cat slept.", "Our nurse stayed calm.")
    assert space_of().decode(batch.tokens) == ["the cat slept.", "our nurse stayed calm."]
    assert batch.tokens.dtype == torch.int64
    assert batch.names[0].startswith(f"{name}:")
    if name.endswith("txt"):
        assert batch.labels.tolist() == [0, 1]
        assert "has no labels; each sentence got its position modulo 2" in batch.notes[0]
    else:
        assert batch.labels.tolist() == [1, 0]
        assert batch.notes == ()


def test_quotes_in_a_tsv_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'sentence\tlabel\n"unbalanced quote\t1\nnext line\t0\n')
    assert load(path).texts == ('"unbalanced quote', "next line")


def test_count_and_start_choose_rows_and_numbers_stay(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\ntwo\nthree\nfour\n")
    batch = load(path, count=2, start=1, num_classes=2)
    assert batch.texts == ("two", "three")
    assert batch.labels.tolist() == [1, 0]
    assert batch.names == ("a.txt:2", "a.txt:3")


def test_labels_that_are_words_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\none,spam\ntwo,ham\nthree,spam\n")
    batch = load(path, count=2)
    assert batch.labels.tolist() == [1, 0]
    assert batch.class_names == ("ham", "spam")
    assert batch.label_name(0) == "spam"


def test_the_bundled_labelled_sentences() -> None:
    batch = load(labelled_sentences(), num_classes=2)
    assert len(batch) == 40
    assert set(batch.labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8 text: byte 0xe9 at position 3"),
        ("a.txt", "", "a.txt holds no sentences"),
        ("a.txt", "\n \n", "a.txt holds no sentences"),
        ("a.md", "hello", "is no text that can be read; accepted: .txt, .tsv, .csv, .jsonl"),
        ("a.tsv", "words\tlabel\nhello\t1\n", "has columns words, label; accepted: sentence or text"),
        ("a.tsv", "", "has columns none"),
        ("a.csv", "text,label\n,1\n", "a.csv:2 has no sentence"),
        ("a.csv", "text,label\none,1\ntwo,\n", "a.csv:3 has no label, other sentences"),
        ("a.jsonl", "{'text': 1}", "a.jsonl:1 is not JSON"),
        ("a.jsonl", '["text"]', "accepted: an object with text"),
        ("a.jsonl", '{"text": 5}', "a.jsonl:1 has no sentence"),
        ("a.jsonl", '{"text": "one", "label": 1.5}', "a.jsonl:1 has label 1.5"),
        ("a.txt", "\u00a0x " + "word " * 70, r"a.txt:1 has \d+ tokens, the model takes 64"),
        ("a.csv", "text,label\none,7\n", "a.csv:2 has label 7; accepted: 0 to 1"),
        ("a.csv", "text,label\none,-1\n", "has label -1; accepted: 0 to 1"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(write(tmp_path, name, content), num_classes=2)
    assert "\n" not in str(caught.value)


def test_fewer_sentences_than_asked_and_no_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\ntwo\n")
    with pytest.raises(InputError, match="holds 2 sentences, 2 from 1 on were asked for"):
        load(path, count=2, start=1)
    with pytest.raises(InputError, match="cannot read"):
        load(tmp_path / "none.txt")
    with pytest.raises(InputError, match="count=0"):
        load(path, count=0)


def test_long_sentences_are_cut_off_only_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "word " * 70 + "\nshort\n")
    batch = load(path, max_length=10)
    assert batch.tokens.shape == (2, 10)
    assert "1 sentence of 2 cut off after 10 tokens." in batch.notes
    assert int(batch.tokens[0, -1]) == space_of().tokenizer.sep_token_id  # type: ignore[union-attr]
    with pytest.raises(InputError, match="max length 100 is not between 2 and the model's 64"):
        load(path, max_length=100)


def test_no_tokenizer() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        private_text(["one"], replace(space_of(), tokenizer=None), "mlm")


# ------------------------------------------------------------------ what the model is given


def test_causal_labels_are_the_tokens() -> None:
    batch = batch_of(text_victim("gpt2", "causal-lm"), 2)
    there = batch.tokens != NO_TOKEN
    assert torch.equal(batch.labels[there], batch.tokens[there])
    assert bool((batch.labels[~there] == IGNORED).all())
    assert bool((~there).any())
    assert torch.equal(batch.sentences, batch.tokens)


def test_a_single_token_has_no_label() -> None:
    with pytest.raises(InputError, match="sentence 1 has one token, which causal-lm has no label for"):
        private_text(["a"], space_of("gpt2"), "causal-lm")


def test_masks_follow_the_usual_recipe() -> None:
    """15 % of ordinary tokens; of these 80 % [MASK], 10 % random, 10 % unchanged; never a special token."""
    space = space_of()
    texts = ["the cat slept on the piano until somebody played the lowest note"] * 800
    batch = private_text(texts, space, "mlm", seed=3)
    whole, _ = space.encode(texts)
    tokenizer = space.tokenizer
    assert tokenizer is not None
    asked = batch.labels != IGNORED
    assert torch.equal(batch.sentences, whole)
    assert torch.equal(batch.tokens[~asked], whole[~asked])
    special = torch.isin(whole, torch.tensor([NO_TOKEN, *tokenizer.all_special_ids]))
    assert not bool((asked & special).any())
    assert float(asked.sum() / (~special).sum()) == pytest.approx(0.15, abs=0.02)
    masked = batch.tokens[asked] == tokenizer.mask_token_id
    kept = batch.tokens[asked] == whole[asked]
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.03)
    assert bool(asked.any(1).all())


def test_masks_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    left = private_text(TEXTS, space_of(), "mlm", seed=5)
    torch.manual_seed(2)
    right = private_text(TEXTS, space_of(), "mlm", seed=5)
    other = private_text(TEXTS, space_of(), "mlm", seed=6)
    assert torch.equal(left.tokens, right.tokens)
    assert torch.equal(left.labels, right.labels)
    assert not torch.equal(left.labels, other.labels)


def test_every_sentence_is_asked_for_one_token_at_least() -> None:
    batch = private_text(["hello"] * 200, space_of(), "mlm")
    assert bool((batch.labels != IGNORED).any(1).all())


def test_fill_masks_leaves_class_labels_alone() -> None:
    tokens = torch.tensor([[1, 2, NO_TOKEN]])
    assert torch.equal(fill_masks(tokens, torch.tensor([1])), tokens)
    assert fill_masks(tokens, torch.tensor([[IGNORED, 5, IGNORED]])).tolist() == [[1, 5, NO_TOKEN]]


def test_the_first_examples_lose_the_filling_that_nothing_needs() -> None:
    batch = private_text(TEXTS[::-1] + TEXTS, space_of(), "mlm")
    first = replace(batch, tokens=batch.tokens.flip(0), labels=batch.labels.flip(0)).first(1)
    assert first.tokens.shape == first.labels.shape
    assert not bool((first.tokens == NO_TOKEN).any())


# ------------------------------------------------------------------ truth files


@pytest.mark.parametrize(("model", "task"), CASES)
def test_a_truth_file_gives_back_what_was_saved(tmp_path: Path, model: str, task: str) -> None:
    batch = replace(batch_of(text_victim(model, task), 2), notes=("a note",), class_names=("no", "yes"))
    save_truth(tmp_path / "truth.safetensors", batch)
    back = load_truth(tmp_path / "truth.safetensors")
    assert torch.equal(back.tokens, batch.tokens)
    assert torch.equal(back.labels, batch.labels)
    assert (back.texts, back.names, back.task, back.class_names, back.notes) == (
        batch.texts, batch.names, batch.task, batch.class_names, batch.notes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "metadata", "message"),
    [
        ({}, None, "is not a truth file of sentences"),
        ({"extra": torch.zeros(1)}, {}, "is not a truth file of sentences"),
        ({}, {"task": "sing"}, "the names in .* are not valid"),
        ({}, {"surprise": 1}, "the names in .* are not valid"),
        ({}, {"names": ["a"]}, "holds 1 names and 2 texts"),
        ({"tokens": torch.zeros(2, 3)}, {}, "holds 2 names"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, {}, "labels \\(2,\\)"),
        ({"tokens": "float"}, {}, "accepted: int64"),
        ({"tokens": "gap"}, {}, "sentences with a gap"),
        ({"tokens": "negative"}, {}, "negative token numbers"),
        ({"labels": "negative"}, {}, "labels that are no tokens"),
        ({"labels": "none"}, {}, "a sentence without a label"),
        ({"sentences": "other"}, {}, "sentences that are not its tokens with the masks filled in"),
    ],
)
def test_a_truth_file_of_another_kind(
    tmp_path: Path, changes: dict, metadata: dict | None, message: str
) -> None:
    batch = batch_of(text_victim("bert", "mlm"), 2)
    tensors = {
        "tokens": batch.tokens.clone(),
        "labels": batch.labels.clone(),
        "sentences": batch.sentences.clone(),
    }
    for name, change in changes.items():
        if isinstance(change, torch.Tensor):
            tensors[name] = change
        elif change == "float":
            tensors[name] = tensors[name].double()
        elif change == "gap":
            tensors[name][0, 1] = NO_TOKEN
        elif change == "negative":
            tensors[name][0, 1] = -7
        elif change == "none":
            tensors[name][1] = IGNORED
        else:
            tensors[name][0, 1] += 1
    facts = {"texts": list(batch.texts), "names": list(batch.names), "task": "mlm", **(metadata or {})}
    save_file(
        tensors, tmp_path / "t.safetensors", None if metadata is None else {TRUTH_KEY: json.dumps(facts)}
    )
    with pytest.raises(InputError, match=message):
        load_truth(tmp_path / "t.safetensors")
