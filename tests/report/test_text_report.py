"""Sentences in the report and in the terminal: spelling, marks, escaping, redaction."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sample_audits import (
    EVIL_TOKENS,
    SENTENCES,
    marked,
    photo_audit,
    text_audit,
    text_blind_audit,
    text_hostile_audit,
)
from test_html_report import Page
from tokenizers import pre_tokenizers

from leakaudit.report.folder import read_run, write_run
from leakaudit.report.html import MAX_STRIP_SENTENCES, MAX_STRIP_TOKENS, render_html
from leakaudit.report.redact import redact
from leakaudit.report.terminal import print_result
from leakaudit.report.tokens import BYTES, pieces, sentence, tally
from leakaudit.results import AuditResult, Frame, Token

SECRET = [Token(text="confidential"), Token(text="diagnosis")]


def read(texts: list[str]) -> str:
    """The sentence as it is seen: pieces of a word stand together."""
    shown = pieces([Token(text=text) for text in texts])
    return "".join(
        piece.text if piece.joined or index == 0 else f" {piece.text}" for index, piece in enumerate(shown)
    )


# ------------------------------------------------------------------ spelling


def byte_level(text: str) -> list[str]:
    """The pieces that the tokenizers library cuts a text into, in the letters of byte-level BPE."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return [piece for piece, _ in cut.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["the", "##rapist", "said", ",", "no"], "therapist said , no"),
        (["##ing", "in", "front"], "ing in front"),
        (["##", "#", "####"], "## ###"),
        (
            ["Meet", "Ġme", "Ġun", "believ", "ably", "Ġlate"],
            "Meet me unbelievably late",
        ),
        (["Ġcaf", "Ã©", "ĠðŁĺĢ"], "café 😀"),
        (["Ġ", "Ġx", "Ċ"], "␣ x\\n"),
        (["ĠðŁ", "ĺĢ"], "\\xf0\\x9f\\x98\\x80"),
        (["Ġ漢", "##s"], "漢##s"),
        (byte_level("▁"), "▁"),
        (["▁der", "▁Pati", "ent", "▁", "<0x0A>"], "der Patient ␣<0x0A>"),
        (["#12", "#7"], "#12 #7"),
        (["", "the"], "– the"),
        ([], ""),
    ],
)
def test_every_spelling_is_made_readable(texts: list[str], expected: str) -> None:
    assert read(texts) == expected


def test_the_letters_of_byte_level_bpe_are_those_of_the_library() -> None:
    assert set(BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTES.values()) == list(range(256))


@given(text=st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12))
def test_byte_level_bpe_reads_back_whatever_was_written(text: str) -> None:
    assert read(byte_level(text)) == text


@given(texts=st.lists(st.text(max_size=6), max_size=6))
def test_whatever_the_tokens_hold_one_piece_a_token_is_printable(texts: list[str]) -> None:
    shown = pieces([Token(text=text) for text in texts])
    assert len(shown) == len(texts)
    assert all(piece.text and piece.text.isprintable() and piece.raw.isprintable() for piece in shown)
    assert not any(piece.joined for piece in shown[:1])


def test_special_tokens_are_left_as_they_are_and_join_nothing() -> None:
    tokens = [Token(text="<|endoftext|>", special=True), Token(text="Hello"), Token(text="Ġyou")]
    shown = pieces(tokens)
    assert [piece.text for piece in shown] == ["<|endoftext|>", "Hello", "you"]
    assert not any(piece.joined for piece in shown)


def test_what_writes_from_the_right_is_laid_out_from_the_right() -> None:
    assert sentence([Token(text="[CLS]", special=True), Token(text="שלום")]).direction == "rtl"
    assert sentence([Token(text="\u202eabc")]).direction == "ltr"
    assert sentence([]).direction == "ltr"


def test_right_and_wrong_are_counted_without_special_tokens() -> None:
    row = marked([Token(text="a"), Token(text="b"), Token(text="[SEP]", special=True)], [Token(text="a")])
    assert tally([row, row]) == "2 right, 2 wrong"
    assert tally([[Token(text="a")]]) == ""
    cut = sentence(row, 2)
    assert (len(cut.pieces), cut.more, cut.note) == (2, 1, "1 right, 1 wrong")


# ------------------------------------------------------------------ the page


def page_of(result: AuditResult) -> str:
    return render_html(result, None)


def section(page: str, name: str) -> str:
    found = re.search(rf'<section class="card" id="{name}">(.*?)</section>', page, re.DOTALL)
    assert found is not None
    return found[1]


def test_both_texts_stand_side_by_side_with_wrong_tokens_marked(tmp_path: Path) -> None:
    result = text_audit(tmp_path, 4, 0.8)
    shown = section(page_of(result), "pictures")
    assert shown.count("<figcaption><b>Original</b>") == shown.count("<figcaption><b>Recovered</b>") == 4
    wrong = [t for e in result.trials[1].examples for t in e.recovered_tokens or [] if t.right is False]
    assert len(wrong) == 7
    assert shown.count('<span class="vh">wrong: </span>') == len(wrong)
    for number in range(4):
        assert f"<h3>Sentence {number}</h3>" in shown
    rows = shown[shown.index("Sentence 1") : shown.index("Sentence 2")]
    assert '<span class="tok">the</span><wbr><span class="tok joined" title="##rapist">rapist</span>' in rows
    assert '<span class="tok special">[CLS]</span>' in rows
    assert rows.count("ROUGE-L") == 1


def test_the_strip_shows_tokens_turning_right(tmp_path: Path) -> None:
    page = page_of(text_audit(tmp_path))
    steps = section(page, "strip").split("<details>")[0].split("<li>")[1:]
    assert [re.findall(r"iteration (\d+)", step) for step in steps] == [["0"], ["10"], ["20"], ["30"]]
    right = [step.count('class="tok right"') for step in steps]
    assert right == sorted(right)
    assert (right[0], right[-1]) == (0, 22)
    assert "22 right, 0 wrong" in steps[-1]


def test_it_is_a_page_about_text_and_not_about_pictures(tmp_path: Path) -> None:
    for make in (text_audit, text_blind_audit):
        text = " ".join(Page(page_of(make(tmp_path))).text)
        body = text[text.index("Skip to the verdict") : text.index("What the adversary knew")]
        for word in ("picture", "Picture", "pixel", "film", "Film", "frame", "image"):
            assert word not in body, word
        assert "From noise to text" in body
        assert "verified exact" in body
        assert "256  tokens at most" in text
    photos = " ".join(Page(render_html(photo_audit(tmp_path), tmp_path)).text)
    body = photos[photos.index("Skip to the verdict") :]
    assert "From noise to picture" in body
    assert "token" not in body


def test_without_the_truth_only_the_recovered_text_is_shown(tmp_path: Path) -> None:
    page = page_of(text_blind_audit(tmp_path))
    shown = section(page, "pictures")
    assert "Original" not in shown.replace("The original text", "")
    assert shown.count("<figcaption><b>Recovered</b>") == 4
    assert not re.search(r'class="tok[^"]*(right|wrong)', page)
    assert "highlighted" not in page


def test_tokens_are_data_not_markup(tmp_path: Path) -> None:
    text = page_of(text_hostile_audit(tmp_path))
    page = Page(text)
    assert len(page.named("script")) == 1
    assert len(page.named("style")) == 1
    assert page.named("img") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not any(c in text for c in "\x00\x1b\u202e\u2066")
    seen = "".join(page.text)
    for token in EVIL_TOKENS:
        if token.isprintable() and "▁" not in token:
            assert token in seen
    classes = {attributes.get("class") or "" for attributes in page.named("span")}
    allowed = {"tok", "right", "wrong", "special", "joined"}
    assert all(set(name.split()) <= allowed for name in classes if name.startswith("tok"))


def test_a_style_forbids_a_token_to_leave_its_box_or_the_page(tmp_path: Path) -> None:
    rule = re.search(r"\.tok \{(.*?)\}", page_of(text_audit(tmp_path)), re.DOTALL)
    assert rule is not None
    assert "unicode-bidi: isolate" in rule[1]
    assert "overflow-wrap: anywhere" in rule[1]


def test_a_long_strip_is_cut_and_says_so(tmp_path: Path) -> None:
    strip = section(page_of(text_hostile_audit(tmp_path)), "strip")
    first = strip.split("<li>")[1]
    assert first.count('<p class="tokens"') == MAX_STRIP_SENTENCES
    assert "and 36 more sentences" in first
    long = text_audit(tmp_path)
    frame = Frame(iteration=0, loss=1.0, sentences=[[Token(text="x")] * 100])
    trial = long.trials[1].model_copy(update={"strip": [frame]})
    page = page_of(long.model_copy(update={"trials": [trial], "best": 0}))
    cut = section(page, "strip")
    assert cut.count('class="tok"') == MAX_STRIP_TOKENS
    assert "and 36 more tokens" in cut
    assert "found its answer in one step." in cut


# ------------------------------------------------------------------ redaction


def secret_audit(folder: Path) -> AuditResult:
    """One token of two was found, so the marks and the recovered text give half of the original."""
    result = text_audit(folder)
    found = [Token(text="confidential", right=True), Token(text="banana", right=False)]
    trials = []
    for trial in result.trials:
        example = trial.examples[0].model_copy(
            update={"original_tokens": SECRET, "recovered_tokens": found, "true_label": "tabby"}
        )
        strip = [Frame(iteration=0, loss=1.0, sentences=[found, found])]
        trials.append(trial.model_copy(update={"examples": [example], "strip": strip}))
    return result.model_copy(update={"trials": trials})


def test_redaction_removes_the_original_and_every_mark(tmp_path: Path) -> None:
    result = secret_audit(tmp_path)
    assert "diagnosis" in page_of(result)
    assert re.search(r'class="tok[^"]*(right|wrong)"', page_of(result))
    closed = redact(result)
    for trial in closed.trials:
        assert trial.examples[0].original_tokens is None
        rows = [trial.examples[0].recovered_tokens or [], *trial.strip[0].sentences]
        assert len(rows) == 3
        assert [[token.right for token in row] for row in rows] == [[None, None]] * 3
        assert [token.text for token in rows[0]] == ["confidential", "banana"]
    assert '"right":true' not in closed.model_dump_json()
    assert '"right":false' not in closed.model_dump_json()


def test_a_redacted_run_holds_the_original_nowhere(tmp_path: Path) -> None:
    write_run(secret_audit(tmp_path), tmp_path)
    write_run(secret_audit(tmp_path).model_copy(update={"redacted": True}), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"report.html", "result.json"}
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "diagnosis" not in text
        assert "tabby" not in text
        assert "banana" in text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'class="tok[^"]*(right|wrong)"', page)
    assert "1 right" not in page
    assert "withheld" in section(page, "pictures")
    assert read_run(tmp_path).redacted
    assert page == render_html(secret_audit(tmp_path), tmp_path, redact=True)


# ------------------------------------------------------------------ the terminal


def printed(result: AuditResult, *, color: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=90, force_terminal=color, color_system="standard" if color else None
    )
    print_result(result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_prints_the_recovered_text(tmp_path: Path) -> None:
    text = printed(text_audit(tmp_path))
    assert "Token accuracy" in text
    assert "ROUGE-L" in text
    words = re.sub(r"\s+", " ", text)
    assert SENTENCES[0] in words
    assert "(22 right, 0 wrong)" in words
    assert "Recovered text" not in printed(photo_audit(tmp_path))


def test_wrong_tokens_are_red_and_underlined(tmp_path: Path) -> None:
    text = printed(text_audit(tmp_path, 4, 0.8), color=True)
    assert "\x1b[4;31mmoor\x1b[0m" in text
    assert "therapist" in re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert text.count("\x1b[4;31m") == 7


def test_the_terminal_stops_after_eight_sentences(tmp_path: Path) -> None:
    text = printed(text_hostile_audit(tmp_path))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]" in text
    assert "and 5 more sentences, in the report" in text
    assert re.search(r"and [\d,]+ more tokens", text)
