"""What a server sees of sentences, for the tests of attacks on text."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakaudit.bundled import TinyModel, sentences, tiny_model
from leakaudit.models.language import IGNORED, LanguageVictim, Task
from leakaudit.models.pretrained import load_language_victim
from leakaudit.models.spaces import NO_TOKEN, stack_sentences
from leakaudit.rounds import Round, client_update
from leakaudit.threat import Knowledge, View, known
from leakaudit.update import Update


@cache
def tiny_victim(name: TinyModel, task: Task) -> LanguageVictim:
    """The bundled model in eval mode; tests must not write to it."""
    return load_language_victim(f"hf:{tiny_model(name)}", task)


@cache
def victim_in(folder: Path, task: Task, lora: str | None = None) -> LanguageVictim:
    return load_language_victim(f"hf:{folder}", task, lora=lora)


def tokens_of(victim: LanguageVictim, *numbers: int) -> Tensor:
    """(N, L): bundled sentences by their number, tokenised."""
    texts = sentences()
    x, cut = victim.space.encode([texts[number] for number in numbers])
    assert not cut
    return x


def random_tokens(victim: LanguageVictim, *lengths: int, seed: int = 0, kinds: int | None = None) -> Tensor:
    """(N, L) random sentences, of `kinds` different tokens at most, so that they repeat; never the padding."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randperm(victim.space.vocabulary - 5, generator=generator)[:kinds] + 5
    return stack_sentences(
        [pool[torch.randint(len(pool), (length,), generator=generator)].tolist() for length in lengths]
    )


def labels_of(victim: LanguageVictim, x: Tensor, seed: int = 0) -> Tensor:
    """As a client has them: classes in turn; about a fifth of the places, at least one a sentence, masked; or
    the tokens themselves."""
    if victim.task == "classification":
        return torch.arange(len(x)) % victim.num_classes
    if victim.task == "causal-lm":
        return x.where(x != NO_TOKEN, IGNORED)
    generator = torch.Generator().manual_seed(seed)
    y = torch.full_like(x, IGNORED)
    for row, target in zip(x, y, strict=True):
        inner = int((row != NO_TOKEN).sum()) - 2
        count = max(1, inner // 5)
        places = 1 + torch.randperm(inner, generator=generator)[:count]
        target[places] = row[places]
    return y


def masked(victim: LanguageVictim, x: Tensor, y: Tensor) -> Tensor:
    """The sentences with [MASK] at the labelled places, as masked language models train."""
    assert victim.space.tokenizer is not None
    mask = victim.space.tokenizer.mask_token_id
    return x.where(y == IGNORED, mask) if victim.task == "mlm" else x


def view_of(
    victim: LanguageVictim, x: Tensor, y: Tensor, round: Round | None = None, noise: float = 0.0, **facts: Any
) -> View:
    """What a server sees that knows the number of sentences, and `facts`; noise is relative to the root mean
    square of all numbers."""
    round = round or Round(len(x))
    observed = client_update(victim, victim.params, round, x, y).detach()
    if noise:
        observed = noisy(observed, noise)
    knowledge = Knowledge(
        **{"batch_size": known(len(x), "test"), "scale": known(True, "test"), **facts},
    )
    return View(victim, round, observed, knowledge)


def noisy(update: Update, level: float, seed: int = 0) -> Update:
    """Gaussian noise of standard deviation `level` per number."""
    generator = torch.Generator().manual_seed(seed)
    return update.map(lambda tensor: tensor + level * torch.randn(tensor.shape, generator=generator))


def pruned(update: Update, keep: float) -> Update:
    """Only the largest numbers of each tensor, the share `keep` of them."""

    def top(tensor: Tensor) -> Tensor:
        count = max(1, round(keep * tensor.numel()))
        least = tensor.abs().flatten().topk(count).values[-1]
        return tensor.where(tensor.abs() >= least, 0.0)

    return update.map(top)


def rows_of(x: Tensor) -> list[tuple[int, ...]]:
    """The sentences without their filling, sorted: batches are known up to order."""
    return sorted(tuple(int(token) for token in row if token != NO_TOKEN) for row in x)
