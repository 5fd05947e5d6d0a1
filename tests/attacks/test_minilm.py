"""The sentence of DLG's text figure behind MiniLM, where HF_HOME or the data beside the repository holds it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from leakaudit.attacks.base import Monitor
from leakaudit.attacks.text_recovery import PositionRows, SpanCheck
from leakaudit.models.language import Task
from leakaudit.models.pretrained import load_language_victim
from leakaudit.randomness import fork
from leakaudit.rounds import Round, client_update
from leakaudit.text_data import private_text
from leakaudit.threat import View
from leakaudit.update import Update

SENTENCE = (
    "Registration, volunteer applications, and student travel application open the first week of September."
    " Child care will be available."
)
SHORT = ("The fish was not in the sea.", "Somebody just left, guess who.")
CACHE = "hub/models--sentence-transformers--all-MiniLM-L6-v2/snapshots"


@pytest.fixture(scope="module")
def minilm() -> str:
    homes = [Path(__file__).parents[2].parent / "shared" / "data" / "hf_home"]
    if "HF_HOME" in os.environ:
        homes.insert(0, Path(os.environ["HF_HOME"]))
    found = [folder for home in homes for folder in sorted((home / CACHE).glob("*"))]
    if not found:
        pytest.skip("HF_HOME does not hold MiniLM")
    return f"hf:{found[0]}"


def seen(model: str, task: Task, texts: tuple[str, ...]) -> tuple[View, torch.Tensor, torch.Tensor]:
    """What the server sees of a batch, and the batch."""
    victim = load_language_victim(model, task)
    batch = private_text(texts, victim.space, task, [i % 2 for i in range(len(texts))])
    round = Round(len(texts))
    update = client_update(victim, victim.params, round, batch.tokens, batch.labels).detach()
    return View(victim, round, update), batch.tokens, batch.labels


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_the_sentence_of_dlg_is_exact(minilm: str, task: Task) -> None:
    view, x, y = seen(minilm, task, (SENTENCE,))
    found = PositionRows().run(view, fork(0, "test"), Monitor())
    assert torch.equal(found.x, x)
    assert torch.equal(found.y, y)
    assert found.loss < 1e-5


def test_it_stays_exact_under_noise(minilm: str) -> None:
    view, x, _ = seen(minilm, "classification", (SENTENCE,))
    generator = fork(0, "noise")
    noisy = {name: t + 1e-4 * torch.randn(t.shape, generator=generator) for name, t in view.observed.items()}
    view = View(view.victim, view.round, Update(noisy))
    assert torch.equal(PositionRows(polish=0).run(view, fork(0, "test"), Monitor()).x, x)


def test_two_sentences_are_taken_apart(minilm: str) -> None:
    view, x, _ = seen(minilm, "classification", SHORT)
    found = SpanCheck().run(view, fork(0, "test"), Monitor())
    assert {tuple(row) for row in found.x.tolist()} == {tuple(row) for row in x.tolist()}
    assert found.loss < 1e-5
