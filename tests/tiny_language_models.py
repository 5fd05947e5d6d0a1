"""The smallest language models that the tests attack, as folders that transformers' Auto classes load offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from leakaudit.bundled import tiny_model


def save_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Save a LLaMA with random weights into `folder` and return it: hidden size 96, 2 layers, 4 heads, rotary
    positions, untied embeddings, and the tokenizer (800 byte-level tokens) of the bundled GPT-2."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("gpt2"), local_files_only=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `save_tiny_llama`, made once; a test file that uses it imports this name."""
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))
