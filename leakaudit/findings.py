"""Findings on the file and on the last layer, the same for images and text.

Sources: labels and counts: `leakaudit.attacks.labels`; noise: the class scores' gradients p - onehot add up
to zero for every example, so each column of the last layer's weight gradient does; noise of standard
deviation s on each of its K numbers makes those sums s sqrt(K).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from leakaudit.attacks.head import (
    HeadConsistency,
    HeadGradient,
    effective_rank,
    head_gradient,
)
from leakaudit.attacks.labels import LabelInference, infer_labels
from leakaudit.errors import InputError
from leakaudit.formats.phrases import counted
from leakaudit.models.victim import cross_entropy_sum
from leakaudit.results import Finding
from leakaudit.threat import View
from leakaudit.update import Update

SAMPLE = 65_536


@dataclass
class Notes:
    """Findings as they come."""

    findings: list[Finding] = field(default_factory=list)

    def leak(self, name: str, text: str, **data: Any) -> None:
        self.findings.append(Finding(name=name, severity="leak", text=text, data=data))

    def hint(self, name: str, text: str, **data: Any) -> None:
        self.findings.append(Finding(name=name, severity="hint", text=text, data=data))

    def info(self, name: str, text: str, **data: Any) -> None:
        self.findings.append(Finding(name=name, severity="info", text=text, data=data))

    def warning(self, name: str, text: str, **data: Any) -> None:
        self.findings.append(Finding(name=name, severity="warning", text=text, data=data))


def missing_parameters(view: View, notes: Notes) -> None:
    missing = [name for name in view.victim.params if name not in view.observed]
    if missing:
        notes.info(
            "missing parameters",
            f"{len(missing)} of {len(view.victim.params)} trainable tensors were not shared.",
            names=missing,
        )


@dataclass(frozen=True)
class Storage:
    """How numbers were kept: on a few levels, or with an absolute error (float16 near zero)."""

    quantised: bool
    absolute: float = 0.0


def storage_of(shared: Update, dtypes: Mapping[str, str], notes: Notes) -> Storage:
    """Report few levels or a short float type."""
    levels = {name: found for name, tensor in shared.items() if (found := _levels(tensor)) is not None}
    if sum(shared[name].numel() for name in levels) > 0.5 * shared.numel():
        most = max(levels.values())
        kind = {2: "signs only", 3: "signs and zeros"}.get(most, f"at most {most} levels a tensor")
        notes.info(
            "quantisation",
            f"The numbers were quantised before sharing: {kind}, in {len(levels)} of {len(shared)} tensors."
            " An adversary who rounds its own simulation the same way loses little.",
            levels=levels,
        )
        return Storage(quantised=True)
    stored = sorted({dtypes[name] for name in shared if name in dtypes} & {"float16", "bfloat16"})
    short = stored[0] if len(stored) == 1 else _short_float(shared)
    if short is None:
        return Storage(quantised=False)
    how = "is stored as" if stored else "was rounded to (every number fits)"
    notes.info(
        "precision",
        f"The update {how} {short}: its numbers are known to about {_epsilon(short):.0e} relative, which"
        " hides little of the private data.",
        dtype=short,
        epsilon=_epsilon(short),
    )
    return Storage(quantised=False, absolute=2.0**-24 if short == "float16" else 0.0)


def same_sizes(view: View, shared: Update, notes: Notes) -> None:
    """Warn where nearly all numbers of every tensor are equally large, as after one step of Adam."""
    tensors = [tensor.abs() for tensor in shared.values() if tensor.numel() >= 32 and bool(tensor.any())]
    alike = sum(int((tensor > 0.9 * tensor.max()).sum()) for tensor in tensors)
    if alike > 0.8 * sum(tensor.numel() for tensor in tensors) > 0 and not view.knowledge.defense.value:
        notes.warning(
            "optimiser",
            "Nearly all numbers are equally large, as after one step of Adam or of signs: the attacks simulate"
            " plain SGD, and cannot match such an update.",
        )


def _levels(tensor: Tensor) -> int | None:
    """Number of distinct values when they are few, and evenly spaced if more than 16; else None."""
    values = _sampled(tensor)
    filled = int((values != 0).sum())
    distinct = _distinct(values)
    if filled < 32 or not 2 <= len(distinct) <= min(256, filled / 2):
        return None
    gaps = distinct.diff()
    steps = gaps / gaps.min()
    even = bool(((steps - steps.round()).abs() < 1e-2 * steps).all())
    return len(distinct) if even or len(distinct) <= 16 else None


def _short_float(shared: Update) -> str | None:
    """The short float type that holds every number of the update, when that cannot be chance."""
    values = torch.cat([_sampled(tensor) for tensor in shared.values()]).double()
    values = values[values != 0]
    if len(_distinct(values)) < 16:
        return None
    for name in ("bfloat16", "float16"):
        if torch.equal(values.to(getattr(torch, name)).double(), values):
            return name
    return None


def _distinct(values: Tensor) -> Tensor:
    ordered = values.sort().values
    return torch.cat([ordered[:1], ordered[1:][ordered.diff() != 0]])


def _sampled(tensor: Tensor) -> Tensor:
    """At most about `SAMPLE` numbers, evenly spread, on the CPU."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].cpu()


def _epsilon(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


def pruning(view: View, shared: Update, storage: Storage, notes: Notes) -> bool:
    """Report zeros that the model does not make by itself; True when entries were pruned.

    Dead ReLU units make whole rows or columns zero.  A ReLU can also leave scattered zeros, so these
    count only where the update of a random input has none, or where a threshold is visible: a
    top-k mask leaves no number below it, while numbers that merely happen to be small thin out.
    """
    shares = {name: float((tensor == 0).double().mean()) for name, tensor in shared.items()}
    weights = {
        name: _live_block(tensor)
        for name, tensor in shared.items()
        if tensor.dim() > 1
        and tensor.numel() >= 64
        and bool(tensor.any())
        and not _underflows(tensor, storage)
    }
    suspects = {name: live for name, live in weights.items() if float((live == 0).double().mean()) > 0.01}
    natural = _natural_zeros(view, list(suspects))
    pruned = [
        name for name, live in suspects.items() if _cut_off(live) or (not natural[name] and _all_over(live))
    ]
    dead = {name: int((shared[name].reshape(len(shared[name]), -1) == 0).all(1).sum()) for name in weights}
    if pruned:
        zero = sum(shares[name] * shared[name].numel() for name in shares) / shared.numel()
        notes.hint(
            "pruning",
            f"{zero:.1%} of the numbers are exactly zero, scattered as by a pruning mask in {len(pruned)} of"
            f" {len(shared)} tensors. Which numbers were kept shows where the gradient is large, and the"
            " adversary simply compares those.",
            zeros=shares,
            pruned=pruned,
        )
    elif any(dead.values()):
        notes.info(
            "inactive units",
            f"{sum(dead.values())} units have a gradient of exactly zero, as ReLU units that no private example"
            " activates have (whole rows, so not a pruning mask).",
            rows={name: rows for name, rows in dead.items() if rows},
        )
    return bool(pruned)


def _natural_zeros(view: View, names: list[str]) -> dict[str, bool]:
    """Whether the gradient of one random input has scattered zeros, for each named weight."""
    if not names:
        return {}
    victim, count = view.victim, view.round.num_examples
    update = view.simulate(victim.probe(count), victim.probe_labels(count)).detach()
    return {name: bool((_live_block(update[name]) == 0).any()) for name in names}


def _all_over(live: Tensor) -> bool:
    """Zeros in most rows; single rows may have them where the model is certain to the last digit."""
    return float((live == 0).double().mean(1).median()) > 0.01


def _live_block(tensor: Tensor) -> Tensor:
    """(rows, columns) of a weight without all-zero output units and all-zero input units."""
    blocks = tensor.reshape(tensor.shape[0], tensor.shape[1], -1) != 0
    live = tensor[blocks.any(2).any(1)][:, blocks.any(2).any(0)]
    return live.reshape(len(live), -1)


def _underflows(tensor: Tensor, storage: Storage) -> bool:
    """Whether the smallest numbers left are at the bottom of float16, where others became zero."""
    kept = tensor[tensor != 0].abs()
    return storage.absolute > 0 and float(kept.min()) < 8 * storage.absolute


def _cut_off(values: Tensor) -> bool:
    """No number but zero lies far below the sixteenth smallest: a threshold was applied.

    Numbers with any density near zero pass with probability 2^-15 at most.
    """
    kept = _sampled(values).abs()
    kept = _distinct(kept[kept > 0])
    return len(kept) >= 32 and float(kept[0] / kept[15]) > 0.5


def class_sum_noise(view: View, storage: Storage, notes: Notes) -> float | None:
    """Standard deviation of noise, from sums over classes that are zero without it."""
    head = head_gradient(view)
    if head is None or head.weight_gradient is None or head.weight is None:
        return None
    gradient = head.weight_gradient
    classes, size = gradient.shape[0], float(gradient.square().mean().sqrt())
    std = float(gradient.sum(0).square().mean().sqrt()) / math.sqrt(classes)
    if not std > max(20 * head.epsilon * size, 4 * storage.absolute):
        return None
    doubt = "" if std > 5e-3 * size else " Arithmetic in reduced precision (TF32, half) could look the same."
    notes.hint(
        "noise",
        "The last layer's gradient does not add up to zero over the classes, as an exact one does: noise of"
        f" standard deviation about {std:.2g} per number was added, where the gradient's own rms is"
        f" {size:.2g} (estimated from {gradient.shape[1]} sums).{doubt}",
        std=std,
        rms=size,
        ratio=std / size,
    )
    return std


def clipping(view: View, shared: Update, notes: Notes) -> None:
    for what, update in (("as shared", shared), ("as a gradient", view.observed)):
        norm = float(update.flat().double().norm())
        digits = float(f"{norm:.1e}")
        if norm > 0 and abs(norm - digits) <= 5e-6 * digits:
            notes.hint(
                "clipping",
                f"The update's length {what} is {norm:.6g}, a round number: it was probably clipped to"
                f" {digits:g}, so its scale says nothing.",
                norm=norm,
            )
            return


def gradient_sizes(view: View, notes: Notes) -> None:
    rms = {name: float(tensor.square().mean().sqrt()) for name, tensor in view.observed.items()}
    largest, smallest = max(rms, key=rms.__getitem__), min(rms, key=rms.__getitem__)
    silent = [name for name, value in rms.items() if value == 0]
    quiet = f" No gradient at all in: {', '.join(silent)}." if silent else ""
    notes.info(
        "gradient size",
        f"Gradient rms per tensor from {rms[smallest]:.2g} ({smallest}) to"
        f" {rms[largest]:.2g} ({largest}).{quiet}",
        rms=rms,
    )


def with_examples(view: View, count: int) -> View:
    if count == view.round.num_examples:
        return view
    size = view.round.local_batch_size
    size = None if size is None else min(size, count)
    return replace(view, round=view.round.of(count, size))


def checkpoint(view: View, found: HeadConsistency | None, notes: Notes, changed: bool) -> None:
    """Does the checkpoint belong to the update?  Only one example in one step can prove it."""
    stated = view.knowledge.batch_size.value
    if found is None or not found.single_example or not _telling(found, stated):
        return
    data = {"factor": found.factor, "residual": found.residual, "rank_residual": found.rank_residual}
    if found.belongs and found.unscaled:
        notes.info(
            "checkpoint",
            "Proven on the last layer: the update is the unscaled gradient of one example under this"
            f" checkpoint (relative residual {found.residual:.1e}).",
            **data,
        )
    elif found.belongs and found.factor < 0:
        notes.warning(
            "checkpoint",
            f"The last layer is {found.factor:.4g} times the gradient of one example: the sign is the wrong"
            " way round. State the file's kind and sign.",
            **data,
        )
    elif found.belongs:
        notes.info(
            "checkpoint",
            f"Proven on the last layer: the update is {found.factor:.4g} times the gradient of one example"
            " under this checkpoint (a learning rate, clipping, a sum or small steps).",
            **data,
        )
    elif found.belongs is False and not changed:
        sure = view.knowledge.local_steps.value == 1 and stated == 1
        (notes.warning if sure else notes.hint)(
            "checkpoint",
            "The last layer's gradient has the form of one example, but not under this checkpoint (relative"
            f" residual {found.residual:.2g}): the client started from another one"
            + (
                ". Attacks cannot match such an update."
                if sure
                else ", made several steps, or has several examples with the same features."
            ),
            **data,
        )


def _telling(found: HeadConsistency, stated: int | None) -> bool:
    """Whether rank one means one example: stated so, or seen at more than the precision of similar features."""
    return stated == 1 or (stated is None and found.tolerance < 1e-3)


def batch_size(view: View, consistency: HeadConsistency | None, notes: Notes) -> int | None:
    """Examples behind the update, from the rank of the last layer's gradient, when that can tell."""
    head = head_gradient(view)
    if head is None or head.weight_gradient is None:
        return None
    stated = view.knowledge.batch_size.value
    if consistency is not None and consistency.single_example and _telling(consistency, stated):
        notes.hint(
            "batch size",
            "The last layer's gradient has rank one: one example (or several with the very same features).",
            rank=1,
        )
        return 1
    if view.round.local_steps > 1:
        return None
    _reduction(view, head, notes)
    rank = effective_rank(head.weight_gradient, head.epsilon)
    limit = min(head.weight_gradient.shape[0] - 1, head.weight_gradient.shape[1])
    if stated is not None and stated < rank:
        notes.warning(
            "batch size",
            f"The last layer's gradient has rank {rank}, more than the number of examples stated, {stated}: there were"
            " more examples or steps, or something was added to the update.",
            rank=rank,
            stated=stated,
        )
        return None
    certain = rank < limit
    steps = "" if view.knowledge.local_steps.value == 1 else ", or fewer in several local steps"
    notes.hint(
        "batch size",
        f"The last layer's gradient has rank {rank} of at most {limit}: "
        + (
            f"{counted(rank, 'example')}, unless some have the same features{steps} (estimate)."
            if certain
            else "no fewer examples."
        ),
        rank=rank,
        limit=limit,
    )
    return rank if certain else None


def _reduction(view: View, head: HeadGradient, notes: Notes) -> None:
    """A mean over examples cannot push the classes' biases by more than 1 in all."""
    if head.bias_gradient is None or not head.scaled:
        return
    negative = -float(head.bias_gradient.clamp(max=0).sum())
    if negative > 1.001 and view.victim.loss_function is not cross_entropy_sum:
        notes.warning(
            "loss reduction",
            f"The negative gradients of the class biases add up to {negative:.3g}, above the 1 that a mean"
            f" over examples allows: the loss was summed over at least {math.ceil(negative)} examples (state"
            " reduction=sum), or the update was scaled up.",
            negative=negative,
        )


def labels_of(view: View, generator: torch.Generator, notes: Notes, provable: bool) -> LabelInference | None:
    count = view.round.num_examples
    try:
        found = infer_labels(view, generator)
    except InputError as error:
        notes.info("labels", f"{error}.")
        return None
    found = replace(found, exact=found.exact and provable)
    counts = {int(c): int(found.counts[c]) for c in found.counts.nonzero().flatten()}
    listed = ", ".join(f"class {c}" + (f" x{n}" if n > 1 else "") for c, n in counts.items())
    if found.exact:
        certainty = f"{'proven' if count == 1 else 'fits to rounding'}, by the {found.method}"
    else:
        certainty = f"estimated; explains {found.explained:.1%} of the bias gradient"
    (notes.leak if found.exact or found.explained > 0.9 else notes.hint)(
        "labels",
        f"The last layer gives away the labels of {count} {'example' if count == 1 else 'examples'}: {listed}"
        f" ({certainty}).",
        counts={str(c): n for c, n in counts.items()},
        method=found.method,
        explained=found.explained,
        exact=found.exact,
    )
    return found
