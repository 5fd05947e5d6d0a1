"""Train the tiny BERT and the tiny GPT-2 of this folder, and their tokenizers, from nothing but our own sentences.

    OMP_NUM_THREADS=1 python examples/tiny_models/build.py [FOLDER]

Result: FOLDER/bert and FOLDER/gpt2 (by default this folder), below 2 MB each, and a table of losses in nats per
predicted token.  About a minute and a half on one CPU core.  The same seed gives the same tokenizers, and the same
weights on the same processor and version of torch.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from leakaudit.bundled import labelled_sentences, sentences

SEED = 0
VOCABULARY = 800
POSITIONS = 64
BATCH = 16
LEARNING_RATE = 2e-3
BERT_EPOCHS = 60
GPT2_EPOCHS = 15
IGNORED = -100
"""The label that transformers' losses skip."""

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[str], torch.Generator], Batch]


def bert_tokenizer(corpus: Sequence[str]) -> PreTrainedTokenizerBase:
    """WordPiece, lower case.  Every printable ASCII character is a token, and every letter and digit also as
    the continuation of a word, so that plain text has no [UNK].  The continuations are named in advance
    because the trainer numbers those it finds in the random order of a hash table, and breaks ties by number.
    """
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    continuations = [f"##{character}" for character in characters if character.isalnum()]
    blank = BertTokenizerFast()
    trainer = WordPieceTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*blank.get_vocab(), *continuations],
        initial_alphabet=characters,
        show_progress=False,
    )
    blank.backend_tokenizer.train_from_iterator(corpus, trainer)
    return BertTokenizerFast(vocab=blank.get_vocab(), do_lower_case=True, model_max_length=POSITIONS)


def gpt2_tokenizer(corpus: Sequence[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE with <|endoftext|> for beginning, end and unknown, and without padding, as GPT-2 has it."""
    blank = GPT2TokenizerFast(model_max_length=POSITIONS)
    return blank.train_new_from_iterator([list(corpus)], VOCABULARY, show_progress=False)


def bert(tokenizer: PreTrainedTokenizerBase) -> BertForMaskedLM:
    """Freshly initialised from torch's global generator."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=192,
            max_position_embeddings=POSITIONS,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )


def gpt2(tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """Freshly initialised from torch's global generator."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=96,
            n_layer=3,
            n_head=4,
            n_positions=POSITIONS,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )


def masked_batch(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Masking of Devlin et al. (2019), section 3.1: 15 % of the tokens are predicted, of which 80 % are
    masked, 10 % replaced by any token, and 10 % kept."""

    def collate(texts: Sequence[str], generator: torch.Generator) -> Batch:
        batch = dict(
            tokenizer(list(texts), padding=True, return_special_tokens_mask=True, return_tensors="pt")
        )
        ordinary = batch.pop("special_tokens_mask") == 0
        tokens = batch["input_ids"]
        chosen = (torch.rand(tokens.shape, generator=generator) < 0.15) & ordinary
        fate = torch.rand(tokens.shape, generator=generator)
        other = torch.randint(len(tokenizer), tokens.shape, generator=generator)
        hidden = tokens.masked_fill(chosen & (fate < 0.8), tokenizer.mask_token_id)
        hidden = torch.where(chosen & (fate >= 0.9), other, hidden)
        return {**batch, "input_ids": hidden, "labels": tokens.masked_fill(~chosen, IGNORED)}

    return collate


def next_token_batch(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Each sentence between two <|endoftext|>; what pads it is neither seen nor predicted."""
    end = tokenizer.eos_token_id

    def collate(texts: Sequence[str], _: torch.Generator) -> Batch:
        rows = [torch.tensor([end, *tokenizer(text)["input_ids"], end]) for text in texts]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORED)}

    return collate


@torch.no_grad()
def mean_loss(model: PreTrainedModel, collate: Collate, texts: Sequence[str], repeats: int = 8) -> float:
    """Nats per predicted token in evaluation mode, over `repeats` passes (each masks other tokens)."""
    model.eval()
    generator = torch.Generator().manual_seed(SEED + 1)
    losses = [model(**collate(texts, generator)).loss for _ in range(repeats)]
    return float(torch.stack(losses).mean())


def train(model: PreTrainedModel, collate: Collate, texts: Sequence[str], epochs: int) -> None:
    """AdamW, the learning rate rising over a tenth of the steps and falling to zero over the others."""
    model.train()
    generator = torch.Generator().manual_seed(SEED)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * -(-len(texts) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(texts), generator=generator).split(BATCH):
            optimiser.zero_grad()
            model(**collate([texts[row] for row in rows], generator)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    model.eval()


def unseen_sentences() -> list[str]:
    """The labelled sentences, which neither tokenizers nor models are trained on."""
    with labelled_sentences().open(encoding="utf-8", newline="") as file:
        return [row["sentence"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def build(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, collate: Collate, epochs: int
) -> None:
    """Train, save and print a line of the README's table."""
    seen, unseen = sentences(), unseen_sentences()
    start = time.perf_counter()
    losses = [mean_loss(model, collate, seen), mean_loss(model, collate, unseen)]
    train(model, collate, seen, epochs)
    losses += [mean_loss(model, collate, seen), mean_loss(model, collate, unseen)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    columns = [folder.name, f"{len(tokenizer)}", f"{model.num_parameters():,}", f"{size:.2f} MB", f"{epochs}"]
    print(
        "|", " | ".join([*columns, *(f"{loss:.2f}" for loss in losses), f"{seconds:.0f} s"]), "|", flush=True
    )


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    pieces, bytes_ = bert_tokenizer(sentences()), gpt2_tokenizer(sentences())
    print(
        "| model | tokens | parameters | size | epochs | loss before: seen | unseen | after: seen | unseen | time |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    build(folder / "bert", bert(pieces), pieces, masked_batch(pieces), BERT_EPOCHS)
    build(folder / "gpt2", gpt2(bytes_), bytes_, next_token_batch(bytes_), GPT2_EPOCHS)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
