"""What a shared update gives away by itself: seconds of arithmetic, no optimisation.

Every check returns a `Finding` that says whether it is proven or estimated; those on the file and on the
last layer are in `leakaudit.findings`.  Sources:
    closed forms: `leakaudit.attacks.linear`.
    BatchNorm: torch's running_mean and running_var (the latter with the unbiased variance of
        the batch), new = (1 - momentum) old + momentum batch, inverted.
    equations: a sum of r outer products (O) x (I) has r (O + I - r) free numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from leakaudit.attacks.head import (
    HeadConsistency,
    head_consistency,
)
from leakaudit.attacks.labels import LabelInference
from leakaudit.attacks.linear import Linear, PatchEmbeddingInverse, input_layer
from leakaudit.findings import (
    Notes,
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
from leakaudit.models.victim import Mode
from leakaudit.results import Finding
from leakaudit.threat import View
from leakaudit.update import Update


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
    notes = Notes()
    shared = view.observed if raw is None else raw
    missing_parameters(view, notes)
    storage = storage_of(shared, dtypes or {}, notes)
    same_sizes(view, shared, notes)
    altered = storage.quantised or pruning(view, shared, storage, notes)
    noise_std = None if altered else class_sum_noise(view, storage, notes)
    changed = altered or noise_std is not None
    steps, mode = _local_steps(view, buffers_after or {}, notes)
    view = _with_steps(view, steps)
    consistency = head_consistency(view)
    checkpoint(view, consistency, notes, changed=changed)
    hint = None if changed else batch_size(view, consistency, notes)
    count = view.knowledge.batch_size.value or hint or view.round.num_examples
    proven_count = view.knowledge.batch_size.value is not None or hint is not None
    view = with_examples(view, count)
    labels = labels_of(
        view, generator, notes, provable=proven_count and noise_std is None and not view.round.uneven
    )
    statistics = _statistics(view, buffers_after or {}, steps, notes)
    _closed_forms(view, notes, changed=changed)
    clipping(view, shared, notes)
    equations, unknowns = _equations(view, notes)
    gradient_sizes(view, notes)
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


# ------------------------------------------------------------------ the round


def _with_steps(view: View, steps: int | None) -> View:
    """The view with the number of local steps just learnt, where it was unknown."""
    if not steps or view.knowledge.local_steps.value is not None:
        return view
    return replace(view, round=replace(view.round, local_steps=steps))


def _local_steps(view: View, after: Mapping[str, Tensor], notes: Notes) -> tuple[int | None, Mode | None]:
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
    view: View, after: Mapping[str, Tensor], steps: int | None, notes: Notes
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


# ------------------------------------------------------------------ the private data


def _closed_forms(view: View, notes: Notes, changed: bool) -> None:
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


def _equations(view: View, notes: Notes) -> tuple[int, int]:
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
