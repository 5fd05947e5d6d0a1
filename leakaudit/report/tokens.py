"""Tokens -> what a reader sees of them.  Markup is the template's; nothing here is markup.

Vocabularies write word boundaries in three ways: WordPiece marks what continues a word (`##ing`),
byte-level BPE and SentencePiece mark what starts one (`Ġword`, `▁word`).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from leakaudit.report.words import MISSING
from leakaudit.results import Token

CONTINUES = "##"
STARTS_BYTES = "\u0120"  # Ġ, the space of byte-level BPE
STARTS = "\u2581"  # ▁, the space of SentencePiece
VISIBLE_SPACE = "\u2423"
_MARKED_BY_ITSELF = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = [byte for byte in range(256) if byte not in _MARKED_BY_ITSELF]
BYTES = {chr(byte): byte for byte in _MARKED_BY_ITSELF} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}
"""Letters of byte-level BPE (Radford et al. 2019) and the bytes they stand for."""


@dataclass(frozen=True)
class Piece:
    """One token as shown.

    Attributes:
        text: readable, without control or direction characters; `MISSING` where nothing was recovered.
        joined: it continues the word of the piece before it.
        raw: as the vocabulary writes it.
        right: None without the truth.
        special: one of those the tokenizer adds by itself.
    """

    text: str
    joined: bool
    raw: str
    right: bool | None
    special: bool


@dataclass(frozen=True)
class Sentence:
    """`more` tokens were left out at the end; `note` counts the right and the wrong of all."""

    pieces: list[Piece]
    direction: str = "ltr"
    more: int = 0
    note: str = ""


def sentence(tokens: Sequence[Token], most: int | None = None) -> Sentence:
    """What the report shows of one sentence, of at most `most` tokens."""
    shown = pieces(tokens[:most])
    return Sentence(shown, _direction(shown), len(tokens) - len(shown), tally([tokens]))


def pieces(tokens: Sequence[Token]) -> list[Piece]:
    """The tokens of one sentence with their spelling made readable."""
    texts = [token.text for token in tokens if not token.special]
    in_bytes = any(text.startswith(STARTS_BYTES) for text in texts)
    starts = STARTS_BYTES if in_bytes else STARTS if any(text.startswith(STARTS) for text in texts) else ""
    shown: list[Piece] = []
    for token in tokens:
        first = not shown or shown[-1].special
        text, joined = (token.text, False) if token.special else _spell(token.text, starts)
        shown.append(
            Piece(
                text=_visible(text) or MISSING,
                joined=joined and not first,
                raw=_visible(token.text),
                right=token.right,
                special=token.special,
            )
        )
    return shown


def tally(sentences: Sequence[Sequence[Token]]) -> str:
    """How many tokens are right and wrong, special ones left out; empty without the truth."""
    counts = Counter(token.right for tokens in sentences for token in tokens if not token.special)
    known = counts[True] + counts[False]
    return f"{counts[True]:,} right, {counts[False]:,} wrong" if known else ""


def _spell(text: str, starts: str) -> tuple[str, bool]:
    """A token's text, and whether it continues a word."""
    if not starts:
        joined = text.startswith(CONTINUES) and len(text) > len(CONTINUES)
        return text.removeprefix(CONTINUES) if joined else text, joined
    joined = bool(text) and not text.startswith(starts)
    body = text.removeprefix(starts)
    if starts == STARTS_BYTES and all(letter in BYTES for letter in body):
        body = bytes(BYTES[letter] for letter in body).decode("utf-8", "backslashreplace")
    if starts == STARTS:  # in byte-level BPE it is a letter like others
        body = body.replace(STARTS, VISIBLE_SPACE)
    return body or (VISIBLE_SPACE if text else ""), joined


def _visible(text: str) -> str:
    """Control characters, and those that turn the direction of writing, as escapes such as \\u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _direction(shown: Sequence[Piece]) -> str:
    """Of the sentence's letters, special tokens left out."""
    kinds = Counter(unicodedata.bidirectional(c) for piece in shown if not piece.special for c in piece.text)
    return "rtl" if kinds["R"] + kinds["AL"] > kinds["L"] else "ltr"
