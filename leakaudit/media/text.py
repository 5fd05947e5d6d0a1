"""Private sentences: model inputs are token numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from leakaudit import bundled
from leakaudit.attacks.base import OnStep, Reconstruction
from leakaudit.attacks.registry import TEXT_AUTO
from leakaudit.errors import InputError
from leakaudit.formats.manifest import Manifest
from leakaudit.formats.phrases import listing
from leakaudit.hypotheses import Sweep
from leakaudit.illustration import Yardstick, hard_labels, thinned
from leakaudit.inspection import Inspection
from leakaudit.media.base import Exhibit, check_count
from leakaudit.metrics import BatchScores, label_score
from leakaudit.models.language import LanguageVictim
from leakaudit.models.lora import Lora
from leakaudit.models.spaces import NO_TOKEN
from leakaudit.models.victim import Victim
from leakaudit.randomness import fork
from leakaudit.results import ExampleScores, Finding, Frame, Verification
from leakaudit.text_data import (
    PrivateText,
    fill_masks,
    load_text,
    load_truth,
    private_text,
    read_sentences,
    save_truth,
)
from leakaudit.text_inspection import inspect_text
from leakaudit.text_metrics import DEFAULT_TEXT_METRICS, TEXT_METRICS, marks, score_sentences
from leakaudit.text_verification import verify_text
from leakaudit.threat import View
from leakaudit.update import Update


@dataclass(frozen=True)
class Text:
    """The medium of `Tokens`; its victims are `LanguageVictim`s, a pool is a tuple of sentences."""

    name: ClassVar[Literal["text"]] = "text"
    specimen: ClassVar[str] = "sentence"
    auto: ClassVar[tuple[str, ...]] = TEXT_AUTO
    metrics: ClassVar[tuple[str, ...]] = DEFAULT_TEXT_METRICS
    known_metrics: ClassVar[tuple[str, ...]] = tuple(TEXT_METRICS)
    facts_left_out: ClassVar[frozenset[str]] = frozenset({"normalisation", "statistics"})

    def load(
        self,
        source: str | Path,
        victim: Victim,
        count: int | None,
        *,
        start: int = 0,
        max_length: int | None = None,
        seed: int = 0,
    ) -> PrivateText:
        victim = _language(victim)
        return load_text(
            source,
            victim.space,
            victim.task,
            count,
            start=start,
            num_classes=victim.num_classes if victim.task == "classification" else None,
            max_length=max_length,
            seed=seed,
        )

    def save_truth(self, path: str | Path, batch: PrivateText) -> None:
        save_truth(path, batch)

    def advice(self, victim: Victim, *, saved: bool) -> list[str]:
        fresh = _language(victim).fresh
        if not fresh or saved:
            return []
        return [
            f"Not in the files of {victim.name}, so initialised at random: {listing(fresh)}. An attack without the"
            " client's model (--save-model) repeats that for seed 0 only."
        ]

    def tensors(self, victim: Victim, batch: PrivateText) -> tuple[Tensor, Tensor]:
        victim = _language(victim)
        _check(batch, victim, "the batch")
        return batch.tokens.to(victim.device), batch.labels.to(victim.device)

    def manifest_fields(self, victim: Victim) -> dict[str, Any]:
        victim = _language(victim)
        return {
            "task": victim.task,
            "lora": None if victim.lora is None else Lora.parse(victim.lora).options,
            "num_classes": victim.num_classes if victim.task == "classification" else None,
        }

    def task(self, victim: Victim) -> str:
        return _language(victim).task

    def read_truth(self, path: str | Path, view: View) -> PrivateText:
        truth = load_truth(path)
        _check(truth, _language(view.victim), path)
        check_count(path, len(truth), "sentence", view)
        return truth

    def read_pool(self, path: str | Path | None, view: View) -> tuple[str, ...]:
        return bundled.sentences() if path is None else read_sentences(path)

    def remarks(self, victim: Victim, manifest: Manifest) -> list[Finding]:
        victim = _language(victim)
        found = []
        if victim.fresh:
            text = (
                f"The files of {victim.name} hold no {listing(victim.fresh)}: initialised at random (seed 0),"
                " which must be what the client did; else pass the client's model as --checkpoint."
            )
            found.append(
                Finding(name="fresh parameters", severity="info", text=text, data={"names": victim.fresh})
            )
        if manifest.mode == "train" and victim.mode_matters:
            text = (
                "The client trained with dropout, whose masks nobody else knows: the attacks simulate the model"
                " without, and no re-simulation can match the update exactly."
            )
            found.append(Finding(name="dropout", severity="warning", text=text))
        return found

    def inspect(
        self,
        view: View,
        *,
        generator: torch.Generator,
        buffers_after: Mapping[str, Tensor] | None = None,
        raw: Update | None = None,
        dtypes: Mapping[str, str] | None = None,
    ) -> Inspection:
        return inspect_text(view, generator=generator, raw=raw, dtypes=dtypes)

    def settle(
        self, view: View, seed: int, on_step: OnStep | None, budget: float | None
    ) -> tuple[View, Sweep]:
        """Nothing is tried: local steps stay one unless stated."""
        return view, Sweep()

    def verify(self, view: View, x: Tensor, y: Tensor) -> Verification:
        return verify_text(view, nearest_tokens(_language(view.victim), x), y)

    def measure(
        self,
        found: Reconstruction,
        view: View,
        yardstick: Yardstick[PrivateText, tuple[str, ...]],
        names: Sequence[str],
    ) -> BatchScores:
        assert yardstick.truth is not None
        victim = _language(view.victim)
        return score_sentences(
            recovered_sentences(victim, found.x, found.y),
            yardstick.truth.sentences,
            victim.space,
            [TEXT_METRICS[name] for name in names],
            pool=yardstick.pool,
            generator=fork(yardstick.seed, "chance"),
        )

    def exhibit(
        self,
        found: Reconstruction,
        view: View,
        yardstick: Yardstick[PrivateText, tuple[str, ...]],
        folder: Path,
        attack: str,
        *,
        best: bool,
    ) -> Exhibit:
        victim, truth = _language(view.victim), yardstick.truth
        sentences = recovered_sentences(victim, found.x, found.y)
        classes = hard_labels(found.y) if victim.task == "classification" else None
        if truth is None:
            examples = [
                ExampleScores(
                    index=i,
                    matched=i,
                    recovered_label=None if classes is None else str(int(classes[i])),
                    recovered_tokens=marks(row, None, victim.space),
                )
                for i, row in enumerate(sentences)
            ]
            return Exhibit(examples=examples, strip=_strip(found, victim, [None] * len(sentences)))
        scored = self.measure(found, view, yardstick, yardstick.metrics)
        owners = {j: i for i, j in enumerate(scored.matched) if j >= 0}
        originals = [truth.sentences[owners[j]] if j in owners else None for j in range(len(sentences))]
        scores = list(scored.scores)
        if classes is not None:
            scores.append(label_score(classes, truth.labels, victim.num_classes))
        examples = [
            ExampleScores(
                index=i,
                matched=j,
                true_label=truth.label_name(i),
                recovered_label=None if classes is None or j < 0 else truth.class_name(int(classes[j])),
                scores=scored.per_example[i],
                original_tokens=None if yardstick.redact else marks(truth.sentences[i], None, victim.space),
                recovered_tokens=None if j < 0 else marks(sentences[j], truth.sentences[i], victim.space),
            )
            for i, j in enumerate(scored.matched)
        ]
        return Exhibit(scores, examples, _strip(found, victim, originals))

    def control(self, view: View) -> PrivateText:
        """The first bundled sentence, cut off where the model takes no more; random tokens without a tokenizer."""
        victim = _language(view.victim)
        if victim.space.tokenizer is None:
            tokens = victim.probe(1).cpu()
            labels = victim.probe_labels(1).cpu()
            return PrivateText(tokens, labels, ("",), ("random tokens",), victim.task)
        return private_text(
            bundled.sentences()[:1], victim.space, victim.task, max_length=victim.space.max_length
        )

    def contents(self, found: Reconstruction, view: View) -> tuple[dict[str, Tensor], dict[str, str]]:
        victim = _language(view.victim)
        sentences = recovered_sentences(victim, found.x, found.y)
        texts = json.dumps(victim.space.decode(sentences), ensure_ascii=False)
        return {"tokens": sentences, "inputs": found.x, "labels": found.y}, {"texts": texts}


TEXT = Text()


def recovered_sentences(victim: LanguageVictim, x: Tensor, y: Tensor) -> Tensor:
    """(M, L) int64 on the CPU: the tokens of a reconstruction, masks filled in."""
    return fill_masks(nearest_tokens(victim, x), y).cpu()


def nearest_tokens(victim: LanguageVictim, x: Tensor) -> Tensor:
    """Token numbers (N, L) as they are; for embeddings (N, L, H) the nearest word row of each."""
    if not x.is_floating_point():
        return x
    rows = victim.word_rows.to(x.device, x.dtype)
    there = ~x.isnan().any(-1)
    nearest = torch.stack([torch.cdist(sentence, rows).argmin(-1) for sentence in x.nan_to_num()])
    return nearest.masked_fill(~there, NO_TOKEN)


def _strip(found: Reconstruction, victim: LanguageVictim, originals: Sequence[Tensor | None]) -> list[Frame]:
    """The film strip; each reconstruction is marked against the private sentence it was matched to, in frames
    of as many sentences as the last."""
    frames = []
    for iteration, loss, x in thinned(found.strip):
        sentences = recovered_sentences(victim, x.to(victim.device), found.y)
        against = originals if len(sentences) == len(originals) else [None] * len(sentences)
        rows = [marks(row, original, victim.space) for row, original in zip(sentences, against, strict=True)]
        frames.append(Frame(iteration=iteration, loss=loss, sentences=rows))
    return frames


def _language(victim: Victim) -> LanguageVictim:
    return cast(LanguageVictim, victim)


def _check(batch: PrivateText, victim: LanguageVictim, what: str | Path) -> None:
    if batch.task != victim.task:
        raise InputError(f"{what} is of task {batch.task}, the model's is {victim.task}")
    longest = int((batch.tokens != NO_TOKEN).sum(1).max())
    if longest > victim.space.max_length:
        raise InputError(
            f"{what} holds a sentence of {longest} tokens, the model takes {victim.space.max_length}"
        )
    largest = max(int(batch.tokens.max()), int(batch.sentences.max()))
    if largest >= victim.space.vocabulary:
        raise InputError(
            f"{what} holds token {largest:,}, the model's vocabulary ends at {victim.space.vocabulary - 1:,}:"
            " another tokenizer?"
        )
    if batch.task == "classification" and int(batch.labels.max()) >= victim.num_classes:
        raise InputError(f"label {int(batch.labels.max())} for a model of {victim.num_classes} classes")
