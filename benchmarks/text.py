"""Recovery of text from gradients: token accuracy, exact matches, ROUGE and seconds, for attacks and defenses.

    python benchmarks/text.py --data sst2_validation.tsv --sentences 100
    python benchmarks/text.py --data sst2_validation.tsv --sentences 16 --batch 8 --attack span-check
    python benchmarks/text.py --data notes.txt --task mlm --defense gaussian-noise:std=1e-4 --defense top-k:keep=0.01
    python benchmarks/text.py --data notes.txt --model hf:random-gpt2 --task causal-lm --batch 4
    python benchmarks/text.py --data sst2_validation.tsv --speed --threads 2 --json text.json

Batches are consecutive sentences of --data.  Each runs under every defense and is attacked by every attack;
"best" is the attack with the smallest residual, chosen without the truth.  `hf:random-gpt2` is GPT-2 small
(12 layers, width 768) with random weights and the tokenizer of --tokenizer, for machines without GPT-2.
One JSON line for each batch, defense and attack, then the means.  One thread unless --threads says otherwise.

--speed: seconds instead.  First the scan of the vocabulary for one sentence, against its size (--vocabulary): `naive`
makes the embeddings of all tokens at one position after another and projects them, as DAGER's published loop does;
`pairs` makes them with `leakaudit.attacks.scans.every_pair`; `ours` is `scan`.  Then whole attacks against the number
of sentences (--batches): on the whole update, and where the embeddings are frozen, which leaves `span-check` the whole
vocabulary to scan, with `scan` and with `every_pair` in its place.  All that is compared takes turns --rounds times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest.mock import patch

import torch
import transformers
from measuring import options as speed_options
from measuring import paired, show
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from leakaudit.attacks import text_recovery
from leakaudit.attacks.base import Attack, Monitor
from leakaudit.attacks.registry import ATTACKS
from leakaudit.attacks.scans import every_pair, scan
from leakaudit.attacks.spans import Span, attention_span
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
T = TypeVar("T")
SHOWN = ("token-accuracy", "exact-match", "rouge-1", "rouge-2", "rouge-l", "bag-f1")


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    victim = load(options)
    print(json.dumps(surroundings(victim, options)), flush=True)
    if options.speed:
        show("Seconds of text attacks", [*scans(victim, options), *attacks(victim, options)], options.json)
        return
    results: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for start in range(options.start, options.start + options.sentences, options.batch):
        batch = sentences(victim, start, options.batch, options)
        for defense in options.defense or ["none"]:
            view = observe(victim, batch, defense, options)
            rows = {name: attacked(view, batch, name, options) for name in options.attack}
            rows["best"] = min(rows.values(), key=lambda row: row["residual"])
            for name, row in rows.items():
                results[defense, name].append(row)
                print(json.dumps({"start": start, "defense": defense, "attack": name, **row}), flush=True)
    means = [
        {
            "defense": defense,
            "attack": name,
            "batches": len(rows_of),
            **{key: statistics.fmean(row[key] for row in rows_of) for key in (*SHOWN, "seconds")},
        }
        for (defense, name), rows_of in results.items()
    ]
    show("Recovery of text", means, options.json)


def arguments() -> argparse.Namespace:
    parser = speed_options(__doc__)
    parser.set_defaults(threads=1)
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
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[1000, 8000, 0], help="0: all of it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.attack = options.attack or ["position-rows", "span-check"]
    return options


def sentences(victim: LanguageVictim, start: int, count: int, options: argparse.Namespace) -> PrivateText:
    return load_text(
        options.data, victim.space, victim.task, count, start=start,
        num_classes=victim.num_classes, max_length=options.max_length, seed=start,
    )  # fmt: skip


def scans(victim: LanguageVictim, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The vocabulary scanned for the sentence at --start, which is among the candidates."""
    batch = sentences(victim, options.start, 1, options)
    truth = batch.tokens[0]
    span = attention_span(victim, observe(victim, batch, "none", options).observed, 0)
    assert span is not None
    everything = torch.arange(victim.space.vocabulary)
    others = everything[~torch.isin(everything, truth)]
    rows = []
    for size in options.vocabulary:
        count = len(everything) if size == 0 else size
        tokens = torch.cat([truth.unique(), others])[:count].sort().values
        ways: dict[str, Callable[[], Tensor]] = {
            "naive": partial(naive, victim, span, tokens, len(truth)),
            "pairs": partial(every_pair, victim, span, tokens, len(truth)),
            "ours": partial(scan, victim, span, tokens, len(truth)),
        }
        taken = timed(ways, options.rounds)
        for name, way in taken.items():
            assert way.found is not None
            assert taken["pairs"].found is not None
            right = tokens[way.found.argmin(dim=1)] == truth
            apart = (way.found - taken["pairs"].found).abs().max()
            rows.append({
                "what": "scan", "vocabulary": count, "positions": len(truth), "way": name,
                **way.row(options.rounds), "token-accuracy": float(right.double().mean()),
                "away from pairs": float(apart),
            })  # fmt: skip
    return rows


@dataclass
class Taken(Generic[T]):
    """Median wall seconds, those of all processors together in every call, and what the last one gave."""

    call: Callable[[], T]
    processors: list[float] = field(default_factory=list)
    found: T | None = None
    seconds: float = 0.0

    def __call__(self) -> None:
        began = time.process_time()
        self.found = self.call()
        self.processors.append(time.process_time() - began)

    def row(self, rounds: int) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu seconds": statistics.median(self.processors[-rounds:])}


def timed(calls: dict[str, Callable[[], T]], rounds: int) -> dict[str, Taken[T]]:
    """Every way of doing a thing, in turns; wall time is fair only on an idle machine, the processors' on any."""
    taken = {name: Taken(call) for name, call in calls.items()}
    for name, seconds in paired(taken, rounds).items():
        taken[name].seconds = seconds
    return taken


def naive(victim: LanguageVictim, span: Span, tokens: Tensor, positions: int) -> Tensor:
    """(positions, n) distances: the embeddings of all tokens at one position after another, then the projection."""
    base: Any = victim.module.base_model
    rows = []
    with torch.no_grad():
        for place in range(positions):
            places = torch.full((len(tokens), 1), victim.first_position + place)
            if hasattr(base, "embeddings"):
                inputs = base.embeddings(input_ids=tokens[:, None], position_ids=places)[:, 0]
            else:
                inputs = base.h[0].ln_1(base.wte(tokens) + base.wpe(places[:, 0]))
            rows.append(torch.stack([_projected(test.basis, test.mapping, inputs) for test in span.tests]))
    return torch.stack(rows).amax(dim=1)


def _projected(basis: Tensor, mapping: Tensor | None, inputs: Tensor) -> Tensor:
    points = inputs if mapping is None else inputs @ mapping.to(inputs).T
    points = points / points.norm(dim=-1, keepdim=True)
    rows = basis.to(points)
    return (torch.einsum("ik,ij,nj->nk", rows, rows, points) - points).norm(dim=-1)


def attacks(victim: LanguageVictim, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole attacks, `applies` and labels included, on the batches that begin at --start."""
    rows = []
    for count in options.batches:
        batch = sentences(victim, options.start, count, options)
        whole = observe(victim, batch, "none", options)
        kept = [name for name in whole.observed if name not in (victim.word, victim.position)]
        frozen = replace(whole, observed=whole.observed.select(kept))
        for name in options.attack:
            if parse(name, ATTACKS, "attack").applies(whole) is not None:
                continue
            runs: dict[str, Callable[[], dict[str, float]]] = {
                "as shared": partial(attacked, whole, batch, name, options)
            }
            if name.startswith("span-check") and count == 1:
                runs["frozen embeddings, pairs"] = partial(with_pairs, frozen, batch, name, options)
                runs["frozen embeddings"] = partial(attacked, frozen, batch, name, options)
            for way, run in timed(runs, options.rounds).items():
                assert run.found is not None
                rows.append({
                    "what": name, "batch": count, "way": way, **run.row(options.rounds),
                    "seconds a sentence": run.seconds / count, "token-accuracy": run.found["token-accuracy"],
                })  # fmt: skip
    return rows


def with_pairs(view: View, batch: PrivateText, name: str, options: argparse.Namespace) -> dict[str, float]:
    """An attack that makes every pair."""
    with patch.object(text_recovery, "scan", every_pair):
        return attacked(view, batch, name, options)


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
            row["residual"] = found.loss
    except RuntimeError as error:
        print(json.dumps({"attack": spec, "failed": str(error)[:100]}), flush=True)
    return {**row, "seconds": round(time.monotonic() - began, 2)}


def surroundings(victim: LanguageVictim, options: argparse.Namespace) -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(tensor.numel() for tensor in victim.params.values()),
        **{key: str(value) for key, value in vars(options).items() if value is not None},
    }


if __name__ == "__main__":
    main()
