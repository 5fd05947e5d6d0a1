"""One small random model of every family that `ARCHITECTURES` lists, and random sentences for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from leakaudit.models.language import IGNORED, LanguageVictim, Task, language_victim
from leakaudit.models.spaces import NO_TOKEN, stack_sentences

VOCABULARY = 60
CLASSES = 3
LONGEST = 24
"""Tokens that every family takes."""

AUTO: dict[Task, Any] = {
    "classification": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
}
_USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": LONGEST,
}
_PADDED: dict[str, Any] = {**_USUAL, "max_position_embeddings": LONGEST + 2, "pad_token_id": 1}
_GROUPED: dict[str, Any] = {**_USUAL, "num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """What the files of transformers 5 say of a family, written down independently of `ARCHITECTURES`.

    Attributes:
        options: of the configuration.
        base: prefix of the base model's parameters.
        word, position: parameters under the prefix.
        inputs: modules of block 0 under the prefix that take its normalised input.
        norm: module of block {} that normalises before the attention; None where it is done after.
        first: position row of the first token.
    """

    options: dict[str, Any]
    base: str
    word: str
    position: str | None
    inputs: tuple[str, ...]
    norm: str | None = None
    first: int = 0
    causal: bool = False


def _encoder(
    options: dict[str, Any], base: str, first: int = 0, block: str = "encoder.layer.0.attention.self"
) -> Family:
    return Family(
        options,
        base,
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        tuple(f"{block}.{part}" for part in ("query", "key", "value")),
        first=first,
    )


def _rotary(options: dict[str, Any]) -> Family:
    inputs = tuple(f"layers.0.self_attn.{part}_proj" for part in "qkv")
    norm = "layers.{}.input_layernorm"
    return Family(options, "model", "embed_tokens.weight", None, inputs, norm, causal=True)


FAMILIES: dict[str, Family] = {
    "bert": _encoder(_USUAL, "bert"),
    "electra": _encoder({**_USUAL, "embedding_size": 16}, "electra"),
    "roberta": _encoder(_PADDED, "roberta", first=2),
    "xlm-roberta": _encoder(_PADDED, "roberta", first=2),
    "camembert": _encoder(_PADDED, "roberta", first=2),
    "distilbert": Family(
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": LONGEST,
        },
        "distilbert",
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        tuple(f"transformer.layer.0.attention.{part}_lin" for part in "qkv"),
    ),
    "gpt2": Family(
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": LONGEST,
            "bos_token_id": VOCABULARY - 1,
            "eos_token_id": VOCABULARY - 1,
        },
        "transformer",
        "wte.weight",
        "wpe.weight",
        ("h.0.attn.c_attn",),
        "h.{}.ln_1",
        causal=True,
    ),
    "gpt_neo": Family(
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": LONGEST,
            "max_position_embeddings": LONGEST,
            "bos_token_id": VOCABULARY - 1,
            "eos_token_id": VOCABULARY - 1,
        },
        "transformer",
        "wte.weight",
        "wpe.weight",
        tuple(f"h.0.attn.attention.{part}_proj" for part in "qkv"),
        "h.{}.ln_1",
        causal=True,
    ),
    "gpt_neox": Family(
        _USUAL,
        "gpt_neox",
        "embed_in.weight",
        None,
        ("layers.0.attention.query_key_value",),
        "layers.{}.input_layernorm",
        causal=True,
    ),
    "opt": Family(
        {**_USUAL, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
        "model",
        "decoder.embed_tokens.weight",
        "decoder.embed_positions.weight",
        tuple(f"decoder.layers.0.self_attn.{part}_proj" for part in "qkv"),
        "decoder.layers.{}.self_attn_layer_norm",
        first=2,
        causal=True,
    ),
    "llama": _rotary(_GROUPED),
    "mistral": _rotary(_GROUPED),
    "qwen2": _rotary({**_USUAL, "num_key_value_heads": 2}),
    "qwen3": _rotary(_GROUPED),
    "gemma": _rotary({**_GROUPED, "pad_token_id": 0}),
}

CASES: list[tuple[str, Task]] = [
    case
    for name, family in FAMILIES.items()
    for case in ((name, "classification"), (name, "causal-lm" if family.causal else "mlm"))
]
"""Every family with its two tasks."""


def small_model(family: str, task: Task, seed: int = 0, **options: Any) -> PreTrainedModel:
    """In eval mode, with parameters (biases and norms too) that are random and never exactly alike; a copy."""
    return copy.deepcopy(_model(family, task, seed, tuple(options.items())))


@cache
def _model(family: str, task: Task, seed: int, options: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {**FAMILIES[family].options, **dict(options)}
        config = AutoConfig.for_model(family, **settings)
        config.num_labels = CLASSES
        module = AUTO[task].from_config(config, attn_implementation="eager")
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return module.eval()


def small_victim(family: str, task: Task, seed: int = 0, **options: Any) -> LanguageVictim:
    return language_victim(small_model(family, task, seed, **options), None, task, name=family)


def random_sentences(*lengths: int, seed: int = 0, first: int = 5) -> Tensor:
    """(N, L) tokens from `first` on up to the last but one, filled up with `NO_TOKEN`."""
    generator = torch.Generator().manual_seed(seed)
    return stack_sentences(
        [torch.randint(first, VOCABULARY - 1, (n,), generator=generator).tolist() for n in lengths]
    )


def labels_for(task: Task, x: Tensor, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Classes; about a third of the places with another token (the first always); or the tokens themselves."""
    generator = torch.Generator().manual_seed(seed)
    if task == "classification":
        return torch.arange(len(x)) % CLASSES
    if task == "causal-lm":
        return x.where(x != NO_TOKEN, IGNORED)
    chosen = torch.rand(x.shape, generator=generator) < 0.3
    chosen[:, 0] = True
    other = torch.randint(vocabulary, x.shape, generator=generator)
    return other.where(chosen & (x != NO_TOKEN), IGNORED)
