"""The tiny language models and the sentences that ship with leakaudit: for the demo, the tests and chance levels."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from leakaudit.errors import InputError

TinyModel = Literal["bert", "gpt2"]


def tiny_model(name: TinyModel) -> Path:
    """The folder of a tiny model and its tokenizer, which transformers' Auto classes load offline.

    "bert" is a masked language model and "gpt2" a causal one, both with tied embeddings, hidden size
    96, 3 layers, 4 heads and 64 positions, trained on `sentences()` alone (not on the labelled ones).
    Raises `InputError` for another name.
    """
    if name not in get_args(TinyModel):
        raise InputError(f"no tiny model is called {name!r}; accepted: {', '.join(get_args(TinyModel))}")
    return _folder("tiny_models") / name


def sentences() -> tuple[str, ...]:
    """The 327 sentences of 6 to 30 words that the tiny models were trained on, in the file's order."""
    text = (_folder("sentences") / "sentences.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def labelled_sentences() -> Path:
    """A .tsv file of 40 further sentences: columns sentence and label (1 pleased, 0 displeased)."""
    return _folder("sentences") / "labelled.tsv"


def _folder(name: str) -> Path:
    """A folder inside the installed package, or the one under examples of a checkout."""
    package = Path(__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / "examples" / name
