"""Private sentences: from .txt, .tsv, .csv and .jsonl files, as model inputs and labels, and truth files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from leakaudit.class_labels import numbered
from leakaudit.errors import InputError
from leakaudit.formats.phrases import counted, first_line, listing, quoted
from leakaudit.formats.reading import read_safetensors
from leakaudit.formats.writing import save_tensors
from leakaudit.models.language import IGNORED, Task, text_as_labels
from leakaudit.models.spaces import NO_TOKEN, Tokens
from leakaudit.randomness import fork

if TYPE_CHECKING:
    pass

TRUTH_KEY = "leakaudit_text_truth"
TEXT_COLUMNS = ("sentence", "text")
MASKED = 0.15
"""Share of the tokens that a masked-language model is asked for (Devlin et al. 2019, section 3.1)."""


@dataclass(frozen=True)
class PrivateText:
    """What a client keeps to itself.

    Attributes:
        tokens: (N, L) int64 model inputs, special tokens and [MASK]s included, short rows filled up with
            `NO_TOKEN`.
        labels: as `LanguageVictim` takes them: (N,) int64 classes, or (N, L) token numbers with `IGNORED`
            where the loss takes nothing.
        texts: the sentences as they were read.
        names: where each example comes from, such as "notes.txt:3".
        task: what the labels are for.
        class_names: by label, where known.
        notes: what was assumed while loading, in sentences.
    """

    tokens: Tensor
    labels: Tensor
    texts: tuple[str, ...]
    names: tuple[str, ...]
    task: Task
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sentences(self) -> Tensor:
        """(N, L) int64: the private tokens themselves, masks filled in; what scores are measured against."""
        return fill_masks(self.tokens, self.labels)

    def first(self, count: int) -> PrivateText:
        """The first `count` examples."""
        return self.part(0, count)

    def part(self, start: int, count: int) -> PrivateText:
        """`count` examples from `start` on."""
        return self.rows(range(len(self))[start : start + count])

    def rows(self, rows: Sequence[int]) -> PrivateText:
        """The examples at these positions, in this order, no wider than the longest."""
        index = list(rows)
        longest = int((self.tokens[index] != NO_TOKEN).sum(1).max())
        labels = self.labels[index]
        return replace(
            self,
            tokens=self.tokens[index, :longest],
            labels=labels if labels.dim() == 1 else labels[:, :longest],
            texts=tuple(self.texts[row] for row in index),
            names=tuple(self.names[row] for row in index),
        )

    def class_name(self, label: int) -> str:
        """The name of a class, or its number where it has none."""
        known = self.class_names is not None and 0 <= label < len(self.class_names)
        return self.class_names[label] if known and self.class_names else str(label)

    def label_name(self, index: int) -> str | None:
        """The name of the class of example `index`; None where labels are tokens."""
        return self.class_name(int(self.labels[index])) if self.labels.dim() == 1 else None


def fill_masks(tokens: Tensor, labels: Tensor) -> Tensor:
    """(N, L) tokens with the labels, where these are as many tokens, in the places they stand for."""
    if labels.shape != tokens.shape or labels.is_floating_point():
        return tokens
    return tokens.where(labels == IGNORED, labels)


def load_text(
    source: str | Path,
    space: Tokens,
    task: Task,
    count: int | None,
    *,
    start: int = 0,
    num_classes: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> PrivateText:
    """`count` sentences (None: all) from `start` on, as a client would train on them.

    Args:
        source: .txt, one sentence a line, blank lines left out; .tsv or .csv with a header that names
            sentence or text, and perhaps label; .jsonl of {"text": ..., "label": ...}; all UTF-8.
        space: of the model, with its tokenizer.
        num_classes: labels of classification must stay below; None for no limit.
        max_length: tokens, special ones included, after which sentences are cut off, which a note says;
            None to refuse a sentence that is longer than the model takes.
        seed: of the masks of a masked-language model.

    Sentences without labels get their position modulo `num_classes`, which a note says.
    Raises `InputError` for a file that cannot be read or holds no, or fewer, sentences, for a sentence
    that is too long or has no tokens, and for a label out of range.
    """
    if (count is not None and count < 1) or start < 0:
        raise InputError(f"count={count} and start={start}: accepted are count >= 1 and start >= 0")
    rows = read_rows(source)
    count = max(1, len(rows) - start) if count is None else count
    if start + count > len(rows):
        held = counted(len(rows), "sentence")
        raise InputError(f"{source} holds {held}, {count} from {start} on were asked for")
    chosen = rows[start : start + count]
    notes: tuple[str, ...] = ()
    labels, class_names = None, None
    if task == "classification":
        numbers, class_names = _labels(rows, source)
        if numbers is None:
            numbers = [row % (num_classes or len(rows)) for row in range(len(rows))]
            modulo = "" if num_classes is None else f" modulo {num_classes}"
            notes = (f"{source} has no labels; each sentence got its position{modulo} as its label.",)
        labels = numbers[start : start + count]
        _check_labels(labels, chosen, source, num_classes)
    batch = private_text([row.text for row in chosen], space, task, labels, max_length=max_length, seed=seed,
                         names=[row.name for row in chosen])  # fmt: skip
    return replace(batch, class_names=class_names, notes=(*notes, *batch.notes))


def private_text(
    texts: Sequence[str],
    space: Tokens,
    task: Task,
    labels: Sequence[int] | None = None,
    *,
    names: Sequence[str] | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> PrivateText:
    """Sentences as a client trains on them; arguments as for `load_text`, `labels` for classification.

    Raises `InputError` for sentences that the model cannot take.
    """
    names = [f"sentence {i + 1}" for i in range(len(texts))] if names is None else names
    tokens, notes = _tokenise(texts, names, space, max_length)
    if task == "causal-lm":
        _refuse_single_tokens(tokens, names)
    if task == "classification":
        y = torch.tensor(list(labels or [0] * len(texts)), dtype=torch.int64)
    elif task == "mlm":
        tokens, y = _mask(tokens, names, space, seed)
    else:
        y = text_as_labels(tokens)
    return PrivateText(tokens, y, tuple(texts), tuple(names), task, notes=notes)


def read_sentences(source: str | Path) -> tuple[str, ...]:
    """The sentences of a file, as `load_text` reads them; `InputError` when there are none."""
    return tuple(row.text for row in read_rows(source))


# ------------------------------------------------------------------------------- sentences to tokens


def _tokenise(
    texts: Sequence[str], names: Sequence[str], space: Tokens, max_length: int | None
) -> tuple[Tensor, tuple[str, ...]]:
    """(N, L) token numbers, and a note on what was cut off."""
    if space.tokenizer is None:
        raise InputError(
            "the model has no tokenizer, so sentences cannot be read; accepted: a model with one"
        )
    if max_length is not None and not 2 <= max_length <= space.max_length:
        raise InputError(
            f"max length {max_length} is not between 2 and the model's {space.max_length} tokens"
        )
    limit = max_length or space.max_length
    whole: list[list[int]] = space.tokenizer(list(texts), verbose=False)["input_ids"]
    for name, row in zip(names, whole, strict=True):
        if not set(row) - space.special:
            raise InputError(f"{name} has no tokens but special ones; accepted: sentences with words")
        if len(row) > limit and max_length is None:
            raise InputError(
                f"{name} has {len(row)} tokens, the model takes {limit}; shorten it, or cut it off by --max-length"
            )
    tokens, cut = replace(space, max_length=limit).encode(texts)
    if not cut:
        return tokens, ()
    return tokens, (f"{counted(len(cut), 'sentence')} of {len(texts)} cut off after {limit} tokens.",)


def _refuse_single_tokens(tokens: Tensor, names: Sequence[str]) -> None:
    for name, row in zip(names, tokens, strict=True):
        if int((row != NO_TOKEN).sum()) < 2:
            raise InputError(
                f"{name} has one token, which causal-lm has no label for; accepted: two and more"
            )


def _mask(tokens: Tensor, names: Sequence[str], space: Tokens, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a masked-language model by transformers' collator (80 % [MASK], 10 % random,
    10 % unchanged), seeded; a sentence that it leaves whole gets one [MASK]."""
    from transformers import DataCollatorForLanguageModeling

    tokenizer = space.tokenizer
    assert tokenizer is not None  # `_tokenise` refuses a model without
    mask_token: Any = tokenizer.mask_token_id
    if mask_token is None:
        raise InputError("the tokenizer has no mask token, which task mlm needs; accepted: another --task")
    generator = fork(seed, "text/masks")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    collator.generator = generator
    ordinary = space.ordinary(tokens)
    inputs, labels = collator.torch_mask_tokens(tokens.clone(), ~ordinary)
    for i in (labels == IGNORED).all(1).nonzero().flatten().tolist():
        places = ordinary[i].nonzero().flatten()
        if not len(places):
            raise InputError(f"{names[i]} has no token that could be masked")
        place = int(places[torch.randint(len(places), (), generator=generator)])
        inputs[i, place], labels[i, place] = mask_token, tokens[i, place]
    return inputs, labels


# ------------------------------------------------------------------------------------ files of text


@dataclass(frozen=True)
class Row:
    """One sentence of a file, with its label as it stands there."""

    text: str
    label: str | None
    name: str


def read_rows(source: str | Path) -> list[Row]:
    """All sentences of a file; `InputError` when it cannot be read, or there are none."""
    path = Path(source)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path} is no text that can be read; accepted: {', '.join(_READERS)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[error.start]:02x} at position {error.start:,}"
        raise InputError(f"{path} is not UTF-8 text: {bad}; accepted: UTF-8") from error
    rows = list(read(text, path))
    if not rows:
        raise InputError(f"{path} holds no sentences")
    return rows


def _lines(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            yield Row(line.strip(), None, f"{path.name}:{number}")


def _table(text: str, path: Path) -> Iterator[Row]:
    tabs = path.suffix.lower() == ".tsv"
    reader = csv.DictReader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
    )
    try:
        columns = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        column = next((name for name in TEXT_COLUMNS if name in columns), None)
        if column is None:
            found = listing(columns) or "none"
            raise InputError(f"{path} has columns {found}; accepted: sentence or text, and perhaps label")
        for row in reader:
            name = f"{path.name}:{reader.line_num}"
            yield _row(row[column], row.get("label"), name)
    except csv.Error as error:
        raise InputError(f"{path} is not a table: {first_line(error)}") from error


def _json_lines(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name = f"{path.name}:{number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is not JSON: {first_line(error)}") from error
        key = next((key for key in TEXT_COLUMNS if isinstance(found, dict) and key in found), None)
        if key is None:
            raise InputError(f"{name} is {quoted(found)}; accepted: an object with text, and perhaps label")
        label = found.get("label")
        if not isinstance(label, str | int | None) or isinstance(label, bool):
            raise InputError(f"{name} has label {quoted(label)}; accepted: a whole number or a word")
        yield _row(found[key], None if label is None else str(label), name)


def _row(text: object, label: str | None, name: str) -> Row:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{name} has no sentence")
    return Row(text.strip(), label.strip() if label and label.strip() else None, name)


_READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    ".txt": _lines,
    ".tsv": _table,
    ".csv": _table,
    ".jsonl": _json_lines,
}


def _labels(rows: Sequence[Row], source: str | Path) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """A number for every row, and names where labels are words, numbered in sorted order; None without."""
    words = [row.label for row in rows if row.label is not None]
    if not words:
        return None, None
    lacking = next((row for row in rows if row.label is None), None)
    if lacking is not None:
        raise InputError(f"{lacking.name} has no label, other sentences of {source} have one")
    return numbered(words)


def _check_labels(
    labels: Sequence[int], rows: Sequence[Row], source: str | Path, num_classes: int | None
) -> None:
    limit = num_classes or 1 << 31
    for label, row in zip(labels, rows, strict=True):
        if not 0 <= label < limit:
            raise InputError(f"{source}: {row.name} has label {label}; accepted: 0 to {limit - 1}")


# ------------------------------------------------------------------------------------- truth files


class _TruthNames(BaseModel):
    model_config = ConfigDict(extra="forbid")

    texts: tuple[str, ...]
    names: tuple[str, ...]
    task: Task
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def save_truth(path: str | Path, batch: PrivateText) -> None:
    """Write a batch to its own .safetensors file, never beside the update; `InputError` when it cannot be.

    `sentences` are the tokens with their masks filled in, which scores are measured against.
    """
    names = _TruthNames(
        texts=batch.texts,
        names=batch.names,
        task=batch.task,
        class_names=batch.class_names,
        notes=batch.notes,
    )
    tensors = {"tokens": batch.tokens, "labels": batch.labels, "sentences": batch.sentences}
    save_tensors(path, tensors, {TRUTH_KEY: names.model_dump_json()})


def load_truth(path: str | Path) -> PrivateText:
    """Read what `save_truth` wrote; `InputError` for anything else."""
    tensors, metadata = read_safetensors(path)
    if TRUTH_KEY not in metadata or tensors.keys() != {"tokens", "labels", "sentences"}:
        raise InputError(
            f"{path} is not a truth file of sentences; accepted: what `leakaudit capture --text --truth` writes"
        )
    try:
        names = _TruthNames.model_validate_json(metadata[TRUTH_KEY])
    except ValidationError as error:
        raise InputError(f"the names in {path} are not valid") from error
    tokens, labels = tensors["tokens"], tensors["labels"]
    count = len(names.names)
    expected = (count,) if names.task == "classification" else tuple(tokens.shape)
    if tokens.dim() != 2 or not len(tokens) == count == len(names.texts) or tuple(labels.shape) != expected:
        raise InputError(
            f"{path} holds {count} names and {len(names.texts)} texts for tokens {tuple(tokens.shape)}, labels"
            f" {tuple(labels.shape)}"
        )
    if any(tensor.dtype != torch.int64 for tensor in tensors.values()):
        kinds = ", ".join(f"{tensor.dtype} {name}" for name, tensor in tensors.items())
        raise InputError(f"{path} holds {kinds}; accepted: int64")
    batch = PrivateText(tokens, labels, names.texts, names.names, names.task, names.class_names, names.notes)
    fault = _fault(batch)
    if fault or not torch.equal(batch.sentences, tensors["sentences"]):
        raise InputError(
            f"{path} holds {fault or 'sentences that are not its tokens with the masks filled in'}"
        )
    return batch


def _fault(batch: PrivateText) -> str:
    """What is wrong with the numbers of a batch, or an empty string."""
    there = batch.tokens != NO_TOKEN
    if not len(batch) or bool((batch.tokens < NO_TOKEN).any()) or not bool(there.any(1).all()):
        return "negative token numbers, or no tokens"
    if bool((there[:, 1:] & ~there[:, :-1]).any()):
        return "sentences with a gap"
    if batch.task == "classification":
        return "negative labels" if bool((batch.labels < 0).any()) else ""
    labelled = batch.labels != IGNORED
    if bool((batch.labels[labelled] < 0).any()) or bool((labelled & ~there).any()):
        return "labels that are no tokens, or stand where there is none"
    return "" if bool(labelled.any(1).all()) else "a sentence without a label"
