"""What a shared update gives away by itself: seconds of arithmetic, no optimisation.

Every check returns a `Finding` that says whether it is proven or estimated.  Sources:
    labels and counts: `leakaudit.attacks.labels`; closed forms: `leakaudit.attacks.linear`.
    BatchNorm: torch's running_mean and running_var (the latter with the unbiased variance of
        the batch), new = (1 - momentum) old + momentum batch, inverted.
    noise: the class scores' gradients p - onehot add up to zero for every example, so each
        column of the last layer's weight gradient does; noise of standard deviation s on each of
        its K numbers makes those sums s sqrt(K).
    equations: a sum of r outer products (O) x (I) has r (O + I - r) free numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from leakaudit.attacks.head import (
    HeadConsistency,
    HeadGradient,
    effective_rank,
    head_consistency,
    head_gradient,
)
from leakaudit.attacks.labels import LabelInference, infer_labels
from leakaudit.attacks.linear import Linear, PatchEmbeddingInverse, input_layer
from leakaudit.errors import InputError
from leakaudit.formats.phrases import counted
from leakaudit.models.victim import Mode, cross_entropy_sum
from leakaudit.results import Finding
from leakaudit.threat import View
from leakaudit.update import Update

SAMPLE = 65_536


@dataclass(frozen=True)
class Inspection:
    """All findings, and the values an audit goes on with.

    Attributes:
        findings: for the report, in reading order.
        labels: None when the update holds no layer next to the class scores.
        batch_size_hint: examples behind the update; None without a hint.
        local_steps: from `num_batches_tracked`; None without those buffers.
        mode: "train" when BatchNorm counted batches, "eval" when it did not; None when unknown.
        statistics: BatchNorm module -> (mean, biased variance) of the batch, each (C,), after one step.
        noise_std: estimated standard deviation of noise on each number of the update; None when
            nothing beyond rounding is seen.
        consistency: test of the hypothesis "one example, this checkpoint"; None when it cannot be made.
        equations: independent equations at most; unknowns: numbers to find.
    """

    findings: tuple[Finding, ...]
    labels: LabelInference | None
    batch_size_hint: int | None
    local_steps: int | None
    mode: Mode | None
    statistics: dict[str, tuple[Tensor, Tensor]]
    noise_std: float | None
    consistency: HeadConsistency | None
    equations: int
    unknowns: int


@dataclass
class _Notes:
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


def inspect_update(
    view: View,
    *,
    generator: torch.Generator,
    buffers_after: Mapping[str, Tensor] | None = None,
    raw: Update | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Inspection:
    """Look at an update without attacking it.

    Args:
        view: the adversary's view.
        generator: of the random inputs on which class probabilities are estimated.
        buffers_after: buffers as shared by the client after its round, by the victim's names.
        raw: the numbers as in the file, before sign and learning rate; `view.observed` when None.
        dtypes: parameter name -> type in the file, such as "float16".
    """
    notes = _Notes()
    shared = view.observed if raw is None else raw
    _missing(view, notes)
    storage = _storage(shared, dtypes or {}, notes)
    _same_sizes(view, shared, notes)
    altered = storage.quantised or _pruning(view, shared, storage, notes)
    noise_std = None if altered else _noise(view, storage, notes)
    changed = altered or noise_std is not None
    steps, mode = _local_steps(view, buffers_after or {}, notes)
    view = _with_steps(view, steps)
    consistency = head_consistency(view)
    _checkpoint(view, consistency, notes, changed=changed)
    hint = None if changed else _batch_size(view, consistency, notes)
    count = view.knowledge.batch_size.value or hint or view.round.num_examples
    proven_count = view.knowledge.batch_size.value is not None or hint is not None
    view = _with_examples(view, count)
    labels = _labels(view, generator, notes, provable=proven_count and noise_std is None)
    statistics = _statistics(view, buffers_after or {}, steps, notes)
    _closed_forms(view, notes, changed=changed)
    _clipping(view, shared, notes)
    equations, unknowns = _equations(view, notes)
    _sizes(view, notes)
    return Inspection(
        findings=tuple(notes.findings),
        labels=labels,
        batch_size_hint=hint,
        local_steps=steps,
        mode=mode,
        statistics=statistics,
        noise_std=noise_std,
        consistency=consistency,
        equations=equations,
        unknowns=unknowns,
    )


# ------------------------------------------------------------------ the file


def _missing(view: View, notes: _Notes) -> None:
    missing = [name for name in view.victim.params if name not in view.observed]
    if missing:
        notes.info(
            "missing parameters",
            f"{len(missing)} of {len(view.victim.params)} trainable tensors were not shared.",
            names=missing,
        )


@dataclass(frozen=True)
class _Storage:
    """How numbers were kept: on a few levels, or with an absolute error (float16 near zero)."""

    quantised: bool
    absolute: float = 0.0


def _storage(shared: Update, dtypes: Mapping[str, str], notes: _Notes) -> _Storage:
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
        return _Storage(quantised=True)
    stored = sorted({dtypes[name] for name in shared if name in dtypes} & {"float16", "bfloat16"})
    short = stored[0] if len(stored) == 1 else _short_float(shared)
    if short is None:
        return _Storage(quantised=False)
    how = "is stored as" if stored else "was rounded to (every number fits)"
    notes.info(
        "precision",
        f"The update {how} {short}: its numbers are known to about {_epsilon(short):.0e} relative, which"
        " hides little of an image.",
        dtype=short,
        epsilon=_epsilon(short),
    )
    return _Storage(quantised=False, absolute=2.0**-24 if short == "float16" else 0.0)


def _same_sizes(view: View, shared: Update, notes: _Notes) -> None:
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


def _pruning(view: View, shared: Update, storage: _Storage, notes: _Notes) -> bool:
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


def _underflows(tensor: Tensor, storage: _Storage) -> bool:
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


def _noise(view: View, storage: _Storage, notes: _Notes) -> float | None:
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


def _clipping(view: View, shared: Update, notes: _Notes) -> None:
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


def _sizes(view: View, notes: _Notes) -> None:
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


# ------------------------------------------------------------------ the round


def _with_steps(view: View, steps: int | None) -> View:
    """The view with the number of local steps just learnt, where it was unknown."""
    if not steps or view.knowledge.local_steps.value is not None:
        return view
    return replace(view, round=replace(view.round, local_steps=steps))


def _with_examples(view: View, count: int) -> View:
    if count == view.round.num_examples:
        return view
    size = view.round.local_batch_size
    size = None if size is None else min(size, count)
    return replace(view, round=replace(view.round, num_examples=count, local_batch_size=size))


def _local_steps(view: View, after: Mapping[str, Tensor], notes: _Notes) -> tuple[int | None, Mode | None]:
    """Local steps and mode, from how far `num_batches_tracked` moved."""
    if after:
        notes.hint(
            "buffers shared",
            f"The file holds {len(after)} buffers besides parameters; running statistics describe the private"
            " data directly and nothing in the averaging of gradients needs them.",
            names=list(after),
        )
    before = view.victim.buffers
    moved = {
        name: int(tensor) - int(before[name])
        for name, tensor in after.items()
        if name.split(".")[-1] == "num_batches_tracked" and name in before
    }
    if not moved:
        return None, None
    counts = set(moved.values())
    if len(counts) > 1 or min(counts) < 0:
        notes.warning(
            "local steps",
            "The BatchNorm layers disagree on how many batches they saw, or saw fewer than the checkpoint:"
            " the checkpoint is not the one this client started from, or layers were frozen or shared.",
            moved=moved,
        )
        return None, None
    (count,) = counts
    if count == 0:
        notes.info("local steps", "BatchNorm counted no batch: the client trained it in eval mode.", steps=0)
        return None, "eval"
    notes.hint(
        "local steps",
        f"num_batches_tracked moved by {count} in {'the' if len(moved) == 1 else 'all'}"
        f" {counted(len(moved), 'BatchNorm layer')}: the client made exactly {counted(count, 'local step')}"
        " in train mode.",
        steps=count,
    )
    return count, "train"


def _statistics(
    view: View, after: Mapping[str, Tensor], steps: int | None, notes: _Notes
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and biased variance of the batch in every BatchNorm layer, after exactly one step."""
    if (view.round.local_steps if steps is None else steps) != 1:
        if steps is not None:
            notes.hint(
                "batch statistics",
                f"The running means and variances average over {steps} local steps; a single batch's are not"
                " exact from them.",
            )
        return {}
    count = view.round.num_examples
    positions = {
        name: inputs[0, 0].numel()
        for name, _, inputs, _ in view.victim.modules_in_order()
        if inputs.dim() > 1
    }
    found = {}
    for name, module in view.victim.batch_norms():
        means = _batch_average(view, after, f"{name}.running_mean", name, module.momentum)
        variances = _batch_average(view, after, f"{name}.running_var", name, module.momentum)
        if means is not None and variances is not None and name in positions:
            number = count * positions[name]
            found[name] = (means, variances * ((number - 1) / number))
    if found:
        channels = sum(len(mean) for mean, _ in found.values())
        notes.leak(
            "batch statistics",
            f"One step moved the running statistics of {counted(len(found), 'BatchNorm layer')}, so the mean and"
            f" variance of the private batch in {channels} channels are known to rounding (for the variances' last"
            f" correction, {count} {'example was' if count == 1 else 'examples were'} assumed).",
            layers=list(found),
            examples=count,
        )
    return found


def _batch_average(
    view: View, after: Mapping[str, Tensor], name: str, module: str, momentum: float | None
) -> Tensor | None:
    """What one batch added to a running average; None when it is not there or did not move."""
    before = view.victim.buffers.get(name)
    if before is None or name not in after or torch.equal(after[name].to(before), before):
        return None
    if momentum is None:
        momentum = 1 / (1 + int(view.victim.buffers[f"{module}.num_batches_tracked"]))
    old, new = before.double(), after[name].to(before.device).double()
    return (old + (new - old) / momentum).to(before.dtype)


def _checkpoint(view: View, found: HeadConsistency | None, notes: _Notes, changed: bool) -> None:
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


# ------------------------------------------------------------------ the private data


def _batch_size(view: View, consistency: HeadConsistency | None, notes: _Notes) -> int | None:
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


def _reduction(view: View, head: HeadGradient, notes: _Notes) -> None:
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


def _labels(view: View, generator: torch.Generator, notes: _Notes, provable: bool) -> LabelInference | None:
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


def _closed_forms(view: View, notes: _Notes, changed: bool) -> None:
    """Layers whose input follows from their gradient without a search."""
    first, alone = input_layer(view.victim), view.round.num_examples == 1
    exactly = "as well as what was done to the update allows" if changed else "exactly"
    if Linear().applies(view) is None and first is not None:
        much = exactly if alone else "as far as neurons respond to one example only, or lie behind a ReLU"
        notes.leak(
            "input in closed form",
            f"The fully connected layer of {first.weight} reads the model input itself, so the ratio of its"
            f" weight and bias gradients gives the private input {much} (attack linear).",
            layer=first.weight,
        )
    if PatchEmbeddingInverse().applies(view) is None:
        notes.leak(
            "input in closed form",
            "The position embedding's gradient is that of every patch, so the patch projection's gradient"
            f" gives the whole image {exactly}, by least squares (attack patch-embedding).",
        )
    layers = _readable_layers(view)
    if alone and view.round.local_steps == 1 and layers:
        notes.leak(
            "features in closed form",
            "With one example, weight over bias gradient gives the input of"
            f" {'layer' if len(layers) == 1 else 'layers'} {', '.join(layers)} {exactly}:"
            " features of the private example.",
            layers=layers,
        )


def _readable_layers(view: View) -> list[str]:
    """Fully connected layers that see one vector an example and shared a bias gradient that is not zero."""
    return [
        name
        for name, module, inputs, _ in view.victim.modules_in_order()
        if isinstance(module, nn.Linear)
        and inputs.dim() == 2
        and f"{name}.weight" in view.observed
        and f"{name}.bias" in view.observed
        and bool(view.observed[f"{name}.bias"].any())
    ]


def _equations(view: View, notes: _Notes) -> tuple[int, int]:
    """Independent numbers in the update at most, against the numbers to find."""
    modules, positions = {}, dict[str, int]()
    for name, module, _, outputs in view.victim.modules_in_order():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and f"{name}.weight" in view.observed:
            modules[name] = module
            positions[name] = positions.get(name, 0) + outputs[0].numel() // len(module.weight)
    products = view.round.num_examples * view.round.local_steps
    total = sum(_layer_equations(view, name, modules[name], products * positions[name]) for name in modules)
    counted = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    total += sum(int((tensor != 0).sum()) for name, tensor in view.observed.items() if name not in counted)
    unknowns = view.unknowns
    if total < unknowns:
        text = (
            f"At most {total:,} independent equations for {unknowns:,} unknown pixel values: without knowledge"
            " of what images look like the input is not unique."
        )
    else:
        text = (
            f"Up to {total:,} independent equations (an upper bound) for {unknowns:,} unknown pixel values,"
            f" {total / unknowns:.1f} times as many: enough in number for a unique solution."
        )
    notes.info("equations", text, equations=total, unknowns=unknowns)
    return total, unknowns


def _layer_equations(view: View, name: str, module: nn.Linear | nn.Conv2d, products: int) -> int:
    """Free numbers in a layer's gradient that is a sum of `products` outer products, zeros not counted."""
    weight, bias = view.observed[f"{name}.weight"], view.observed.get(f"{name}.bias")
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    height, width = len(weight) // groups, weight[0].numel() + (bias is not None)
    rank = min(products, height, width)
    filled = int((weight != 0).sum()) + (0 if bias is None else int((bias != 0).sum()))
    return min(groups * rank * (height + width - rank), filled)
