"""The bundled tiny language models, one private batch each, and a simple attack, for the tests of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from text_rounds import tiny_victim

from leakaudit.attacks import registry
from leakaudit.attacks.base import Monitor, Reconstruction
from leakaudit.bundled import tiny_model
from leakaudit.models.language import LanguageVictim
from leakaudit.models.spaces import Tokens
from leakaudit.rounds import Round, client_update
from leakaudit.text_data import PrivateText, private_text
from leakaudit.threat import Knowledge, View, known

TEXTS = ("The cat slept on the piano.", "Our nurse stayed calm and explained everything twice.")
CASES = (("bert", "classification"), ("bert", "mlm"), ("gpt2", "causal-lm"))
BERT = f"hf:{tiny_model('bert')}"
GPT2 = f"hf:{tiny_model('gpt2')}"


def text_victim(model: str = "bert", task: str = "classification") -> LanguageVictim:
    return tiny_victim(model, task)  # type: ignore[arg-type]


def space_of(model: str = "bert") -> Tokens:
    return text_victim(model, {"bert": "mlm", "gpt2": "causal-lm"}[model]).space


def batch_of(victim: LanguageVictim, count: int = 1) -> PrivateText:
    labels = [1, 0][:count] if victim.task == "classification" else None
    return private_text(TEXTS[:count], victim.space, victim.task, labels)


def text_view(victim: LanguageVictim, count: int = 1, **facts: Any) -> tuple[View, PrivateText]:
    """What a server sees of the first sentences, and these."""
    batch, round = batch_of(victim, count), Round(count)
    observed = client_update(victim, victim.params, round, batch.tokens, batch.labels).detach()
    knowledge = {
        "batch_size": known(count, "test"),
        "local_steps": known(1, "test"),
        "mode": known("eval", "test"),
        "scale": known(True, "test"),
    }
    return View(victim, round, observed, Knowledge(**{**knowledge, **facts})), batch


@dataclass(frozen=True)
class PositionRows:
    """One sentence behind a classifier: the word row most like each position row (test only)."""

    restarts: int = 1
    wrong: int = 0

    def applies(self, view: View) -> str | None:
        return None if view.round.num_examples == 1 else "it takes one sentence"

    def run(self, view: View, generator: torch.Generator, monitor: Monitor) -> Reconstruction:
        victim: Any = view.victim
        words, positions = view.observed[victim.word], view.observed[victim.position]
        bag = words.any(1).nonzero().flatten()
        used = positions[positions.any(1)]
        found = bag[(F.normalize(used, dim=1) @ F.normalize(words[bag], dim=1).T).argmax(1)][None]
        found[0, : self.wrong] = 7
        labels = view.knowledge.labels.value
        start = torch.zeros_like(found)
        monitor.start(1)
        monitor.step(1.0, start, labels)
        monitor.step(view.residual(found, labels), found, labels)
        return monitor.result()


@contextmanager
def registered_attack(name: str = "test-rows") -> Iterator[str]:
    """`PositionRows` registered as a text attack for a while."""
    tables: tuple[dict[str, Any], ...] = (registry.TEXT_ATTACKS, registry.ATTACKS)
    for table in tables:
        table[name] = PositionRows()
    try:
        yield name
    finally:
        for table in tables:
            del table[name]


def random_tokens(space: Tokens, count: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return replace(space, max_length=length).sample(count, generator)
