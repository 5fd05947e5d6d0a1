"""Recovery of text from gradients: token accuracy, exact matches, ROUGE and seconds, for attacks and defenses.

    python benchmarks/text.py --data sst2_validation.tsv --sentences 100
    python benchmarks/text.py --data sst2_validation.tsv --sentences 16 --batch 8 --attack span-check
    python benchmarks/text.py --data notes.txt --task mlm --defense gaussian-noise:std=1e-4 --defense top-k:keep=0.01
    python benchmarks/text.py --data notes.txt --model hf:random-gpt2 --task causal-lm --batch 4

Batches are consecutive sentences of --data.  Each runs under every defense and is attacked by every attack;
"best" is the attack with the smallest residual, chosen without the truth.  `hf:random-gpt2` is GPT-2 small
(12 layers, width 768) with random weights and the tokenizer of --tokenizer, for machines without GPT-2.
One JSON line for each batch, defense and attack, then the means.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from leakaudit.attacks.base import Attack, Monitor
from leakaudit.attacks.registry import ATTACKS
from leakaudit.defenses import DEFENSES, apply
from leakaudit.models.language import LanguageVictim
from leakaudit.models.lora import Lora
from leakaudit.models.pretrained import load_language_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.spec import parse
from leakaudit.text_data import PrivateText, fill_masks, load_text
from leakaudit.text_metrics import TEXT_METRICS, score_sentences
from leakaudit.threat import Knowledge, View, known

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SHOWN = ("token-accuracy", "exact-match", "rouge-1", "rouge-2", "rouge-l", "bag-f1")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    victim = load(options)
    print(json.dumps(surroundings(victim, options)), flush=True)
    results: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for start in range(options.start, options.start + options.sentences, options.batch):
        batch = load_text(
            options.data, victim.space, victim.task, options.batch, start=start,
            num_classes=victim.num_classes, max_length=options.max_length, seed=start,
        )  # fmt: skip
        for defense in options.defense or ["none"]:
            view = observe(victim, batch, defense, options)
            rows = {name: attacked(view, batch, name, options) for name in options.attack}
            rows["best"] = min(rows.values(), key=lambda row: row["residual"])
            for name, row in rows.items():
                results[defense, name].append(row)
                print(json.dumps({"start": start, "defense": defense, "attack": name, **row}), flush=True)
    for (defense, name), rows_of in results.items():
        means = {key: round(statistics.fmean(row[key] for row in rows_of), 4) for key in (*SHOWN, "seconds")}
        print(json.dumps({"defense": defense, "attack": name, "batches": len(rows_of), **means}), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help=".txt, .tsv, .csv or .jsonl")
    parser.add_argument("--model", default=f"hf:{MINILM}")
    parser.add_argument("--tokenizer", default=MINILM, help="of hf:random-gpt2")
    parser.add_argument("--task", default="classification")
    parser.add_argument("--lora", help="rank=8,alpha=16,targets=query+value")
    parser.add_argument("--sentences", type=int, default=10)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--attack", action="append", help="may be repeated; position-rows and span-check")
    parser.add_argument("--defense", action="append", help="may be repeated; none")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for an attack")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.attack = options.attack or ["position-rows", "span-check"]
    return options


def load(options: argparse.Namespace) -> LanguageVictim:
    """The victim; for LoRA with B away from zero, as after some training, so that A has a gradient."""
    if options.model != "hf:random-gpt2":
        victim = load_language_victim(options.model, options.task, lora=options.lora)
    else:
        with tempfile.TemporaryDirectory() as folder:
            random_gpt2(Path(folder), options.tokenizer)
            victim = load_language_victim(f"hf:{folder}", options.task, lora=options.lora)
    if options.lora:
        Lora.parse(options.lora)
        generator = fork(0, "benchmark/lora")
        for name, tensor in victim.params.items():
            if "lora_B" in name:
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    return victim


def random_gpt2(folder: Path, tokenizer: str) -> None:
    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    words.save_pretrained(folder)


def observe(victim: LanguageVictim, batch: PrivateText, defense: str, options: argparse.Namespace) -> View:
    """What the server sees: the number of sentences is known, labels and noise are not."""
    round = Round(len(batch), options.local_steps, learning_rate=options.learning_rate)
    parts = [] if defense == "none" else [parse(part, DEFENSES, "defense") for part in defense.split("+")]
    client = apply(client_update, parts, fork(0, "benchmark/defense"))
    update = client(victim, victim.params, round, batch.tokens, batch.labels).detach()
    knowledge = Knowledge(
        batch_size=known(len(batch), "stated"), local_steps=known(round.local_steps, "stated")
    )
    return View(victim, round, update, knowledge)


def attacked(view: View, batch: PrivateText, spec: str, options: argparse.Namespace) -> dict[str, float]:
    """Scores of one attack, 0 where it does not apply or fails; its residual is then infinite."""
    attack: Attack = parse(spec, ATTACKS, "attack")
    began = time.monotonic()
    row = {**dict.fromkeys(SHOWN, 0.0), "residual": float("inf")}
    try:
        if attack.applies(view) is None:
            found = attack.run(view, fork(0, spec), Monitor(deadline=began + options.budget))
            recovered = fill_masks(found.x, found.y)
            metrics = [TEXT_METRICS[name] for name in SHOWN]
            scored = score_sentences(
                recovered, fill_masks(batch.tokens, batch.labels), view.victim.space, metrics,
                generator=fork(0, "chance"),
            )  # fmt: skip
            row.update({score.metric: score.value or 0.0 for score in scored.scores if score.metric in SHOWN})
            row["residual"] = view.residual(found.x, found.y)
    except RuntimeError as error:
        print(json.dumps({"attack": spec, "failed": str(error)[:100]}), flush=True)
    return {**row, "seconds": round(time.monotonic() - began, 2)}


def surroundings(victim: LanguageVictim, options: argparse.Namespace) -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": options.threads,
        "parameters": sum(tensor.numel() for tensor in victim.params.values()),
        **{key: value for key, value in vars(options).items() if value is not None},
    }


if __name__ == "__main__":
    main()
