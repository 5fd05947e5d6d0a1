"""How much of the private text a reconstruction holds: scores per sentence, matching, and chance levels.

The truth enters here, as it does in `leakaudit.metrics` for images.  Sentences are (N, L) int64 token
numbers on any device, short rows filled up with `NO_TOKEN`; a `NO_TOKEN` before the last token of a
reconstruction is a position at which nothing was recovered.  All scores lie in [0, 1], 1 is the truth.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from leakaudit.errors import InputError, Unmeasurable
from leakaudit.metrics import CHANCE_DRAWS, BatchScores
from leakaudit.models.spaces import NO_TOKEN, Tokens, stack_sentences
from leakaudit.results import Score, Token

Row: TypeAlias = list[int]
"""One sentence without the filling at its end."""


@dataclass(frozen=True)
class TextMetric:
    """`function` maps a recovered sentence, the private one and their space to a score in [0, 1].

    It raises `Unmeasurable` with the reason where the private sentence has nothing to measure.  A `whole`
    metric gets all sentences of either side as one, and scores every private one alike.
    """

    name: str
    function: Callable[[Row, Row, Tokens], float]
    description: str = ""
    whole: bool = False


def token_accuracy(recovered: Row, truth: Row, space: Tokens) -> float:
    """Share of the private tokens that stand at their own position, special tokens left out."""
    return _share_right(recovered, _places(truth, space, special=False), "has no tokens but special ones")


def special_accuracy(recovered: Row, truth: Row, space: Tokens) -> float:
    """Share of the private sentence's special tokens that stand at their own position."""
    return _share_right(recovered, _places(truth, space, special=True), "has no special tokens")


def bag_precision(recovered: Row, truth: Row, space: Tokens) -> float:
    """Share of the recovered tokens that the private sentence holds, as multisets without special
    tokens; 0 when nothing was recovered."""
    found, wanted = _bags(recovered, truth, space)
    return (found & wanted).total() / max(1, found.total())


def bag_recall(recovered: Row, truth: Row, space: Tokens) -> float:
    """Share of the private tokens that were recovered, as multisets without special tokens."""
    found, wanted = _bags(recovered, truth, space)
    return (found & wanted).total() / wanted.total()


def bag_f1(recovered: Row, truth: Row, space: Tokens) -> float:
    """Harmonic mean of bag precision and bag recall."""
    found, wanted = _bags(recovered, truth, space)
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def words_f1(recovered: Row, truth: Row, space: Tokens) -> float:
    """Harmonic mean of precision and recall of the different tokens, as sets without special tokens."""
    found, wanted = (set(bag) for bag in _bags(recovered, truth, space))
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def exact_match(recovered: Row, truth: Row, space: Tokens) -> float:
    """1 when every token of the sentence is right, the special ones too, and there is none more."""
    return float(recovered == truth)


def rouge_1(recovered: Row, truth: Row, space: Tokens) -> float:
    """ROUGE-1 (Lin 2004), F-measure over words of the decoded text; see `_rouge`."""
    return _rouge(recovered, truth, space, "rouge1", words=1)


def rouge_2(recovered: Row, truth: Row, space: Tokens) -> float:
    """ROUGE-2 (Lin 2004), F-measure over pairs of neighbouring words; see `_rouge`."""
    return _rouge(recovered, truth, space, "rouge2", words=2)


def rouge_l(recovered: Row, truth: Row, space: Tokens) -> float:
    """ROUGE-L (Lin 2004), F-measure of the longest common subsequence of words; see `_rouge`."""
    return _rouge(recovered, truth, space, "rougeL", words=1)


TEXT_METRICS: dict[str, TextMetric] = {
    metric.name: metric
    for metric in (
        TextMetric("token-accuracy", token_accuracy, "tokens at their own position, without special ones"),
        TextMetric("special-accuracy", special_accuracy, "special tokens at their own position"),
        TextMetric("bag-precision", bag_precision, "recovered tokens that are in the sentence, in any order"),
        TextMetric("bag-recall", bag_recall, "tokens of the sentence that were recovered, in any order"),
        TextMetric("bag-f1", bag_f1, "harmonic mean of bag precision and bag recall"),
        TextMetric(
            "words-f1", words_f1, "different tokens of the whole batch, wherever they stand", whole=True
        ),
        TextMetric("exact-match", exact_match, "sentences of which every token is right"),
        TextMetric("rouge-1", rouge_1, "words in common, F-measure"),
        TextMetric("rouge-2", rouge_2, "pairs of neighbouring words in common, F-measure"),
        TextMetric("rouge-l", rouge_l, "longest common subsequence of words, F-measure"),
    )
}

DEFAULT_TEXT_METRICS = tuple(TEXT_METRICS)


def match_sentences(recovered: Tensor, truth: Tensor, space: Tokens) -> tuple[int, ...]:
    """For each private sentence the index of its reconstruction, -1 for one that is left over.

    The Hungarian method, by the largest sum of two likenesses of equal weight, each in [0, 1]: tokens
    right at their position over the longer sentence's length (special tokens count), and bag F1.  A
    reconstruction is never preferred to one that is better in both; an attack that finds the tokens
    without their order is matched by its bag.  Ties, which tokens have often, are broken by what the
    sentences are and not by their order.
    """
    orders = [sorted(range(len(rows)), key=rows.__getitem__) for rows in (_rows(truth), _rows(recovered))]
    likeness = _likeness(recovered[orders[1]], truth[orders[0]], space)
    lines, columns = linear_sum_assignment(likeness.numpy(), maximize=True)
    found = {orders[0][i]: orders[1][j] for i, j in zip(lines.tolist(), columns.tolist(), strict=True)}
    return tuple(found.get(index, -1) for index in range(len(truth)))


def score_sentences(
    recovered: Tensor,
    truth: Tensor,
    space: Tokens,
    metrics: Iterable[TextMetric] | None = None,
    *,
    pool: Sequence[str] | None = None,
    generator: torch.Generator,
) -> BatchScores:
    """Match, then score every private sentence, with the chance level of each metric.

    Chance is what a guess scores in the same procedure: as many unrelated sentences as there are
    reconstructions, matched and scored in the same way, on average over `CHANCE_DRAWS` draws.  The
    unrelated sentences come from `pool`; without one, or without a tokenizer, they are private
    sentences in which every token but the special ones was drawn from the vocabulary.

    Args:
        recovered: (M, L') int64 token numbers, filled up with `NO_TOKEN`.
        truth: (N, L) int64 token numbers, filled up with `NO_TOKEN`.
        space: the sentences' vocabulary and tokenizer.
        metrics: None for `DEFAULT_TEXT_METRICS`.
        pool: texts to draw unrelated sentences from; those of the truth are left out.
        generator: draws them; on the CPU.

    Raises `InputError` for anything but two-dimensional token numbers of this vocabulary.
    """
    recovered, truth = (_checked(name, x, space) for name, x in (("recovered", recovered), ("true", truth)))
    chosen = list(TEXT_METRICS.values()) if metrics is None else list(metrics)
    matched = match_sentences(recovered, truth, space)
    per_example, reasons = _measure(chosen, recovered, truth, matched, space)
    unrelated = _unrelated(pool, len(recovered), truth, space, generator)
    chances = [
        _measure(chosen, guess, truth, match_sentences(guess, truth, space), space)[0]
        for guess in _guesses(len(recovered), truth, unrelated, space, generator)
    ]
    scores = [
        Score(
            metric=name,
            value=_mean([values[name] for values in per_example]),
            chance=_mean([_mean([values[name] for values in draw]) for draw in chances]),
            reason=reason,
        )
        for name, reason in reasons.items()
    ]
    source = f"sentences of a pool of {len(pool or ()):,}" if len(unrelated) else "random tokens"
    return BatchScores(matched, scores, per_example, source)


def marks(recovered: Tensor, truth: Tensor | None, space: Tokens) -> list[Token]:
    """One sentence (L',) for the report: its tokens as text, each right or wrong against the truth (L,)
    at the same position, or neither without the truth.

    A position where nothing was recovered gets a token without text.
    """
    row, kinds = _row(recovered), space.special
    names = iter(space.pieces(torch.tensor(row, dtype=torch.int64)))
    wanted = None if truth is None else _row(truth)
    return [
        Token(
            text="" if token == NO_TOKEN else next(names),
            right=None if wanted is None else index < len(wanted) and token == wanted[index],
            special=token in kinds,
        )
        for index, token in enumerate(row)
    ]


def _row(tokens: Tensor) -> Row:
    row = [int(token) for token in tokens]
    while row and row[-1] == NO_TOKEN:
        row.pop()
    return row


def _rows(sentences: Tensor) -> list[Row]:
    return [_row(row) for row in sentences]


def _places(truth: Row, space: Tokens, *, special: bool) -> list[tuple[int, int]]:
    kinds = space.special
    return [(index, token) for index, token in enumerate(truth) if (token in kinds) == special]


def _share_right(recovered: Row, places: list[tuple[int, int]], lack: str) -> float:
    if not places:
        raise Unmeasurable(f"the private sentence {lack}")
    return sum(recovered[index : index + 1] == [token] for index, token in places) / len(places)


def _bags(recovered: Row, truth: Row, space: Tokens) -> tuple[Counter[int], Counter[int]]:
    """Multisets of both sentences' tokens, without special ones; the private one is not empty."""
    left_out = space.special | {NO_TOKEN}
    found, wanted = (Counter(t for t in row if t not in left_out) for row in (recovered, truth))
    if not wanted:
        raise Unmeasurable("the private sentence has no tokens but special ones")
    return found, wanted


def _rouge(recovered: Row, truth: Row, space: Tokens, key: str, words: int) -> float:
    """By torchmetrics, without stemming, which needs nothing from nltk.

    Words are runs of letters and digits of any script, in lower case: Lin's script, and torchmetrics by
    itself, know those of ASCII only and find no word in other scripts.  For ASCII both are the same.
    """
    pair = [_plain_words(text) for text in space.decode(stack_sentences([recovered, truth]))]
    if len(pair[1].split()) < words:
        lack = "no words" if words == 1 else f"fewer than {words} words"
        raise Unmeasurable(f"the private sentence has {lack}")
    from torchmetrics.functional.text.rouge import (
        rouge_score,  # seconds, and its package imports transformers
    )

    score = rouge_score(*pair, rouge_keys=key, normalizer=str, tokenizer=str.split)
    return float(score[f"{key}_fmeasure"])


def _plain_words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower())


def _likeness(recovered: Tensor, truth: Tensor, space: Tokens) -> Tensor:
    """(N, M) float64 in [0, 2]; 2 for equal sentences only."""
    length = max(recovered.shape[1], truth.shape[1])
    found, wanted = (F.pad(x, (0, length - x.shape[1]), value=NO_TOKEN) for x in (recovered, truth))
    vocabulary, places = torch.unique(torch.cat([found, wanted]), return_inverse=True)
    left_out = torch.tensor([NO_TOKEN, *space.special])
    content = ~torch.isin(vocabulary, left_out)
    counts = torch.zeros(len(places), len(vocabulary), dtype=torch.float64)
    counts.scatter_add_(1, places, torch.ones_like(places, dtype=torch.float64))
    bags, private = counts[: len(found), content], counts[len(found) :, content]
    ends = torch.tensor([len(row) for row in _rows(found)], dtype=torch.float64)
    lines = []
    for row, bag in zip(wanted, private, strict=True):
        right = ((found == row) & (row != NO_TOKEN)).sum(1)
        longer = ends.clamp(min=max(1, len(_row(row))))
        overlap = torch.minimum(bags, bag).sum(1)
        lines.append(right / longer + 2 * overlap / (bags.sum(1) + bag.sum()).clamp(min=1))
    return torch.stack(lines) if lines else torch.zeros(0, len(found), dtype=torch.float64)


def _checked(what: str, sentences: Tensor, space: Tokens) -> Tensor:
    if sentences.dim() != 2 or sentences.dtype != torch.int64:
        kind = str(sentences.dtype).removeprefix("torch.")
        raise InputError(
            f"{what} sentences are (N, L) int64 token numbers, got shape {tuple(sentences.shape)}, {kind}"
        )
    outside = sentences[(sentences < NO_TOKEN) | (sentences >= space.vocabulary)]
    if len(outside):
        raise InputError(
            f"{what} token number {int(outside[0])} is not in the vocabulary, which ends at {space.vocabulary - 1}"
        )
    return sentences.detach().cpu()


def _measure(
    metrics: Sequence[TextMetric], recovered: Tensor, truth: Tensor, matched: Sequence[int], space: Tokens
) -> tuple[list[dict[str, float | None]], dict[str, str]]:
    """The scores of every private sentence, and for every metric why some are absent."""
    found, wanted = _rows(recovered), _rows(truth)
    whole = list(itertools.chain(*found)), list(itertools.chain(*wanted))
    per_example: list[dict[str, float | None]] = [{} for _ in wanted]
    reasons = {}
    for metric in metrics:
        absent: Counter[str] = Counter()
        for index, chosen in enumerate(matched):
            value = None
            try:
                if not found or (chosen < 0 and not metric.whole):
                    raise Unmeasurable("there is no reconstruction of it")
                pair = whole if metric.whole else (found[chosen], wanted[index])
                value = metric.function(*pair, space)
            except Unmeasurable as reason:
                absent[str(reason)] += 1
            per_example[index][metric.name] = value
        reasons[metric.name] = "; ".join(
            text if count == len(wanted) == 1 else f"{count} of {len(wanted)} sentences: {text}"
            for text, count in absent.items()
        )
    return per_example, reasons


def _unrelated(
    pool: Sequence[str] | None, count: int, truth: Tensor, space: Tokens, generator: torch.Generator
) -> list[Row]:
    """Sentences of the pool as token numbers, no more than all draws need; none without a tokenizer."""
    if not pool or space.tokenizer is None:
        return []
    private = _rows(truth)
    drawn = torch.randperm(len(pool), generator=generator)[: CHANCE_DRAWS * count + len(private)]
    rows = _rows(space.encode([pool[int(index)] for index in drawn])[0])
    return [row for row in rows if row not in private]


def _guesses(
    count: int, truth: Tensor, unrelated: list[Row], space: Tokens, generator: torch.Generator
) -> Iterator[Tensor]:
    """Batches of `count` sentences that have nothing to do with the truth."""
    for _ in range(CHANCE_DRAWS if count and len(truth) else 0):
        if not unrelated:
            order = torch.randperm(len(truth), generator=generator).repeat(-(-count // len(truth)))
            yield _with_random_tokens(truth[order[:count]], space, generator)
        elif len(unrelated) < count:
            drawn = torch.randint(len(unrelated), (count,), generator=generator)
            yield stack_sentences([unrelated[int(index)] for index in drawn])
        else:
            drawn = torch.randperm(len(unrelated), generator=generator)[:count]
            yield stack_sentences([unrelated[int(index)] for index in drawn])


def _with_random_tokens(sentences: Tensor, space: Tokens, generator: torch.Generator) -> Tensor:
    """The sentences with every token but the special ones drawn anew."""
    special = torch.tensor(sorted(space.special), dtype=torch.int64)
    ordinary = torch.ones(space.vocabulary, dtype=torch.bool)
    ordinary[special[special < space.vocabulary]] = False
    choices = ordinary.nonzero().flatten()
    drawn = choices[torch.randint(len(choices), sentences.shape, generator=generator)]
    kept = (sentences == NO_TOKEN) | torch.isin(sentences, special)
    return torch.where(kept, sentences, drawn)


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None
