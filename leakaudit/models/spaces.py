"""Where candidates live.

A *space* says how a model input is drawn at random, kept inside its box, and
shown to a person.  Attacks work on model inputs: normalised pixels, which `Pixels.decode`
turns into pixels in [0, 1], or token numbers, which `Tokens.decode` turns into text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOKEN = -1
"""Fills up the rows of a batch of sentences; no token of any vocabulary."""
SAMPLE_LENGTH = 8
"""Tokens of a random sentence."""


@dataclass(frozen=True)
class Pixels:
    """Images, seen by the model as (pixel - mean) / std per channel.

    Attributes:
        shape: (channels, height, width).
        mean, std: one number a channel, in pixel units of [0, 1]; None when the
            normalisation is unknown, then candidates have no box to stay in.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("normalisation needs both mean and std")
        for values in (self.mean, self.std):
            if values is not None and len(values) != self.shape[0]:
                raise ValueError(f"normalisation has {len(values)} channels, the input has {self.shape[0]}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def unknowns(self) -> int:
        """Numbers to find per example."""
        channels, height, width = self.shape
        return channels * height * width

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.mean or (0.0,) * self.shape[0], self.std or (1.0,) * self.shape[0]
        return (
            torch.tensor(mean, dtype=like.dtype, device=like.device).view(-1, 1, 1),
            torch.tensor(std, dtype=like.dtype, device=like.device).view(-1, 1, 1),
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] -> model input; (..., C, H, W), floating point."""
        mean, std = self._affine(pixels)
        return (pixels - mean) / std

    def decode(self, inputs: Tensor) -> Tensor:
        """Model input -> pixels; values may leave [0, 1] (`project` first, or clamp to show)."""
        mean, std = self._affine(inputs)
        return inputs * std + mean

    def project(self, inputs: Tensor) -> Tensor:
        """The nearest model input whose pixels lie in [0, 1]; unchanged without a normalisation."""
        if self.mean is None:
            return inputs
        mean, std = self._affine(inputs)
        return torch.minimum(torch.maximum(inputs, -mean / std), (1 - mean) / std)

    def sample(self, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal model inputs, (count, C, H, W), on the generator's device."""
        return torch.randn((count, *self.shape), generator=generator, dtype=dtype, device=generator.device)


@dataclass(frozen=True)
class Tokens:
    """Sentences as token numbers, (N, L) int64; short rows end in `NO_TOKEN`.

    Attributes:
        vocabulary: rows of the word embedding; tokens are 0 .. vocabulary - 1.
        max_length: tokens of a sentence at most, special ones included.
        tokenizer: None where the model has none; sentences are then shown as numbers.
    """

    vocabulary: int
    max_length: int
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int]:
        return (self.max_length,)

    @property
    def unknowns(self) -> int:
        """Tokens to find per example, at most."""
        return self.max_length

    @property
    def special(self) -> frozenset[int]:
        """Tokens that the tokenizer adds by itself ([CLS], [SEP], [MASK], <|endoftext|>, ...)."""
        return frozenset(() if self.tokenizer is None else self.tokenizer.all_special_ids)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Random sentences of `SAMPLE_LENGTH` tokens at most, (count, L) int64, on the generator's device."""
        shape = (count, min(SAMPLE_LENGTH, self.max_length))
        return torch.randint(self.vocabulary, shape, generator=generator, device=generator.device)

    def ordinary(self, sentences: Tensor) -> Tensor:
        """(N, L) bool: where there is a token that is not special."""
        return ~torch.isin(sentences, torch.tensor([NO_TOKEN, *self.special], device=sentences.device))

    def pieces(self, row: Tensor) -> list[str]:
        """The tokens of one sentence (L,), each as text; `NO_TOKEN` is left out."""
        numbers = [int(number) for number in row if number != NO_TOKEN]
        if self.tokenizer is None:
            return [f"#{number}" for number in numbers]
        names = self.tokenizer.convert_ids_to_tokens(numbers)
        return [f"#{n}" if name is None else name for n, name in zip(numbers, names, strict=True)]

    def decode(self, sentences: Tensor) -> list[str]:
        """(N, L) token numbers as text, without special tokens."""
        if self.tokenizer is None:
            return [" ".join(self.pieces(row)) for row in sentences]
        rows = [[int(number) for number in row if number != NO_TOKEN] for row in sentences]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Sentences as (N, L) token numbers with the tokenizer's special tokens, and the indices of those
        that were cut off at `max_length`.  Needs a tokenizer."""
        assert self.tokenizer is not None
        whole = self.tokenizer(list(texts), verbose=False)["input_ids"]
        cut = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return stack_sentences(cut), [i for i, row in enumerate(whole) if len(row) > len(cut[i])]


def stack_sentences(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token numbers of several sentences as one (N, L) int64 tensor, filled up with `NO_TOKEN`."""
    return pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=NO_TOKEN
    )
