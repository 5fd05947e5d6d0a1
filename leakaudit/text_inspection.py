"""What a shared update of a language model gives away by itself: seconds of arithmetic, no optimisation.

The gradient of an embedding row is the sum over the places where its token, or position, stands: rows of
tokens that nobody wrote are exactly zero, unless the layer that scores tokens shares the weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from leakaudit.attacks.head import HeadConsistency, head_consistency
from leakaudit.attacks.labels import LabelInference
from leakaudit.attacks.rows import Rows, language, noisy_rows, read_rows
from leakaudit.attacks.spans import attention_span
from leakaudit.findings import (
    Notes,
    Storage,
    batch_size,
    checkpoint,
    class_sum_noise,
    clipping,
    gradient_sizes,
    labels_of,
    missing_parameters,
    pruning,
    same_sizes,
    storage_of,
    with_examples,
)
from leakaudit.formats.phrases import counted
from leakaudit.inspection import Inspection
from leakaudit.models.language import LanguageVictim
from leakaudit.results import Finding
from leakaudit.threat import View
from leakaudit.update import Update

LISTED = 40
"""Tokens that a finding spells out; all of them are in its data."""


def inspect_text(
    view: View,
    *,
    generator: torch.Generator,
    raw: Update | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Inspection:
    """Look at an update of a `LanguageVictim` without attacking it; arguments as for `inspect_update`."""
    notes, victim = Notes(), language(view)
    shared = view.observed if raw is None else raw
    missing_parameters(view, notes)
    storage = storage_of(shared, dtypes or {}, notes)
    same_sizes(view, _without_zero_rows(shared), notes)
    pruned = not storage.quantised and pruning(view, _without_embeddings(victim, shared), storage, notes)
    altered = storage.quantised or pruned
    noise_std = None if altered else _noise(view, storage, notes)
    labels, hint, consistency = None, None, None
    if victim.task == "classification":
        labels, hint, consistency = _last_layer(view, generator, notes, altered, noise_std)
    if not storage.quantised and noise_std is None:
        notes.findings += text_findings(view, whole=not pruned)
    _membership(view, victim, noise_std or 0.0, notes)
    clipping(view, shared, notes)
    gradient_sizes(view, notes)
    return Inspection(
        findings=tuple(notes.findings),
        labels=labels,
        batch_size_hint=hint,
        local_steps=None,
        mode=None,
        statistics={},
        noise_std=noise_std,
        consistency=consistency,
        equations=sum(int((tensor != 0).sum()) for tensor in view.observed.values()),
        unknowns=view.unknowns,
    )


def _last_layer(
    view: View, generator: torch.Generator, notes: Notes, altered: bool, noise_std: float | None
) -> tuple[LabelInference | None, int | None, HeadConsistency | None]:
    """Labels, examples behind the update, and whether the checkpoint belongs to it, of a classifier."""
    changed = altered or noise_std is not None
    consistency = head_consistency(view)
    checkpoint(view, consistency, notes, changed=changed)
    hint = None if changed else batch_size(view, consistency, notes)
    stated = view.knowledge.batch_size.value
    view = with_examples(view, stated or hint or view.round.num_examples)
    proven_count = stated is not None or hint is not None
    labels = labels_of(view, generator, notes, provable=proven_count and noise_std is None)
    return labels, hint, consistency


# ------------------------------------------------------------------ words and positions


def text_findings(view: View, *, whole: bool) -> list[Finding]:
    """What the rows of the embeddings say of an update without noise; `whole` when nothing was pruned."""
    victim = language(view)
    notes = Notes()
    rows = read_rows(view)
    if rows is not None and (rows.certain or not victim.tied):
        _bag(rows, victim, notes, whole)
    if victim.position is not None and victim.position in view.observed:
        _longest(view, victim, notes, whole)
    return notes.findings


def _bag(rows: Rows, victim: LanguageVictim, notes: Notes, whole: bool) -> None:
    numbers = rows.tokens.sort().values.cpu()
    if not 0 < len(numbers) <= victim.space.vocabulary // 2:
        return
    how = "that the scores of tokens do not explain" if victim.tied else "with a gradient"
    pieces = victim.space.pieces(numbers)
    special = victim.space.special
    words = [piece for piece, number in zip(pieces, numbers.tolist(), strict=True) if number not in special]
    last = " (the last of a sentence leaves none)" if victim.task == "causal-lm" else ""
    notes.leak(
        "bag of tokens",
        f"The word embedding has {counted(len(numbers), 'row')} {how}{last}, so the client's text holds"
        f" {'exactly' if whole else 'at least'} these tokens: {_spelt(words)}.",
        tokens=pieces,
        numbers=numbers.tolist(),
        proven=True,
    )


def _spelt(words: list[str]) -> str:
    more = len(words) - LISTED
    return " ".join(words[:LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _longest(view: View, victim: LanguageVictim, notes: Notes, whole: bool) -> None:
    assert victim.position is not None
    used = view.observed[victim.position].any(1).nonzero().flatten()
    used = used[used >= victim.first_position]
    if not len(used):
        return
    length = int(used[-1]) - victim.first_position + 1 + (victim.task == "causal-lm")  # the last has no label
    if length > victim.space.max_length:
        return
    notes.leak(
        "longest sentence",
        f"The last row of the position embedding with a gradient shows that the longest sentence has"
        f" {'' if whole else 'at least '}{counted(length, 'token')}, special ones included.",
        length=length,
    )


def _membership(view: View, victim: LanguageVictim, noise: float, notes: Notes) -> None:
    """Whether the span check can tell tokens apart, which depends on the rank of the first layer's gradient."""
    span = attention_span(victim, view.observed, 0, noise) if victim.architecture is not None else None
    if span is None:
        family = victim.module.config.model_type
        why = (
            f"where {family} keeps its attention inputs is not known"
            if victim.architecture is None
            else "the first attention layer was not shared"
        )
        notes.info("membership", f"No word can be tested for membership in the batch: {why}.")
    elif span.tests:
        notes.hint(
            "membership",
            f"The first attention layer's gradient has rank {span.rank} of {span.width}: its inputs span a part"
            " of the space, so every token can be tested for membership. Up to a rank of"
            f" {span.width - 1}, which that many different tokens and places have, nothing is hidden.",
            rank=span.rank,
            width=span.width,
        )
    else:
        notes.info(
            "membership",
            f"The first attention layer's gradient fills its {span.width} dimensions: the batch has at least"
            " that many different tokens and places, or noise does. Membership is not identifiable this way.",
            rank=span.rank,
            width=span.width,
        )


# ------------------------------------------------------------------ the file


def _embeddings(victim: LanguageVictim) -> set[str]:
    """Names of the weights of embeddings."""
    owners = {id(m.weight) for m in victim.module.modules() if isinstance(m, nn.Embedding)}
    return {name for name, tensor in victim.module.named_parameters() if id(tensor) in owners}


def _without_embeddings(victim: LanguageVictim, shared: Update) -> Update:
    """Rows of embeddings are zero by themselves."""
    return shared.select(name for name in shared if name not in _embeddings(victim))


def _without_zero_rows(shared: Update) -> Update:
    return shared.map(lambda t: t[t.flatten(1).any(1)] if t.dim() > 1 else t)


def _noise(view: View, storage: Storage, notes: Notes) -> float | None:
    """Standard deviation of noise: of embedding rows that should be zero, else by the sums over classes."""
    found = noisy_rows(view)
    if found is not None:
        name, std = found
        if _decayed(view, name, notes):
            return None
        size = float(view.observed[name].double().square().mean(1).max().sqrt())
        notes.hint(
            "noise",
            f"Rows of {name} that no text needs, which should be zero, are all of the same size: noise of"
            f" standard deviation about {std:.2g} per number was added, where the largest row has"
            f" {size:.2g} (estimated).",
            std=std,
            rms=size,
            ratio=std / size,
        )
        return std
    victim = language(view)
    embeddings = [
        name for name in (None if victim.tied else victim.word, victim.position) if name is not None
    ]
    if any(name in view.observed and not bool(view.observed[name].any(1).all()) for name in embeddings):
        return None  # whatever class sums say: noise would have filled the rows that are zero
    return class_sum_noise(view, storage, notes) if victim.task == "classification" else None


def _decayed(view: View, name: str, notes: Notes) -> bool:
    """Whether the smallest rows point along the weights themselves, as weight decay leaves them."""
    victim = view.victim
    rows, weights = view.observed[name].double(), {**victim.params, **victim.frozen}[name].double()
    order = rows.square().mean(1).argsort()[: max(4, len(rows) // 10)]
    along = torch.cosine_similarity(rows[order], weights[order], dim=1).abs().median()
    if float(along) < 0.9:
        return False
    notes.warning(
        "weight decay",
        f"Rows of {name} that no text needs point along the weights, as weight decay moves them: the attacks"
        " simulate plain SGD, and cannot match such an update exactly.",
        cosine=float(along),
    )
    return True
